"""From the plan of a step to tensors: token rows on language ranks, pixels on encoder ranks, read in the background."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sphinx.data import images
from megatron_sphinx.data.content import BESIDE, Memory, Scan, bad_id
from megatron_sphinx.data.packing import Row, Segment
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.data.plan import DataConfig, Planner
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError, writing
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.model.sphinx import MicroBatch
from megatron_sphinx.model.views import encoded_views, image_positions, views_of


@dataclass(frozen=True)
class Sources:
    """The opened streams of a run."""

    tokenizer: Tokenizer
    pairs: SampleIndex | None
    text: TextIndex | None

    def check(self, memory: Memory = BESIDE) -> None:
        """Raise DataError where a file is missing or has changed, or was made with another tokenizer."""
        for source in (self.pairs, self.text):
            if source is not None:
                source.check(self.tokenizer, memory)

    def scan(self, memory: Memory) -> Scan:
        """What will read, in the background, the data whose content nothing knows."""
        parts = [part for source in (self.pairs, self.text) if source is not None for part in source.parts]
        return Scan(parts, self.tokenizer.identity.vocabulary, memory)


def open_sources(config: DataConfig, model: LanguageConfig) -> Sources:
    """Open what the configuration names; cheap, every rank does it.

    Raises:
        DataError: a file is missing or damaged, or a vocabulary differs.
    """
    tokenizer = Tokenizer(config.tokenizer)
    if tokenizer.identity.vocabulary != model.vocabulary:
        raise DataError(
            f"data.tokenizer={config.tokenizer}: has {tokenizer.identity.vocabulary} pieces, but model.vocabulary="
            f"{model.vocabulary}; set that to {tokenizer.identity.vocabulary}, or give the model's tokenizer"
        )
    key = "conversations" if config.conversations_per_step else "pairs"
    pairs = SampleIndex([source.path for source in config.samples], key) if config.samples_per_step else None
    text = TextIndex([source.path for source in config.text]) if config.text_tokens_per_step else None
    return Sources(tokenizer, pairs, text)


def make_planner(
    config: DataConfig,
    sources: Sources,
    model: LanguageConfig,
    vision: VisionConfig,
    *,
    replicas: int,
    seed: int,
    multiple: int = 1,
) -> Planner:
    """The planner of a run: the same on every rank."""

    def tokens_of_views(width: int, height: int) -> tuple[int, tuple[int, ...]]:
        views = encoded_views(width, height, vision)
        return image_positions(len(views), vision), views

    return Planner(
        config,
        pairs=sources.pairs,
        text=sources.text,
        tokens_of_views=tokens_of_views,
        cost=model.train_flops,
        replicas=replicas,
        seed=seed,
        multiple=multiple,
    )


class BatchBuilder:
    """Turns planned rows into a MicroBatch; touches captions and text, never an image.

    Args:
        multiple: what the number of positions must be a multiple of; padding makes it so.
    """

    def __init__(self, config: DataConfig, sources: Sources, vision: VisionConfig, multiple: int = 1) -> None:
        self.config, self.sources, self.vision, self.multiple = config, sources, vision, multiple

    def build(self, rows: Sequence[Row]) -> MicroBatch:
        """One replica's micro-batch. No rows at all give padding only: each rank takes every step."""
        units = [(number, row) for number, row in enumerate(rows)]
        if self.config.isolate_documents:
            units = [(number, (piece,)) for number, row in units for piece in row]
        units.sort(key=lambda unit: sum(piece.length for piece in unit[1]))
        pieces = [piece for _, unit in units for piece in unit]
        lengths = [sum(piece.length for piece in unit) for _, unit in units]
        row_of_token = np.repeat([number for number, _ in units], lengths).astype(np.int64)
        padding = -sum(lengths) % self.multiple if lengths else self.multiple
        filled = [self._fill(piece) for piece in pieces]
        self._check_ids(pieces, filled)
        return self._join(pieces, filled, lengths, row_of_token, len(rows), padding)

    def _check_ids(
        self, pieces: Sequence[Segment], filled: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> None:
        """Raise DataError where a token, or one that is to be predicted, is none of the model's."""
        if not pieces:
            return
        vocabulary = self.sources.tokenizer.identity.vocabulary
        tokens, targets = map(np.concatenate, zip(*filled, strict=True))
        is_bad = tokens.view(np.uint64) >= vocabulary  # as unsigned numbers negative ones are large
        is_target_bad = (targets.view(np.uint64) >= vocabulary) & (targets != -100)
        if not (is_bad | is_target_bad).any():
            return
        at = int((is_bad | is_target_bad).argmax())
        ends = np.cumsum([piece.length for piece in pieces])
        piece = pieces[int(np.searchsorted(ends, at, "right"))]
        raise bad_id(self._name(piece), int((tokens if is_bad[at] else targets)[at]), vocabulary)

    def _name(self, piece: Segment) -> str:
        """The document or the pair that a piece is of, as an error should name it."""
        if not piece.is_sample:
            assert self.sources.text is not None
            return self.sources.text.name(piece.item)
        assert self.sources.pairs is not None
        name = self.sources.pairs.name(piece.item)
        if not self.sources.pairs.place(piece.item).bytes:
            return name
        shard, key = ImageReader(self.sources.pairs).name(piece.item)
        return f"{name} ({key} of {shard})"

    def _fill(self, piece: Segment) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and targets of one piece."""
        return self._fill_pair(piece) if piece.is_sample else self._fill_text(piece)

    def _fill_pair(self, piece: Segment) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        assert self.sources.pairs is not None
        tokenizer = self.sources.tokenizer
        caption = self.sources.pairs.caption(piece.item, piece.tokens)
        tokens = np.zeros(piece.length, np.int64)
        tokens[0], tokens[-1] = tokenizer.bos, tokenizer.eos
        tokens[-1 - piece.tokens : -1] = caption
        is_target = self.sources.pairs.is_target(piece.item, piece.tokens)
        targets = np.full(piece.length, -100, np.int64)
        targets[-2 - piece.tokens : -1] = np.where(is_target, tokens[-1 - piece.tokens :], -100)
        return tokens, targets  # what stands before a token predicts it, the image's last position the first

    def _fill_text(self, piece: Segment) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        assert self.sources.text is not None
        ahead = self.sources.text.read(piece.item, piece.start, piece.tokens + (piece.targets == piece.tokens))
        targets = np.full(piece.length, -100, np.int64)
        targets[: piece.targets] = ahead[1:]
        return ahead[: piece.tokens], targets

    def _join(
        self,
        pieces: Sequence[Segment],
        filled: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
        lengths: list[int],
        row_of_token: NDArray[np.int64],
        rows: int,
        padding: int,
    ) -> MicroBatch:
        """Lay the pieces one behind the other; pairs keep the order of their ids for their views.

        A pair may be there twice, where one epoch ends and the next begins.
        """

        def padded(parts: Sequence[NDArray[np.int64]], fill: int) -> Tensor:
            return torch.from_numpy(np.concatenate([*parts, np.full(padding, fill, np.int64)]))

        places = sorted((n for n, piece in enumerate(pieces) if piece.is_sample), key=lambda n: pieces[n].item)
        order = {place: number for number, place in enumerate(places)}
        starts = np.cumsum([0, *(piece.length for piece in pieces)])
        owner = np.full(sum(lengths), -1, np.int64)
        for place, number in order.items():
            owner[starts[place] : starts[place + 1]] = number
        sample_of_view: list[int] = []
        begins: list[int] = []
        skipped: list[int] = []
        for place, number in order.items():
            at = int(starts[place]) + 1
            for view in range(self.vision.views if pieces[place].views else 0):
                if is_encoded := view in pieces[place].views:
                    sample_of_view.append(number)
                (begins if is_encoded else skipped).append(at)
                at += self.vision.tokens_per_view if is_encoded else 1
        block = np.arange(self.vision.tokens_per_view)
        positions = (np.array(begins, np.int64)[:, None] + block).reshape(-1)
        targets = padded([targets for _, targets in filled], -100)
        return MicroBatch(
            tokens=padded([tokens for tokens, _ in filled], 0),
            targets=targets,
            target_positions=(targets >= 0).nonzero().flatten(),
            lengths=(*lengths, padding) if padding else tuple(lengths),
            sample_of_token=padded([owner], -1),
            row_of_token=padded([row_of_token], -1),
            rows=rows,
            view_positions=torch.from_numpy(positions),
            skip_positions=torch.tensor(skipped, dtype=torch.int64),
            sample_of_view=torch.tensor(sample_of_view, dtype=torch.int64),
            pairs=tuple(pieces[place].item for place in places),
            documents=tuple(piece.item for piece in pieces if not piece.is_sample),
        )


class BatchLoader:
    """The micro-batches of one replica, step by step, the next step's made in the background."""

    def __init__(self, planner: Planner, builder: BatchBuilder, replica: int) -> None:
        self.planner, self.builder, self.replica = planner, builder, replica
        self._pool = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, on the CPU."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._make, step))
        made = self._next[1].result()
        self._next = (step + 1, self._pool.submit(self._make, step + 1))
        return made

    def _make(self, step: int) -> list[MicroBatch]:
        return [self.builder.build(replicas[self.replica]) for replicas in self.planner.step(step).micro_batches]


@dataclass(frozen=True)
class Pixels:
    """Views of some pairs, ready to encode.

    Attributes:
        views: for each input side, pixels from 0 to 255 [views, 3, side, side].
        bad: numbers of the views whose image could not be read; their pixels mean nothing.
    """

    views: dict[int, Tensor]
    bad: tuple[int, ...]


class PixelLoader:
    """Decodes the images of pairs on a few threads. What cannot be decoded is written to the quarantine file."""

    def __init__(self, index: SampleIndex, vision: VisionConfig, *, workers: int, quarantine: Path) -> None:
        self.index, self.vision, self.quarantine = index, vision, quarantine
        self._reader, self._views = ImageReader(index), views_of(vision.parts)
        self._pool = ThreadPoolExecutor(workers, "decode")

    def submit(self, views: Sequence[tuple[int, int]]) -> "PendingPixels":
        """Begin to read views, given as (pair, number of the view)."""
        kind = images.pixel_type(self.vision)
        arrays = {side: np.zeros((len(views), 3, side, side), kind) for side in self.vision.sides}
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, (pair, view) in enumerate(views):
            wanted.setdefault(pair, []).append((view, place))
        read = {pair: self._pool.submit(self._read, pair, places, arrays) for pair, places in wanted.items()}
        return PendingPixels(self, list(views), arrays, read)

    def _read(self, pair: int, wanted: Sequence[tuple[int, int]], arrays: dict[int, NDArray[Any]]) -> bool:
        """Write views of a pair, given as (number, place), to their places; False where it cannot be read."""
        try:
            canvas = images.Canvas(images.decode(self._reader.read(pair)), self.vision)
        except (DataError, OSError) as error:
            self.report(pair, str(error))
            return False
        for view, place in wanted:
            for side, array in arrays.items():
                array[place] = canvas.cut(self._views[view], side)
        return True

    def report(self, pair: int, reason: str) -> None:
        """Write a pair to the quarantine file."""
        shard, key = self._reader.name(pair)
        line = json.dumps({"shard": shard, "key": key, "pair": pair, "reason": " ".join(reason.split())})
        with writing(self.quarantine.parent), self.quarantine.open("a") as file:
            file.write(line + "\n")


@dataclass(frozen=True)
class PendingPixels:
    """Views that are being read."""

    loader: PixelLoader
    views: list[tuple[int, int]]
    arrays: dict[int, NDArray[Any]]
    read: dict[int, "Future[bool]"]

    def report(self, view: int, reason: str) -> None:
        """Write the pair of one of the views to the quarantine file."""
        self.loader.report(self.views[view][0], reason)

    def wait(self) -> None:
        """Until all are read."""
        wait(self.read.values())

    def result(self) -> Pixels:
        """Wait for the pixels."""
        bad = {pair for pair, read in self.read.items() if not read.result()}
        views = {side: torch.from_numpy(array) for side, array in self.arrays.items()}
        return Pixels(views, tuple(n for n, (pair, _) in enumerate(self.views) if pair in bad))


def views_in(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """The views of a micro-batch as (pair, number of the view), in the order in which its MicroBatch has them."""
    pieces = sorted((piece.item, piece.views) for row in rows for piece in row if piece.is_sample)
    return [(pair, view) for pair, views in pieces for view in views]


def numbered_rounds(planner: Planner, start: int, stop: int) -> Iterator[tuple[int, int, tuple[tuple[Row, ...], ...]]]:
    """The micro-batches of `rounds`, each behind its step and its number in the step."""
    for step in range(start, stop):
        for number, micro_batch in enumerate(planner.step(step).micro_batches):
            yield step, number, micro_batch


def rounds(planner: Planner, start: int, stop: int) -> Iterator[tuple[tuple[Row, ...], ...]]:
    """The micro-batches of steps `start` to `stop`, one behind the other: for each replica its rows."""
    for _, _, micro_batch in numbered_rounds(planner, start, stop):
        yield micro_batch
