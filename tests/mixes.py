"""Small checkpoints of random weights, and the sum of several as one writes it, for the tests of mixing."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch_arrays import as_array, as_tensor, type_of

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.encoders import ENCODERS
from megatron_sphinx.checkpoint.formats import huggingface
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.tensors.entries import MappedFiles
from megatron_sphinx.tensors.write import create_file

SMALL = LanguageConfig(layers=1, hidden=8, ffn=12, heads=2, groups=1, vocabulary=20)
# What arithmetic would change, or be stopped by: a negative zero, the largest, one below the normal.
ODD = (-0.0, torch.finfo(torch.bfloat16).max, 1e-40)


def drawn_shape(rng: random.Random, *, experts: int = 0) -> LanguageConfig:
    groups, queries, width = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([2, 4])
    return LanguageConfig(
        layers=rng.randint(1, 3), hidden=groups * queries * width * 2, ffn=rng.choice([24, 48]),
        heads=groups * queries, groups=groups, vocabulary=rng.choice([97, 120]), experts=experts,
    )  # fmt: skip


def make(
    folder: Path,
    seed: int,
    shape: LanguageConfig = SMALL,
    *,
    dtype: torch.dtype = torch.float32,
    channels: int = 0,
    shard_bytes: int = 10**9,
) -> Path:
    """A checkpoint of Hugging Face's format, of random weights."""
    found, about = huggingface.plan(Model(shape, channels=channels), WriteOptions(1, type_of(dtype), shard_bytes), {})
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for file in found:
        out = create_file(folder / file.name, {item.name: (item.shape, type_of(dtype)) for item in file.tensors})
        for item in file.tensors:
            value = torch.randn(item.shape, generator=generator)
            value.view(-1)[:3] = torch.tensor(ODD)
            out.put(item.name, as_array(value.to(dtype)))
        out.close()
    for name, content in about.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def tensors(folder: Path, shape: LanguageConfig | None = None) -> dict[tuple[str, str], Tensor]:
    """All tensors of a checkpoint, by file and name; frozen experts too."""
    opened, maps = open_checkpoint(folder, shape), MappedFiles()
    found = {key: as_tensor(maps.read(entry)) for key, entry in opened.source.entries.items()}
    for expert, entries in opened.encoders.items():
        found |= {(expert, name): as_tensor(maps.read(entry)) for name, entry in entries.items()}
    return found


def is_same(found: dict, wanted: dict) -> bool:
    """Whether two sets of tensors have the same bits."""
    return found.keys() == wanted.keys() and all(
        value.dtype == wanted[key].dtype
        and torch.equal(*(one.contiguous().view(torch.uint8) for one in (value, wanted[key])))
        for key, value in found.items()
    )


def plain(sides: list[dict], shares: tuple[float, ...]) -> dict:
    """The sum as one writes it in fp32, to the bit."""
    made = {}
    for key, value in sides[0].items():
        total = shares[0] * sides[0][key].float()
        for share, side in zip(shares[1:], sides[1:], strict=True):
            total = total + share * side[key].float()
        made[key] = total.to(value.dtype)
    return made


def by_name(folder: Path) -> dict[str, Tensor]:
    return {name: value for (_, name), value in tensors(folder).items()}


def ours(folder: Path, seed: int, *, tokenizer: str = "", **shape: int) -> Path:
    """A checkpoint of our own."""
    source = make(folder.with_name(f"{folder.name}_hf"), seed, replace(SMALL, **shape))
    if tokenizer:
        (source / "tokenizer.model").write_text(tokenizer)
    convert(source, folder, "megatron", WriteOptions())
    shutil.rmtree(source)
    return folder


def accessory(folder: Path, seed: int, expert: Tensor) -> Path:
    """A checkpoint of LLaMA2-Accessory of two ranks, with a frozen expert in each file."""
    source = make(folder.with_name(f"{folder.name}_hf"), seed, replace(SMALL, groups=2), channels=6)
    with_expert(source, expert, "llma.clip.w")
    convert(source, folder, "accessory", WriteOptions(2))
    return folder


def with_expert(folder: Path, expert: Tensor, name: str = "w") -> Path:
    """Put a frozen expert beside a checkpoint."""
    (folder / ENCODERS).mkdir(exist_ok=True)
    out = create_file(folder / ENCODERS / "clip.safetensors", {name: (tuple(expert.shape), type_of(expert.dtype))})
    out.put(name, as_array(expert))
    out.close()
    return folder
