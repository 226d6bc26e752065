"""The work and the communication that sizing counts, beside what a step really sends and what the model needs."""

import json
import os
import random
from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.sizing import counts
from megatron_sphinx.sizing.counts import TrainingSetup
from megatron_sphinx.sizing.layouts import work_of
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.training.step import Trainer


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"parallel.tensor": 2},
        {"parallel.tensor": 2, "parallel.sequence": True},
        {"parallel.pipeline": 2},
        {"model.experts": 4, "parallel.expert": 2},
        {"parallel.tensor": 2, "training.activation_checkpointing": "full"},
    ],
)
def test_bytes_of_collectives(run_ranks, tiny, tmp_path, monkeypatch, overrides):
    """What a step sends is what megatron-core and DeepSpeed hand to torch.distributed, in groups of two."""
    path = tiny.write(tmp_path / "run.yaml", {"training.steps": 2, "training.precision": "fp32"} | overrides)
    config = configuration.load(path)
    layout = ParallelLayout(world=2, config=config.parallel)
    work, _ = work_of(config)
    planned = counts.communication(TrainingSetup.ours(config, is_cuda=False), layout, work)
    steps: list[Counter[str]] = []
    take_step = Trainer.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        with CountBytes() as counts:
            report = take_step(*args, **kwargs)
        steps.append(counts.found)
        return report

    monkeypatch.setattr(Trainer, "step", counted)

    def check() -> None:
        assert main(["train", str(path)]) == 0
        (tmp_path / os.environ["RANK"]).write_text(json.dumps(steps[0]))

    run_ranks(2, check)
    sent = [Counter(json.loads((tmp_path / str(rank)).read_text())) for rank in range(2)]
    for role, transfers in planned.items():
        ranks = [rank for rank in range(2) if role == f"language stage {layout.seat(rank).pipeline}"]
        expected: Counter[str] = Counter()
        for transfer in transfers:
            expected[transfer.kind] += transfer.bytes
        for kind, total in expected.items():
            found = sum(sent[rank][kind] for rank in ranks) / len(ranks)  # replicas have unlike rows
            assert found == pytest.approx(total, rel=0.05), (role, kind, expected, sent)


class CountBytes(TorchDispatchMode):
    """Counts the bytes that this rank hands to each kind of collective in groups of several ranks."""

    KINDS: ClassVar = {
        "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
        "reduce_": "reduce_scatter", "alltoall_base_": "all_to_all", "send": "send", "broadcast_": "broadcast",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace == "c10d" and name in self.KINDS:
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            inputs = args[1] if name in ("_reduce_scatter_base_", "alltoall_base_") else args[0]
            values = [inputs] if isinstance(inputs, torch.Tensor) else inputs
            large = [value for value in values if value.numel() > 24]  # reports and counts are less
            if group.size() > 1:
                self.found[self.KINDS[name]] += sum(value.nbytes for value in large)
        return func(*args, **(kwargs or {}))


def test_work_of_expected_and_planned_steps_agree(tiny, tmp_path):
    config = configuration.load(tiny.write(tmp_path / "run.yaml"))
    planned, origin = work_of(config)
    assert origin.startswith("planned")
    expected = Work.expected(config)
    total = [work.rows * work.positions for work in (planned, expected)]
    assert total[1] == pytest.approx(total[0], rel=0.3)
    assert planned.rows * planned.views == expected.rows * expected.views == config.data.pairs_per_step


def test_flops_are_the_models(tiny, tmp_path):
    """All ranks together compute what LanguageConfig.train_flops counts, attention's backward and padding aside."""
    rng = random.Random(7)
    config = configuration.load(tiny.write(tmp_path / "run.yaml", {"model.vocabulary": 256}))
    work = replace(work_of(config)[0], rows=8)
    sizes = ParallelConfig(tensor=rng.choice([1, 2]), pipeline=rng.choice([1, 2]))
    layout = ParallelLayout(world=4, config=sizes)
    found = counts.flops(TrainingSetup.ours(config, is_cuda=True), layout, work)
    parts = ((part["matrices"], part["logits"], part["attention"] * 3 / 3.5) for part in found.values())
    counted = work.rows * work.language_flops(config.model)
    assert sum(map(sum, parts)) * layout.stage == pytest.approx(counted, rel=1e-6)
