"""The cache against the forward of training: log-probabilities of every token, in every layout, chunk and batch."""

import io
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megatron_sphinx.generation.executor import LanguageRankExecutor, serve_encoder
from megatron_sphinx.generation.pictures import views_of_picture
from megatron_sphinx.generation.requests import Picture
from megatron_sphinx.generation.runner import ModelRunner
from megatron_sphinx.generation.ticks import Draw, Piece, Tick
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig, VisualExpertConfig
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.language import build_language, draw_weights
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.model.views import encoded_views, image_positions
from megatron_sphinx.model.vision import VisualProjection
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run.job import join

VOCABULARY, BLOCK, PLACES = 100, 8, 1600
EXPERTS = (VisualExpertConfig(name="dinov2_small", weights="random"),)
ONE_VIEW = VisionConfig(experts=EXPERTS, grid=4)
VIEWS = {
    1: ONE_VIEW,
    5: replace(ONE_VIEW, views=5, padding="corner", skip_padding_views=True),
    10: replace(ONE_VIEW, views=10, padding="corner", skip_padding_views=True),
}
LAYOUTS = {  # ranks, and their sizes
    "T1": (1, {}),
    "T2": (2, {"tensor": 2}),
    "P2": (2, {"pipeline": 2}),
    "P3": (3, {"pipeline": 3}),
    "T2xP2": (4, {"tensor": 2, "pipeline": 2}),
    "D2": (2, {}),
    "D2xP2": (4, {"pipeline": 2}),
    "T1+encoder": (2, {"encoder": 1}),
    "T2xP2+encoders": (6, {"tensor": 2, "pipeline": 2, "encoder": 2}),
    "E2": (2, {"expert": 2}),
    "T2xE2": (2, {"tensor": 2, "expert": 2}),
    "E2xP2": (4, {"expert": 2, "pipeline": 2}),
}
FAST = {("llama", "T1"), ("mixtral", "T1"), ("llama", "T2xP2"), ("mixtral", "T2xE2"), ("llama", "D2xP2"),
        ("llama", "T2xP2+encoders"), ("mixtral", "E2xP2")}  # fmt: skip


def language(kind: str) -> LanguageConfig:
    experts = {"experts": 4, "experts_per_token": 2} if kind == "mixtral" else {}
    return LanguageConfig(
        layers=3, hidden=32, ffn=48, heads=4, groups=2, vocabulary=VOCABULARY, init_std=0.2, **experts
    )


def picture(number: int, vision: VisionConfig) -> Picture:
    """A picture of noise, of a shape of its own."""
    rng = np.random.default_rng(number)
    width, height = [(40, 40), (70, 20), (24, 64), (50, 12)][number % 4]
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "png")
    encoded = encoded_views(width, height, vision)
    positions = image_positions(len(encoded), vision)
    return Picture(sha256(file.getvalue()).hexdigest(), file.getvalue(), width, height, encoded, positions)


class Sequences:
    """Sequences of random tokens, some behind a picture that others are behind, too."""

    def __init__(self, vision: VisionConfig, seed: int, count: int = 7) -> None:
        rng = random.Random(seed)
        shown = [picture(number, vision) for number in range(3)]
        self.pictures = [rng.choice([*shown, None]) for _ in range(count - 1)] + [shown[1]]
        self.tokens = []
        for one in self.pictures:
            text = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(2, 40))]
            self.tokens.append([1, *[0] * (one.positions if one else 0), *text])

    def targets(self, number: int) -> list[int]:
        """The positions behind which a next token is known that is no picture's."""
        one = self.pictures[number]
        first = one.positions if one else 0
        return list(range(first, len(self.tokens[number]) - 1))


def groups_of(sizes: ParallelConfig, world: int) -> ProcessGroups:
    platform = join("cpu", 60)
    return ProcessGroups.create(
        ParallelLayout(world=world, config=sizes), platform.backend, timedelta(seconds=60), timedelta(seconds=60)
    )


