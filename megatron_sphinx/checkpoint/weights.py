"""The weights that a run begins with: of a checkpoint in any format and layout, each rank reads what it keeps.

The formats, and what converts between them, are imported when weights are opened: most runs need none of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sphinx.checkpoint.digests import sha256_of
from megatron_sphinx.checkpoint.identity import differences, in_order, require_same
from megatron_sphinx.checkpoint.intact import verify_files
from megatron_sphinx.checkpoint.manifest import read_manifest
from megatron_sphinx.checkpoint.slices import TensorSlice
from megatron_sphinx.checkpoint.steps import newest_of
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.checkpoint.weight_names import MASTER
from megatron_sphinx.data.tokenizer_files import tokenizers_in
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.shards import Block, boxes_of

if TYPE_CHECKING:
    from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint
    from megatron_sphinx.checkpoint.mapping.axes import Model
    from megatron_sphinx.checkpoint.mapping.rules import TensorSpec

KEY = "model.weights"
VISION = f"{MASTER}vision."
SKIP_TOKEN = f"{VISION}skip_token"


@dataclass(frozen=True)
class Weights:
    """A checkpoint that a run begins with.

    Attributes:
        path: its folder.
        drawn: how the names begin of weights that it lacks, and may lack: a language model has never seen a picture, a
            stage that looks at one view has no skip token.
        checkpoint: what it holds; None for one of ours, which the store reads.
        changes: how pictures were shown to it otherwise than they are in this run, key by key.
    """

    path: Path
    drawn: str
    checkpoint: SourceCheckpoint | None
    changes: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path, model: Model, store: CheckpointStore) -> Weights:
        """Recognise a checkpoint and compare it with the run.

        Args:
            folder: where it is; in a run folder of ours, the newest one is taken.
            model: the weights that the run has.
            store: the store of the run, whose ranks compare the checksums of a checkpoint of ours.

        Raises:
            CheckpointError: it is of no known format, damaged, of another model, or was trained with another tokenizer
                or other encoders.
        """
        origin = _origin_of(folder, model)
        path, holds = origin.path, origin.model
        made, current = _facts(holds), _facts(model)
        if origin.tokenizers:
            own = current["tokenizer"] = store.identity["tokenizer"]
            made["tokenizer"] = own if own in origin.tokenizers else origin.tokenizers[0]
        if not holds.channels:
            made["channels"] = current["channels"]
        seen, vision = origin.vision, store.identity.get("vision", {})
        if "experts" in seen:
            for identity, facts in ((seen, made), (vision, current)):
                facts["vision"] = in_order({"experts": identity["experts"]})
        way_out = "configure the same model, tokenizer and encoders, or begin with other weights"
        require_same(f"{KEY}={path}", made, current, way_out)
        if origin.manifest is not None:
            verify_files(store.groups, path, origin.manifest, KEY)
        lacks_skip_token = model.has_skip_token and not holds.has_skip_token
        drawn = VISION if not holds.channels else SKIP_TOKEN if lacks_skip_token else ""
        changed = differences(seen, {name: vision.get(name) for name in seen}, "vision")
        changes = tuple(f"{key} was {before}, is {now}" for key, before, now in changed)
        return cls(path, drawn, origin.checkpoint, changes)

    def load(self, slices: Iterable[TensorSlice], store: CheckpointStore) -> None:
        """Fill slices of our fp32 weights, all but those to be drawn; every language rank calls this, together.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        kept = (one for one in slices if not (self.drawn and one.name.startswith(self.drawn)))
        if self.checkpoint is None:
            store.load(self.path, kept, key=KEY)
        else:
            fill(self.checkpoint, kept)


@dataclass(frozen=True)
class _Origin:
    """What a checkpoint to begin with says of itself.

    Attributes:
        path: its folder.
        model: the weights that it has.
        tokenizers: sha256 of its tokenizer, in each form that it has it in.
        vision: how it was shown pictures, for one of ours.
        manifest: what one of ours says of itself; None for others.
        checkpoint: its tensors; None for one of ours.
    """

    path: Path
    model: Model
    tokenizers: tuple[str, ...]
    vision: dict[str, Any]
    manifest: dict[str, Any] | None
    checkpoint: SourceCheckpoint | None


def _origin_of(folder: Path, model: Model) -> _Origin:
    """Recognise a checkpoint.

    Raises:
        CheckpointError: it is of no known format, or damaged.
    """
    from megatron_sphinx.checkpoint.formats import megatron

    if megatron.is_here(folder):
        path = newest_of(folder)
        manifest = read_manifest(path, KEY)
        holds, identity = megatron.model_of(path, manifest), manifest["identity"]
        vision = identity.get("vision", {}) if holds.channels else {}
        known = (identity["tokenizer"],) if "tokenizer" in identity else ()
        beside = _digests(path) if known else ()  # a conversion knows the first of several forms alone
        return _Origin(path, holds, (*known, *beside), vision, manifest, None)
    from megatron_sphinx.checkpoint.open import open_checkpoint

    try:
        checkpoint = open_checkpoint(folder, model.language)
    except CheckpointError as error:  # begins with the path
        raise CheckpointError(f"{KEY}={error}") from error
    return _Origin(checkpoint.folder, checkpoint.model, _digests(checkpoint.folder), {}, None, checkpoint)


def _digests(folder: Path) -> tuple[str, ...]:
    """SHA-256 of the tokenizer in a folder, in each form that it is there in."""
    return tuple(map(sha256_of, tokenizers_in(folder)))


def fill(checkpoint: SourceCheckpoint, slices: Iterable[TensorSlice]) -> None:
    """Copy into each slice of our fp32 weights what overlaps it; rows of the vocabulary's padding are zero."""
    import torch

    from megatron_sphinx.checkpoint.formats import megatron
    from megatron_sphinx.checkpoint.mapping.conversion import Conversion
    from megatron_sphinx.tensors.dtypes import FLOAT32

    whole = {spec.name: spec for spec in megatron.specs_of_model(checkpoint.model)}
    conversion = Conversion(checkpoint.source, whole.values())
    for one in slices:
        for spec, place in cut(whole[one.name], one.block):
            values = one.values[place]
            if values.is_cpu:
                conversion.fill(spec, values.numpy())
            else:
                values.copy_(torch.from_numpy(conversion.make(spec, FLOAT32)))
        conversion.release()


def cut(spec: TensorSpec, block: Block) -> Iterator[tuple[TensorSpec, tuple[slice, ...]]]:
    """Cut a box of a tensor into tensors that are boxes of its axes.

    Args:
        spec: the tensor.
        block: the box.

    Yields:
        A tensor, and where in the box it lies.
    """
    dimensions = []
    for axes, first, count in zip(spec.rule.dimensions, block.offset, block.shape, strict=True):
        sizes = tuple(spec.size(axis) for axis in axes)
        dimensions.append(
            [
                (list(zip(axes, corner, shape, strict=True)), slice(start - first, start - first + prod(shape)))
                for corner, shape, start in boxes_of(sizes, first, first + count)
            ]
        )
    for runs in product(*dimensions):
        box = dict(spec.box)
        for axis, first, count in (run for axes, _ in runs for run in axes):
            start = first + spec.box.get(axis, (0, 0))[0]
            box[axis] = (start, start + count)
        yield replace(spec, box=box), tuple(place for _, place in runs)


def _facts(model: Model) -> dict[str, object]:
    channels = {"visual_proj": model.channels, "qformer_proj": model.queries}
    return {"model": model.language.shape, "channels": channels}
