"""Conversion of checkpoints: bit-exact round trips through every format and layout, logits of transformers, bad inputs."""

import json
import os
import pickle
import random
import struct
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from megatron_sphinx.checkpoint import convert as converting
from megatron_sphinx.checkpoint.conversion import Conversion
from megatron_sphinx.checkpoint.convert import convert, open_checkpoint
from megatron_sphinx.checkpoint.formats.base import Wanted
from megatron_sphinx.checkpoint.keymap import WEIGHTS, Model, Rule, stored
from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.checkpoint.stream import create, read_file, read_torch
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig


def drawn_model(rng: random.Random, *, experts: int) -> PreTrainedModel:
    """A small Llama or Mixtral of a random shape, odd numbers of groups among them, every weight drawn."""
    groups, queries, width = rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 2, 3]), rng.choice([2, 4, 6])
    shape = {
        "hidden_size": groups * queries * width,
        "intermediate_size": rng.choice([24, 48]),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "vocab_size": rng.choice([96, 120, 144]),
        "rope_theta": rng.choice([10000.0, 1e6]),
    }
    torch.manual_seed(rng.randrange(2**31))
    if experts:
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=experts, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, shard_size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def targets_of(model: PreTrainedModel, rng: random.Random) -> tuple[str, Wanted]:
    """A format, and how it is divided, that this model can have."""
    shape = model.config
    experts = getattr(shape, "num_local_experts", 0)
    form = rng.choice(["hf", "meta", "accessory", "megatron", "torch_dist"] + ([] if experts else ["internlm2"]))
    sizes = [n for n in range(1, 9) if all(size % n == 0 for size in (
        shape.num_key_value_heads, shape.intermediate_size, shape.vocab_size, shape.hidden_size))]  # fmt: skip
    is_sparse = rng.random() < 0.5
    if experts and not is_sparse:
        sizes = [n for n in sizes if experts % n == 0]
    ranks = rng.choice(sizes) if form == "accessory" or (form == "meta" and not experts) else 1
    return form, Wanted(ranks, None, rng.choice([3000, 10**9]), is_sparse=is_sparse)


def shape_of(model: PreTrainedModel) -> LanguageConfig:
    of = model.config
    return LanguageConfig(
        layers=of.num_hidden_layers, hidden=of.hidden_size, ffn=of.intermediate_size, heads=of.num_attention_heads,
        groups=of.num_key_value_heads, vocabulary=of.vocab_size, experts=getattr(of, "num_local_experts", 0),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_any_way_through_the_formats_leaves_every_bit_and_the_logits(tmp_path, seed):
    rng = random.Random(seed)
    model = drawn_model(rng, experts=rng.choice([0, 6, 8, 2]) if seed % 2 else 0)
    model = model.to(torch.bfloat16) if rng.random() < 0.3 else model
    here, way = save(model, tmp_path / "0", rng.choice(["3KB", "5GB"])), []
    for hop in range(4):
        form, wanted = targets_of(model, rng)
        way.append((form, wanted))
        there = tmp_path / f"{hop + 1}"
        convert(here, there, form, wanted, shape=shape_of(model), verify=True)
        here = there
    convert(here, tmp_path / "last", "hf", Wanted(dtype=model.dtype), shape=shape_of(model))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "last").eval()
    tokens = torch.randint(0, 90, (2, 11))
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, model(tokens).logits), way
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), (way, name)


def test_megatron_core_loads_what_is_written_for_it(tmp_path, run_ranks):
    """Both ways with megatron.core.dist_checkpointing itself, whose GPT gives the logits of transformers."""
    model = drawn_model(random.Random(3), experts=0)
    convert(save(model, tmp_path / "hf"), tmp_path / "dist", "torch_dist", Wanted())
    tokens = torch.randint(0, 90, (1, 9))
    with torch.no_grad():
        wanted = F.log_softmax(model(tokens).logits[0].double(), -1)

    def check():
        from megatron.core import dist_checkpointing
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from megatron_sphinx import platform
        from megatron_sphinx.parallel.groups import ProcessGroups
        from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout

        gpt = gpt_of(shape_of(model), get_gpt_layer_local_spec(normalization="RMSNorm"))
        state = gpt.sharded_state_dict()
        gpt.load_state_dict(dist_checkpointing.load(state, str(tmp_path / "dist"), strict="log_all"), strict=False)
        dist_checkpointing.save(gpt.sharded_state_dict(), str(tmp_path / "again"))

    run_ranks(1, check)
    convert(tmp_path / "again", tmp_path / "back", "hf", Wanted(), shape=shape_of(model))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in model.state_dict().items())