def build(kind: str, vision: VisionConfig, groups: ProcessGroups) -> SphinxModel:
    config = language(kind)
    projection = None
    if groups.is_first_stage:
        projection = VisualProjection(vision, config.hidden, dtype=torch.float32, device=torch.device("cpu"))
    model = SphinxModel(
        build_language(config, groups, dtype=torch.float32, sequence_length=512), projection, groups
    ).eval()
    draw_weights(model, config, groups, seed=4)
    return model


def encoders_of(vision: VisionConfig) -> FrozenEncoders:
    return FrozenEncoders(vision, device=torch.device("cpu"), dtype=torch.float32, seed=1)


def forward(model: SphinxModel, features: torch.Tensor, tokens: list[int], one: Picture | None) -> list[float]:
    """Log-probabilities of the tokens behind a picture, and BOS, by the forward that training takes."""
    vision = model.vision.config
    at, views, skips = 1, [], []
    for view in range(vision.views if one else 0):
        is_encoded = view in one.encoded
        size = vision.tokens_per_view if is_encoded else 1
        (views if is_encoded else skips).extend(range(at, at + size))
        at += size
    nobody = torch.zeros(len(tokens), dtype=torch.int64)
    batch = MicroBatch(
        tokens=torch.tensor(tokens), targets=torch.tensor([*tokens[1:], -100]),
        target_positions=torch.arange(at - 1, len(tokens) - 1), lengths=(len(tokens),), sample_of_token=nobody,
        row_of_token=nobody, rows=1, view_positions=torch.tensor(views, dtype=torch.int64),
        skip_positions=torch.tensor(skips, dtype=torch.int64), sample_of_view=nobody[:0], samples=(0,), documents=(),
    )  # fmt: skip
    with torch.no_grad():
        return (-model(batch, features)).tolist()


def whole(kind: str, vision: VisionConfig, seed: int) -> list[list[float]]:
    """Log-probabilities by the forward that training takes, one sequence at a time."""
    groups = groups_of(ParallelConfig(), 1)
    model, encoders, sequences = build(kind, vision, groups), encoders_of(vision), Sequences(vision, seed)
    none = torch.zeros(0, vision.feature_values)
    return [
        forward(model, encoders(views_of_picture(one, vision)) if one else none, tokens, one)
        for tokens, one in zip(sequences.tokens, sequences.pictures, strict=True)
    ]


