"""Files of tensors that are written tensor by tensor, or piece by piece: safetensors, and torch's zip files.

Each file is laid out before its first byte is written, so that it can also be written from front to back.
"""

import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sphinx.remote import RemoteSink, Sink, is_remote
from megatron_sphinx.saved import STORAGES
from megatron_sphinx.tensors.copying import Source, copy_range, write_from
from megatron_sphinx.tensors.dtypes import SAFETENSORS_DTYPES, Array, bytes_of
from megatron_sphinx.tensors.layout import contiguous_strides
from megatron_sphinx.tensors.pickle_writer import Call, Name, Outside, dumps
from megatron_sphinx.tensors.torch_archive import Record, checksum_of, directory_of, records_of

_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_STORAGE_NAMES = {name: storage for storage, name in STORAGES.items()}
FileContents = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shape and type of each tensor of a file, in order


class LocalSink:
    """A file of this machine that is written, at any place.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    @property
    def number(self) -> int:
        """The number of the open file."""
        return self._file.fileno()

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes to a place."""
        write_from(self.number, memoryview(data), offset)

    def close(self) -> None:
        """Close the file, which is complete now."""
        self._file.close()


def _sink_of(path: Path) -> Sink:
    return RemoteSink(path) if is_remote(path) else LocalSink(path)


