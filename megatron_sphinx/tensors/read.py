"""Files of tensors whose contents are listed without being loaded: safetensors, torch's zip files, distributed ones."""

import io
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, BinaryIO, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.remote import is_remote, open_file
from megatron_sphinx.saved import SavedPlace, SavedTensor
from megatron_sphinx.settings.keys import shown
from megatron_sphinx.tensors.dtypes import SAFETENSORS_DTYPES
from megatron_sphinx.tensors.entries import Chunk, Entry
from megatron_sphinx.tensors.torch_archive import Archive
from megatron_sphinx.unpickling import fault_of, metadata_of, tensor_of, unpickled

_MOST_HEADER = 100_000_000  # bytes of a header of safetensors, by its own library


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
        length, header = _checked_header(path)
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


def _checked_header(path: Path) -> tuple[int, dict[str, Any]]:
    """The header of a safetensors file and its length, after its library has found all tensors inside the file."""
    if is_remote(path):
        with open_file(path) as file, NamedTemporaryFile(suffix=path.suffix) as double:  # as long, with nothing in it
            head = file.read(8)
            double.write(head + file.read(min(int.from_bytes(head, "little"), _MOST_HEADER)))
            double.truncate(file.seek(0, io.SEEK_END))
            double.flush()
            return _checked_header(Path(double.name))
    with safe_open(path, "np"):  # checks that all tensors lie in the file, one behind the other
        pass
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return length, json.loads(file.read(length))


def read_torch(path: Path) -> dict[str, Entry]:
    """List the tensors of a file of torch.save by their keys; those of a mapping `model` inside it if that is there.

    Raises:
        CheckpointError: the file is none, is cut off, or holds what is not data.
    """
    try:
        with open_file(path) as file:
            archive, size = Archive(file), file.seek(0, io.SEEK_END)
            saved = unpickled(archive.pickle)
            saved = saved.get("model", saved) if isinstance(saved, Mapping) else saved
            tensors = {str(name): tensor_of(value) for name, value in saved.items()} if _is_mapping(saved) else {}
            places = {name: archive.place_of(one.storage) for name, one in tensors.items() if one is not None}
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint ({fault_of(error)}); fetch it again"
        ) from error
    if not _is_mapping(saved):
        raise CheckpointError(f"{path}: holds no tensors by name; give a checkpoint of a model")
    entries = {}
    for name, tensor in tensors.items():
        if tensor is None:
            raise CheckpointError(f"{path}: {shown(name)} is no tensor; give a checkpoint of a model")
        chunk = _chunk_of(path, tensor, places[name], size)
        if chunk is None:
            raise CheckpointError(f"{path}: {shown(name)} lies behind the end of the file; fetch it again")
        entries[name] = Entry(tensor.shape, tensor.dtype, (chunk,))
    return entries


def _is_mapping(saved: Any) -> bool:
    return isinstance(saved, Mapping)


def _chunk_of(
    path: Path, tensor: SavedTensor, record: tuple[int, int], size: int, offset: tuple[int, ...] = ()
) -> Chunk | None:
    """Find the elements of a tensor; None where its record is smaller than said, or not whole in the file.

    Args:
        path: the file.
        tensor: what it says of the tensor.
        record: first byte of the record that holds the tensor in the file, and its bytes.
        size: bytes of the file.
        offset: corner of what the tensor is a box of.
    """
    start, nbytes = record
    if start + nbytes > size or nbytes < tensor.storage_bytes:
        return None
    first = start + tensor.start * tensor.dtype.itemsize
    return Chunk(path, first, tensor.stride, offset or (0,) * len(tensor.shape), tensor.shape)


def is_intact(path: Path) -> bool:
    """Tell whether the records of a file of torch.save have the checksums that the file says."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive raises nearly anything
        return False


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
    dtypes: dict[str, np.dtype] = {}
    files: dict[str, BinaryIO] = {}
    try:
        for place in metadata.places:
            if place.name in wanted:
                if place.file not in files:
                    files[place.file] = open_file(folder / place.file)
                chunk, dtype = _saved_chunk(folder / place.file, files[place.file], place)
                chunks[place.name].append(chunk)
                dtypes[place.name] = dtype
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({fault_of(error)}); give a whole checkpoint") from error
    finally:
        for file in files.values():
            file.close()
    for name in names:
        tensor = metadata.tensors.get(name)
        if tensor is None or not chunks[name]:
            raise CheckpointError(f"{folder}: holds no tensor {name}; give a checkpoint of a model")
        is_whole = sum(prod(chunk.shape) for chunk in chunks[name]) == prod(tensor.shape)
        if not is_whole or not all(_is_inside(chunk, tensor.shape) for chunk in chunks[name]):
            raise CheckpointError(f"{folder}: parts of {name} are missing; give a whole checkpoint")
        entries[name] = Entry(tensor.shape, dtypes[name], tuple(chunks[name]))
    return entries


def _is_inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    ends = [first + size for first, size in zip(chunk.offset, chunk.shape, strict=False)]
    has_all = len(chunk.offset) == len(chunk.shape) == len(shape)
    return has_all and all(end <= size for end, size in zip(ends, shape, strict=True))


def _saved_chunk(path: Path, file: BinaryIO, place: SavedPlace) -> tuple[Chunk, np.dtype]:
    """Find the elements of one box, which torch.distributed.checkpoint keeps as a file of torch.save in its file."""
    try:
        archive = Archive(cast("IO[bytes]", _Window(file, place.start, place.length)))
        tensor = tensor_of(unpickled(archive.pickle))
        record = archive.place_of(tensor.storage) if tensor is not None else (0, 0)
    except Exception as error:
        raise CheckpointError(f"{path}: is damaged ({fault_of(error)}); give a whole checkpoint") from error
    if tensor is None:
        raise CheckpointError(f"{path}: is damaged ({place.name} is no tensor); give a whole checkpoint")
    start, nbytes = record
    chunk = _chunk_of(path, tensor, (place.start + start, nbytes), file.seek(0, io.SEEK_END), place.offset or ())
    if chunk is None:
        raise CheckpointError(f"{path}: is cut off; give a whole checkpoint")
    return chunk, tensor.dtype