class Driver:
    """Drives an executor as the engine does, but by chance: chunks, batches, places, and who goes together."""

    under_way: ClassVar[list] = []  # who is in the ticks that a pipeline has not ended yet

    def __init__(self, executor: LanguageRankExecutor, sequences: Sequences, seed: int) -> None:
        self.executor, self.sequences, self.rng = executor, sequences, random.Random(seed)
        count = len(sequences.tokens)
        self.replica = [number % executor.replicas for number in range(count)]
        free = [self._blocks() for _ in range(executor.replicas)]
        self.blocks = []
        for number, tokens in enumerate(sequences.tokens):
            self.blocks.append([free[self.replica[number]].pop() for _ in range(-(-len(tokens) // BLOCK))])
        self.scores: list[list[float]] = [[] for _ in range(count)]
        self.done = [0] * count

    def _blocks(self) -> list[int]:
        blocks = list(range(PLACES // BLOCK))
        if self.rng.random() < 0.7:  # else stretches are whole sequences
            self.rng.shuffle(blocks)
        return blocks

    def segments(self, number: int, tokens: int) -> tuple[tuple[int, int], ...]:
        found: list[tuple[int, int]] = []
        for block in self.blocks[number]:
            count = min(BLOCK, tokens)
            tokens -= count
            if count and found and sum(found[-1]) == block * BLOCK:
                found[-1] = (found[-1][0], found[-1][1] + count)
            elif count:
                found.append((block * BLOCK, count))
        return tuple(found)

    def piece(self, number: int) -> Piece:
        tokens, start = self.sequences.tokens[number], self.done[number]
        count = min(len(tokens) - start, self.rng.choice([1, 1, 1, 4, 30]))
        self.done[number] = end = start + count
        wanted = [position for position in self.sequences.targets(number) if start <= position < end]
        one = self.sequences.pictures[number]
        return Piece(
            tuple(tokens[start:end]), start, self.segments(number, end), one.key if one else None,
            draw=Draw(0, 0) if self.rng.random() < 0.5 else None,
            targets=tuple((position - start, tokens[position + 1]) for position in wanted),
        )  # fmt: skip

    def run(self) -> list[list[float]]:
        """Compute all sequences; the log-probabilities of each one's tokens."""
        executor, stages = self.executor, self.executor.stages
        wanted = {(one.key, self.replica[number]): one for number, one in enumerate(self.sequences.pictures) if one}
        for (_, replica), one in wanted.items():
            executor.encode(one, replica)
        while wanted:
            for key in executor.encoded():
                del wanted[key]
        tick = 0
        while True:
            lane = [n for n in range(len(self.done)) if n % stages == tick % stages]
            open_ = [n for n in lane if self.done[n] < len(self.sequences.tokens[n])]
            chosen = self.rng.sample(open_, self.rng.randint(min(1, len(open_)), len(open_)))
            numbers = [[n for n in chosen if self.replica[n] == replica] for replica in range(executor.replicas)]
            self.under_way.append(numbers)
            pieces = tuple(tuple(self.piece(n) for n in of_replica) for of_replica in numbers)
            outcomes = executor.tick(Tick(pieces, ((),) * executor.replicas))
            if outcomes is not None:
                for of_replica, given in zip(self.under_way.pop(0), outcomes, strict=True):
                    for number, outcome in zip(of_replica, given, strict=True):
                        self.scores[number] += outcome.scores
            tick += 1
            is_done = all(done == len(tokens) for done, tokens in zip(self.done, self.sequences.tokens, strict=True))
            if is_done and not any(any(numbers) for numbers in self.under_way):
                return self.scores


def compute(kind: str, vision: VisionConfig, sizes: ParallelConfig, seeds: Sequence[int], target: Path) -> None:
    """What each rank does: the first one drives, and writes what it found."""
    groups = groups_of(sizes, int(os.environ["WORLD_SIZE"]))
    if groups.seat.encoder is not None:
        serve_encoder(encoders_of(vision), groups)
        return
    is_encoding = groups.is_first_stage and not sizes.encoder
    runner = ModelRunner(build(kind, vision, groups), places=PLACES, vocabulary=VOCABULARY)
    executor = LanguageRankExecutor(
        runner, groups, encoders_of(vision) if is_encoding else None, places=PLACES, block=BLOCK, positions=512
    )
    if dist.get_rank():
        executor.follow()
        return
    sequences = Sequences(vision, 3)
    torch.save([Driver(executor, sequences, seed).run() for seed in seeds], target)
    executor.close()


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """What the forward of training gives, by model and views; computed once."""
    return {}, tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize(
    ("kind", "layout", "views"),
    [
        pytest.param(
            kind, layout, views, marks=() if (kind, layout) in FAST and views == views_of_case else pytest.mark.slow
        )
        for number, (kind, layout) in enumerate((k, one) for k in ("llama", "mixtral") for one in LAYOUTS)
        if kind == "mixtral" or "E2" not in layout
        for views_of_case in [tuple(VIEWS)[number % 3]]
        for views in VIEWS
    ],
)
def test_the_cache_gives_what_the_forward_of_training_does(run_ranks, tmp_path, known, kind, layout, views):
    remembered, folder = known
    path = folder / f"{kind}_{views}.pt"
    if path not in remembered:
        run_ranks(1, lambda: torch.save(whole(kind, VIEWS[views], 3), path))
        remembered[path] = torch.load(path)
    world, sizes = LAYOUTS[layout]
    if kind == "mixtral" and sizes.get("tensor", 1) > 1 and "expert" not in sizes:
        sizes = sizes | {"expert": 1}
    run_ranks(world, lambda: compute(kind, VIEWS[views], ParallelConfig(**sizes), (1, 2), tmp_path / "found.pt"))
    for found in torch.load(tmp_path / "found.pt"):
        for one, wanted in zip(found, remembered[path], strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(wanted), rtol=0, atol=1e-5)
    assert {a != b for a, b in pairwise(remembered[path])} == {True}, "sequences that are all alike show nothing"
