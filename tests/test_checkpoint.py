"""Training states: cut into boxes and put together again, moved between layouts, and what damage gets."""

import json
import os
import random
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint import store
from megatron_sphinx.checkpoint.slices import TensorSlice
from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.checkpoint.store import CheckpointStore, load_weights
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.shards import Block, WeightShard, _blocks_of_rank
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import job

EXACT = ("loss", "loss_pairs", "loss_text", "gradient_norm")
MIXTRAL = {
    "model.experts": 4, "model.balance_loss_coefficient": 0.1, "model.layers": 3, "model.heads": 4, "model.groups": 4,
    "optimizer.epsilon": 1e-4,
}  # fmt: skip
# world and sizes; all fit MIXTRAL
LAYOUTS = [
    (1, {}),
    (2, {}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (3, {"pipeline": 3}),
    (2, {"expert": 2}),
    (4, {"expert": 2, "expert_tensor": 2}),
    (4, {"tensor": 2, "sequence": True, "expert": 2}),
    (4, {"pipeline": 2, "expert": 2}),
    (3, {"encoder": 1}),
    (4, {"tensor": 2, "sequence": True, "encoder": 2, "expert_tensor": 2}),
    (5, {"pipeline": 2, "encoder": 1, "pipeline_layers": [1, 2]}),
]


def overrides(sizes: dict) -> dict:
    return MIXTRAL | {f"parallel.{axis}": size for axis, size in sizes.items()}


# boxes


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_of_a_shard_is_boxes_of_the_whole(seed):
    rng = random.Random(seed)
    ranks, stride = rng.choice([1, 2, 3]), rng.choice([1, 2])
    shape = [rng.randint(1, 5) for _ in range(rng.randint(1, 4))]
    dim = rng.randrange(len(shape)) if stride == 1 else 0  # stacked matrices are cut along 0
    shape[dim] *= stride  # what one rank has
    whole_shape, _ = _blocks_of_rank(shape, dim, stride, ranks, 0)
    whole = torch.arange(torch.Size(whole_shape).numel()).view(whole_shape)
    seen = torch.zeros_like(whole)
    for rank in range(ranks):
        _, blocks = _blocks_of_rank(shape, dim, stride, ranks, rank)
        local = torch.cat([whole[box(block)].flatten() for block in blocks])
        shard = WeightShard("w", whole_shape, tuple(blocks), is_first_copy=True, is_expert=False)
        cuts = sorted({0, len(local), *(rng.randint(0, len(local)) for _ in range(3))})
        for start, stop in pairwise(cuts):
            behind = start
            for block, at in shard.boxes(start, stop - start):
                assert at == behind, "boxes follow one another in memory"
                part = local[at : at + torch.Size(block.shape).numel()].view(block.shape)
                assert torch.equal(part, whole[box(block)])
                seen[box(block)] += 1
                behind += part.numel()
            assert behind == stop
    assert (seen == 1).all()


def box(block: Block) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(block.offset, block.shape, strict=True))


# layouts


@pytest.fixture(scope="module")
def whole_run():
    """Metrics and weights of a run in one go on one rank, computed once."""
    return {}


