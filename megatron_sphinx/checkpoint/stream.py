"""Files of tensors, read and written tensor by tensor: safetensors, torch's zip files, torch.distributed.checkpoint.

Nothing is loaded to be looked at: a file is mapped, a tensor is a view of it, and its pages are given back once it has
been used.
"""

import io
import json
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import Lock, local
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.serialization import skip_data

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.unpickling import fault_of, load_torch, metadata_of

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Chunk:
    """Where a box of a tensor lies.

    Attributes:
        path: of the file.
        start: byte of its first element.
        stride: of its dimensions, in elements.
        offset: of the box in the whole tensor.
        shape: of the box.
    """

    path: Path
    start: int
    stride: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor that can be read.

    Attributes:
        shape: of the whole.
        dtype: of its elements.
        chunks: together the whole, each element once.
        added: a difference to be added to it, in fp32 and rounded once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    added: "Entry | None" = None

    @property
    def is_view(self) -> bool:
        """Whether it can be read without copying."""
        return len(self.chunks) == 1 and self.added is None

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def paths(self) -> set[Path]:
        """The files that it lies in."""
        return {chunk.path for chunk in self.chunks} | (self.added.paths if self.added else set())


class Maps:
    """Mapped files; the pages of what was read are given back by `release`. Threads may share them."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = Lock()
        self._thread = local()

    def read(self, entry: Entry) -> Tensor:
        """The tensor: a view of its file if it is one chunk, else put together."""
        if entry.added is not None:
            whole = self.read(replace(entry, added=None)).float().clone()
            return whole.add_(self.read(entry.added)).to(entry.dtype)
        first = entry.chunks[0]
        if len(entry.chunks) == 1:
            return self._view(first, entry.dtype)
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for chunk in entry.chunks:
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offset, chunk.shape, strict=True))
            whole[box] = self._view(chunk, entry.dtype)
        return whole

    def _view(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        if 0 in chunk.shape:
            return torch.empty(chunk.shape, dtype=dtype)
        with self._lock:
            if chunk.path not in self._maps:
                with chunk.path.open("rb") as file:  # private: torch wants what is writable
                    self._maps[chunk.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            mapped = self._maps[chunk.path]
        count = 1 + sum((size - 1) * step for size, step in zip(chunk.shape, chunk.stride, strict=True))
        self._touched.append((mapped, chunk.start, count * dtype.itemsize))
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=chunk.start)
        return flat.as_strided(chunk.shape, chunk.stride)

    @property
    def _touched(self) -> list[tuple[mmap.mmap, int, int]]:
        """The parts of files that this thread has read."""
        found: list[tuple[mmap.mmap, int, int]] = self._thread.__dict__.setdefault("touched", [])
        return found

    def release(self) -> None:
        """Give back the memory of what this thread has read; it can be read again."""
        for mapped, start, size in self._touched:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, first, start + size - first)
        self._touched.clear()


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor whose last dimension is the fastest."""
    return tuple(prod(shape[place + 1 :]) for place in range(len(shape)))


