"""Fewer visual experts than a checkpoint has: what begins a SPHINX-X with the weights of a SPHINX."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_sphinx.checkpoint.encoders import RELEASED
from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import VISUAL_EXPERTS

_PROJECTION = "visual_proj.0.weight"


def select(checkpoint: SourceCheckpoint, kept: Sequence[str]) -> SourceCheckpoint:
    """Turn a checkpoint of all released experts into one of some: the columns of the projection that read these.

    Args:
        checkpoint: what has all experts.
        kept: names of RELEASED.

    Raises:
        CheckpointError: an expert is unknown, or the checkpoint's projection does not read the released ones.
    """
    if unknown := [name for name in kept if name not in RELEASED]:
        raise CheckpointError(f"--experts: {unknown[0]}: unknown; known: {', '.join(RELEASED)}")
    ranges, end = {}, 0
    for name in RELEASED:
        width = VISUAL_EXPERTS[name].channels if VISUAL_EXPERTS[name].grid else 0
        ranges[name] = (end, end := end + width)
    if checkpoint.model.channels != end:
        raise CheckpointError(
            f"--experts: {checkpoint.folder} projects {checkpoint.model.channels} channels; "
            f"can be chosen from the {end} of {', '.join(RELEASED)}"
        )
    spans = [span for name, span in ranges.items() if name in kept]
    queries = checkpoint.model.queries if "blip2_qformer" in kept else 0
    model = replace(checkpoint.model, channels=sum(stop - start for start, stop in spans), queries=queries)
    if not model.channels:
        raise CheckpointError("--experts: needs at least one expert beside a Q-Former")
    source = checkpoint.source
    specs = [replace(spec, sizes=model.sizes) for spec in source.specs if model.weights.issuperset(spec.rule.weights)]
    entries = {(spec.file, spec.name): source.entries[spec.file, spec.name] for spec in specs}
    for spec in specs:
        if spec.rule.weights == (_PROJECTION,):
            entries[spec.file, spec.name] = entries[spec.file, spec.name].of_spans(1, spans)
    files = {RELEASED[name] for name in kept}
    encoders = {name: tensors for name, tensors in checkpoint.encoders.items() if name in files}
    return replace(checkpoint, model=model, source=replace(source, specs=specs, entries=entries), encoders=encoders)
