"""Paths in indexes and manifests of checkpoints: they name files of their folder alone."""

import json
import random
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_convert import drawn_model, refused, save
from test_paths import SECRET
from torch import save as torch_save

from megatron_sphinx.checkpoint.convert import convert, open_checkpoint
from megatron_sphinx.checkpoint.formats.base import Wanted
from megatron_sphinx.checkpoint.interpolate import interpolate
from megatron_sphinx.checkpoint.manifest import MANIFEST, read_manifest
from megatron_sphinx.errors import CheckpointError


def with_index(folder: Path, kind: str) -> tuple[Path, Path, dict]:
    """A checkpoint of Hugging Face's in several files of a kind; its index, and what that holds."""
    save(drawn_model(random.Random(1), experts=0), folder, "3KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if kind == "bin":
        for path in folder.glob("*.safetensors"):
            torch_save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
        index.unlink()
        index = folder / "pytorch_model.bin.index.json"
        places = content["weight_map"]
        content["weight_map"] = {name: file.replace(".safetensors", ".bin") for name, file in places.items()}
        index.write_text(json.dumps(content))
    return folder, index, content


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "lead", ["../outside/{}", "{outside}/{}", "sub/../../outside/{}", "sub/{}", "{}\0", "..", ".", "", 3, None, ["x"]],
    ids=repr,
)  # fmt: skip
def test_an_index_names_files_beside_it_alone(tmp_path, kind, lead):
    folder, index, content = with_index(tmp_path / "model", kind)
    for name in ("outside", "model/sub"):
        (tmp_path / name).mkdir()
    file = max(content["weight_map"].values())
    for name in ("outside", "model/sub"):
        (tmp_path / name / file).write_bytes((folder / file).read_bytes())
    lead = lead.replace("{outside}", str(tmp_path / "outside")).replace("{}", file) if isinstance(lead, str) else lead
    for name in [name for name, of in content["weight_map"].items() if of == file]:
        content["weight_map"][name] = lead
    index.write_text(json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    found = re.escape(f"{lead!r}")
    message = rf"^{index}: .+={found}: is no file beside the index; fetch it from a source you trust$"
    refused(folder, message)
    with pytest.raises(CheckpointError, match=message):
        interpolate([folder, folder], {tmp_path / "mix": (0.5, 0.5)})
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_without_files_is_damaged(tmp_path):
    folder, index, content = with_index(tmp_path / "model", "safetensors")
    index.write_text(json.dumps(content | {"weight_map": ["x"]}))
    refused(folder, "weight_map holds no files by tensor; fetch it again")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_downloads_that_are_full_of_links_are_taken(tmp_path, kind):
    """Hugging Face's cache: every file of a snapshot is a link to ../../blobs."""
    folder, _, _ = with_index(tmp_path / "model", kind)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "1", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "target", "hf", Wanted(), verify=True)


@pytest.mark.parametrize("name", ["../secret", "{tmp}/secret", "a/../../secret", "..", ".", "", "x\0", "a/x"], ids=repr)
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, name):
    (tmp_path / "secret").write_bytes(SECRET)
    save(drawn_model(random.Random(1), experts=0), tmp_path / "hf")
    folder = tmp_path / "step_00000001"
    convert(tmp_path / "hf", folder, "megatron", Wanted())
    manifest = json.loads((folder / MANIFEST).read_text())
    name = name.format(tmp=tmp_path)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": {**manifest["files"], name: "0"}}))
    message = rf"=.*step_00000001: {MANIFEST} names {re.escape(repr(name))}, no file in its folder; give another one"
    with pytest.raises(CheckpointError, match=f"^checkpoint.resume{message}"):
        read_manifest(folder)
    with pytest.raises(CheckpointError, match=f"^SOURCE{message}"):
        open_checkpoint(folder)
