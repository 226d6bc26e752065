"""Gradients from backward to the partitions: the sum is right for any cut, and few bytes are moved for it."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sphinx import config as configuration
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.device import current_platform
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.run import assembly
from megatron_sphinx.run.job import open_run
from megatron_sphinx.training import gradients
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.gradients import PartitionedGradients, PartitionedGroup

MOST_BYTES = 16  # for each weight and micro-batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_parts_hold_the_sum_of_all_replicas_for_random_shapes_and_buckets(run_ranks, monkeypatch, copies, dtype):
    rng = random.Random(31 * copies)
    for case in range(4):
        shapes = [tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 7))]
        monkeypatch.setattr(gradients, "BUCKET", rng.choice([1, 3, 17, 64, 10**6]))
        micro_batches, in_backward = rng.randint(1, 4), rng.random() < 0.5
        run_ranks(copies, lambda: check_sum(shapes, micro_batches, dtype, seed=case, in_backward=in_backward))  # noqa: B023


def check_sum(shapes, micro_batches: int, dtype: torch.dtype, *, seed: int, in_backward: bool) -> None:
    """Sum random gradients of two groups of weights, and compare each rank's part with what all ranks drew."""
    dist.init_process_group("gloo")
    rank, copies = dist.get_rank(), dist.get_world_size()
    sizes = [torch.Size(shape).numel() for shape in shapes]
    weights = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    cuts = []
    for members in (weights[::2], weights[1::2]):
        offsets = [sum(weight.numel() for weight in members[:number]) for number in range(len(members))]
        part = -(-sum(weight.numel() for weight in members) // copies) + seed % 2  # the last part is filled up
        cuts.append(PartitionedGroup(members, offsets, part, dist.group.WORLD))
    reduced = PartitionedGradients(cuts, torch.device("cpu"))
    if in_backward:
        reduced.take_in_backward()
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(2):  # steps
        # numbers whose sums are exact in any order and in either type
        flat = torch.randint(-3, 4, (copies, micro_batches, sum(sizes)), generator=drawn)
        for own in flat[rank]:
            parts = zip(weights, own.to(dtype).split(sizes), strict=True)
            sum(((weight * part.view(weight.shape)).sum() for weight, part in parts), torch.zeros([])).backward()
            assert in_backward == all(weight.grad is None for weight in weights)
        if not in_backward:
            reduced.take_all()
        reduced.finish()
        assert not list(reduced.buffers())
        whole = dict(zip(weights, flat.sum((0, 1)).float().split(sizes), strict=True))
        for cut, part in zip(cuts, reduced.parts(), strict=True):
            expected = torch.zeros(cut.part * copies)
            expected[: sum(weight.numel() for weight in cut.weights)] = torch.cat(
                [whole[weight] for weight in cut.weights] or [torch.zeros(0)]
            )
            assert part.dtype is torch.float32
            assert torch.equal(part, expected[rank * cut.part :][: cut.part])
        reduced.clear()


def test_a_bf16_sum_over_micro_batches_is_not_rounded(run_ranks):
    def check() -> None:
        dist.init_process_group("gloo")
        weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        reduced = PartitionedGradients([PartitionedGroup([weight], [0], 1, dist.group.WORLD)], torch.device("cpu"))
        reduced.take_in_backward()
        for value in [256.0] + [1.0] * 9:  # in bf16 256 + 1 is 256
            (weight * value).sum().backward()
        reduced.finish()
        assert reduced.parts()[0].tolist() == [265.0]

    run_ranks(1, check)


def test_weights_without_a_gradient_have_zeros_and_memory_is_not_read_before_it_is_written(run_ranks, monkeypatch):
    def check() -> None:
        dist.init_process_group("gloo")
        monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(size, float("nan"), **options))
        weights = [nn.Parameter(torch.zeros(count)) for count in (2, 3, 1)]
        reduced = PartitionedGradients([PartitionedGroup(weights, [0, 3, 6], 8, dist.group.WORLD)], torch.device("cpu"))
        reduced.take_in_backward()
        weights[1].sum().backward()
        weights[1].sum().backward()
        reduced.finish()
        assert reduced.parts()[0].tolist() == [0, 0, 0, 2, 2, 2, 0, 0]
        weights[0].sum().backward()  # more after it is finished
        reduced.finish()
        assert reduced.parts()[0].tolist() == [1, 1, 0, 2, 2, 2, 0, 0]
        reduced.clear()
        reduced.finish()
        assert reduced.parts()[0].tolist() == [0] * 8

    run_ranks(1, check)


class CountMoved(TorchDispatchMode):
    """Counts the bytes that operations on gradients read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.is_counting = Counter[str](), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.is_counting and func.namespace == "aten" and not func.is_view and name not in ("detach", "empty"):
            read = args[1:] if name == "copy_" else args  # what is overwritten is not read
            tensors = [leaf for leaf in (*read, out) if isinstance(leaf, torch.Tensor)]
            self.moved[name] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
def test_at_most_16_bytes_are_moved_for_each_weight_and_micro_batch(run_ranks, tiny, tmp_path, world, precision):
    config = configuration.load(tiny.write(tmp_path / "run.yaml", {"training.precision": precision}))

    def check() -> None:
        dist.init_process_group("gloo")
        groups = ProcessGroups.create(ParallelLayout(world=world, config=config.parallel), "gloo")
        context = open_run(config, current_platform(), groups)
        model = assembly.build_model(config, groups, context.platform)
        engine = assembly.build_engine(context, model)
        features = assembly.build_features(context, context.encoders(), 0)
        trainer = assembly.build_trainer(context, engine, features, Watch(config.divergence))
        plan = context.planner.step(0)
        builder = BatchBuilder(config.data, context.sources, config.vision, context.planner.multiple)
        batches = [builder.build(replicas[groups.seat.data]) for replicas in plan.micro_batches]
        counter = CountMoved()
        for name in ("take_from", "finish"):
            setattr(engine.reduced, name, counted(getattr(engine.reduced, name), counter))
        for weight in model.parameters():
            weight._post_accumulate_grad_hooks.clear()
        engine.reduced.take_in_backward()
        with counter:
            trainer.step(plan, batches, rate=0.1)
        weights = sum(weight.numel() for weight in model.parameters())
        each = sum(counter.moved.values()) / weights / len(batches)
        assert len(batches) > 1
        assert 4 < each <= MOST_BYTES, (each, counter.moved)
        assert not engine._optimizer._grad_acc_hooks, "DeepSpeed takes the gradients too"

    run_ranks(world, check)


def counted(work, counter: CountMoved):
    """Let the counter count while some work is done."""

    def done(*args):
        counter.is_counting = True
        work(*args)
        counter.is_counting = False

    return done
