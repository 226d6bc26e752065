"""Frozen visual experts beside a checkpoint: the released ones, and the folder that holds each in a file of its own."""

from collections.abc import Mapping
from pathlib import Path

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.tensors.entries import Entry, MappedFiles
from megatron_sphinx.tensors.read import read_safetensors
from megatron_sphinx.tensors.write import create_file

Encoders = Mapping[str, Mapping[str, Entry]]  # tensors of frozen experts: by expert, then by name

ENCODERS = "encoders"  # the folder of frozen experts inside a checkpoint's
# The experts of the released models, in the order of their channels, and how LLaMA2-Accessory's files call each.
RELEASED = {
    "clip_vit_l14": "clip",
    "clip_convnext_xxl": "openclip_convnext_xxl",
    "dinov2_vitg14": "dinov2_vitg14",
    "blip2_qformer": "qformer",
}


def read_encoders(folder: Path) -> Encoders:
    """List the tensors of frozen experts that lie in files of their own.

    Raises:
        CheckpointError: the folder holds none, or one that is not known.
    """
    encoders = {path.stem: read_safetensors(path) for path in sorted(folder.glob("*.safetensors"))}
    known = ", ".join(RELEASED.values())
    if not encoders:
        raise CheckpointError(f"{folder}: holds no *.safetensors of frozen experts; known: {known}")
    if unknown := sorted(encoders.keys() - set(RELEASED.values())):
        raise CheckpointError(f"{folder}: {unknown[0]}: unknown; known: {known}")
    return encoders


def write_encoders(folder: Path, encoders: Encoders, maps: MappedFiles) -> None:
    """Write frozen experts into files of their own in the folder `encoders` of a checkpoint.

    Args:
        folder: the checkpoint's.
        encoders: what is written, nothing where there are none.
        maps: the files that the experts are read from.
    """
    for expert, entries in encoders.items():
        path = folder / ENCODERS / f"{expert}.safetensors"
        path.parent.mkdir(exist_ok=True)
        out = create_file(path, {name: (entry.shape, entry.dtype) for name, entry in entries.items()})
        for name, entry in entries.items():
            out.put(name, maps.read(entry))
            maps.release()
        out.close()
