"""Files of tensors whose contents are listed without being loaded: safetensors, torch's zip files, distributed ones."""

import io
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.settings.keys import shown
from megatron_sphinx.tensors.entries import Chunk, Entry
from megatron_sphinx.unpickling import fault_of, load_torch, metadata_of

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_file(path: Path) -> dict[str, Entry]:
    """List the tensors of a file of the kind that its name tells: safetensors or torch.save.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
    """
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def read_safetensors(path: Path) -> dict[str, Entry]:
    """List the tensors of a safetensors file.

    Raises:
        CheckpointError: the file is none, or is cut off.
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
    for name, tensor in header.items():
        if tensor["dtype"] not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise CheckpointError(f"{path}: {shown(name)} is of type {tensor['dtype']}; known: {known}")
        start, dtype = 8 + length + tensor["data_offsets"][0], SAFETENSORS_DTYPES[tensor["dtype"]]
        entries[name] = Entry.contiguous(path, start, tuple(tensor["shape"]), dtype)
    return entries


def read_torch(path: Path) -> dict[str, Entry]:
    """List the tensors of a file of torch.save by their keys; those of a mapping `model` inside it if that is there.

    Raises:
        CheckpointError: the file is none, is cut off, or holds what is not data.
    """
    try:
        saved = load_torch(path, device="meta")  # the places of tensors; reads none
    except Exception as error:  # torch raises nearly anything for a damaged file
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint ({fault_of(error)}); fetch it again"
        ) from error
    saved = saved.get("model", saved) if isinstance(saved, Mapping) else saved
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{path}: holds no tensors by name; give a checkpoint of a model")
    size = path.stat().st_size
    entries = {}
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {shown(str(name))} is no tensor; give a checkpoint of a model")
        start = storage_offset(value, path)
        if start + value.untyped_storage().nbytes() > size:
            raise CheckpointError(f"{path}: {shown(str(name))} lies behind the end of the file; fetch it again")
        shape = tuple(value.shape)
        first = start + int(value.storage_offset()) * value.itemsize
        chunk = Chunk(path, first, value.stride(), (0,) * len(shape), shape)
        entries[str(name)] = Entry(shape, value.dtype, (chunk,))
    return entries


def is_intact(path: Path) -> bool:
    """Tell whether the records of a file of torch.save have the checksums that the file says."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive raises nearly anything
        return False


def storage_offset(value: Tensor, path: Path) -> int:
    """Return the offset, in bytes, of the storage of a tensor that was loaded on `meta` from a file of torch.save.

    torch keeps the offset in a private attribute of the storage, which is its only record of it: with the public API
    one would have to read the tensor to find it. The zip format of torch.save has the data uncompressed and in a row.

    Raises:
        CheckpointError: the file is of the format before torch 1.6, whose tensors have no such offset.
    """
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(
            f"{path}: is of the old format of torch.save, which cannot be read in parts; load it and save it again"
        )
    return int(start)


class _Window(io.RawIOBase):
    """A range of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._offset = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._offset)
        data = self._file.read(min(len(buffer), self._size - self._offset))
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)


def read_distributed(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """List tensors of a torch.distributed.checkpoint, by name.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    metadata, wanted = metadata_of(folder), set(names)
    entries = {}
    chunks: dict[str, list[Chunk]] = {name: [] for name in wanted}
    dtypes: dict[str, torch.dtype] = {}
    files: dict[str, BinaryIO] = {}
    try:
        for index, record in metadata.storage_data.items():  # torch's _StorageInfo: file, offset and length in it
            if index.fqn in wanted:
                path = folder / record.relative_path
                if record.relative_path not in files:
                    files[record.relative_path] = path.open("rb")
                chunk, dtype = _chunk_of(path, files[record.relative_path], record, tuple(index.offset or ()))
                chunks[index.fqn].append(chunk)
                dtypes[index.fqn] = dtype
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({fault_of(error)}); give a whole checkpoint") from error
    finally:
        for file in files.values():
            file.close()
    for name in names:
        tensor = metadata.state_dict_metadata.get(name)
        if not isinstance(tensor, TensorStorageMetadata) or not chunks[name]:
            raise CheckpointError(f"{folder}: holds no tensor {name}; give a checkpoint of a model")
        shape = tuple(tensor.size)
        if sum(prod(chunk.shape) for chunk in chunks[name]) != prod(shape):
            raise CheckpointError(f"{folder}: parts of {name} are missing; give a whole checkpoint")
        entries[name] = Entry(shape, dtypes[name], tuple(chunks[name]))
    return entries


def _chunk_of(path: Path, file: BinaryIO, record: Any, offset: tuple[int, ...]) -> tuple[Chunk, torch.dtype]:
    """Find the elements of one box, which torch.distributed.checkpoint keeps as a file of torch.save in its file."""
    try:
        window: Any = _Window(file, record.offset, record.length)
        value = load_torch(window, device="meta")
    except Exception as error:
        raise CheckpointError(f"{path}: is damaged ({fault_of(error)}); give a whole checkpoint") from error
    start = record.offset + storage_offset(value, path) + value.storage_offset() * value.itemsize
    if start + value.untyped_storage().nbytes() > path.stat().st_size:
        raise CheckpointError(f"{path}: is cut off; give a whole checkpoint")
    shape = tuple(value.shape)
    return Chunk(path, start, value.stride(), offset or (0,) * len(shape), shape), value.dtype