class TensorFile:
    """A file whose tensors have their places before they are written, each from its beginning, by any thread.

    One behind a URL takes its tensors in their order, from one thread.

    Args:
        file: where the bytes go.
        offsets: where each tensor begins, in bytes.
    """

    def __init__(self, file: Sink, offsets: Mapping[str, int]) -> None:
        self._file, self._offsets = file, offsets
        self._written = dict.fromkeys(offsets, 0)

    def put(self, name: str, value: Array) -> None:
        """Write a tensor, or the next piece of it."""
        self.append(name, bytes_of(value))

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of a tensor."""
        offset = self._offsets[name] + self._written[name]
        self._written[name] += len(data)
        self._file.write_at(data, offset)

    def append_range(self, name: str, source: Source, start: int, count: int) -> int:
        """Let the kernel copy the next bytes of a tensor from another file, if nothing is to be known of them.

        Args:
            name: the tensor.
            source: the open file that is read.
            start: where the bytes begin in it.
            count: how many there are.

        Returns:
            How many were copied; the rest is to be appended.
        """
        if not isinstance(source, int) or not isinstance(self._file, LocalSink):
            return 0
        offset = self._offsets[name] + self._written[name]
        copied = copy_range(source, start, self._file.number, offset, count)
        self._written[name] += copied
        return copied

    def watch(self, _: Callable[[bytes | memoryview], object]) -> bool:
        """Let every byte of the file be shown to a function, in order; False where the file cannot do that."""
        return False

    def close(self) -> None:
        """Close the file, all of whose tensors are written."""
        self._file.close()


class SafetensorsFile(TensorFile):
    """A safetensors file that is being written.

    Args:
        path: where the file is made.
        contents: its tensors, in their order.
    """

    def __init__(self, path: Path, contents: FileContents) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in contents.items():
            start, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = _sink_of(path)
        file.write_at(struct.pack("<Q", len(text)) + text, 0)
        super().__init__(file, {name: 8 + len(text) + header[name]["data_offsets"][0] for name in contents})


class TorchFile(TensorFile):
    """A file as torch.save writes it, that is being written.

    Args:
        path: where the file is made.
        contents: its tensors.
        under: the key of the mapping that holds the tensors, if they lie in one.
        is_bare: whether the file holds one tensor, and no mapping at all.
    """

    def __init__(self, path: Path, contents: FileContents, *, under: str | None = None, is_bare: bool = False) -> None:
        tensors = {name: _rebuilt(str(key), *each) for key, (name, each) in enumerate(contents.items())}
        saved: Any = next(iter(tensors.values())) if is_bare else {under: tensors} if under else tensors
        pickled = dumps(saved)
        self._small = _in_archive(
            {
                "data.pkl": pickled, ".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little",
                "version": b"3\n", ".data/serialization_id": f"{checksum_of(pickled):040d}".encode(),
            }
        )  # fmt: skip
        self._keys = {name: f"archive/data/{key}" for key, name in enumerate(contents)}
        sizes = {name: len(data) for name, data in self._small.items()}
        first = {name: sizes.pop(name) for name in list(sizes)[:4]}
        large = {self._keys[name]: prod(shape) * dtype.itemsize for name, (shape, dtype) in contents.items()}
        self._records = records_of({**first, **large, **sizes})
        self._checksums = {name: checksum_of(data) for name, data in self._small.items()}
        self._checksums |= dict.fromkeys(large, 0)
        self._watcher: Callable[[bytes | memoryview], object] | None = None
        by_name = {record.name: record for record in self._records}
        self._large = {name: by_name[key] for name, key in self._keys.items()}
        places = {name: record.start for name, record in self._large.items()}
        super().__init__(_sink_of(path), places)
        for record in self._records:  # what is around the tensors
            self._file.write_at(record.header + self._small.get(record.name, b""), record.header_start)
            if not record.nbytes or record.name in self._small:
                self._end(record)

    def _end(self, record: Record) -> None:
        """Write what is behind the data of a record."""
        self._file.write_at(record.descriptor(self._checksums[record.name]), record.start + record.nbytes)

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of a tensor."""
        super().append(name, data)
        key = self._keys[name]
        self._checksums[key] = checksum_of(data, self._checksums[key])
        if data and self._written[name] == self._large[name].nbytes:
            self._end(self._large[name])
        if self._watcher:
            self._watcher(data)

    def append_range(self, *_: object) -> int:
        """Copy nothing: the checksum of all bytes is to be known."""
        return 0

    def watch(self, show: Callable[[bytes | memoryview], object]) -> bool:
        """Let every byte of the file be shown to a function, in order; False where there are several tensors."""
        if len(self._offsets) != 1:
            return False
        self._watcher = show
        (key,) = self._keys.values()
        for record in self._records:
            if record.name == key:
                show(record.header)
                break
            show(self._whole(record))
        return True

    def _whole(self, record: Record) -> bytes:
        """A small record as it stands in the file."""
        return record.header + self._small[record.name] + record.descriptor(self._checksums[record.name])

    def close(self) -> None:
        """Complete the file by what is behind the tensors: checksums, and the archive's directory."""
        directory = directory_of(self._records, self._checksums)
        self._file.write_at(directory, self._records[-1].stop)
        if self._watcher:
            (key,) = self._keys.values()
            place = next(number for number, record in enumerate(self._records) if record.name == key)
            self._watcher(self._records[place].descriptor(self._checksums[key]))
            for record in self._records[place + 1 :]:
                self._watcher(self._whole(record))
            self._watcher(directory)
        super().close()


def _in_archive(records: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"archive/{name}": data for name, data in records.items()}


def _rebuilt(key: str, shape: tuple[int, ...], dtype: np.dtype) -> Call:
    """What torch makes a tensor by that has a storage of its own.

    Source: PyTorch, torch/_tensor.py, Tensor._reduce_ex_internal.
    """
    is_typed, count = dtype.name in _STORAGE_NAMES, prod(shape)
    kind = Name("torch", _STORAGE_NAMES[dtype.name]) if is_typed else Name("torch.storage", "UntypedStorage")
    storage = Outside(("storage", kind, key, "cpu", count if is_typed else count * dtype.itemsize))
    arguments = [storage, 0, shape, contiguous_strides(shape), False, Call(Name("collections", "OrderedDict"))]
    if is_typed:
        return Call(Name("torch._utils", "_rebuild_tensor_v2"), arguments)
    return Call(Name("torch._utils", "_rebuild_tensor_v3"), [*arguments, Name("torch", dtype.name)])


def create_file(path: Path, contents: FileContents) -> TensorFile:
    """Create a file to be written, of the kind that its name tells: safetensors or torch.save."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, contents)
    return TorchFile(path, contents, is_bare=path.suffix == ".distcp")
