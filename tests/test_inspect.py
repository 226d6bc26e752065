"""What tools/inspect_checkpoint.py says of checkpoints, and how it tells what has changed."""

import json
import random
import re
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.inspect import compare, tensors
from megatron_sphinx.checkpoint.open import open_checkpoint

TOOL = "inspect_checkpoint.py"
CHANNELS = 10


def make(folder: Path, seed: int, *, experts: int = 0, is_sphinx: bool = True) -> Path:
    """A Hugging Face checkpoint of a random shape: two files, projections and tags, a frozen expert."""
    rng = random.Random(seed)
    groups, queries = rng.choice([2, 4]), rng.choice([1, 3])
    hidden = groups * queries * 4
    shape = {
        "hidden_size": hidden, "intermediate_size": rng.choice([12, 20]), "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": groups * queries, "num_key_value_heads": groups, "vocab_size": rng.choice([64, 130]),
    }  # fmt: skip
    torch.manual_seed(seed)
    if experts:
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=experts, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(folder, max_shard_size="9KB")
    if is_sphinx:
        sizes = {"0.weight": (hidden, CHANNELS), "0.bias": (hidden,), "1.weight": (hidden,), "1.bias": (hidden,)}
        extras = {f"visual_proj.{name}": torch.rand(size) for name, size in sizes.items()}
        save_file(
            extras | {"start_tag": torch.rand(hidden), "end_tag": torch.rand(hidden)}, folder / "sphinx.safetensors"
        )
        (folder / "encoders").mkdir()
        save_file({"llma.clip.proj": torch.rand(3, 5)}, folder / "encoders" / "clip.safetensors")
    return folder


def change(folder: Path, name: str, by: torch.Tensor | float) -> float:
    """Add to a tensor of a Hugging Face checkpoint, wherever it lies; the norm of what was added."""
    (path,) = [path for path in folder.rglob("*.safetensors") if name in load_file(path)]
    found = load_file(path)
    apart = (found[name] + by) - found[name]
    found[name] = found[name] + by
    save_file(found, path, {"format": "pt"})
    return float(apart.double().norm())


# what it is


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("form", ["hf", "megatron", "accessory"])
def test_it_says_what_a_checkpoint_is(run_tool, tmp_path, form, experts):
    source = make(tmp_path / "source", 3, experts=experts)
    convert(source, tmp_path / "target", form, WriteOptions(2 if form == "accessory" else 1, is_sparse=True))
    folder = tmp_path / "target"
    status, out, _ = run_tool(TOOL, folder, "--json", "--keys")
    about, config = json.loads(out), json.loads((source / "config.json").read_text())
    assert status == 0
    assert (about["format"], about["path"]) == (form, str(folder))
    assert about["architecture"] == ("Mixtral, SPHINX" if experts else "LLaMA, SPHINX")
    assert about["model"]["ffn"] == config["intermediate_size"]
    assert about["channels"] == {"visual_proj": CHANNELS}
    held = load_file(source / "sphinx.safetensors")
    parts = about["parameters"]
    assert parts["projections and tags"] == sum(value.numel() for value in held.values())
    assert parts["clip"] == 15
    model = {name: entry for (_, name), entry in open_checkpoint(source).source.entries.items() if name not in held}
    assert parts["language"] == sum(torch.Size(entry.shape).numel() for entry in model.values())
    assert parts["all"] == sum(parts.values()) - parts["all"]
    assert about["tensors"] == len(about["keys"]) == sum(about["dtypes"].values())
    assert about["dtypes"].keys() == {"float32"}
    status, out, _ = run_tool(TOOL, folder, "--keys")
    lines = out.splitlines()
    assert re.match(rf"{folder}: {form}, .*; {about['architecture']}$", lines[0])
    assert f"parameters: {parts['all']:,} (language {parts['language']:,}, projections" in out
    for name, key in about["keys"].items():
        assert f"{name} {key['shape']} float32" in lines
    assert run_tool(TOOL, folder)[1].splitlines() == lines[: -len(about["keys"])]


def test_a_torch_dist_checkpoint_needs_its_shape(run_tool, tiny, tmp_path):
    source = make(tmp_path / "source", 5, is_sphinx=False)
    convert(source, tmp_path / "dist", "torch_dist", WriteOptions())
    status, out, error = run_tool(TOOL, tmp_path / "dist")
    assert (status, out) == (2, "")
    assert "does not tell its number of heads; name its shape: --preset" in error
    shape = open_checkpoint(source).model.language
    values = {f"model.{name}": value for name, value in shape.shape.items()}
    config = tiny.write(tmp_path / "c.yaml", values)
    status, out, _ = run_tool(TOOL, tmp_path / "dist", "--preset", config)
    assert status == 0
    assert f"parameters: {shape.parameters:,} (language {shape.parameters:,})" in out
    assert run_tool(TOOL, source, "--diff", tmp_path / "dist")[0] == 0