def read_safetensors(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is none, or is cut off.
    """
    try:
        with safe_open(path, "pt"):  # checks that all tensors lie in the file, one behind the other
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({fault_of(error)}); fetch it again") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, about in header.items():
        shape = tuple(about["shape"])
        if about["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is of type {about['dtype']}; known: {', '.join(_DTYPES)}")
        entries[name] = _whole(path, 8 + length + about["data_offsets"][0], shape, _DTYPES[about["dtype"]])
    return entries


def read_torch(path: Path) -> dict[str, Entry]:
    """The tensors of a file of torch.save, by their keys; of a mapping inside it named `model` if that is there.

    Raises:
        CheckpointError: it is none, is cut off, or holds what is not data.
    """
    try:
        found = load_torch(path, device="meta")  # the places of tensors; reads none
    except Exception as error:  # torch raises nearly anything for a damaged file
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint ({fault_of(error)}); fetch it again"
        ) from error
    found = found.get("model", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: holds no tensors by name; give a checkpoint of a model")
    size = path.stat().st_size
    entries = {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is no tensor; give a checkpoint of a model")
        start = _place(value, path)
        if start + value.untyped_storage().nbytes() > size:
            raise CheckpointError(f"{path}: {name} lies behind the end of the file; fetch it again")
        shape = tuple(value.shape)
        first = start + int(value.storage_offset()) * value.itemsize
        chunk = Chunk(path, first, value.stride(), (0,) * len(shape), shape)
        entries[str(name)] = Entry(shape, value.dtype, (chunk,))
    return entries


def is_intact(path: Path) -> bool:
    """Whether the records of a file of torch.save have the checksums that it says."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def _place(value: Tensor, path: Path) -> int:
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(
            f"{path}: is of the old format of torch.save, which cannot be read in parts; load it and save it again"
        )
    return int(start)


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        found = self._file.read(min(len(buffer), self._size - self._at))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def read_distributed(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Tensors of a torch.distributed.checkpoint, by name.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    metadata, wanted = metadata_of(folder), set(names)
    entries = {}
    chunks: dict[str, list[Chunk]] = {name: [] for name in wanted}
    dtypes: dict[str, torch.dtype] = {}
    files: dict[str, BinaryIO] = {}
    try:
        for index, info in metadata.storage_data.items():
            if index.fqn in wanted:
                path = folder / info.relative_path
                if info.relative_path not in files:
                    files[info.relative_path] = path.open("rb")
                chunk, dtype = _record(path, files[info.relative_path], info, tuple(index.offset or ()))
                chunks[index.fqn].append(chunk)
                dtypes[index.fqn] = dtype
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({fault_of(error)}); give a whole checkpoint") from error
    finally:
        for file in files.values():
            file.close()
    for name in names:
        about = metadata.state_dict_metadata.get(name)
        if not isinstance(about, TensorStorageMetadata) or not chunks[name]:
            raise CheckpointError(f"{folder}: holds no tensor {name}; give a checkpoint of a model")
        shape = tuple(about.size)
        if sum(prod(chunk.shape) for chunk in chunks[name]) != prod(shape):
            raise CheckpointError(f"{folder}: parts of {name} are missing; give a whole checkpoint")
        entries[name] = Entry(shape, dtypes[name], tuple(chunks[name]))
    return entries


def _record(path: Path, file: BinaryIO, info: Any, offset: tuple[int, ...]) -> tuple[Chunk, torch.dtype]:
    try:
        window: Any = _Window(file, info.offset, info.length)
        value = load_torch(window, device="meta")
    except Exception as error:
        raise CheckpointError(f"{path}: is damaged ({fault_of(error)}); give a whole checkpoint") from error
    start = info.offset + _place(value, path) + value.storage_offset() * value.itemsize
    if start + value.untyped_storage().nbytes() > path.stat().st_size:
        raise CheckpointError(f"{path}: is cut off; give a whole checkpoint")
    shape = tuple(value.shape)
    return Chunk(path, start, value.stride(), offset or (0,) * len(shape), shape), value.dtype


def _whole(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
    return Entry(shape, dtype, (Chunk(path, start, contiguous(shape), (0,) * len(shape), shape),))


# writing

Planned = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of each tensor of a file, in order


class _TensorFile:
    """A file whose tensors have their places; they are written in any order, by any thread, each from its beginning."""

    def __init__(self, file: BinaryIO, places: Mapping[str, int]) -> None:
        self._file, self._places = file, places
        self._written = dict.fromkeys(places, 0)

    def put(self, name: str, value: Tensor) -> None:
        """Write a tensor, or the next piece of it."""
        self.append(name, _bytes(value))

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of a tensor."""
        at, self._written[name] = self._places[name] + self._written[name], self._written[name] + len(data)
        while data:
            written = os.pwrite(self._file.fileno(), data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        """All is written."""
        self._file.close()


class SafetensorsFile(_TensorFile):
    """A safetensors file.

    Args:
        path: of the file.
        planned: its tensors, in their order.
    """

    def __init__(self, path: Path, planned: Planned) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (shape, dtype) in planned.items():
            size = prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        super().__init__(file, {name: 8 + len(text) + header[name]["data_offsets"][0] for name in planned})


class TorchFile(_TensorFile):
    """A file of torch.save.

    Args:
        path: of the file.
        planned: its tensors.
        under: the key of the mapping that holds them, if they lie in one.
        is_bare: one tensor, and no mapping at all.
    """

    def __init__(self, path: Path, planned: Planned, *, under: str | None = None, is_bare: bool = False) -> None:
        # Their memory is never touched, and so takes none.
        empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in planned.items()}
        payload: Any = next(iter(empty.values())) if is_bare else {under: empty} if under else empty
        with skip_data():
            torch.save(payload, path)
        saved = load_torch(path, device="meta")
        saved = dict.fromkeys(planned, saved) if is_bare else saved[under] if under else saved
        super().__init__(path.open("r+b"), {name: _place(value, path) for name, value in saved.items()})
        self._sums = dict.fromkeys(planned, 0)

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of a tensor."""
        super().append(name, data)
        self._sums[name] = zlib.crc32(data, self._sums[name])

    def close(self) -> None:
        """All is written: set the checksums of the zip file's records, which torch has made of nothing."""
        _set_checksums(self._file, {self._places[name]: value for name, value in self._sums.items()})
        super().close()


def create(path: Path, planned: Planned, *, under: str | None = None) -> SafetensorsFile | TorchFile:
    """A file to be written, of the kind that its name tells."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, planned)
    return TorchFile(path, planned, under=under, is_bare=path.suffix == ".distcp")


def _set_checksums(file: BinaryIO, sums: Mapping[int, int]) -> None:
    """Write the checksums of a zip file's records, by where their data begin, into both of its headers."""
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
        if data in sums:
            value = struct.pack("<I", sums[data])
            if head[6] & 8:  # sizes and checksum follow the data
                file.seek(data + member.file_size + 4)
                file.write(value)
            else:
                file.seek(member.header_offset + 14)
                file.write(value)
            file.seek(directory + 16)
            file.write(value)
        directory += 46 + name + extra + comment


def _bytes(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat = value.contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
