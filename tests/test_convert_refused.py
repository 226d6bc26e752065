"""What a conversion refuses: bad inputs, which it names, and what cannot be asked for."""

import json
import os
import pickle
import random
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamas import assert_same_weights, drawn_model, refused, save, shape_of
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
)

from megatron_sphinx.checkpoint import convert as converting
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mapping.conversion import Conversion, TensorSource
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.errors import CheckpointError

# what is refused


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def tiny_hf(tmp_path) -> tuple[PreTrainedModel, Path]:
    model = drawn_model(random.Random(1), experts=0)
    return model, save(model, tmp_path / "hf")


def test_a_repository_that_holds_both_kinds_of_files(tiny_hf, tmp_path):
    _, folder = tiny_hf
    (folder / "pytorch_model.bin").write_bytes(b"fetched by nobody")
    convert(folder, tmp_path / "target", "hf", WriteOptions(), verify=True)


def test_scaled_positions_are_refused_unless_they_are_far_behind(tiny_hf, tmp_path):
    _, folder = tiny_hf
    about = json.loads((folder / "config.json").read_text())
    for kind in ("dynamic", "linear"):
        scaled = about | {"rope_parameters": about["rope_parameters"] | {"rope_type": kind, "factor": 2.0}}
        (folder / "config.json").write_text(json.dumps(scaled))
        if kind == "dynamic":
            convert(folder, tmp_path / "target", "hf", WriteOptions(), verify=True)
        else:
            refused(folder, "config.json: rope_parameters={.*linear.*}: positions are not scaled here; give a model")


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_dropped_misnamed_misshaped_or_doubled_tensor_is_named(tmp_path, experts, seed):
    rng = random.Random(seed)
    model = drawn_model(rng, experts=experts)
    for form in ("hf", "meta", "accessory"):
        folder = tmp_path / form
        convert(save(model, tmp_path / "0"), folder, form, WriteOptions()) if form != "hf" else save(model, folder)
        (file,) = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".pth")]
        loaded = load_file(file) if form == "hf" else torch.load(file, weights_only=True)
        weights = loaded.get("model", loaded)

        def write(values, file=file, form=form):
            save_file(values, file) if form == "hf" else torch.save({"model": values}, file)

        name = rng.choice([name for name, value in weights.items() if value.ndim > 1])
        others = {key: value for key, value in weights.items() if key != name}
        plain = re.escape(name)
        write(others)
        refused(folder, f"holds no {plain}; give a whole checkpoint|unknown value|does not describe")
        write(weights | {"surprise": torch.zeros(3)})
        refused(folder, "holds (llma.)?surprise, which no rule of its format knows")
        write(others | {f"{name}x": weights[name]})
        refused(folder, f"holds no {plain}; give a whole checkpoint|does not describe")
        write(others | {name: weights[name][:-1].clone()})
        refused(
            folder,
            r"(has shape \[.*\], its configuration says \[.*\]|by the tensors); give files that belong|cannot|must",
        )
        if form == "accessory":
            write(weights | {name.removeprefix("llma."): weights[name]})
            refused(folder, f"holds {plain} twice, with and without llma.; remove one of them")
        write(weights)
        convert(folder, tmp_path / f"{form}_whole", "hf", WriteOptions())
        assert_same_weights(tmp_path / f"{form}_whole", model)


def test_a_tensor_in_two_files_is_named(tiny_hf):
    model, _ = tiny_hf
    folder = save(model, tiny_hf[1].parent / "sharded", "3KB")
    one, other = sorted(folder.glob("model-*.safetensors"))[:2]
    name, value = next(iter(load_file(one).items()))
    save_file(load_file(other) | {name: value}, other)
    refused(folder, f"{re.escape(name)} is in {one.name} and in {other.name}; remove one of them")
    one.unlink()
    refused(folder, f"{one.name} is missing; fetch it again")


def test_rules_that_overlap_or_leave_a_gap_are_refused(tiny_hf):
    """The proof of a conversion does not rest on the tables: wrong ones are found before anything is written."""
    _, folder = tiny_hf
    opened = open_checkpoint(folder)
    items = [*opened.source.specs]
    assert Conversion(opened.source, items).copies == []
    with pytest.raises(CheckpointError, match=r"0 of the .* elements of k in .*k_proj.weight would be used"):
        Conversion(opened.source, [item for item in items if "k_proj" not in item.name])
    broken = TensorSource("s", [item for item in items if "k_proj" not in item.name], opened.source.entries)
    with pytest.raises(CheckpointError, match=r"holds what .*k_proj.weight needs nowhere \(k\)"):
        Conversion(broken, items)
    up = next(item for item in items if "up_proj" in item.name)
    overlapping = replace(up, box=up.box | {"ffn": (0, 5)})
    with pytest.raises(CheckpointError, match=r"holds what .*up_proj.weight needs twice \(up\)"):
        Conversion(TensorSource("s", [*items, overlapping], opened.source.entries), items)


@pytest.fixture(params=["hf", "bin", "meta", "accessory", "megatron", "torch_dist"])
def stored_file(request, tmp_path) -> tuple[PreTrainedModel, str, Path]:
    """A model, the format that it is stored in, and the first file of its tensors."""
    model, form = drawn_model(random.Random(1), experts=0), request.param
    folder = save(model, tmp_path / "hf")
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif form != "hf":
        convert(folder, tmp_path / "there", form, WriteOptions())
        folder = tmp_path / "there"
    suffixes = (".safetensors", ".bin", ".pth", ".distcp")
    return model, form, min(path for path in folder.iterdir() if path.suffix in suffixes)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def test_torn_files_are_refused(stored_file):
    model, _, file = stored_file
    whole = file.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(file.parent, rf"{file.name}: .*(cannot be read as|is damaged) .*(fetch|give)", shape=shape_of(model))
    file.unlink()
    refused(file.parent, "missing|cannot be read|no checkpoint of a known format", shape=shape_of(model))


