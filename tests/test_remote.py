"""Checkpoints behind URLs: read by ranges and written from front to back, to the bits of those on this machine."""

import random
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from llamas import drawn_model, save, shape_of

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.remote import copy_file, place_of

FORMS = ["hf", "meta", "accessory", "megatron", "torch_dist"]


@pytest.fixture
def store():
    """A folder behind a URL, empty at first and gone at last."""
    url = f"memory://{uuid4().hex}"
    yield place_of(url)
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)


def files_of(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path).removeprefix(f"{folder}/"): path.read_bytes() for path in found}


def uploaded(folder: Path, target: Path) -> Path:
    for name in files_of(folder):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / name, target / name)
    return target


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("experts", [0, 2])
def test_behind_urls_every_format_has_the_bits_of_this_machine(tmp_path, store, form, experts):
    model = drawn_model(random.Random(f"{form} {experts}"), experts=experts)
    source, shape = save(model, tmp_path / "source", "3KB"), shape_of(model)
    for options in (WriteOptions(), WriteOptions(shard_bytes=3000)):
        name = f"{form}{options.shard_bytes}"
        convert(source, tmp_path / name, form, options)
        convert(uploaded(source, store / f"in{name}"), store / name, form, options, verify=True, shape=shape)
        assert files_of(store / name) == files_of(tmp_path / name)
        convert(tmp_path / name, tmp_path / f"back{name}", "hf", options, shape=shape)
        convert(store / name, store / f"back{name}", "hf", options, shape=shape)
        assert files_of(store / f"back{name}") == files_of(tmp_path / f"back{name}")


def test_what_is_not_finished_is_refused_and_gone_on_with(tmp_path, store, monkeypatch):
    source = save(drawn_model(random.Random(1)), tmp_path / "source")
    (store / "made").mkdir(parents=True)
    (store / "made" / ".files").write_text("")
    with pytest.raises(CheckpointError, match="made: is not finished; run the command that makes it again"):
        open_checkpoint(store / "made")
    convert(source, store / "made", "hf", WriteOptions())
    with pytest.raises(CheckpointError, match="made: exists; give another TARGET"):
        convert(source, store / "made", "hf", WriteOptions())
