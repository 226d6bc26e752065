"""Weights between two checkpoints: the formula to the bit, whatever wrote the sides; what is refused; the memory."""

import hashlib
import json
import os
import re
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_sphinx.checkpoint import blend as blending
from megatron_sphinx.checkpoint.blend import Blended, blend
from megatron_sphinx.checkpoint.store import complete, load_weights, sha256_of, write_manifest
from megatron_sphinx.errors import CheckpointError

TOOL = "interpolate_weights.py"
IDENTITY = {"model": {"layers": 2, "hidden": 4}, "vision": {"experts": {"clip": "c1"}, "grid": 4}, "tokenizer": "t1"}
MIXTRAL = {"model.experts": 4, "model.groups": 4, "model.balance_loss_coefficient": 0.1}
STILL = {"training.steps": 1, "optimizer.learning_rate": 0.0, "optimizer.weight_decay": 0.0}


def make(
    folder: Path, weights: dict[str, Tensor], identity: dict | None = None, states: tuple = ("master", "exp_avg")
) -> Path:
    """A run folder with a checkpoint of these weights."""
    path = folder / "checkpoints" / "step_00000007"
    states = {f"{state}/{name}": weight for state in states for name, weight in weights.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        save(states, storage_writer=FileSystemWriter(path), no_dist=True)
    files = {file.name: sha256_of(file) for file in path.iterdir()}
    manifest = {"step": 7, "bad_pairs": 0, "identity": identity or IDENTITY, "layout": {"world": 1}}
    write_manifest(path, manifest | {"encoders": {}, "files": files})
    return folder


def drawn(seed: int) -> dict[str, Tensor]:
    """Weights with the values that arithmetic would change: a negative zero, the largest, one below the normal."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (("language.a", (7, 5)), ("language.b", (3,)), ("vision.tag", (4,)), ("vision.w", (2, 3)))
    }
    weights["language.b"][:] = torch.tensor([-0.0, torch.finfo(torch.float32).max, 1e-44])
    return weights


def formula(real: dict[str, Tensor], syn: dict[str, Tensor], beta: float) -> dict[str, Tensor]:
    return {name: beta * real[name] + (1 - beta) * syn[name] for name in real}


def is_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether two sets of fp32 weights have the same bits."""
    return found.keys() == wanted.keys() and all(
        weight.dtype == torch.float32 and torch.equal(weight.view(torch.int32), wanted[name].view(torch.int32))
        for name, weight in found.items()
    )


# the formula


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 0.6, 1 - 1e-9])
def test_a_blend_is_the_formula_to_the_bit(tmp_path, beta):
    real, syn = make(tmp_path / "real", drawn(1)), make(tmp_path / "syn", drawn(2))
    assert blend(real, syn, tmp_path / "mix", beta) == Blended(mixed=4, copied=0, parameters=48)
    mix = load_weights(tmp_path / "mix")
    assert is_same(mix, formula(drawn(1), drawn(2), beta))
    blend(syn, real, tmp_path / "other", 1 - beta)
    for name, weight in load_weights(tmp_path / "other").items():
        torch.testing.assert_close(weight, mix[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scope", ["all", "language"])
@pytest.mark.parametrize("beta", [0, 1])
def test_at_the_ends_a_side_is_copied_to_the_bit(tmp_path, beta, scope):
    sides = [drawn(1), drawn(2)]
    for row, side in enumerate(sides):
        side["language.a"][row, :2] = torch.tensor([torch.nan, torch.inf])  # 0 times these is not 0
    real, syn = (make(tmp_path / name, side) for name, side in zip(("real", "syn"), sides, strict=True))
    assert blend(real, syn, tmp_path / "mix", beta, scope=scope) == Blended(mixed=0, copied=4, parameters=48)
    wanted = sides[0] if beta else sides[1]
    if scope == "language":
        wanted = wanted | {name: weight for name, weight in sides[0].items() if name.startswith("vision.")}
    assert is_same(load_weights(tmp_path / "mix"), wanted)


def test_of_scope_language_all_else_is_real(tmp_path):
    real, syn = make(tmp_path / "real", drawn(1)), make(tmp_path / "syn", drawn(2))
    assert blend(real, syn, tmp_path / "mix", 0.6, scope="language") == Blended(mixed=2, copied=2, parameters=48)
    wanted = formula(drawn(1), drawn(2), 0.6) | {name: drawn(1)[name] for name in ("vision.tag", "vision.w")}
    assert is_same(load_weights(tmp_path / "mix"), wanted)


def test_a_blend_says_what_it_is(tmp_path):
    sides = [make(tmp_path / name, drawn(seed)) for seed, name in enumerate(("real", "syn"))]
    blend(*sides, tmp_path / "deep" / "mix", 0.25)
    manifests = [path / "checkpoints" / "step_00000007" / "checkpoint.json" for path in sides]
    real, syn = [
        {"path": str(path.parent.resolve()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in manifests
    ]
    found = json.loads((tmp_path / "deep" / "mix" / "checkpoint.json").read_text())
    files = found.pop("files")
    assert found.pop("blend") == {"beta": 0.25, "scope": "all", "real": real, "syn": syn}
    assert found == {name: value for name, value in json.loads(manifests[0].read_text()).items() if name != "files"}
    held = [path for path in (tmp_path / "deep" / "mix").iterdir() if path.name != "checkpoint.json"]
    assert files == {path.name: sha256_of(path) for path in held}
    assert len(files) == 5  # a file for each tensor, and the metadata
    blend(tmp_path / "deep" / "mix", sides[1], tmp_path / "again", 0.5)  # a blend is a side as any other
    assert is_same(load_weights(tmp_path / "again"), formula(formula(drawn(0), drawn(1), 0.25), drawn(1), 0.5))


# runs


@pytest.fixture(scope="module")
def runs():
    """Run folders, computed once."""
    return {}


@pytest.fixture
def trained(train, runs):
    """Runs of one model on other data, each in two layouts."""
    if not runs:
        for side, data in (("real", {}), ("syn", {"data.pairs_per_step": 3, "data.text_tokens_per_step": 60})):
            settings = MIXTRAL | data | {"training.steps": 2}
            layouts = {
                "one": (1, {}),
                "replicas": (2, {}),
                "tensor": (2, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.expert": 2}),
            }
            for layout in ("one", "tensor") if side == "real" else ("one", "replicas"):
                world, sizes = layouts[layout]
                runs[side, layout] = train(world, settings | sizes, name=f"{side}_{layout}").folder
    return runs


def test_checkpoints_of_any_layouts_mix_to_the_same(trained, tmp_path):
    blend(trained["real", "one"], trained["syn", "one"], tmp_path / "one", 0.6)
    blend(trained["real", "tensor"], trained["syn", "replicas"], tmp_path / "other", 0.6)
    sides = load_weights(trained["real", "tensor"]), load_weights(trained["syn", "replicas"])
    mixes = load_weights(tmp_path / "one"), load_weights(tmp_path / "other")
    assert is_same(mixes[1], formula(*sides, 0.6))
    for name, weight in mixes[1].items():
        torch.testing.assert_close(weight, mixes[0][name], rtol=1e-4, atol=1e-5)
    moved = [(sides[0][name] - sides[1][name]).abs().max() for name in sides[0]]
    assert min(moved) > 0, "the two sides differ in each tensor"


def test_runs_of_any_layout_begin_with_a_blend(trained, train, tmp_path):
    target = tmp_path / "mix"
    blend(trained["real", "tensor"], trained["syn", "one"], target, 0.3, scope="language")
    weights = load_weights(target)
    sides = [load_weights(trained[side]) for side in (("real", "tensor"), ("syn", "one"))]
    wanted = sides[0] | {name: one for name, one in formula(*sides, 0.3).items() if name.startswith("language.")}
    assert is_same(weights, wanted)
    losses = []
    for name, world, sizes in (("one", 1, {}), ("expert", 2, {"parallel.expert": 2})):
        run = train(world, MIXTRAL | STILL | sizes | {"model.weights": str(target)}, name=name)
        assert f"begins with the weights of {target}" in run.ranks.text(0)
        assert is_same(load_weights(run.folder), weights)
        losses.append(run.metrics[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_blend_cannot_be_resumed(trained, train, tmp_path):
    blend(trained["real", "one"], trained["syn", "one"], tmp_path / "mix", 0.5)
    resumed = MIXTRAL | {"training.steps": 4, "checkpoint.resume": str(tmp_path / "mix")}
    for world, name in ((1, "one"), (2, "two")):
        ended = train(world, resumed, name=name, status=2)
        said = r"checkpoint\.resume=\S+mix: holds no exp_avg/\S+, only weights; begin a run with them: give it as model"
        assert re.search(said, ended.ranks.text(0))


# what is refused


def refused(tmp_path: Path, message: str, *, beta: float = 0.5) -> None:
    """Mix `real` and `syn` in vain; nothing is left of it."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        blend(tmp_path / "real", tmp_path / "syn", tmp_path / "mix", beta)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("beta", [-0.1, 1.001, float("nan"), float("inf"), float("-inf")])
def test_a_share_that_is_none_is_refused(tmp_path, beta):
    refused(tmp_path, r"beta=\S+: is not from 0 to 1; give the share of REAL", beta=beta)


def test_a_target_that_exists_is_refused(tmp_path):
    for name in ("real", "syn"):
        make(tmp_path / name, drawn(1))
    (tmp_path / "mix").symlink_to("nowhere")
    refused(tmp_path, r"mix: exists; give another TARGET, or remove it")
    (tmp_path / "mix").unlink()
    (tmp_path / "mix").mkdir()
    refused(tmp_path, r"mix: exists; give another TARGET, or remove it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"layers": 3, "hidden": 4}}, r"model\.layers=3, REAL with 2; give two checkpoints with the same"),
        ({"tokenizer": "t2"}, r"tokenizer=t2, REAL with t1; give two"),
        ({"vision": {"experts": {"clip": "c2"}, "grid": 4}}, r"vision\.experts\.clip=c2, REAL with c1; give two"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    make(tmp_path / "real", drawn(1), IDENTITY | {"run": {"seed": 1}})
    make(tmp_path / "syn", drawn(2), IDENTITY | change)
    refused(tmp_path, rf"SYN=\S+syn/checkpoints/step_00000007: was made with {message}")


def test_other_tensors_are_refused(tmp_path):
    fewer = drawn(1)
    del fewer["language.b"], fewer["vision.w"]
    make(tmp_path / "real", drawn(1))
    make(tmp_path / "syn", fewer)
    refused(tmp_path, r"SYN=\S+: holds no master/language\.b, REAL does; give two checkpoints of the same model")
    (tmp_path / "real").rename(tmp_path / "more")
    (tmp_path / "syn").rename(tmp_path / "real")
    (tmp_path / "more").rename(tmp_path / "syn")
    refused(tmp_path, r"REAL=\S+: holds no master/language\.b, SYN does; give two checkpoints of the same model")
    shutil.rmtree(tmp_path / "real")
    make(tmp_path / "real", drawn(1) | {"language.a": torch.ones(5, 7)})
    refused(tmp_path, r"SYN=\S+: master/language\.a has shape \[7, 5\], REAL's has \[5, 7\]; give two checkpoints of")


@pytest.mark.parametrize("side", ["real", "syn"])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_damage_is_refused(tmp_path, side, file):
    make(tmp_path / "real", drawn(1))
    make(tmp_path / "syn", drawn(2))
    victim = tmp_path / side / "checkpoints" / "step_00000007" / file
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    refused(tmp_path, rf"{side.upper()}=\S+: {file} is damaged \(its checksum differs\); give an earlier one")
    victim.unlink()
    refused(tmp_path, rf"{side.upper()}=\S+: {file} is missing; give an earlier one")
    shutil.rmtree(tmp_path / side)
    refused(tmp_path, rf"{side}: holds no complete checkpoint; train first")


def test_a_blend_is_complete_or_invisible(tmp_path, monkeypatch):
    for seed, name in enumerate(("real", "syn")):
        make(tmp_path / name, drawn(seed))
    left_behind = tmp_path / ".mix.partial"  # of one that was killed
    left_behind.mkdir()
    (left_behind / "__0_9.distcp").write_bytes(b"half")
    write, seen = blending.write_manifest, []

    def look(path: Path, manifest: dict) -> None:
        seen.append((path.name, (tmp_path / "mix").exists()))
        write(path, manifest)

    monkeypatch.setattr(blending, "write_manifest", look)
    blend(tmp_path / "real", tmp_path / "syn", tmp_path / "mix", 0.5)
    assert seen == [(".mix.partial", False)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mix", "real", "syn"]
    assert not (tmp_path / "mix" / "__0_9.distcp").exists()
    shutil.rmtree(tmp_path / "mix")

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    message = r"mix: could not be written \(.*No space left on device\); put that right and run it again"
    for module, name in ((blending, "write_manifest"), (os, "fsync")):  # by us, and inside torch
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            refused(tmp_path, message)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"mix: could not be written \(.*Not a directory"):
        blend(tmp_path / "real", tmp_path / "syn", tmp_path / "file" / "mix", 0.5)


# memory

SIZE = 2**25  # bytes of a tensor; malloc gives as many back at once


def check_memory(folder: Path) -> None:
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    blend(folder / "small", folder / "small", folder / "warm", 0.5)
    before = peak()
    blend(folder / "real", folder / "syn", folder / "mix", 0.5)
    grown = peak() - before
    assert grown < 5 * SIZE, f"{grown / SIZE:.1f} tensors"


def test_a_blend_holds_a_few_tensors_only(run_ranks, tmp_path):
    make(tmp_path / "small", drawn(1))
    for value, name in enumerate(("real", "syn")):
        weights = {f"language.w{number}": torch.full((SIZE // 4,), float(value)) for number in range(8)}
        make(tmp_path / name, weights, states=("master",))
    run_ranks(1, lambda: check_memory(tmp_path))
    mix = load_weights(tmp_path / "mix")
    assert len(mix) == 8
    assert all((weight == 0.5).all() for weight in mix.values())
    for name in ("real", "syn", "mix"):
        shutil.rmtree(tmp_path / name)


# the tool


def test_the_tool(tmp_path, run_tool, capsys):
    real, syn = make(tmp_path / "real", drawn(1)), make(tmp_path / "syn", drawn(2))
    status, out, error = run_tool(TOOL, real, syn, tmp_path / "mix", "--beta", 0.6, "--scope", "language")
    assert status == 0
    assert out == f"{tmp_path}/mix: 2 tensors mixed, 2 copied, 48 parameters\n"
    assert "checking: 100%" in error
    assert "mixing: 100%" in error
    newest = complete(real / "checkpoints")[-1]
    status, out, _ = run_tool(TOOL, newest, syn, tmp_path / "all", "--beta", 0.6)
    assert status == 0
    assert out == f"{tmp_path}/all: 4 tensors mixed, 0 copied, 48 parameters\n"
    assert is_same(load_weights(tmp_path / "all"), formula(drawn(1), drawn(2), 0.6))
    status, out, error = run_tool(TOOL, real, syn, tmp_path / "mix", "--beta", 0.6)
    assert status == 2
    assert (out, error) == ("", f"{TOOL}: {tmp_path}/mix: exists; give another TARGET, or remove it\n")
    with pytest.raises(SystemExit, match="2"):
        run_tool(TOOL, real, syn, tmp_path / "none")
    assert "the following arguments are required: --beta" in capsys.readouterr().err
