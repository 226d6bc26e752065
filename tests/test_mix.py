"""Weights between checkpoints: the formula to the bit in every format, what a mix says of itself, and the memory."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixes import SMALL, accessory, by_name, drawn_shape, is_same, make, plain, tensors
from torch import Tensor
from torch_arrays import type_of

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.digests import sha256_of
from megatron_sphinx.checkpoint.formats import huggingface
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mix import interpolate, shares_of, sweep
from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.model.architecture import LanguageConfig

TOOL = "interpolate_weights.py"
MIXTRAL = {"model.experts": 4, "model.groups": 4, "model.balance_loss_coefficient": 0.1}
STILL = {"training.steps": 1, "optimizer.learning_rate": 0.0, "optimizer.weight_decay": 0.0}
FORMATS = ("hf", "internlm2", "meta", "accessory", "megatron", "torch_dist")


def formula(sides: list[dict], shares: tuple[float, ...]) -> dict:
    """The sum in fp64, rounded once."""
    return {
        key: sum(share * side[key].double() for share, side in zip(shares, sides, strict=True)).to(value.dtype)
        for key, value in sides[0].items()
    }


def is_close(found: dict, wanted: dict) -> bool:
    """Whether they differ by roundings of fp32, which the sum has two of before the last.

    Of terms that nearly cancel the sum is small, so these are measured by the terms, which are below 8 here; and where
    the sum lies between two bf16 numbers, the last rounding may go the other way, by one in the last place.
    """
    for key, value in found.items():
        error = (value.double() - wanted[key].double()).abs()
        bound = wanted[key].double().abs() * torch.finfo(value.dtype).eps + 8 * torch.finfo(torch.float32).eps
        is_near = (error <= bound) | (value == wanted[key])  # in fp16 the largest is infinite
        if value.dtype != wanted[key].dtype or not is_near.all():
            return False
    return found.keys() == wanted.keys()


# the formula


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_a_mix_is_the_formula_in_every_format(tmp_path, form, seed):
    rng = random.Random(f"{form} {seed}")
    experts = rng.choice([0, 4, 6]) if form != "internlm2" else 0
    shape = drawn_shape(rng, experts=experts)
    dtype = torch.float32 if form == "megatron" else rng.choice([torch.float32, torch.bfloat16, torch.float16])
    is_sparse = rng.random() < 0.5
    ranks = rng.choice([1, 2]) if form == "accessory" or (form == "meta" and not experts) else 1
    shape = replace(shape, groups=shape.groups * ranks, heads=shape.heads * ranks, vocabulary=120)
    shape = replace(shape, hidden=shape.heads * 4)
    wanted = WriteOptions(ranks, type_of(dtype), rng.choice([3000, 10**9]), is_sparse=is_sparse)
    inputs = []
    for number in range(3):
        source = make(tmp_path / f"hf{number}", 10 * seed + number, shape, dtype=dtype)
        convert(source, tmp_path / f"{number}", form, wanted, shape=shape)
        inputs.append(tmp_path / f"{number}")
    sides = [tensors(folder, shape) for folder in inputs]
    beta = rng.random()
    done = interpolate(inputs[:2], {tmp_path / "mix": shares_of(beta)}, shape=shape)
    assert (done.mixed, done.copied) == (len(sides[0]), 0)
    assert is_same(tensors(tmp_path / "mix", shape), plain(sides[:2], shares_of(beta)))
    assert is_close(tensors(tmp_path / "mix", shape), formula(sides[:2], shares_of(beta)))
    shares = (0.5, 0.2, 0.3)
    interpolate(inputs, {tmp_path / "three": shares}, shape=shape)
    assert is_same(tensors(tmp_path / "three", shape), plain(sides, shares))
    assert is_close(tensors(tmp_path / "three", shape), formula(sides, shares))
    extra = "interpolation.json"
    assert {path.name for path in (tmp_path / "mix").iterdir()} - {extra} == {path.name for path in inputs[0].iterdir()}
    for path in (tmp_path / "mix").iterdir():
        assert path.suffix not in (".pth", ".distcp") or zipfile.ZipFile(path).testzip() is None


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("scope", ["all", "language"])
def test_at_the_ends_tensors_are_copied_to_the_bit(tmp_path, beta, scope):
    inputs = [make(tmp_path / f"{seed}", seed, dtype=torch.bfloat16, channels=6) for seed in range(2)]
    sides = [tensors(folder) for folder in inputs]
    done = interpolate(inputs, {tmp_path / "mix": shares_of(beta)}, scope=scope)
    assert (done.mixed, done.copied) == (0, len(sides[0]))
    assert done.parameters == sum(value.numel() for value in sides[0].values())
    wanted = sides[0] if beta else sides[1]
    if scope == "language":
        wanted = wanted | {key: value for key, value in sides[0].items() if key[0] == huggingface.EXTRAS}
    assert is_same(tensors(tmp_path / "mix"), wanted)
    if beta:
        for name in ("model.safetensors", huggingface.EXTRAS):
            assert (tmp_path / "mix" / name).read_bytes() == (inputs[0] / name).read_bytes()


def test_of_scope_language_all_else_is_of_the_first(tmp_path):
    inputs = [make(tmp_path / f"{seed}", seed, channels=6) for seed in range(2)]
    sides = [tensors(folder) for folder in inputs]
    done = interpolate(inputs, {tmp_path / "mix": (0.6, 0.4)}, scope="language")
    of_vision = {key: value for key, value in sides[0].items() if key[0] == huggingface.EXTRAS}
    assert (done.mixed, done.copied) == (len(sides[0]) - len(of_vision), len(of_vision))
    assert len(of_vision) == 6
    assert is_same(tensors(tmp_path / "mix"), plain(sides, (0.6, 0.4)) | of_vision)


def test_a_share_of_nothing_takes_nothing(tmp_path):
    """0 times what is not a number is not 0."""
    inputs = [make(tmp_path / f"{seed}", seed) for seed in range(3)]
    (inputs[1] / "model.safetensors").write_bytes((inputs[1] / "model.safetensors").read_bytes()[:-400] + b"\xff" * 400)
    sides = [tensors(folder) for folder in inputs]
    assert any(value.isnan().any() for value in sides[1].values())
    interpolate(inputs, {tmp_path / "mix": (0.5, 0.0, 0.5)})
    assert is_same(tensors(tmp_path / "mix"), plain([sides[0], sides[2]], (0.5, 0.5)))


def test_a_sweep_is_its_single_mixes(tmp_path):
    inputs = [make(tmp_path / f"{seed}", seed, drawn_shape(random.Random(5)), shard_bytes=4000) for seed in range(2)]
    betas = [0.0, 0.1, 0.25, 1.0]
    targets = sweep(tmp_path / "sweep", betas)
    assert [path.name for path in targets] == ["beta_0", "beta_0.1", "beta_0.25", "beta_1"]
    interpolate(inputs, targets)
    for beta, folder in zip(betas, targets, strict=True):
        interpolate(inputs, {tmp_path / f"{beta}": shares_of(beta)})
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / f"{beta}").iterdir()}


def test_other_files_of_the_second_are_no_matter(tmp_path):
    """Of whole tensors it is no matter in which file they are, nor of which kind it is."""
    shape = drawn_shape(random.Random(1))
    inputs = [make(tmp_path / f"{seed}", seed, shape, shard_bytes=size) for seed, size in enumerate((3000, 10**9))]
    wanted = plain([by_name(folder) for folder in inputs], (0.3, 0.7))
    interpolate(inputs, {tmp_path / "mix": (0.3, 0.7)})
    assert is_same(by_name(tmp_path / "mix"), wanted)
    torch.save(by_name(inputs[1]), inputs[1] / "pytorch_model.bin")
    (inputs[1] / "model.safetensors").unlink()
    interpolate(inputs, {tmp_path / "again": (0.3, 0.7)})
    assert is_same(by_name(tmp_path / "again"), wanted)
    interpolate(inputs[::-1], {tmp_path / "bin": (0.7, 0.3)})
    assert is_same(by_name(tmp_path / "bin"), plain([by_name(folder) for folder in inputs[::-1]], (0.7, 0.3)))
    assert is_same(torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True), by_name(tmp_path / "bin"))


def test_what_is_not_laid_out_row_by_row(tmp_path):
    """Transposed tensors, and parts of larger ones, as torch.save keeps them."""
    for seed in range(2):
        folder = make(tmp_path / f"{seed}", seed)
        state = {name: value.t().contiguous().t() for name, value in by_name(folder).items() if value.ndim == 2}
        (folder / "model.safetensors").rename(folder / "kept")
        other = {name: torch.stack([value, value])[1] for name, value in read(folder / "kept").items()}
        torch.save(other | state, folder / "pytorch_model.bin")
    inputs = [tmp_path / "0", tmp_path / "1"]
    interpolate(inputs, {tmp_path / "mix": (0.3, 0.7)})
    assert is_same(tensors(tmp_path / "mix"), plain([tensors(folder) for folder in inputs], (0.3, 0.7)))


def read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(path.read_bytes())


# what is beside the tensors


def test_frozen_experts_stay(tmp_path):
    expert = torch.randn(3, 5)
    inputs = [accessory(tmp_path / f"{seed}", seed, expert) for seed in range(2)]
    interpolate(inputs, {tmp_path / "mix": (0.5, 0.5)})
    found = tensors(tmp_path / "mix")
    assert torch.equal(found.pop(("clip", "llma.clip.w")), expert)
    sides = [tensors(folder) for folder in inputs]
    assert is_same(found, {key: value for key, value in plain(sides, (0.5, 0.5)).items() if key[0] != "clip"})
    for file in ("consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth"):
        held = torch.load(tmp_path / "mix" / file, weights_only=True)["model"]
        assert held.keys() == torch.load(inputs[0] / file, weights_only=True)["model"].keys()
        assert torch.equal(held["llma.clip.w"], expert)


def test_what_a_killed_run_has_left_is_no_matter(tmp_path):
    inputs = [make(tmp_path / name, 1) for name in "ab"]
    (tmp_path / ".mix.partial").mkdir()
    (tmp_path / ".mix.partial" / "half").touch()
    interpolate(inputs, {tmp_path / "mix": (0.5, 0.5)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "mix"]
    assert not (tmp_path / "mix" / "half").exists()


@pytest.mark.parametrize("shares", [{"mix": (0.5, 0.5)}, {"one": (0.25, 0.75), "two": (0.5, 0.5)}])
def test_a_killed_mix_goes_on_where_it_was(tmp_path, shares):
    inputs = [make(tmp_path / name, ord(name), replace(SMALL, layers=40), shard_bytes=1000) for name in "ab"]
    targets = {tmp_path / name: share for name, share in shares.items()}
    whole = {tmp_path / f"whole_{name}": share for name, share in shares.items()}
    interpolate(inputs, whole)
    if (pid := os.fork()) == 0:
        interpolate(inputs, targets)
        os._exit(0)
    partials = [tmp_path / f".{name}.partial" for name in shares]
    journal = partials[0] / ".files"
    while not journal.is_file() or journal.read_text().count("\n") < 20:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    done = [line.split()[1] for line in journal.read_text().splitlines()[1:]]
    times = {(target, name): (partial / name).stat().st_mtime_ns
             for target, partial in zip(targets, partials, strict=True) for name in done}  # fmt: skip
    assert not any(target.exists() for target in targets)
    interpolate(inputs, targets)
    assert all((target / name).stat().st_mtime_ns == at for (target, name), at in times.items())
    for target, other in zip(targets, whole, strict=True):
        names = {path.name for path in target.iterdir()}
        assert names == {path.name for path in other.iterdir()}
        assert len(done) < len(names) - 2
        assert all((target / name).read_bytes() == (other / name).read_bytes() for name in names)


# runs


@pytest.fixture(scope="module")
def runs():
    """Run folders, computed once."""
    return {}


@pytest.fixture
def trained(train, runs):
    """Runs of one model on other data, in other layouts."""
    if not runs:
        tensor = {"parallel.tensor": 2, "parallel.sequence": True, "parallel.expert": 2}
        sides = {
            "real": (2, tensor),
            "syn": (2, {"data.pairs_per_step": 3, "data.text_tokens_per_step": 60}),
        }
        for side, (world, settings) in sides.items():
            runs[side] = train(world, MIXTRAL | {"training.steps": 2} | settings, name=side).folder
    return runs


def test_runs_begin_with_a_mix_of_runs(trained, train, tmp_path):
    target = tmp_path / "mix"
    interpolate([trained["real"], trained["syn"]], {target: (0.3, 0.7)}, scope="language")
    weights, sides = load_weights(target), [load_weights(trained[side]) for side in ("real", "syn")]
    mixed = {name: one for name, one in plain(sides, (0.3, 0.7)).items() if name.startswith("language.")}
    assert is_same(weights, sides[0] | mixed)
    losses = []
    for name, world, sizes in (("one", 1, {}), ("expert", 2, {"parallel.expert": 2})):
        run = train(world, MIXTRAL | STILL | sizes | {"model.weights": str(target)}, name=name)
        assert f"begins with the weights of {target}" in run.ranks.text(0)
        assert is_same(load_weights(run.folder), weights)
        losses.append(run.metrics[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    ended = train(1, MIXTRAL | {"checkpoint.resume": str(target)}, name="resumed", status=2)
    said = r"checkpoint\.resume=\S+mix: holds no exp_avg/\S+, only weights; begin a run with them: give it as model"
    assert re.search(said, ended.ranks.text(0))


# memory

PROGRAM = """
import re, sys
from pathlib import Path
from megatron_sphinx.checkpoint.manifest import MANIFEST
from megatron_sphinx.checkpoint.mix import interpolate
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
folder = Path(sys.argv[1])
interpolate([folder / "small"] * 2, {folder / "warm": (0.5, 0.5)})
before = peak()
interpolate([folder / "0", folder / "1"], {folder / "x": (0.5, 0.5), folder / "y": (0.1, 0.9)})
print(peak() - before)
"""


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_the_memory_is_of_buffers_alone(tmp_path, form):
    shape = LanguageConfig(layers=2, hidden=512, ffn=6000, heads=4, groups=2, vocabulary=24000)
    for name, of_it in (("small", SMALL), ("0", shape), ("1", shape)):
        source = make(tmp_path / f"{name}_hf", 1, of_it)
        convert(source, tmp_path / name, form, WriteOptions())
        shutil.rmtree(source)
    grown, largest = [], 24000 * 512 * 4
    while len(grown) < 3 and min(grown, default=largest) >= largest / 2:  # a busy machine only ever adds to it
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        grown.append(int(done.stdout))
        for target in ("warm", "x", "y"):
            shutil.rmtree(tmp_path / target)
    assert min(grown) < largest / 2, f"{min(grown) / largest:.2f} times the largest tensor"


# the tool


def test_the_tool(tmp_path, run_tool, capsys):
    a, b, c = (make(tmp_path / name, seed, channels=6) for seed, name in enumerate("abc"))
    pair = ("--real", a, "--synthetic", b)
    status, out, error = run_tool(TOOL, *pair, "--beta", 0.6, "--output", tmp_path / "mix", "--scope", "language")
    assert (status, out.splitlines()) == (0, [
        f"{tmp_path}/mix: 12 tensors mixed, 6 copied, {count(a):,} parameters",
        f"{a}: 18 tensors = 12 mixed + 6 copied + 0 left out",
        f"{b}: 18 tensors = 12 mixed + 6 are the first one's + 0 left out",
    ])  # fmt: skip
    assert "mixing: 100%" in error
    status, out, _ = run_tool(TOOL, *pair, "--beta", "0:1:0.1", "--output", tmp_path / "sweep", "--sha256")
    names = ["beta_0", "beta_1", *(f"beta_0.{digit}" for digit in range(1, 10))]
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == sorted(names)
    said = json.loads((tmp_path / "sweep" / "beta_0.3" / "interpolation.json").read_text())
    assert said["inputs"][1]["digests"]["model.safetensors"] == sha256_of(b / "model.safetensors")
    assert is_same(tensors(tmp_path / "sweep" / "beta_0.3"), plain([tensors(a), tensors(b)], (0.3, 0.7)))
    shares = ("--checkpoint", f"{a}=0.5", "--checkpoint", f"{b}=0.3", "--checkpoint", f"{c}=0.2")
    status, _, _ = run_tool(TOOL, *shares, "--output", tmp_path / "three")
    assert status == 0
    assert is_same(tensors(tmp_path / "three"), plain([tensors(x) for x in (a, b, c)], (0.5, 0.3, 0.2)))
    status, out, error = run_tool(TOOL, *pair, "--beta", 0.6, "--output", tmp_path / "mix")
    assert (status, out) == (2, "")
    assert error == f"{TOOL}: {tmp_path}/mix: exists; give another target, or remove it\n"
    for wrong, message in (
        (pair, "give --real, --synthetic and --beta, or several --checkpoint"),
        ((*pair, *shares), "give --real, --synthetic and --beta, or several --checkpoint"),
        ((*pair, "--beta", "0:1"), "0:1: neither a number nor first:last:step"),
        (("--checkpoint", f"{a}"), "give PATH=SHARE"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_tool(TOOL, *wrong, "--output", tmp_path / "none")
        assert message in capsys.readouterr().err


def count(folder: Path) -> int:
    return sum(value.numel() for value in tensors(folder).values())


def test_the_tool_takes_the_shape_of_a_preset(tiny, tmp_path, run_tool):
    names = ("layers", "hidden", "ffn", "heads", "groups", "vocabulary")
    model = tiny.write(tmp_path / "run.yaml", {f"model.{name}": getattr(SMALL, name) for name in names})
    for seed, name in enumerate("ab"):
        convert(make(tmp_path / f"hf_{name}", seed), tmp_path / name, "torch_dist", WriteOptions())
    pair = ("--real", tmp_path / "a", "--synthetic", tmp_path / "b", "--beta", 0.5, "--output", tmp_path / "mix")
    status, _, error = run_tool(TOOL, *pair)
    assert status == 2
    assert "a torch_dist checkpoint does not tell its number of heads; name its shape: --preset" in error
    status, _, error = run_tool(TOOL, *pair, "--preset", model)
    assert status == 0, error
    sides = [tensors(tmp_path / name, SMALL) for name in "ab"]
    assert is_same(tensors(tmp_path / "mix", SMALL), plain(sides, (0.5, 0.5)))
