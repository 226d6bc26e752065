"""Files of tensors that are written tensor by tensor, or piece by piece: safetensors, and torch's zip files."""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import skip_data

from megatron_sphinx.tensors.read import SAFETENSORS_DTYPES, storage_offset
from megatron_sphinx.unpickling import load_torch

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
FileContents = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of each tensor of a file, in order


class TensorFile:
    """A file whose tensors have their places before they are written, each from its beginning, by any thread.

    Args:
        file: the file, open for writing.
        offsets: where each tensor begins, in bytes.
    """

    def __init__(self, file: BinaryIO, offsets: Mapping[str, int]) -> None:
        self._file, self._offsets = file, offsets
        self._written = dict.fromkeys(offsets, 0)

    def put(self, name: str, value: Tensor) -> None:
        """Write a tensor, or the next piece of it."""
        self.append(name, bytes_of(value))

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of a tensor."""
        offset = self._offsets[name] + self._written[name]
        self._written[name] += len(data)
        while data:
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

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
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        super().__init__(file, {name: 8 + len(text) + header[name]["data_offsets"][0] for name in contents})


class TorchFile(TensorFile):
    """A file of torch.save that is being written.

    torch writes the file with room for the tensors and without their data (`skip_data`); the offset of each tensor is
    then read from the file as any reader finds it.

    Args:
        path: where the file is made.
        contents: its tensors.
        under: the key of the mapping that holds the tensors, if they lie in one.
        is_bare: whether the file holds one tensor, and no mapping at all.
    """

    def __init__(self, path: Path, contents: FileContents, *, under: str | None = None, is_bare: bool = False) -> None:
        # Their memory is never touched, and so takes none.
        empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in contents.items()}
        payload: Any = next(iter(empty.values())) if is_bare else {under: empty} if under else empty
        with skip_data():
            torch.save(payload, path)
        saved = load_torch(path, device="meta")
        saved = dict.fromkeys(contents, saved) if is_bare else saved[under] if under else saved
        super().__init__(path.open("r+b"), {name: storage_offset(value, path) for name, value in saved.items()})
        self._checksums = dict.fromkeys(contents, 0)

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of a tensor."""
        super().append(name, data)
        self._checksums[name] = zlib.crc32(data, self._checksums[name])

    def close(self) -> None:
        """Complete the file by the checksums of the zip file's records, which torch has made of nothing."""
        _set_checksums(self._file, {self._offsets[name]: value for name, value in self._checksums.items()})
        super().close()


def create_file(path: Path, contents: FileContents) -> TensorFile:
    """Create a file to be written, of the kind that its name tells: safetensors or torch.save."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, contents)
    return TorchFile(path, contents, is_bare=path.suffix == ".distcp")


def _set_checksums(file: BinaryIO, checksums: Mapping[int, int]) -> None:
    """Write the checksums of a zip file's records, by where their data begin, into both of its headers.

    Source: PKWARE's APPNOTE.TXT, 4.3.7 (local header), 4.3.9 (data descriptor), 4.3.12 (central directory).
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        directory = archive.start_dir
    for member in members:
        file.seek(directory)
        entry = file.read(46)
        name, extra, comment = struct.unpack("<3H", entry[28:34])
        file.seek(member.header_offset)
        head = file.read(30)
        data = member.header_offset + 30 + sum(struct.unpack("<2H", head[26:30]))
        if data in checksums:
            value = struct.pack("<I", checksums[data])
            if head[6] & 8:  # sizes and checksum follow the data
                file.seek(data + member.file_size + 4)
                file.write(value)
            else:
                file.seek(member.header_offset + 14)
                file.write(value)
            file.seek(directory + 16)
            file.write(value)
        directory += 46 + name + extra + comment


def bytes_of(value: Tensor) -> memoryview:
    """Return the memory of a tensor, a copy where it is not contiguous."""
    return memoryview(value.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