def test_what_is_no_checkpoint_is_refused(run_tool, tmp_path):
    assert run_tool(TOOL, tmp_path / "none") == (
        2, "", f"{TOOL}: {tmp_path}/none: no such folder; give the folder of a checkpoint\n",
    )  # fmt: skip
    status, out, error = run_tool(TOOL, tmp_path)
    assert (status, out) == (2, "")
    assert f"{tmp_path}: no checkpoint of a known format; give a folder with" in error


# manifests


@pytest.mark.parametrize("form", ["hf", "megatron", "accessory"])
def test_a_manifest_finds_every_change(run_tool, tmp_path, form):
    convert(
        make(tmp_path / "source", 7),
        tmp_path / "here",
        form,
        WriteOptions(2 if form == "accessory" else 1, is_sparse=True),
    )
    status, out, error = run_tool(TOOL, tmp_path / "here", "--hash")
    assert status == 0
    assert "hashing: 100%" in error
    sums = json.loads(out)["digests"]
    opened = open_checkpoint(tmp_path / "here")
    assert sums.keys() == tensors(opened).keys()
    manifest = tmp_path / "manifest.json"
    manifest.write_text(out)
    assert run_tool(TOOL, tmp_path / "here", "--check", manifest)[:2] == (0, f"{tmp_path}/here: as it was\n")
    name, entry = max(tensors(opened).items(), key=lambda item: item[1].nbytes)
    chunk = entry.chunks[0]
    with chunk.path.open("r+b") as file:  # one bit
        file.seek(chunk.start + entry.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    other = sums | {"more: of it": "0" * 64}
    added = next(key for key in sums if key != name)
    del other[added]
    manifest.write_text(json.dumps({"digests": other}))
    status, out, _ = run_tool(TOOL, tmp_path / "here", "--check", manifest)
    assert status == 1
    wanted = [f"{added}: is new", f"{name}: differs", "more: of it: is missing"]
    assert out.splitlines() == [*sorted(wanted), f"{tmp_path}/here: 3 of {len(other)} tensors differ"]


def test_a_manifest_of_sha256_is_made_on_request_and_was_called_so_at_first(run_tool, tmp_path):
    folder, manifest = make(tmp_path / "source", 7), tmp_path / "manifest.json"
    sums = json.loads(run_tool(TOOL, folder, "--hash", "--sha256")[1])["digests"]
    name, entry = next(iter(tensors(open_checkpoint(folder)).items()))
    content = entry.chunks[0].path.read_bytes()[entry.chunks[0].start :][: entry.nbytes]
    assert sums[name] == sha256(f"torch.float32 {list(entry.shape)}".encode() + content).hexdigest()
    manifest.write_text(json.dumps({"sha256": sums}))
    assert run_tool(TOOL, folder, "--check", manifest)[0] == 0


def test_the_same_tensors_have_the_same_digests_in_other_files(run_tool, tmp_path):
    source = make(tmp_path / "source", 9)
    convert(source, tmp_path / "one_file", "hf", WriteOptions())
    found = [json.loads(run_tool(TOOL, folder, "--hash")[1])["digests"] for folder in (source, tmp_path / "one_file")]
    one, other = ({name.split(": ")[1]: digest for name, digest in sums.items()} for sums in found)
    assert one == other
    assert len(set(one.values())) > len(one) / 2
    change(source, "start_tag", torch.zeros([1], dtype=torch.float64))  # the same values in another type
    changed = json.loads(run_tool(TOOL, source, "--hash")[1])["digests"]
    assert {name for name in changed if changed[name] != found[0][name]} == {"sphinx.safetensors: start_tag"}


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", r"cannot be read \(.*\); give a file that --hash has"), ("[]", "is no manifest; give a file that --hash")],
)
def test_what_is_no_manifest_is_refused(run_tool, tmp_path, content, message):
    (tmp_path / "manifest").write_text(content)
    folder = make(tmp_path / "source", 1)
    status, out, error = run_tool(TOOL, folder, "--check", tmp_path / "manifest")
    assert (status, out) == (2, "")
    assert re.search(rf"{TOOL}: {tmp_path}/manifest: {message}", error)


# differences