def test_flipped_bits_are_refused(stored_file, tmp_path):
    """In what describes tensors, if they change anything; in the tensors themselves where files have checksums."""
    model, form, file = stored_file
    whole, rng = file.read_bytes(), random.Random(1)
    begin = 0 if form == "hf" else whole.index(b"data.pkl")
    end = 8 + struct.unpack("<Q", whole[:8])[0] if form == "hf" else begin + 150
    for _ in range(20):
        file.write_bytes(flipped(whole, rng.randrange(begin, end), rng.randrange(8)))
        try:
            convert(file.parent, tmp_path / "target", "hf", WriteOptions(), shape=shape_of(model))
        except CheckpointError:
            assert not (tmp_path / "target").exists()
        else:  # a bit that nothing follows from
            assert_same_weights(tmp_path / "target", model)
            shutil.rmtree(tmp_path / "target")
    if form not in ("hf", "torch_dist"):
        weight = model.model.embed_tokens if form == "megatron" else model.model.norm  # the file's first tensor
        place = whole.index(weight.weight.detach().numpy().tobytes()[:40])
        file.write_bytes(flipped(whole, place + rng.randrange(40), rng.randrange(8)))
        refused(file.parent, rf"{file.name} is damaged \(its checksum differs\)", verify=True)


def test_verifying_finds_a_bit_that_the_disk_does_not_keep(tiny_hf, tmp_path, monkeypatch):
    _, folder = tiny_hf
    opened = converting.open_checkpoint

    def faulty(source: Path, *arguments, is_finished: bool = True, **named):
        if not is_finished:
            file = next(source.glob("*.safetensors"))
            whole = file.read_bytes()
            file.write_bytes(flipped(whole, len(whole) - 2, 3))
        return opened(source, *arguments, is_finished=is_finished, **named)

    monkeypatch.setattr(converting, "open_checkpoint", faulty)
    convert(folder, tmp_path / "unseen", "hf", WriteOptions())
    refused(folder, r"read back differs; the disk or the memory is faulty", verify=True)


def test_what_is_pickled_is_not_run(stored_file, tmp_path):
    model, form, file = stored_file
    victims = {"hf": [], "megatron": [file, file.with_name(".metadata")]}
    victims["torch_dist"] = victims["megatron"]
    for victim in victims.get(form, [file]):
        before = victim.read_bytes()
        if victim.name == ".metadata":
            victim.write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
        else:
            torch.save({"model": Malicious(tmp_path / "owned")}, victim)
        refused(file.parent, f"{victim.name}: .*(posix.mkdir|is damaged|cannot be read)", shape=shape_of(model))
        assert not (tmp_path / "owned").exists()
        victim.write_bytes(before)


def test_missing_shards_are_named(tmp_path):
    source = save(drawn_model(random.Random(5), experts=0, groups=4), tmp_path / "source")
    convert(source, tmp_path / "meta", "meta", WriteOptions(4))
    convert(source, tmp_path / "accessory", "accessory", WriteOptions(4))
    (tmp_path / "meta" / "consolidated.01.pth").unlink()
    refused(
        tmp_path / "meta", "its shards are consolidated.00.pth, consolidated.02.pth, consolidated.03.pth; fetch the m"
    )
    (tmp_path / "accessory" / "consolidated.01-of-04.model.pth").unlink()
    refused(tmp_path / "accessory", r"has 3 of 4 shards \(consolidated.00-of-04.model.pth, .*\); fetch all of them")


def test_what_cannot_be_asked_for_is_refused(tiny_hf, tmp_path, run_tool):
    _, folder = tiny_hf
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there: exists; give another TARGET, or remove it"):
        convert(folder, tmp_path / "there", "hf", WriteOptions())
    refused(tmp_path / "nowhere", "nowhere: no such folder; give the folder of a checkpoint")
    refused(tmp_path / "there", "no checkpoint of a known format; give a folder with model.safetensors")
    refused(folder, "--tensor-parallel 2: megatron does not divide tensors; leave it out", "megatron", WriteOptions(2))
    refused(folder, "7 tensor ranks: cannot share .* of .*; use a divisor", "meta", WriteOptions(7))
    experts = save(drawn_model(random.Random(2), experts=6), tmp_path / "experts")
    refused(experts, "--tensor-parallel: Mistral's checkpoints of experts are one file", "meta", WriteOptions(2))
    refused(experts, "--to internlm2: has no experts; use hf", "internlm2")
    refused(experts, "4 tensor ranks: cannot share", "accessory", WriteOptions(4))
    status, _, error = run_tool("convert_checkpoint.py", tmp_path / "nowhere", tmp_path / "x", "--to", "hf")
    assert status == 2
    assert error.splitlines()[-1] == (
        f"convert_checkpoint.py: {tmp_path}/nowhere: no such folder; give the folder of a checkpoint"
    )
    with pytest.raises(SystemExit):
        run_tool("convert_checkpoint.py", folder, tmp_path / "x", "--to", "gguf")
    convert(folder, tmp_path / "dist", "torch_dist", WriteOptions())
    refused(tmp_path / "dist", "does not tell its number of heads; name its shape: --preset")


def test_what_a_conversion_of_something_else_left_is_not_taken(tiny_hf, tmp_path):
    _, folder = tiny_hf
    partial = tmp_path / ".target.partial"
    partial.mkdir()
    (partial / ".files").write_text("of something else\n- model.safetensors\n")
    convert(folder, tmp_path / "target", "hf", WriteOptions(), verify=True)
