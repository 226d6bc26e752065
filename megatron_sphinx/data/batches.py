"""From the plan of a step to the token rows of language ranks, made in the background; no image is touched."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sphinx.data.config import DataConfig
from megatron_sphinx.data.content import bad_id
from megatron_sphinx.data.packing import Row, Segment
from megatron_sphinx.data.pairs import ImageReader
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.data.sources import Sources
from megatron_sphinx.model.architecture import VisionConfig
from megatron_sphinx.model.micro_batch import MicroBatch

NO_TARGET = -100  # what torch's cross entropy ignores
TokensAndTargets = tuple[NDArray[np.int64], NDArray[np.int64]]


class BatchBuilder:
    """Turns planned rows into a MicroBatch; reads captions and text, never an image.

    Args:
        config: whether attention stays inside each segment.
        sources: the opened data.
        vision: how many positions a view takes.
        multiple: the number of positions is padded to a multiple of this.
    """

    def __init__(self, config: DataConfig, sources: Sources, vision: VisionConfig, multiple: int = 1) -> None:
        self.config, self.sources, self.vision, self.multiple = config, sources, vision, multiple

    def build(self, rows: Sequence[Row]) -> MicroBatch:
        """Return one replica's micro-batch; without rows it is padding only, since every rank takes every step.

        Raises:
            DataError: a token id is none of the model's.
        """
        units = list(enumerate(rows))  # what attention stays inside, each behind the number of its row
        if self.config.isolate_documents:
            units = [(number, (segment,)) for number, row in units for segment in row]
        units.sort(key=lambda unit: sum(segment.length for segment in unit[1]))
        segments = [segment for _, unit in units for segment in unit]
        lengths = [sum(segment.length for segment in unit) for _, unit in units]
        row_of_token = np.repeat([number for number, _ in units], lengths).astype(np.int64)
        padding = -sum(lengths) % self.multiple if lengths else self.multiple
        filled = [self._fill(segment) for segment in segments]
        self._check_ids(segments, filled)
        return self._join(segments, filled, lengths, row_of_token, len(rows), padding)

    def _check_ids(self, segments: Sequence[Segment], filled: Sequence[TokensAndTargets]) -> None:
        """Raise DataError where a token, or one that is to be predicted, is none of the model's."""
        if not segments:
            return
        vocabulary = self.sources.tokenizer.identity.vocabulary
        tokens, targets = map(np.concatenate, zip(*filled, strict=True))
        is_bad = tokens.view(np.uint64) >= vocabulary  # as unsigned numbers negative ones are large
        is_target_bad = (targets.view(np.uint64) >= vocabulary) & (targets != NO_TARGET)
        if not (is_bad | is_target_bad).any():
            return
        position = int((is_bad | is_target_bad).argmax())
        ends = np.cumsum([segment.length for segment in segments])
        segment = segments[int(np.searchsorted(ends, position, "right"))]
        token = int((tokens if is_bad[position] else targets)[position])
        raise bad_id(self._name(segment), token, vocabulary)

    def _name(self, segment: Segment) -> str:
        """Name the document or the sample that a segment belongs to, as an error should."""
        if not segment.is_sample:
            assert self.sources.text is not None
            return self.sources.text.name(segment.item)
        assert self.sources.samples is not None
        name = self.sources.samples.name(segment.item)
        if not self.sources.samples.location(segment.item).bytes:
            return name
        shard, key = ImageReader(self.sources.samples).name(segment.item)
        return f"{name} ({key} of {shard})"

    def _fill(self, segment: Segment) -> TokensAndTargets:
        """Read tokens and targets of a segment, both [length]."""
        return self._fill_sample(segment) if segment.is_sample else self._fill_text(segment)

    def _fill_sample(self, segment: Segment) -> TokensAndTargets:
        assert self.sources.samples is not None
        tokenizer = self.sources.tokenizer
        caption = self.sources.samples.caption(segment.item, segment.tokens)
        tokens = np.zeros(segment.length, np.int64)
        tokens[0], tokens[-1] = tokenizer.bos, tokenizer.eos
        tokens[-1 - segment.tokens : -1] = caption
        is_target = self.sources.samples.is_target(segment.item, segment.tokens)
        targets = np.full(segment.length, NO_TARGET, np.int64)
        targets[-2 - segment.tokens : -1] = np.where(is_target, tokens[-1 - segment.tokens :], NO_TARGET)
        return tokens, targets  # what stands before a token predicts it, the image's last position the first

    def _fill_text(self, segment: Segment) -> TokensAndTargets:
        assert self.sources.text is not None
        count = segment.tokens + (segment.targets == segment.tokens)  # the next token too, where it is predicted
        ahead = self.sources.text.read(segment.item, segment.start, count)
        targets = np.full(segment.length, NO_TARGET, np.int64)
        targets[: segment.targets] = ahead[1:]
        return ahead[: segment.tokens], targets

    def _join(
        self,
        segments: Sequence[Segment],
        filled: Sequence[TokensAndTargets],
        lengths: list[int],
        row_of_token: NDArray[np.int64],
        rows: int,
        padding: int,
    ) -> MicroBatch:
        """Lay the segments one behind the other, and note where views stand; samples are in ascending order.

        A sample may be there twice, where one epoch ends and the next begins.
        """

        def padded(parts: Sequence[NDArray[np.int64]], fill: int) -> Tensor:
            return torch.from_numpy(np.concatenate([*parts, np.full(padding, fill, np.int64)]))

        samples = [number for number, segment in enumerate(segments) if segment.is_sample]
        samples.sort(key=lambda number: segments[number].item)
        starts = np.cumsum([0, *(segment.length for segment in segments)])
        owner = np.full(sum(lengths), -1, np.int64)
        sample_of_view: list[int] = []
        begins: list[int] = []
        skipped: list[int] = []
        for index, number in enumerate(samples):
            owner[starts[number] : starts[number + 1]] = index
            position = int(starts[number]) + 1  # behind BOS
            for view in range(self.vision.views if segments[number].views else 0):
                if is_encoded := view in segments[number].views:
                    sample_of_view.append(index)
                (begins if is_encoded else skipped).append(position)
                position += self.vision.tokens_per_view if is_encoded else 1
        block = np.arange(self.vision.tokens_per_view)
        view_positions = (np.array(begins, np.int64)[:, None] + block).reshape(-1)
        targets = padded([targets for _, targets in filled], NO_TARGET)
        return MicroBatch(
            tokens=padded([tokens for tokens, _ in filled], 0),
            targets=targets,
            target_positions=(targets >= 0).nonzero().flatten(),
            lengths=(*lengths, padding) if padding else tuple(lengths),
            sample_of_token=padded([owner], -1),
            row_of_token=padded([row_of_token], -1),
            rows=rows,
            view_positions=torch.from_numpy(view_positions),
            skip_positions=torch.tensor(skipped, dtype=torch.int64),
            sample_of_view=torch.tensor(sample_of_view, dtype=torch.int64),
            samples=tuple(segments[number].item for number in samples),
            documents=tuple(segment.item for segment in segments if not segment.is_sample),
        )


class BatchLoader:
    """The micro-batches of one replica, step by step; while a step is computed, a thread makes those of the next."""

    def __init__(self, planner: Planner, builder: BatchBuilder, replica: int) -> None:
        self.planner, self.builder, self.replica = planner, builder, replica
        self._pool = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def step(self, step: int, following: int | None = None) -> list[MicroBatch]:
        """Return the micro-batches of a step, on the CPU; steps asked for in turn have been made ahead.

        Args:
            step: number of the step.
            following: the step that will be asked for next; the one behind it unless given.
        """
        following = step + 1 if following is None else following
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._make, step))
        micro_batches = self._next[1].result()
        self._next = (following, self._pool.submit(self._make, following))
        return micro_batches

    def _make(self, step: int) -> list[MicroBatch]:
        return [self.builder.build(replicas[self.replica]) for replicas in self.planner.step(step).micro_batches]
