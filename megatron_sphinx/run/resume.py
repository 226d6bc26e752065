"""What a run goes on from: its own checkpoint, or the weights of another; checked before it is loaded."""

from pathlib import Path
from typing import Any, NamedTuple

from megatron_sphinx.checkpoint.intact import SavedStep
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.checkpoint.weight_names import MASTER
from megatron_sphinx.checkpoint.weights import SKIP_TOKEN, VISION, Weights
from megatron_sphinx.config import Config
from megatron_sphinx.console import say
from megatron_sphinx.parallel.seeding import restore_random_state
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.run.provenance import changes, describe, identity, sizes_of
from megatron_sphinx.training.engine import Engine


class StartingPoint(NamedTuple):
    """Where a run begins.

    Attributes:
        step: steps that are done.
        bad_pairs: pairs so far whose image could not be read.
        divergence: what the run remembers to judge its losses; None at its first step.
    """

    step: int = 0
    bad_pairs: int = 0
    divergence: dict[str, Any] | None = None


def open_store(context: RankContext, encoder_digests: dict[str, str]) -> CheckpointStore:
    """Open the checkpoints of the run folder, whose identity is that of the run with these encoders."""
    config = context.config
    return CheckpointStore(
        context.folder / "checkpoints",
        context.groups,
        keep=config.checkpoint.keep,
        identity=lambda: identity(config, context.sources, encoder_digests),  # of data, more is known later
        about=describe(config, context.groups.layout, encoder_digests),
        progress=context.progress,
        guard=context.hold.require if context.hold else lambda: None,
    )


def choose(context: RankContext, store: CheckpointStore) -> SavedStep | Weights | None:
    """Find the checkpoint to go on from, or else the weights to begin with, and compare them with the run.

    Every language rank calls this, together.

    Raises:
        CheckpointError: there is none that was asked for, or it does not fit.
    """
    if chosen := store.choose(context.config.checkpoint.resume):
        return chosen
    weights = context.config.model.weights
    return Weights.open(Path(weights), _model_of(context.config), store) if weights else None


def load(
    context: RankContext, store: CheckpointStore, engine: Engine, chosen: SavedStep | Weights | None
) -> StartingPoint:
    """Load what was chosen into the engine; every language rank calls this, together.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    if isinstance(chosen, SavedStep):
        return _go_on(context, store, engine, chosen)
    if chosen is not None:
        _begin_with(context, store, engine, chosen)
    return StartingPoint()


def _begin_with(context: RankContext, store: CheckpointStore, engine: Engine, weights: Weights) -> None:
    """Take the weights of a checkpoint, and nothing else of it."""
    engine.state.prepare(0)
    slices = engine.state.slices(with_copies=True)
    weights.load((each for each in slices if each.name.startswith(MASTER)), store)
    engine.state.take()
    if context.is_first_rank:
        drawn = {VISION: ", new projections and tags", SKIP_TOKEN: ", a new skip token"}
        say(f"begins with the weights of {weights.path}{drawn.get(weights.drawn, '')}")
        for note in weights.checkpoint.notes if weights.checkpoint else ():
            say(f"  {note}")
        for change in weights.changes:
            say(f"  changed: {change}")


def _go_on(context: RankContext, store: CheckpointStore, engine: Engine, chosen: SavedStep) -> StartingPoint:
    """Take the whole state of a checkpoint."""
    manifest = chosen.manifest
    step, divergence = int(manifest["step"]), manifest.get("divergence")
    engine.state.prepare(step - (divergence["skipped"] if divergence else 0))
    objects = store.load(chosen.path, engine.state.slices(with_copies=True), ["random"])
    engine.state.take()
    layout = sizes_of(context.config, context.groups.layout)
    if manifest.get("layout") == layout and "random" in objects:
        restore_random_state(objects["random"])
    if context.scan:
        context.scan.then = store.require_same_data
    if context.is_first_rank:
        moved = "" if manifest.get("layout") == layout else f", from layout {manifest.get('layout')}"
        say(f"resumed after step {step} from {chosen.path}{moved}")
        for change in changes(chosen.path, manifest, context.config):
            say(f"  changed: {change}")
    return StartingPoint(step, int(manifest.get("bad_pairs", 0)), divergence)


def _model_of(config: Config) -> Model:
    """Describe the model of a run as checkpoints do."""
    vision = config.vision
    queries = vision.qformer.channels if vision.qformer else 0
    return Model(config.model, vision.channels, queries, has_skip_token=vision.has_skip_token)
