"""Which files of a checkpoint are taken, what goes along with them, and that no tensor is dropped without a word."""

import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llamas import assert_same_weights, drawn_model, refused, save, shape_of
from mixes import make, ours
from safetensors.torch import load_file, save_file

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mix import interpolate
from megatron_sphinx.cli.mix import betas_of
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.tensors.dtypes import BFLOAT16


def drawn(seed: int):
    """Small Llamas of one shape, their weights drawn by the seed."""
    torch.manual_seed(seed)
    model = drawn_model(random.Random(1), experts=0, groups=2, layers=2)
    for weight in model.parameters():
        weight.data.add_(seed)
    return model


def as_bin(folder: Path, target: Path, *, is_sharded: bool) -> None:
    """Write the tensors of a folder as .bin files into another one."""
    weights = load_file(folder / "model.safetensors")
    if not is_sharded:
        torch.save(weights, target / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-{1 + number % 2:05d}-of-00002.bin" for number, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in places if places[name] == file}, target / file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_of_several_weights_those_are_taken_that_transformers_takes(tmp_path, run_tool, is_sharded):
    tuned = drawn(2)
    as_bin(save(drawn(1), tmp_path / "base"), save(tuned, tmp_path / "tuned"), is_sharded=is_sharded)
    status, out, _ = run_tool("convert_checkpoint.py", tmp_path / "tuned", tmp_path / "out", "--to", "hf")
    assert status == 0
    assert_same_weights(tmp_path / "out", tuned)
    assert_same_weights(tmp_path / "tuned", tuned)  # what transformers takes
    names = "pytorch_model.bin.index.json, pytorch_model-00001-of-00002.bin, .*" if is_sharded else "pytorch_model.bin"
    assert re.search(rf"tuned: model.safetensors is taken, as transformers does; {names} beside it left out", out)


def test_a_whole_file_is_taken_before_an_index(tmp_path):
    tuned = drawn(2)
    folder = save(tuned, tmp_path / "hf")
    save(drawn(1), tmp_path / "sharded", "3KB")
    for path in (tmp_path / "sharded").glob("model*"):
        shutil.copy(path, folder / path.name)
    convert(folder, tmp_path / "out", "hf", WriteOptions())
    assert_same_weights(tmp_path / "out", tuned)


def test_an_index_that_leaves_tensors_out_or_names_none(tmp_path):
    model = drawn(1)
    folder = save(model, tmp_path / "hf", "20KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = sorted(index["weight_map"])[-1]
    path.write_text(
        json.dumps(index | {"weight_map": {key: file for key, file in index["weight_map"].items() if key != name}})
    )
    if index["weight_map"][name] in [file for key, file in index["weight_map"].items() if key != name]:
        convert(folder, tmp_path / "out", "hf", WriteOptions())
        assert_same_weights(tmp_path / "out", model)
    for broken in ([], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 5}}, {"weight_map": 7}):
        path.write_text(json.dumps(broken))
        refused(folder, "index.json: (holds no keys|weight_map holds no files|a=5: is no file beside)")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "model.gguf is a GGUF of llama.cpp"),
        ("adapter_model.safetensors", "adapter_model.safetensors holds a low-rank adapter alone"),
        ("adapter_config.json", "adapter_config.json tells of a low-rank adapter; merge it into its base model first"),
        ("model-00001-of-00002.safetensors", "is a part of a checkpoint whose model.safetensors.index.json is missing"),
        ("consolidated.safetensors", "is of Mistral's newer format"),
        ("consolidated.01.pth", "is a part of a checkpoint whose first one is missing"),
        ("tf_model.h5", "is of TensorFlow"),
        ("model.fp16.safetensors", "has another name than model.safetensors"),
    ],
)
def test_what_is_no_whole_checkpoint_is_named(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(b"x")
    refused(tmp_path / "folder", f"folder: .*{message}")


def test_an_adapter_beside_its_base_is_refused(tmp_path):
    folder = save(drawn(1), tmp_path / "hf")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter_config.json tells of a low-rank adapter; merge it into its base model first")


def test_types_of_quantized_weights_are_refused_and_mixed_ones_lose_nothing(tmp_path):
    model = drawn(1)
    folder = save(model, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    refused(folder, "k_proj.weight is of type I8; known|is of type int8; give a checkpoint that is not quantized")
    save_file(weights | {name: weights[name].to(torch.int32)}, folder / "model.safetensors")
    refused(folder, f"{name} in model.safetensors is of type int32; give a checkpoint that is not quantized")
    other = "model.layers.0.self_attn.q_proj.weight"  # with k in one matrix of InternLM2
    save_file(weights | {other: weights[other].to(torch.bfloat16)}, folder / "model.safetensors")
    convert(folder, tmp_path / "packed", "internlm2", WriteOptions(), verify=True)
    convert(tmp_path / "packed", tmp_path / "back", "hf", WriteOptions())
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")[name], weights[name])


def test_values_that_fp16_does_not_have_are_told(tmp_path, run_tool):
    model = drawn(1)
    model.model.norm.weight.data[:2] = 1e6
    save(model, tmp_path / "hf")
    arguments = (tmp_path / "hf", tmp_path / "out", "--to", "hf", "--dtype", "fp16")
    status, out, _ = run_tool("convert_checkpoint.py", *arguments)
    assert status == 0
    assert "model.norm.weight: 2 values are infinite in fp16, whose largest one is 65,504; --dtype bf16 holds" in out


# what goes along


def test_tokens_positions_and_generation_go_along(tmp_path, run_tool):
    model = drawn(1)
    model.config.update({"bos_token_id": 50, "eos_token_id": [51, 52], "pad_token_id": 51})
    model.config.max_position_embeddings = 4096
    model.generation_config.update(eos_token_id=[51, 52])
    save(model, tmp_path / "hf")
    wanted = {"bos_token_id": 50, "eos_token_id": [51, 52], "pad_token_id": 51, "max_position_embeddings": 4096}
    convert(tmp_path / "hf", tmp_path / "ours", "megatron", WriteOptions())
    for source, form in (("hf", "hf"), ("hf", "internlm2"), ("ours", "hf"), ("internlm2", "hf")):
        target = tmp_path / (form if form != "hf" else f"{source}_hf")
        convert(tmp_path / source, target, form, WriteOptions(dtype=BFLOAT16))
        assert json.loads((target / "config.json").read_text()).items() >= wanted.items()
        assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [51, 52]
    status, out, _ = run_tool("convert_checkpoint.py", tmp_path / "hf", tmp_path / "meta", "--to", "meta")
    assert status == 0
    _, told, _ = run_tool("convert_checkpoint.py", tmp_path / "meta", tmp_path / "back", "--to", "hf")
    assert "meta: does not tell bos_token_id, eos_token_id, max_position_embeddings; config.json has the arch" in told
    lost = r"bos_token_id=50, .*max_position_embeddings=4096, .*pad_token_id=51, .*generation_config.json"
    assert re.search(rf"hf: meta has no place for {lost}", out)


def test_positions_scaled_behind_the_last_are_kept(tmp_path):
    model = drawn(1)
    save(model, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4096}
    path.write_text(json.dumps(json.loads(path.read_text()) | scaled))
    convert(tmp_path / "hf", tmp_path / "out", "hf", WriteOptions())
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found.items() >= scaled.items()
    assert found["rope_theta"] == shape_of(model).rope_theta


def run_of(tmp_path: Path, tokenizer: Path, weights: Path | None, digest: str) -> Path:
    """A run folder with a checkpoint of ours, as a run that began with some weights leaves it."""
    run = tmp_path / "run"
    step = ours(run / "checkpoints" / "step_00000001", 1)
    manifest = json.loads((step / "checkpoint.json").read_text())
    manifest["identity"]["tokenizer"] = digest
    del manifest["transformers"]  # a conversion has it, no run
    (step / "checkpoint.json").write_text(json.dumps(manifest))
    told = {
        "data": {"tokenizer": str(tokenizer), "sequence_length": 128},
        "model": {"weights": weights and str(weights)},
    }
    (run / "config.yaml").write_text(json.dumps(told))
    return run


def test_the_tokenizer_of_a_run_goes_along(tmp_path, tiny, run_tool):
    path = tiny.folder / "tokenizer.model"
    digest = tiny.tokenizer.identity.sha256
    run = run_of(tmp_path, path, None, digest)
    status, out, _ = run_tool("convert_checkpoint.py", run, tmp_path / "out", "--to", "hf")
    assert status == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == path.read_bytes()
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["bos_token_id"], found["eos_token_id"]) == (tiny.tokenizer.bos, tiny.tokenizer.eos)
    assert found["max_position_embeddings"] == 128
    shutil.rmtree(run)
    run_of(tmp_path, path, None, "other")
    _, out, _ = run_tool("convert_checkpoint.py", run, tmp_path / "out2", "--to", "hf")
    assert f"data.tokenizer={path}: is not the one that the run had, so no tokenizer goes along" in out
    shutil.rmtree(run)
    run_of(tmp_path, tmp_path / "gone.model", None, digest)
    _, out, _ = run_tool("convert_checkpoint.py", run, tmp_path / "out3", "--to", "hf")
    assert "gone.model: is not there, so no tokenizer goes along" in out
    shutil.rmtree(run)
    begun = save(drawn(1), tmp_path / "begun")
    config = json.loads((begun / "config.json").read_text()) | {"eos_token_id": 77, "max_position_embeddings": 999}
    (begun / "config.json").write_text(json.dumps(config))
    shutil.copy(path, begun / "tokenizer.model")
    (begun / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    run_of(tmp_path, path, begun, digest)
    convert(run, tmp_path / "out4", "hf", WriteOptions())
    found = json.loads((tmp_path / "out4" / "config.json").read_text())
    assert (found["eos_token_id"], found["max_position_embeddings"]) == (77, 999)
    assert (tmp_path / "out4" / "tokenizer_config.json").read_text() == '{"chat_template": "x"}'


# every tensor is accounted for


def balance_of(out: str) -> list[int]:
    """The numbers of the last line, which add up."""
    total, parts = re.search(r": (\d+) tensors = (.*?)( \(|$)", out.splitlines()[-1]).group(1, 2)
    counts = [int(part.split()[0]) for part in parts.split(" + ")]
    assert sum(counts) == int(total), out
    return [int(total), *counts]


def test_what_is_left_out_is_named(tmp_path, run_tool):
    folder = save(drawn(1), tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    derived = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(3) for layer in range(2)}
    save_file(weights | derived, folder / "model.safetensors")
    (folder / "LICENSE").write_text("free")
    _, out, _ = run_tool("convert_checkpoint.py", folder, tmp_path / "meta", "--to", "meta", "--tensor-parallel", 2)
    assert balance_of(out) == [23, 21, 2]
    assert "(2 model.safetensors: model.layers.*.self_attn.rotary_emb.inv_freq: follows from the configuration)" in out
    assert f"{folder}: LICENSE stays behind" in out.splitlines()
    _, out, _ = run_tool("convert_checkpoint.py", tmp_path / "meta", tmp_path / "back", "--to", "hf")
    assert balance_of(out) == [42, 37, 5]  # both ranks have the norms
    assert "another rank's file has it too" in out
    _, out, _ = run_tool("convert_checkpoint.py", folder, tmp_path / "packed", "--to", "internlm2")
    assert balance_of(out) == [23, 21, 2]
    assert "21 made into 17" in out
    pair = ("--real", folder, "--synthetic", tmp_path / "back", "--beta", 0.5, "--output", tmp_path / "mix")
    status, out, _ = run_tool("interpolate_weights.py", *pair)
    assert (status, balance_of(out)) == (0, [21, 21, 0])
    assert f"{folder}: 23 tensors = 21 mixed + 2 copied + 0 left out" in out.splitlines()


# mixing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 5e5, "rope_parameters": ...}, "has model.rope_theta=500000.0"),
        ({"rms_norm_eps": 1e-4}, "has model.norm_epsilon=0.0001"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": ...},
            "groups=4|heads=4|shape",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "has rope_scaling={'type': 'dynamic', 'factor': 2.0}"),
        ({"attention_bias": True}, "attention_bias=True: there are no biases here"),
    ],
)
def test_models_of_other_settings_are_not_mixed(tmp_path, change, message):
    for name in "ab":
        save(drawn(1), tmp_path / name)
    path = tmp_path / "b" / "config.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(CheckpointError, match=message):
        interpolate([tmp_path / "a", tmp_path / "b"], {tmp_path / "mix": (0.5, 0.5)})


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"])
def test_models_of_other_tokenizers_are_not_mixed(tmp_path, name):
    for folder in "ab":
        make(tmp_path / folder, 1)
    inputs, target = [tmp_path / "a", tmp_path / "b"], {tmp_path / "mix": (0.5, 0.5)}
    (tmp_path / "a" / name).write_text('{"model": {"vocab": {"a": 1}}, "version": "1"}')
    done = interpolate(inputs, {tmp_path / "first": (0.5, 0.5)})
    assert done.notes == (f"{tmp_path / 'b'}: has no tokenizer beside it to compare with that of {tmp_path / 'a'}",)
    (tmp_path / "b" / name).write_text('{"model": {"vocab": {"a": 2}}, "version": "1"}')
    with pytest.raises(CheckpointError, match=rf"b: {name} differs from that of \S+/a; give checkpoints with the same"):
        interpolate(inputs, target)
    if name.endswith("json"):  # another version of the library, which writes other spaces
        (tmp_path / "b" / name).write_text('{"version": "2", "model": {"vocab":\n {"a": 1}}}')
        interpolate(inputs, target)


