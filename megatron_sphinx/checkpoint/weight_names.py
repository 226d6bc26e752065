"""What the tensors of a checkpoint of ours are called, and which shapes they have."""

from pathlib import Path

from megatron_sphinx.unpickling import metadata_of

MASTER = "master/"  # begins the names of the whole fp32 weights


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's whole fp32 weights, by the names that it has for them."""
    tensors = metadata_of(path).tensors.items()
    return {name: whole.shape for name, whole in tensors if name.startswith(MASTER) and whole is not None}


def tensor_names(path: Path) -> list[str]:
    """List the tensors of a checkpoint, the optimizer's too."""
    return [name for name, whole in metadata_of(path).tensors.items() if whole is not None]