@pytest.mark.parametrize("pair", [*range(4), *(pytest.param(pair, marks=pytest.mark.slow) for pair in range(4, 8))])
def test_a_run_goes_on_in_another_layout(train, whole_run, pair):
    first, second = random.Random(f"pair {pair}").sample(LAYOUTS, 2)
    settings = {"training.steps": 8, "checkpoint.interval": 4}
    if not whole_run:
        done = train(1, overrides({}) | settings, name="whole")
        whole_run["metrics"] = done.metrics
        whole_run["weights"] = load_weights(done.folder / "checkpoints")
    ended = train(first[0], overrides(first[1]) | settings, name="moved")
    (ended.folder / "checkpoints" / "step_00000008" / "checkpoint.json").unlink()  # as if it had ended before
    moved = train(second[0], overrides(second[1]) | settings, name="moved")
    assert "resumed after step 4 from" in moved.ranks.text(0), f"{first} to {second}"
    assert "from layout" in moved.ranks.text(0)
    assert [line["step"] for line in moved.metrics] == list(range(8))
    for line, wanted in zip(moved.metrics, whole_run["metrics"], strict=True):
        for name in EXACT:
            assert line[name] == pytest.approx(wanted[name], rel=1e-5), f"{first} to {second}: {name}"
    for name, weight in load_weights(moved.folder / "checkpoints").items():
        torch.testing.assert_close(weight, whole_run["weights"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("world", "sizes"),
    [(4, {"tensor": 2, "sequence": True, "expert": 2}), (5, {"pipeline": 2, "expert": 2, "encoder": 1})],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_the_same_layout_a_run_goes_on_to_the_bit(train, world, sizes, precision):
    settings = overrides(sizes) | {"training.steps": 6, "checkpoint.interval": 3, "training.precision": precision}
    run = train(world, settings)
    wanted = [[line[name] for name in EXACT] for line in run.metrics]
    weights = load_weights(run.folder / "checkpoints")
    (run.folder / "checkpoints" / "step_00000006" / "checkpoint.json").unlink()
    again = train(world, settings)
    assert "resumed after step 3" in again.ranks.text(0)
    assert "from layout" not in again.ranks.text(0)
    assert [[line[name] for name in EXACT] for line in again.metrics] == wanted
    assert all(
        torch.equal(weight, weights[name]) for name, weight in load_weights(again.folder / "checkpoints").items()
    )


def test_a_run_begins_with_the_weights_of_another_in_any_layout(train):
    first = train(2, overrides({"tensor": 2, "sequence": True}) | {"data.pairs_per_step": 0}, name="first")
    weights = load_weights(first.folder)
    still = {"training.steps": 1, "optimizer.learning_rate": 0.0, "optimizer.weight_decay": 0.0}
    still |= {"model.weights": str(first.folder)}  # other data, other steps, fresh moments
    for name, world, sizes in (("a", 1, {}), ("b", 5, {"pipeline": 2, "expert": 2, "encoder": 1})):
        second = train(world, overrides(sizes) | still, name=name)
        assert f"begins with the weights of {first.folder}" in second.ranks.text(0)
        found = load_weights(second.folder)
        assert found.keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in found.items())
    again = train(1, overrides({}) | still | {"training.steps": 2}, name="a")  # what it has done itself comes first
    assert "resumed after step 1" in again.ranks.text(0)
    other = train(1, still | {"model.layers": 3}, name="c", status=2)
    assert re.search(r"model\.weights=\S+: was made with model\.experts=4, this run has 0; ", other.ranks.text(0))
    nowhere = train(1, {"model.weights": "/nowhere"}, name="d", status=2)
    assert "model.weights=/nowhere: no such folder; give the folder of a checkpoint" in nowhere.ranks.text(0)


def test_a_checkpoint_says_what_it_is(train):
    run = train(3, overrides({"encoder": 1}))
    manifest = json.loads((complete(run.folder / "checkpoints")[-1] / "checkpoint.json").read_text())
    assert manifest["layout"]["world"] == 3
    assert manifest["encoders"]["dinov2_small"] == {"path": "random", "sha256": "random 3"}
    names = load_weights(run.folder / "checkpoints").keys()
    assert "language.decoder.layers.2.mlp.experts.weight1" in names
    assert not any("encoder" in name for name in names)
    assert len(manifest["files"]) == 3  # two language ranks and the metadata


# the background


def slowly(config: Path, seconds: float) -> int:
    """Train, but writing a checkpoint takes some time."""
    write = CheckpointStore._write_pieces

    def wait(self, *args):
        time.sleep(seconds)
        return write(self, *args)

    CheckpointStore._write_pieces = wait
    return main(["train", str(config)])


def test_steps_go_on_while_a_checkpoint_is_written(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "run.yaml", {"training.steps": 8, "checkpoint.interval": 4})
    ranks = start_ranks(2, lambda: slowly(config, 6.0))
    folder, lines = config.with_suffix(""), 0
    while lines < 8:
        time.sleep(0.01)
        lines = len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0
        if lines < 8:
            assert not complete(folder / "checkpoints"), "a checkpoint that takes 6 s was there before step 8"
    assert ranks.wait() == [0, 0], ranks.text()
    found = [
        json.loads(line)["checkpoint_wait_seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(found) < 3.0
    assert [path.name for path in complete(folder / "checkpoints")] == ["step_00000004", "step_00000008"]


def die_while_saving(config: Path, doomed: int) -> int:
    """Train, but one rank is killed in the middle of its second checkpoint."""
    write, calls = store.FileSystemWriter.write_data, []

    def die(self, plan, planner):
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == str(doomed):
            (Path(self.path) / "__torn.distcp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, plan, planner)

    store.FileSystemWriter.write_data = die
    return main(["train", str(config)])


@pytest.mark.parametrize("doomed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(train, start_ranks, tiny, tmp_path, doomed):
    settings = {"training.steps": 12, "checkpoint.interval": 3}
    wanted = train(2, settings, name="whole").metrics
    config = tiny.write(tmp_path / "torn.yaml", settings)
    ranks = start_ranks(2, lambda: die_while_saving(config, doomed))
    statuses = ranks.wait()
    assert statuses[doomed] == -9
    assert statuses[1 - doomed] == 1
    left = sorted(path.name for path in (tmp_path / "torn" / "checkpoints").iterdir())
    assert left == [".step_00000006.partial", "step_00000003"]
    again = train(2, settings, name="torn")
    assert "resumed after step 3" in again.ranks.text(0)
    assert [[line[n] for n in EXACT] for line in again.metrics] == [[line[n] for n in EXACT] for line in wanted]
    assert not list((tmp_path / "torn" / "checkpoints").glob(".step*"))


# damage


def one_line(ranks) -> str:
    (line,) = [line for line in ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    return line


def test_a_damaged_checkpoint_is_refused(train):
    run = train(2)
    newest = complete(run.folder / "checkpoints")[-1]
    victim = max(newest.glob("__1_*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    settings = {"training.steps": 5, "checkpoint.resume": str(newest)}
    said = one_line(train(3, settings | {"parallel.encoder": 1}, status=2).ranks)
    assert f"{victim.name} is damaged (its checksum differs); give an earlier one" in said
    victim.unlink()
    said = one_line(train(2, settings, status=2).ranks)
    assert f"{victim.name} is missing; give an earlier one" in said
    said = one_line(train(2, {"checkpoint.resume": str(run.folder)}, status=2).ranks)
    assert "not a complete checkpoint; give a step_... folder" in said
    earlier = str(complete(run.folder / "checkpoints")[-2])
    assert len(train(2, {"training.steps": 5, "checkpoint.resume": earlier}).metrics) == 5


def check_other_tensors(folder: Path):
    job.find_place()
    job.join("cpu", 30)
    groups = ProcessGroups.create(ParallelLayout(world=1, config=ParallelConfig()), "gloo")

    def piece(name: str, *shape: int) -> TensorSlice:
        return TensorSlice(name, shape, Block((0,) * len(shape), shape), torch.ones(shape))

    kept = CheckpointStore(folder, groups, keep=1, identity=lambda: {"a": 1}, about={"layout": {}})
    kept.save(7, [piece("w", 2, 3)], {"random": {"x": torch.ones(1)}}, bad_pairs=0)
    kept.finish()
    (path,) = complete(folder)
    empty = piece("w", 2, 3)
    empty.values.zero_()
    assert torch.equal(kept.load(path, [empty], ["random"])["random"]["x"], torch.ones(1))
    assert torch.equal(empty.values, torch.ones(2, 3))
    with pytest.raises(CheckpointError, match=r"holds no v; it is of another model: use the configuration"):
        kept.load(path, [piece("v", 2)], [])
    with pytest.raises(CheckpointError, match=r"w has shape \[2, 3\], this run's has \[2, 4\]; use the config"):
        kept.load(path, [piece("w", 2, 4)], [])
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint; train first"):
        load_weights(folder / "nothing")
    content = next(path.glob("*.distcp"))
    content.write_bytes(content.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"cannot be read \(.+\); give an earlier one"):
        kept.load(path, [empty], [])
    kept.save(8, [TensorSlice("w", (2, 3), Block((1, 0), (2, 3)), torch.ones(2, 3))], {}, bad_pairs=0)
    with pytest.raises(CheckpointError, match=r"step_00000008: rank 0 could not write it \(.*key:w has out of bounds"):
        kept.finish()  # pieces that do not make a whole are no checkpoint
    assert [found.name for found in folder.iterdir()] == ["step_00000007"]


def test_tensors_of_another_model_are_named(run_ranks, tmp_path):
    run_ranks(1, lambda: check_other_tensors(tmp_path / "checkpoints"))
