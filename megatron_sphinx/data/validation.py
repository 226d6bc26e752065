"""The held-out data of a run: opened, compared with what is trained on, and what each validation takes of it."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sphinx.data.config import DataConfig, DataSource, ValidationConfig
from megatron_sphinx.data.content import ContentSource
from megatron_sphinx.data.packing import Row, Segment
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.plan import Planner, StepPlan
from megatron_sphinx.data.sources import Sources, make_planner
from megatron_sphinx.data.streams import Mixture
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.model.views import encoded_views, image_positions

_SEED = 0  # of the order: every run takes the same samples of the same data


@dataclass(frozen=True)
class HeldOut:
    """What a run validates on, and when; the same on every rank.

    Attributes:
        sources: the opened held-out data.
        planner: plans the steps of a validation, of which each one takes the first `steps`.
        steps: how many steps' worth of data a validation takes.
        interval: steps of the training between two validations.
        last_step: steps of the whole training; behind them is a validation too.
        sample_rounds: the samples that are answered in each validation, in micro-batches: of each replica the rows,
            one or none; sample n is on replica n modulo their number.
    """

    sources: Sources
    planner: Planner
    steps: int
    interval: int
    last_step: int
    sample_rounds: tuple[tuple[tuple[Row, ...], ...], ...] = ()

    @property
    def samples(self) -> int:
        """How many samples are answered."""
        return sum(len(rows) for sample_round in self.sample_rounds for rows in sample_round)

    def is_due(self, done: int) -> bool:
        """Whether a validation is made when so many steps of the training are done."""
        return done > 0 and (done % self.interval == 0 or done == self.last_step)

    def left(self, done: int) -> int:
        """Count the validations that are made behind so many steps."""
        is_last_extra = self.last_step % self.interval > 0 and done < self.last_step
        return self.last_step // self.interval - done // self.interval + is_last_extra

    @property
    def plans(self) -> Iterator[StepPlan]:
        """The steps of a validation."""
        return map(self.planner.step, range(self.steps))

    def __str__(self) -> str:
        config = self.planner.config
        return (
            f"every {self.interval} steps and at the end, on {self.steps} x ({config.samples_per_step} samples, "
            f"{config.text_tokens_per_step} text tokens)"
        )


def open_held_out(config: ValidationConfig, training: Sources) -> Sources:
    """Open what a validation takes; this is cheap, and every rank does it.

    Args:
        config: names the data.
        training: the opened data of the training.

    Raises:
        DataError: a file is missing or damaged.
    """
    key, given = ("conversations", config.conversations) if config.conversations else ("pairs", config.pairs)
    samples = SampleIndex([source.path for source in given], key, "validation") if given else None
    text = TextIndex([source.path for source in config.text], "validation.text") if config.text else None
    return Sources(training.tokenizer, samples, text)


def refuse_trained(held_out: Sources, training: Sources) -> None:
    """Make sure that nothing is held out that is trained on, as far as the content of both is known.

    Raises:
        DataError: an index or a token file is in both.
    """
    for own, other in ((held_out.samples, training.samples), (held_out.text, training.text)):
        known = {mark: source for source in _contents(other) for mark in _marks(source)}
        for source in _contents(own):
            if same := next((known[mark] for mark in _marks(source) if mark in known), None):
                raise DataError(
                    f"{source.label}: is what {same.label} trains on; give data that is held out, such as the folder "
                    f"held_out that megatron-sphinx prepare --held-out makes"
                )


def _contents(index: SampleIndex | TextIndex | None) -> list[ContentSource]:
    """List the indexes or token files of a stream."""
    return list(index.content_sources) if index is not None else []


def _marks(source: ContentSource) -> list[str]:
    """List what identifies data: where it lies, and its content where that is known."""
    return [str(source.paths[0].resolve()), *([source.content.sha256] if source.content else [])]


def plan_validation(
    config: ValidationConfig,
    data: DataConfig,
    held_out: Sources,
    model: LanguageConfig,
    vision: VisionConfig,
    *,
    replicas: int,
    multiple: int,
    last_step: int,
) -> HeldOut:
    """Plan the validations of a run, whose rows are filled as those of the training.

    Args:
        config: when, on what and how much.
        data: of the training, with all values taken.
        held_out: the opened data.
        model: decides what a row costs.
        vision: decides the positions that an image takes.
        replicas: how many data-parallel replicas there are.
        multiple: the positions of a replica's micro-batch are padded to a multiple of this.
        last_step: steps of the whole training.

    Raises:
        ConfigError: there is less data than the steps take.
    """
    samples = held_out.samples.bounds if held_out.samples else [0]
    tokens = held_out.text.bounds if held_out.text else [0]
    taken = config.data_of(data, samples[-1], tokens[-1])
    for name, sources, bounds, amount in (
        ("conversations" if config.conversations else "pairs", taken.samples, samples, taken.samples_per_step),
        ("text", taken.text, tokens, taken.text_tokens_per_step),
    ):
        if amount:
            _check_enough(name, sources, bounds, amount, config.steps)
    planner = make_planner(taken, held_out, model, vision, replicas=replicas, seed=_SEED, multiple=multiple)
    index = held_out.samples
    rounds: tuple[tuple[tuple[Row, ...], ...], ...] = ()
    if index is not None and config.samples:
        rounds = _sample_rounds(index, config.samples, vision, replicas)
    return HeldOut(held_out, planner, config.steps, config.interval, last_step, rounds)


def _sample_rounds(
    index: SampleIndex, count: int, vision: VisionConfig, replicas: int
) -> tuple[tuple[tuple[Row, ...], ...], ...]:
    """Deal the first samples of an index, as many as there are, to replicas: one to each in every round."""
    index = index.as_stored() if vision.resize == "accessory" else index
    sizes = index.sizes(0, min(count, len(index)))
    rows = []
    for sample, (width, height) in enumerate(zip(sizes.width.tolist(), sizes.height.tolist(), strict=True)):
        views = encoded_views(width, height, vision) if width else ()
        length = 2 + (image_positions(len(views), vision) if width else 0)
        rows.append((Segment(True, sample, 0, length, 0, 0, views),))
    starts = range(0, len(rows), replicas)
    return tuple(tuple(tuple(rows[n : n + 1]) for n in range(start, start + replicas)) for start in starts)


def _check_enough(name: str, sources: tuple[DataSource, ...], bounds: list[int], amount: int, steps: int) -> None:
    """Raise ConfigError where the steps of a validation would take something of a source twice.

    Args:
        name: of the stream in the section.
        sources: of the stream.
        bounds: where each source begins, and how much there is in all.
        amount: what a step takes of all.
        steps: of a validation.
    """
    mixture = Mixture(bounds, [source.weight for source in sources], amount, name)
    for number, (given, (begin, end)) in enumerate(zip(mixture.given(steps), mixture.spans, strict=True)):
        if given > end - begin:
            where = f".{number}" if len(mixture.spans) > 1 else ""
            raise ConfigError(
                f"validation.steps={steps}: take {given} of validation.{name}{where}, which has {end - begin}; "
                f"use fewer steps, or other weights"
            )
