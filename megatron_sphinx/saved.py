"""What the files that torch saves tensors in say of them, as plain records."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

# The types of elements, by the names that torch has for them; and those of storages, which have names of their own.
TYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name)) for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
        "float8_e5m2fnuz", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
        "complex128", "complex64",
    )
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}  # fmt: skip


@dataclass(frozen=True)
class SavedTensor:
    """A tensor as a file of torch.save describes it.

    Attributes:
        storage: name of the record that holds its elements, and maybe those of others.
        storage_bytes: bytes of that record.
        dtype: type of its elements.
        start: its first element in the record.
        shape: its sizes.
        stride: strides of its dimensions, in elements.
    """

    storage: str
    storage_bytes: int
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class SavedBox:
    """A box of a tensor of a torch.distributed.checkpoint.

    Attributes:
        offset: its corner in the whole tensor.
        shape: its sizes.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SavedWhole:
    """A tensor that a torch.distributed.checkpoint has in boxes.

    Attributes:
        dtype: type of its elements.
        shape: sizes of the whole tensor.
        boxes: what it is divided into.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    boxes: tuple[SavedBox, ...]


@dataclass(frozen=True)
class SavedPlace:
    """Where a torch.distributed.checkpoint has a box of a tensor, or an object.

    Attributes:
        name: of the tensor or object.
        offset: the corner of the box in the whole tensor; None of an object.
        index: the number of the box, where it is told.
        file: name of a file in its folder.
        start: where in the file it begins, in bytes.
        length: its bytes, with what torch.save puts around it.
    """

    name: str
    offset: tuple[int, ...] | None
    index: int | None
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class DistributedMetadata:
    """What a torch.distributed.checkpoint says of itself.

    Attributes:
        tensors: its tensors by name; None of small objects.
        places: where they lie.
    """

    tensors: dict[str, SavedWhole | None]
    places: tuple[SavedPlace, ...]
