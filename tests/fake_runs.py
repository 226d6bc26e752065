"""Runs of a benchmark that end at once, with made-up numbers: a plugin of the tests that measure nothing."""

import pytest

from megatron_sphinx.benchmark import sweep
from megatron_sphinx.benchmark.summary import MeasuredRun
from megatron_sphinx.benchmark.sweep import BenchmarkError, Measurement
from megatron_sphinx.data.packing import views_in
from megatron_sphinx.data.sources import make_planner, open_sources


def planner_of(config):
    sources = open_sources(config.data, config.model)
    return make_planner(config.data, sources, config.model, config.vision, replicas=1, seed=config.run.seed)


class FakeRuns:
    """Runs that end at once, of the samples and the work that the configuration asks for.

    Attributes:
        asked: configuration and ranks of each.
        seconds: of each step of each run, from its configuration and how many there were before it.
        samples: what names a run's samples.
        error: what a run ends with, from its configuration; nothing where it ends well.
    """

    def __init__(self):
        self.asked, self.seconds = [], lambda config, before: [1.0] * 99
        self.samples = self.error = lambda config: ""

    def __call__(self, how, config, folder):
        taken = self.seconds(config, len(self.asked))[: how.warmup + how.steps]
        self.asked.append((config, how.ranks))
        if error := self.error(config):
            raise BenchmarkError(error)
        lines = [
            {
                "step": step,
                "sample_ids": f"{self.samples(config)} {step}",
                "step_seconds": seconds,
                "tokens_per_second": 600 / seconds,
                "exposed_encoder_seconds": seconds / 4,
                "data_wait_seconds": seconds / 10,
                "feature_bytes": 1000 * (step + 1),
            }
            for step, seconds in enumerate(taken)
        ][how.warmup :]
        plan = planner_of(config).step(0)
        text_tokens, views = sum(tokens for _, _, tokens in plan.text), len(views_in(plan.rows))
        work = {"positions": plan.positions, "pairs": len(plan.samples), "text_tokens": text_tokens, "views": views}
        work["language_flops"] = 8e9
        encoders = config.parallel.encoder
        ranks = [self.rank(rank, lines, work) for rank in range(how.ranks - encoders)]
        ranks += [self.encoder(how.ranks - encoders + n, work["views"] / encoders) for n in range(encoders)]
        return MeasuredRun(lines, ranks)

    def rank(self, rank, lines, work):
        names = {"seconds": 1.0, "data_wait_seconds": 0.1, "exposed_encoder_seconds": 0.25 / (rank + 1)}
        steps = {name: [line["step_seconds"] * share for line in lines] for name, share in names.items()}
        own = {"role": "language", "steps": steps, "work": work, "communication": {"data": 0.125 * (rank + 1)}}
        return self.facts(rank) | own

    def encoder(self, rank, views):
        spent = {"read_seconds": 1.0, "encode_seconds": 5.0, "send_seconds": 4.0}
        return (
            self.facts(rank) | {"role": "encoder", "views_per_step": views, "communication": {"features": 0.4}} | spent
        )

    def facts(self, rank):
        return {
            "rank": rank, "host": f"n{rank // 2}", "device": "Abacus 9", "threads": 3, "backend": "gloo",
            "layout": "as it is", "peak_flops": 2e10, "peak_memory_bytes": 2**30 + rank,
        }  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    fake = FakeRuns()
    monkeypatch.setattr(sweep, "_run", fake)
    return fake


@pytest.fixture
def how(tiny, tmp_path):
    """`how(**changes)` is a Measurement of the small model."""
    config = tiny.write(tmp_path / "c.yaml")
    defaults = {"config": config, "ranks": 2, "steps": 3, "warmup": 1, "repeats": 2, "folder": tmp_path / "bench"}
    return lambda **changes: Measurement(**defaults | changes)