def test_what_changes_no_weight_is_told_and_taken_from_the_first(tmp_path):
    for name in "ab":
        make(tmp_path / name, 1)
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 9}))
    done = interpolate([tmp_path / "a", tmp_path / "b"], {tmp_path / "mix": (0.5, 0.5)})
    assert done.notes == (f"{tmp_path}/b: eos_token_id=9, {tmp_path}/a has 2, which the mix takes",)


def test_experts_drawn_from_other_seeds_say_how_to_go_on(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        folder = ours(tmp_path / name, seed)
        manifest = json.loads((folder / "checkpoint.json").read_text())
        manifest["identity"]["vision"] = {"experts": {"clip_vit_l14": f"random {seed}"}}
        (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"random 2, \S+ with random 1; .*drawn from run.seed.*one run.seed"):
        interpolate([tmp_path / "a", tmp_path / "b"], {tmp_path / "mix": (0.5, 0.5)})


def test_a_range_of_shares_may_run_down():
    assert betas_of("1:0:0.25") == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert betas_of("1:0:-0.25") == betas_of("1:0:0.25")
    assert betas_of("0:1:0.25") == betas_of("1:0:0.25")[::-1]


@pytest.mark.parametrize("text", ["0:1:0", "0:1:nan", "0:inf:1", "a", "0:1:1e-9", "::", "1:2:3:4", ""])
def test_a_range_that_is_none_is_refused(tmp_path, run_tool, capsys, text):
    pair = ("--real", tmp_path, "--synthetic", tmp_path, "--output", tmp_path / "x", f"--beta={text}")
    with pytest.raises(SystemExit, match="2"):
        run_tool("interpolate_weights.py", *pair)
    assert re.search(
        "neither a number nor first:last:step|are [0-9]+ mixes; give a larger step, for 1000", capsys.readouterr().err
    )


# two at once, and being stopped


@pytest.mark.parametrize("is_mix", [False, True])
def test_two_at_once_do_not_write_one_folder(tmp_path, is_mix):
    inputs = [make(tmp_path / name, 1) for name in "ab"]
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "of another").touch()
    number = os.open(partial, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)

    def work() -> None:
        if is_mix:
            interpolate(inputs, {tmp_path / "out": (0.5, 0.5)})
        else:
            convert(inputs[0], tmp_path / "out", "hf", WriteOptions())

    with pytest.raises(CheckpointError, match=r"\.out\.partial: another process is writing it; wait for that, or give"):
        work()
    assert (partial / "of another").exists()
    os.close(number)
    work()
    assert not partial.exists()


def test_a_source_or_target_that_is_a_file(tmp_path, run_tool):
    folder = make(tmp_path / "a", 1)
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        ((file, tmp_path / "x"), "file: no such folder"),
        ((folder, file), "file: exists; give another TARGET"),
        ((folder, file / "x"), r"x: could not be written \(Not a directory\)"),
        ((folder, tmp_path / ("x" * 300)), r"could not be written \(File name too long\)|exists"),
        ((folder, "/proc/x"), r"could not be written"),
    ):
        status, _, error = run_tool("convert_checkpoint.py", *arguments, "--to", "hf")
        assert status == 2
        assert re.search(message, error.splitlines()[-1])
    assert run_tool("inspect_checkpoint.py", file)[0] == 2


def test_ctrl_c_is_one_line(tmp_path):
    code = (
        "import sys, megatron_sphinx.cli.inspect as command\n"
        "from megatron_sphinx.cli.command import run_alone\n"
        "def run(args): raise KeyboardInterrupt\n"
        "command.run = run\n"
        "sys.argv = ['inspect', '.']\n"
        "sys.exit(run_alone(command))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "inspect: stopped by Ctrl-C; run the same command again\n")
