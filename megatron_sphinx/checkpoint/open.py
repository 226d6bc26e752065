"""Opens a checkpoint of any format: what it is, and what tensors it holds, without reading them."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from megatron_sphinx.checkpoint.encoders import ENCODERS, read_encoders
from megatron_sphinx.checkpoint.formats.format import Format, SourceCheckpoint
from megatron_sphinx.checkpoint.formats.registry import format_named, formats, names
from megatron_sphinx.checkpoint.steps import require_folder
from megatron_sphinx.checkpoint.targets import require_finished
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig

# What people have beside the formats that are known, by names of files, each with what to do.
_OTHERS = {
    "*.gguf": "is a GGUF of llama.cpp, whose weights are quantized; give the checkpoint that it was made of",
    "adapter_model.*": "holds a low-rank adapter alone; merge it into its base model first",
    "model-*-of-*.safetensors": "is a part of a checkpoint whose model.safetensors.index.json is missing; fetch that",
    "pytorch_model-*-of-*.bin": "is a part of a checkpoint whose pytorch_model.bin.index.json is missing; fetch that",
    "consolidated*.safetensors": "is of Mistral's newer format; give the repository's model*.safetensors",
    "consolidated.*.pth": "is a part of a checkpoint whose first one is missing; fetch all of them",
    "mp_rank_*": "is of Megatron-LM's older format; save it with --ckpt-format torch_dist",
    "*.distcp": "is of a torch.distributed.checkpoint without its .metadata or metadata.json; give a whole one",
    "*.nemo": "is an archive of NeMo; convert it with NeMo first",
    "*.safetensors": "has another name than model.safetensors; rename it, or give its variant's repository",
    "*.msgpack": "is of Flax; save it with transformers as safetensors first",
    "*.h5": "is of TensorFlow; save it with transformers as safetensors first",
}
_ADAPTER = "adapter_config.json"


def open_checkpoint(
    folder: Path,
    shape: LanguageConfig | None = None,
    diff: Path | None = None,
    ignored: Collection[str] = (),
    *,
    is_finished: bool = True,
) -> SourceCheckpoint:
    """Recognise a checkpoint and list what it holds, without reading its tensors.

    Args:
        folder: where it is.
        shape: shape of the model, for the one format that does not tell it, torch_dist.
        diff: a folder of LLaMA2-Accessory's -diff files, to be added to it.
        ignored: keys of its configuration that the user says are of no matter.
        is_finished: whether one that is still being written is refused.

    Raises:
        CheckpointError: it is of no known format, incomplete or damaged, or its configuration says what is not known.
    """
    require_folder(folder)
    try:
        if is_finished:
            require_finished(folder)
        form = form_of(folder, diff)
        said = [line for file in form.settings(folder) for line in file.check(ignored)]
        checkpoint = form.open_sum(folder, diff) if diff and form.open_sum else form.open(folder, shape)
        checkpoint.source.check()
        others = [other.name for other in formats() if other is not form and _is_here(other, folder)]
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{folder}: cannot be read ({reason}); give a folder that can be") from error
    said += [f"{folder}: is taken as {form.name}; what it holds as {name} is left out" for name in others]
    beside = checkpoint.folder / ENCODERS
    encoders = read_encoders(beside) if beside.is_dir() else checkpoint.encoders
    return replace(checkpoint, encoders=encoders, notes=(*checkpoint.notes, *said))


def _is_here(form: Format, folder: Path) -> bool:
    try:
        return form.is_here(folder)
    except CheckpointError:  # a file that is not of the checkpoint
        return False


def form_of(folder: Path, diff: Path | None = None) -> Format:
    """Recognise the format of what a folder holds, by the names of files alone.

    Args:
        folder: where a checkpoint is, or a run.
        diff: a folder of LLaMA2-Accessory's -diff files, to be added to it.

    Raises:
        CheckpointError: there is nothing of a known format.
    """
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(f"{folder}: {_ADAPTER} tells of a low-rank adapter; merge it into its base model first")
    for form in formats():
        if (form.open_sum is not None) if diff is not None else form.is_here(folder):
            return form
    for pattern, fault in _OTHERS.items():
        if found := sorted(folder.glob(pattern)):
            raise CheckpointError(f"{folder}: {found[0].name} {fault}")
    files = ", ".join(file for name in names() for file in format_named(name).files)
    raise CheckpointError(
        f"{folder}: no checkpoint of a known format; give a folder with {files}, or a checkpoint of ours"
    )
