"""The weights that a run begins with: of a checkpoint in any format and layout, each rank reads what it keeps."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.conversion import Conversion
from megatron_sphinx.checkpoint.convert import open_checkpoint
from megatron_sphinx.checkpoint.digests import sha256_of
from megatron_sphinx.checkpoint.formats import megatron
from megatron_sphinx.checkpoint.formats.base import Opened
from megatron_sphinx.checkpoint.identity import differences, in_order, require_same
from megatron_sphinx.checkpoint.keymap import Model, Stored
from megatron_sphinx.checkpoint.manifest import read_manifest
from megatron_sphinx.checkpoint.pieces import WEIGHTS, Piece
from megatron_sphinx.checkpoint.steps import newest_of
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.shards import Block, boxes_of

KEY = "model.weights"
VISION = f"{WEIGHTS}vision."
SKIP_TOKEN = f"{VISION}skip_token"


@dataclass(frozen=True)
class Weights:
    """A checkpoint to begin with.

    Attributes:
        path: of it.
        drawn: how the names begin of weights that it lacks, and may lack: a language model has never seen a picture, a
            stage that looks at one view has no skip token.
        opened: what it holds; None for one of ours, which the store reads.
        changes: how pictures were shown to it otherwise than they are in this run, key by key.
    """

    path: Path
    drawn: str
    opened: Opened | None
    changes: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path, model: Model, store: CheckpointStore) -> "Weights":
        """Recognise a checkpoint and compare it with the run.

        Args:
            folder: where it is; of a run folder of ours, the newest one is taken.
            model: what the run has.
            store: of the run, whose ranks compare the checksums of a checkpoint of ours.

        Raises:
            CheckpointError: it is of no known format, damaged, of another model, or was trained with another tokenizer
                or other encoders.
        """
        opened, seen = None, dict[str, Any]()
        if megatron.is_here(folder):
            path = newest_of(folder)
            manifest = read_manifest(path, KEY)
            holds, mark = megatron.model_of(path, manifest), manifest["identity"].get("tokenizer")
            seen = manifest["identity"].get("vision", {}) if holds.channels else {}
        else:
            try:
                opened = open_checkpoint(folder, model.language)
            except CheckpointError as error:  # begins with the path
                raise CheckpointError(f"{KEY}={error}") from error
            path, holds = opened.folder, opened.model
            tokenizer = path / "tokenizer.model"
            mark = sha256_of(tokenizer) if tokenizer.is_file() else None
        made, here = _facts(holds), _facts(model)
        if mark:
            made["tokenizer"], here["tokenizer"] = mark, store.identity["tokenizer"]
        if not holds.channels:
            made["channels"] = here["channels"]
        vision = store.identity.get("vision", {})
        if "experts" in seen:
            for known, facts in ((seen, made), (vision, here)):
                facts["vision"] = in_order({"experts": known["experts"]})
        way_out = "configure the same model, tokenizer and encoders, or begin with other weights"
        require_same(f"{KEY}={path}", made, here, way_out)
        if opened is None:
            store.verify(path, manifest, KEY)
        lacks_skip_token = model.has_skip_token and not holds.has_skip_token
        drawn = VISION if not holds.channels else SKIP_TOKEN if lacks_skip_token else ""
        others = differences(seen, {name: vision.get(name) for name in seen}, "vision")
        return cls(path, drawn, opened, tuple(f"{key} was {had}, is {has}" for key, had, has in others))

    def load(self, pieces: Iterable[Piece], store: CheckpointStore) -> None:
        """Fill pieces of our fp32 weights, all but those to be drawn; every language rank calls this, together.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        kept = (piece for piece in pieces if not (self.drawn and piece.name.startswith(self.drawn)))
        if self.opened is None:
            store.load(self.path, kept, key=KEY)
        else:
            fill(self.opened, kept)


def fill(opened: Opened, pieces: Iterable[Piece]) -> None:
    """Copy what meets each piece of our fp32 weights; rows of the vocabulary's padding are zero."""
    whole = {item.name: item for item in megatron.stored_of(opened.model)}
    conversion = Conversion(opened.source, whole.values())
    for piece in pieces:
        for part, place in cut(whole[piece.name], piece.block):
            conversion.fill(part, piece.values[place])
        conversion.release()


def cut(item: Stored, block: Block) -> Iterator[tuple[Stored, tuple[slice, ...]]]:
    """A box of a tensor as tensors that are boxes of its axes, and where in the box each lies."""
    dimensions = []
    for axes, first, count in zip(item.rule.dimensions, block.offset, block.shape, strict=True):
        sizes = tuple(item.size(axis) for axis in axes)
        dimensions.append(
            [
                (list(zip(axes, corner, shape, strict=True)), slice(at - first, at - first + prod(shape)))
                for corner, shape, at in boxes_of(sizes, first, first + count)
            ]
        )
    for runs in product(*dimensions):
        box = dict(item.box)
        for axis, first, count in (run for axes, _ in runs for run in axes):
            start = first + item.box.get(axis, (0, 0))[0]
            box[axis] = (start, start + count)
        yield Stored(item.file, item.name, item.rule, box, item.sizes), tuple(place for _, place in runs)


def _facts(model: Model) -> dict[str, object]:
    channels = {"visual_proj": model.channels, "qformer_proj": model.queries}
    return {"model": model.language.shape, "channels": channels}