@pytest.mark.parametrize(
    ("form", "experts"),
    [("hf", 0), ("megatron", 0), ("megatron", 4), ("accessory", 0), ("accessory", 4), ("internlm2", 0)],
)
def test_differences_are_found_across_formats(run_tool, tmp_path, form, experts):
    one, other = (make(tmp_path / name, 11, experts=experts) for name in ("one", "other"))
    convert(one, tmp_path / "same", form, WriteOptions(2 if form == "accessory" else 1, is_sparse=True))
    status, out, _ = run_tool(TOOL, one, "--diff", tmp_path / "same")
    assert (status, out.split()) == (0, ["norm", "relative", "most", "0", "0", "0", "all"])
    assert run_tool(TOOL, tmp_path / "same", "--diff", one)[0] == 0
    norms = {
        "model.layers.0.self_attn.k_proj.weight": 0.5,
        "visual_proj.0.bias": torch.rand(open_checkpoint(one).model.language.hidden),
        "llma.clip.proj": 0.01,
    }
    norms = {name: change(other, name, by) for name, by in norms.items()}
    convert(other, tmp_path / "changed", form, WriteOptions(2 if form == "accessory" else 1, is_sparse=True))
    status, out, _ = run_tool(TOOL, one, "--diff", tmp_path / "changed", "--json")
    assert status == 1
    *rows, every = json.loads(out)
    assert [row["norm"] for row in rows] == sorted((row["norm"] for row in rows), reverse=True)
    found = {row["name"].split(": ")[1]: row for row in rows}
    assert {name for name, row in found.items() if row["norm"]} == norms.keys()
    for name, norm in norms.items():
        assert found[name]["norm"] == pytest.approx(norm, rel=1e-6)
        assert found[name]["relative"] == pytest.approx(norm / found[name]["of_first"], rel=1e-6)
    assert found["model.layers.0.self_attn.k_proj.weight"]["most"] == pytest.approx(0.5, rel=1e-5)
    assert every["norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5, rel=1e-6)
    status, out, _ = run_tool(TOOL, one, "--diff", tmp_path / "changed")
    assert status == 1
    lines = out.splitlines()
    assert len(lines) == 5
    assert lines[-1].endswith(" all")
    of_target = run_tool(TOOL, tmp_path / "changed", "--diff", one, "--json")
    assert json.loads(of_target[1])[-1]["most"] == pytest.approx(every["most"])


def test_infinities_are_alike_and_what_is_no_number_comes_first(run_tool, tmp_path):
    one, other = (make(tmp_path / name, 13) for name in ("one", "other"))
    for folder in (one, other):
        change(folder, "start_tag", torch.inf)
    change(other, "end_tag", 1e6)
    assert [line.split()[-1] for line in run_tool(TOOL, one, "--diff", other)[1].splitlines()[1:]] == ["end_tag", "all"]
    change(other, "visual_proj.1.bias", torch.nan)
    status, out, _ = run_tool(TOOL, one, "--diff", other)
    assert status == 1
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["visual_proj.1.bias", "end_tag", "all"]


def test_padding_is_no_difference(tmp_path):
    convert(make(tmp_path / "hf", 2), tmp_path / "ours", "megatron", WriteOptions())
    ours = open_checkpoint(tmp_path / "ours")
    name = "master/language.output_layer.weight"
    (chunk,) = ours.source.entries["weights", name].chunks
    rows, hidden = chunk.shape
    with chunk.path.open("r+b") as file:
        file.seek(chunk.start + 4 * hidden * ours.model.language.vocabulary)
        file.write(torch.ones(hidden).numpy().tobytes())
    assert rows > ours.model.language.vocabulary
    assert not any(item.norm for item in compare(ours, open_checkpoint(tmp_path / "hf")))


def test_two_models_are_not_compared(run_tool, tmp_path):
    one, other = make(tmp_path / "one", 4), make(tmp_path / "other", 4, experts=2)
    status, out, error = run_tool(TOOL, one, "--diff", other)
    assert (status, out) == (2, "")
    assert f"{other}: has model.experts=2, {one} has 0; give two of one model" in error
    bare = make(tmp_path / "bare", 4, is_sphinx=False)
    error = run_tool(TOOL, one, "--diff", bare)[2]
    assert f"{bare}: has channels=0, {one} has {CHANNELS}; give two of one model" in error
    save_file({"llma.clip.proj": torch.rand(3, 4)}, tmp_path / "clip.safetensors")
    twin = make(tmp_path / "twin", 4)
    (tmp_path / "clip.safetensors").replace(twin / "encoders" / "clip.safetensors")
    error = run_tool(TOOL, one, "--diff", twin)[2]
    assert f"{twin}: clip has no llma.clip.proj of the same shape; give two of one model" in error
