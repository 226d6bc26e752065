"""Everything that is pickled in files of somebody else is read here, and nothing that such a file names is called.

Files of torch.save, and the `.metadata` of a torch.distributed.checkpoint, are read into plain records, without torch,
whose own reader of the latter would unpickle it without limits. Where torch is at hand anyhow, small objects are read
by its `weights_only`. Checksums do not protect: whoever wrote a file wrote them too. No other module may import pickle
or call torch.load.
"""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shortened
from threading import RLock
from typing import IO, Any

import numpy as np

from megatron_sphinx.errors import CheckpointError, DataError
from megatron_sphinx.paths import is_plain
from megatron_sphinx.remote import open_file
from megatron_sphinx.saved import (
    STORAGES,
    TYPES,
    DistributedMetadata,
    SavedBox,
    SavedPlace,
    SavedTensor,
    SavedWhole,
)

_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_OLDER = "torch.distributed._shard.sharded_tensor.metadata"
_PLANNER, _MEGATRON = "torch.distributed.checkpoint.planner", "megatron.core.dist_checkpointing.strategies.torch"
_RECORDS = {
    *((_METADATA, name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    (_FILES, "_StorageInfo"),
    *((_OLDER, name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")),
    # What the writer of a checkpoint had planned and where it wrote is read past, it is not needed.
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *((_MEGATRON, name) for name in ("MCoreMetadata", "MCoreSavePlan")),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}  # fmt: skip
_UTILS = "torch._utils"
_REBUILT = {  # what a file of torch.save makes its tensors by
    *((_UTILS, name) for name in (
        "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_parameter_with_state",
    )),
    ("torch", "device"),
}  # fmt: skip
_OPERATIONS = {  # of pickletools
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "LONG", "LONG1", "LONG4", "BININT",
    "BININT1", "BININT2", "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING",
    "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
    "EMPTY_SET", "ADDITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "PUT", "BINPUT", "LONG_BINPUT",
    "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
}  # fmt: skip
_BY_CODE = {operation.code: operation for operation in pickletools.opcodes}
_MOST_BYTES = 2**24  # of arguments; what is behind them is cut off, and so no pickle
_LOADING = RLock()  # what torch's `weights_only` takes is a list of the whole process
# Names that are read as plain values: `_get_layout`, private to torch, is what a pickled torch.layout is made by.
_PLAIN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple, ("torch.serialization", "_get_layout"): str, ("builtins", "set"): set,
}  # fmt: skip
_ORDERED = ("collections", "OrderedDict")


def load_torch(source: Path | IO[bytes], *, device: str = "cpu", is_mapped: bool = False) -> Any:
    """Read a file of torch.save that holds tensors and plain values.

    Args:
        source: the file, or where it is.
        device: where its tensors go; on `meta` only their places are read.
        is_mapped: whether tensors are mapped into memory, so that only what is used of them is read.

    Raises:
        Exception: it is damaged, or names anything but tensors and plain values; torch has many errors for this.
    """
    import torch

    with only_tensors():
        return torch.load(source, map_location=device, weights_only=True, mmap=is_mapped)


@contextmanager
def only_tensors() -> Iterator[None]:
    """Let torch's `weights_only` take tensors and plain values alone, whatever libraries have added to what it takes.

    megatron-core and torch.distributed add classes that do things when they are made. One thread at a time is in here.
    """
    import torch

    with _LOADING:
        added = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(added)


def unpickled(content: bytes) -> Any:
    """Read what a file of torch.save says of its tensors: its `data.pkl`.

    Returns:
        Its plain values; `tensor_of` knows which of them are tensors.

    Raises:
        Exception: it is damaged, or names anything but tensors; pickle has many errors for this.
    """
    _require_plain(content, {"BINPERSID"})
    return _Unpickler(io.BytesIO(content), _REBUILT).load()


def tensor_of(value: Any) -> SavedTensor | None:
    """Return the tensor that a value of a file of torch.save is; None where it is none.

    Raises:
        Exception: it cannot be one; what it holds may be anything.
    """
    while isinstance(value, _Record) and value.name.startswith("_rebuild_parameter"):
        value = value.arguments[0]
    if not (isinstance(value, _Record) and value.name.startswith("_rebuild_tensor")):
        return None
    storage, start, shape, stride, *others = value.arguments
    if not (isinstance(storage, _Record) and storage.name == "storage"):
        raise TypeError(f"{shortened(storage)} is no storage")
    kind, key, count = storage.arguments
    (start, count), shape, stride = _sizes((start, count)), _sizes(shape), _sizes(stride)
    dtype = _type(others[2] if value.name == "_rebuild_tensor_v3" else kind)
    nbytes = count if kind.arguments == ("untyped",) else count * dtype.itemsize
    if not isinstance(key, str) or len(shape) != len(stride):
        raise TypeError(f"{shortened((key, shape, stride))} is no place of a tensor")
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    if (start + extent) * dtype.itemsize > nbytes:
        raise ValueError(f"{extent} elements from {start} on are out of bounds for a storage of {nbytes} bytes")
    return SavedTensor(key, nbytes, dtype, start, shape, stride)


def metadata_of(folder: Path) -> DistributedMetadata:
    """Read what a torch.distributed.checkpoint says of its tensors and their places.

    Raises:
        CheckpointError: it has no such file, or one that is damaged or names code.
    """
    path = folder / ".metadata"
    try:
        content = path.read_bytes()
        _require_plain(content)
        record = _Unpickler(io.BytesIO(content), _RECORDS).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path}: cannot be read ({fault_of(error)}); give a whole checkpoint") from error
    if not (isinstance(record, _Record) and record.name == "Metadata"):
        raise CheckpointError(f"{path}: is not of a torch.distributed.checkpoint; give a whole checkpoint")
    try:
        return _metadata(record)
    except Exception as error:  # what it holds may be anything
        raise CheckpointError(f"{path}: is damaged ({fault_of(error)}); give a whole checkpoint") from error


def arguments_of(path: Path) -> dict[str, Any]:
    """Return the arguments that Megatron-LM was given, as far as they are plain values, of its file beside tensors.

    Args:
        path: its `common.pt`, a file of torch.save; it holds a Namespace, of which no class is made.

    Returns:
        The arguments by name; none where the file holds none.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with open_file(path) as opened, zipfile.ZipFile(opened) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                content = file.read(_MOST_BYTES)
        _require_plain(content, {"BINPERSID"})
        saved = _AnyUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path}: cannot be read ({fault_of(error)}); give a whole checkpoint") from error
    given = saved.get("args") if isinstance(saved, dict) else None
    state = given.state if isinstance(given, _Record) else given
    if not isinstance(state, dict):
        return {}
    return {str(key): value for key, value in state.items() if isinstance(value, str | int | float | None)}


def fault_of(error: BaseException) -> str:
    """Say in a line what is wrong with a file, without torch's advice to load it nevertheless."""
    text = str(error)
    fault = text.partition("WeightsUnpickler error: ")[2].partition(" was not")[0].partition("\n")[0] or text
    return " ".join(fault.split())[:160] or type(error).__name__


def _require_plain(content: bytes, others: Collection[str] = ()) -> None:
    """Raise UnpicklingError where a pickle holds what no writer of a `.metadata` writes.

    So no object is made by a number of an extension or of the reader, nothing is doubled without being written, and no
    table is as large as a number says.
    """
    for operation, argument in _operations(content):
        if operation.name not in _OPERATIONS and operation.name not in others:
            raise pickle.UnpicklingError(f"it holds {operation.name}")
        if operation.name.endswith("PUT") and (argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it holds {operation.name} {argument}")


class _Record:
    """Stands for an object whose class is known by name; it keeps what the object is made of and runs nothing."""

    name: str

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        """Keep the state of the object."""
        self.state = state

    def get(self, key: str) -> Any:
        """Return an attribute of the object; None where it has none."""
        return self.state.get(key) if isinstance(self.state, dict) else None


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict, whose attributes are read past."""

    def __setstate__(self, _: Any) -> None:
        """Read past what torch notes of versions."""


class _Unpickler(pickle.Unpickler):
    """Knows some names of torch and megatron-core, and refuses any other.

    Args:
        file: what is read.
        names: module and name of what it may hold records of.
    """

    def __init__(self, file: IO[bytes], names: Collection[tuple[str, str]]) -> None:
        super().__init__(file)
        self._names = names
        self._kinds: dict[str, type[Any]] = {}  # a pickle may change a class: these end with it

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name."""
        key = (module, name)
        if key in _PLAIN:
            return _PLAIN[key]
        if key == _ORDERED:
            return self._kinds.setdefault("OrderedDict", type("OrderedDict", (_Ordered,), {}))
        if module == "torch" and name in TYPES:
            return self._kind("dtype")(name)
        if module == "torch" and name in STORAGES:
            return self._kind("dtype")(STORAGES[name])
        if key == ("torch.storage", "UntypedStorage"):
            return self._kind("dtype")("untyped")
        if key not in self._names:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._kind(name)

    def _kind(self, name: str) -> Any:
        return self._kinds.setdefault(name, type(name, (_Record,), {"name": name}))

    def persistent_load(self, pid: Any) -> Any:  # called by pickle
        """Return a record of a storage, which a file of torch.save has outside of its pickle."""
        _, kind, key, _, count = pid
        return self._kind("storage")(kind, key, count)


class _AnyUnpickler(pickle.Unpickler):
    """Takes every name, and makes of none what it names: an object that keeps what it is made of stands for each."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name."""
        key = (module, name)
        return dict if key == _ORDERED else _PLAIN.get(key) or type(name, (_Record,), {"name": f"{module}.{name}"})

    def persistent_load(self, _: Any) -> None:  # called by pickle
        """Read past the values of tensors."""


def _metadata(record: _Record) -> DistributedMetadata:
    """Take what is needed of what was read; raises what damage leads to."""
    tensors = {
        str(name): _whole(tensor) if tensor.name == "TensorStorageMetadata" else None
        for name, tensor in record.get("state_dict_metadata").items()
    }
    return DistributedMetadata(tensors, tuple(_places(record.get("storage_data"))))


def _whole(record: _Record) -> SavedWhole:
    boxes = tuple(SavedBox(_sizes(one.get("offsets")), _sizes(one.get("sizes"))) for one in record.get("chunks"))
    return SavedWhole(_type(record.get("properties").state[0]), _sizes(record.get("size")), boxes)


def _places(storage: Any) -> Iterator[SavedPlace]:
    """Where each box of each tensor lies."""
    for index, info in storage.items():
        offset, number, file = index.get("offset"), index.get("index"), info.get("relative_path")
        if not is_plain(file):
            raise ValueError(f"{shortened(file)} is no name of a file in it")
        if info.get("transform_descriptors"):
            how = shortened(info.get("transform_descriptors"))
            raise ValueError(f"{file} is transformed by {how}, which is not known here")
        start, length = _sizes((info.get("offset"), info.get("length")))
        corner = None if offset is None else _sizes(offset)
        yield SavedPlace(str(index.get("fqn")), corner, number, file, start, length)


def _type(value: Any) -> np.dtype:
    if not (isinstance(value, _Record) and value.name == "dtype" and value.arguments[0] in TYPES):
        raise TypeError(f"{shortened(value)} is no type of a tensor")
    return TYPES[value.arguments[0]]


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise TypeError(f"{shortened(values)} are no sizes")
    return values


def plain_pickle(path: Path) -> Any:
    """Read a pickle that holds numbers, texts, lists, tuples, sets and dictionaries, and names nothing.

    Args:
        path: such as the references of RefCOCO, which Python 2 has written; their texts are UTF-8.

    Raises:
        DataError: it cannot be read, is damaged, or names code.
    """
    try:
        content = path.read_bytes()
        _require_plain(content)
        return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: cannot be read as a pickle of plain values ({fault_of(error)})") from error


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every name."""

    def find_class(self, module: str, name: str) -> Any:
        """Raise UnpicklingError, whatever the name."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _operations(content: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """Yield what a pickle does and with what.

    pickletools would refuse the texts of Python 2 that are not ASCII: the bytes of these are yielded as they are.
    """
    file = io.BytesIO(content)
    while code := file.read(1):
        operation = _BY_CODE[code.decode("latin-1")]
        if operation.name == "STRING":
            yield operation, file.readline()
        else:
            yield operation, operation.arg.reader(file) if operation.arg else None
        if operation.name == "STOP":
            return
