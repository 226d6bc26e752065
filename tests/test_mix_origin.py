"""What a mix says of its origin: its inputs, their shares and digests, in a file or in its manifest."""

import json

import pytest
from mixes import is_same, make, ours, plain, tensors

from megatron_sphinx.checkpoint.digests import algorithm_of, digest_of, sha256_of
from megatron_sphinx.checkpoint.manifest import MANIFEST
from megatron_sphinx.checkpoint.mix import interpolate
from megatron_sphinx.errors import CheckpointError


def test_a_mix_says_what_it_is(tmp_path):
    inputs = [make(tmp_path / f"{seed}", seed) for seed in range(2)]
    for number, folder in enumerate(inputs):
        (folder / "tokenizer.model").write_text("0")
        (folder / "README.md").write_text(str(number))
        (folder / "optimizer.pt").write_bytes(b"weights that would not be mixed")
    done = interpolate(inputs, {tmp_path / "deep" / "mix": (0.25, 0.75)}, scope="language")
    assert done.notes == (f"{inputs[0]}: optimizer.pt stays behind",)
    found = json.loads((tmp_path / "deep" / "mix" / "interpolation.json").read_text())
    assert found == {
        "scope": "language",
        "inputs": [
            {
                "path": str(folder.resolve()),
                "share": share,
                "algorithm": "xxh3_128",
                "digests": {"model.safetensors": digest_of(folder / "model.safetensors")},
            }
            for folder, share in zip(inputs, (0.25, 0.75), strict=True)
        ],
    }
    names = {path.name for path in (tmp_path / "deep" / "mix").iterdir()}
    assert names == {"README.md", "config.json", "interpolation.json", "model.safetensors", "tokenizer.model"}
    assert (tmp_path / "deep" / "mix" / "README.md").read_text() == "0"


CONVERT = "convert_checkpoint.py"


@pytest.mark.parametrize("wanted", ["xxh3_128", "sha256"])
def test_ours_says_it_in_its_manifest(tmp_path, wanted):
    inputs = [ours(tmp_path / f"{seed}", seed) for seed in range(2)]
    interpolate(inputs, {tmp_path / "mix": (0.25, 0.75), tmp_path / "other": (0.5, 0.5)}, algorithm=wanted)
    found, first = (json.loads((folder / "checkpoint.json").read_text()) for folder in (tmp_path / "mix", inputs[0]))
    files, kept = found.pop("files"), first.pop("files")
    assert {*map(algorithm_of, kept.values())} == {"xxh3_128"}
    says = found.pop("interpolation")
    assert found == first
    assert says["inputs"][0]["algorithm"] == wanted
    assert says["inputs"][0]["digests"] == {name: digest_of(inputs[0] / name, wanted) for name in [*kept, MANIFEST]}
    held = [path for path in (tmp_path / "mix").iterdir() if path.name != MANIFEST]
    assert files == {path.name: digest_of(path, wanted) for path in held}
    other = json.loads((tmp_path / "other" / MANIFEST).read_text())["files"]
    assert other == {name: digest_of(tmp_path / "other" / name, wanted) for name in files}
    assert other != files
    interpolate([tmp_path / "mix", inputs[1]], {tmp_path / "again": (0.5, 0.5)})  # a mix is an input as any other
    sides = [tensors(tmp_path / "mix"), tensors(inputs[1])]
    assert is_same(tensors(tmp_path / "again"), plain(sides, (0.5, 0.5)))


def test_what_was_written_before_has_digests_of_sha256(tmp_path):
    """They are checked, and name that input in a mix; what is written now has others."""
    inputs = [ours(tmp_path / f"{seed}", seed) for seed in range(2)]
    manifest = json.loads((inputs[1] / MANIFEST).read_text())
    manifest["files"] = {name: sha256_of(inputs[1] / name) for name in manifest["files"]}
    (inputs[1] / MANIFEST).write_text(json.dumps(manifest))
    interpolate(inputs, {tmp_path / "mix": (0.25, 0.75)})
    found = json.loads((tmp_path / "mix" / MANIFEST).read_text())
    assert [each["algorithm"] for each in found["interpolation"]["inputs"]] == ["xxh3_128", "sha256"]
    named = {name: sha256_of(inputs[1] / name) for name in [*manifest["files"], MANIFEST]}
    assert found["interpolation"]["inputs"][1]["digests"] == named
    assert {*map(algorithm_of, found["files"].values())} == {"xxh3_128"}
    manifest["files"][".metadata"] = sha256_of(inputs[1] / MANIFEST)
    (inputs[1] / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"/1: \.metadata is damaged \(its checksum differs\); give an earlier"):
        interpolate(inputs, {tmp_path / "again": (0.25, 0.75)})


@pytest.mark.parametrize("asked", [(), ("--sha256",)])
def test_convert_writes_digests_of_either_kind_and_checks_both(tmp_path, run_tool, asked):
    source = make(tmp_path / "source", 1)
    status, _, error = run_tool(CONVERT, source, tmp_path / "ours", "--to", "megatron", *asked)
    assert status == 0, error
    files = json.loads((tmp_path / "ours" / MANIFEST).read_text())["files"]
    algorithm = "sha256" if asked else "xxh3_128"
    assert files == {name: digest_of(tmp_path / "ours" / name, algorithm) for name in files}
    assert len(files) == len(list((tmp_path / "ours").iterdir())) - 1
    status, _, error = run_tool(CONVERT, tmp_path / "ours", tmp_path / "hf", "--to", "hf", "--verify")
    assert status == 0, error
    victim = tmp_path / "ours" / ".metadata"
    victim.write_bytes(victim.read_bytes() + b".")  # which a pickle's reader does not look at
    status, _, error = run_tool(CONVERT, tmp_path / "ours", tmp_path / "again", "--to", "hf", "--verify")
    assert status == 2
    assert ".metadata is damaged (its checksum differs); fetch it again" in error
