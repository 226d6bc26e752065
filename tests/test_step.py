"""One step by itself: what a target weighs, what a pair that could not be read takes away, and what is handed on."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_sphinx.liveness.progress import Progress
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.training.divergence import DivergenceConfig, Watch
from megatron_sphinx.training.step import Trainer

TEXT_WEIGHT, NORM = 0.25, 2.0
LOSSES = torch.tensor([1.0, 2.0, 3.0, 7.0, 5.0, 11.0])  # three targets of pair 0, one of pair 1, two of a text
BATCH = MicroBatch(
    tokens=torch.zeros(8, dtype=torch.int64),
    targets=torch.tensor([-100, 1, 1, 1, -100, 1, 1, 1]),
    target_positions=torch.tensor([1, 2, 3, 5, 6, 7]),
    lengths=(4, 2, 2),
    sample_of_token=torch.tensor([0, 0, 0, 0, 1, 1, -1, -1]),
    row_of_token=torch.zeros(8, dtype=torch.int64),
    rows=1,
    view_positions=torch.tensor([0, 4]),
    skip_positions=torch.zeros(0, dtype=torch.int64),
    sample_of_view=torch.tensor([0, 1]),
    samples=(10, 11),
    documents=(3,),
)


class OneLoss:
    """An engine whose gradient is not computed: it notes what it was given."""

    def __init__(self) -> None:
        self.losses, self.update_of, self.is_discarded = [], None, False

    def model(self, _batch, features, _routing):
        assert not features.isnan().any(), "a picture that could not be read reaches no weight"
        return LOSSES

    def backward(self, forward, batches):
        self.losses = [float(forward(batch)) for batch in batches]

    def gradient_norm(self):
        return NORM

    def update(self, rate, norm, factor):
        self.update_of = (rate, norm, factor)

    def discard(self):
        self.is_discarded = True


def take_step(bad_views: list[int], watch: Watch | None = None):
    """A step of one micro-batch, some of whose views could not be read; its engine and its report."""
    dist.init_process_group("gloo")
    groups = ProcessGroups.create(ParallelLayout(world=1, config=ParallelConfig()), "gloo")
    features = torch.ones(2, 3)
    features[bad_views] = torch.nan
    source = SimpleNamespace(
        waiting=SimpleNamespace(seconds=0.0), received_bytes=0, prepare=lambda _: None, next=lambda: features
    )
    engine = OneLoss()
    trainer = Trainer(
        engine=engine, features=source, groups=groups, device=torch.device("cpu"),
        watch=watch or Watch(DivergenceConfig()), progress=Progress(), text_weight=TEXT_WEIGHT, moe_layers=0,
    )  # fmt: skip
    plan = SimpleNamespace(positions=8, targets=lambda **stream: 4 if next(iter(stream.values())) else 2)
    return engine, trainer.step(plan, [BATCH], rate=0.5)


def check_each_target_weighs_the_same_and_text_its_weight() -> None:
    engine, report = take_step([])
    planned = 4 + TEXT_WEIGHT * 2
    mean = (1 + 2 + 3 + 7 + TEXT_WEIGHT * (5 + 11)) / planned
    assert engine.losses == pytest.approx([mean])
    assert report.loss == pytest.approx(mean)
    assert engine.update_of == (0.5, NORM, 1.0)
    assert (report.sums.targets_pairs, report.sums.targets_text, report.sums.bad_pairs) == (4, 2, 0)


def check_what_a_bad_pair_takes_away_is_made_up_for() -> None:
    engine, report = take_step([1])
    planned, left = 4 + TEXT_WEIGHT * 2, 3 + TEXT_WEIGHT * 2
    total = 1 + 2 + 3 + TEXT_WEIGHT * (5 + 11)
    assert engine.losses == pytest.approx([total / planned]), "divided by what was planned, before all ranks are asked"
    rate, norm, factor = engine.update_of
    assert (rate, factor, norm) == (0.5, pytest.approx(planned / left), pytest.approx(NORM * planned / left))
    assert report.loss == pytest.approx(total / left)
    assert report.gradient_norm == norm
    assert (report.sums.targets_pairs, report.sums.bad_pairs) == (3, 1)


def check_text_makes_up_for_pairs_that_are_all_bad() -> None:
    engine, report = take_step([0, 1])
    assert report.sums.bad_pairs == 2
    assert engine.update_of[2] == pytest.approx((4 + TEXT_WEIGHT * 2) / (TEXT_WEIGHT * 2)), "text is left"


def check_a_fault_discards_the_gradient_and_names_the_samples() -> None:
    watch = Watch(DivergenceConfig(on_spike="skip", window=4, sigma=1.0))
    for step in range(4):
        watch.settle(step, 1.0 + step / 100, NORM, "", ([], []))
    engine, report = take_step([], watch)
    assert engine.is_discarded
    assert engine.update_of is None
    assert report.fault.startswith("loss is ")
    assert report.samples == ([10, 11], [3])


@pytest.mark.parametrize(
    "check",
    [
        check_each_target_weighs_the_same_and_text_its_weight,
        check_what_a_bad_pair_takes_away_is_made_up_for,
        check_text_makes_up_for_pairs_that_are_all_bad,
        check_a_fault_discards_the_gradient_and_names_the_samples,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_a_step(run_ranks, check):
    run_ranks(1, check)
