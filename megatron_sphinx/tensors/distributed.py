"""Writes what a torch.distributed.checkpoint says of its tensors and their places, without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sphinx.tensors.pickle_writer import Call, Instance, Name, dumps
from megatron_sphinx.tensors.write import FileContents

_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")


def write_metadata(folder: Path, files: Mapping[str, FileContents]) -> None:
    """Write the `.metadata` of whole tensors, each in a file of its own that is there.

    Args:
        folder: the checkpoint.
        files: shape and type of the tensor in each file, by the file's name and the tensor's.

    Source: PyTorch, torch/distributed/checkpoint/metadata.py: what its classes pickle as.
    """
    tensors, places = {}, {}
    for file, contents in files.items():
        ((name, (shape, dtype)),) = contents.items()
        sizes, corner = _size(shape), _size((0,) * len(shape))
        chunk = _made("ChunkStorageMetadata", offsets=corner, sizes=sizes)
        tensors[name] = _made("TensorStorageMetadata", properties=_properties(dtype), size=sizes, chunks=[chunk])
        place = {"relative_path": file, "offset": 0, "length": (folder / file).stat().st_size}
        places[_made("MetadataIndex", fqn=name, offset=corner, index=None)] = Instance(_STORAGE_INFO, place)
    about = {"planner_data": None, "storage_meta": None, "version": None}
    saved = _made("Metadata", state_dict_metadata=tensors, storage_data=places, **about)
    (folder / ".metadata").write_bytes(dumps(saved))


def _made(kind: str, **attributes: Any) -> Instance:
    return Instance(Name(_METADATA, kind), attributes)


def _size(shape: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), [shape])


def _properties(dtype: np.dtype) -> Instance:
    """What torch keeps of a tensor beside its shape: its type, and that it is an ordinary one."""
    layout = Call(Name("torch.serialization", "_get_layout"), ["torch.strided"])
    memory_format = Call(Name(_METADATA, "_MEM_FORMAT_ENCODING"), [0])  # contiguous
    state = (Name("torch", dtype.name), layout, False, memory_format, False)
    return Instance(Name(_METADATA, "TensorProperties"), state)
