"""Small Llamas and Mixtrals of transformers, every weight drawn, for the tests of conversion."""

import random
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig


def drawn_model(
    rng: random.Random, *, experts: int, groups: int = 0, layers: int = 0, std: float = 0.3
) -> PreTrainedModel:
    """A small Llama or Mixtral of a random shape, odd numbers of groups among them, every weight drawn."""
    groups = groups or rng.choice([1, 2, 3, 4, 8])
    queries, width = rng.choice([1, 2, 3]), rng.choice([8, 16] if experts else [2, 4, 6])
    shape = {
        "hidden_size": groups * queries * width,
        "intermediate_size": rng.choice([24, 48]),
        "num_hidden_layers": layers or rng.randint(1, 3),
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "vocab_size": rng.choice([96, 120, 144]),
        "rope_theta": rng.choice([10000.0, 1e6]),
    }
    return model_of(shape, experts=experts, seed=rng.randrange(2**31), std=std)


def model_of(shape: dict, *, experts: int, seed: int, std: float) -> PreTrainedModel:
    """A Llama or Mixtral of transformers of this shape, every weight drawn."""
    torch.manual_seed(seed)
    if experts:
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=experts, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=std)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, shard_size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def ranks_of(model: PreTrainedModel, *, is_sparse: bool) -> list[int]:
    """Numbers of tensor ranks that can share its matrices."""
    of, experts = model.config, getattr(model.config, "num_local_experts", 0)
    sizes = [of.num_key_value_heads, of.vocab_size, of.hidden_size]
    sizes.append(experts if experts and not is_sparse else of.intermediate_size)
    return [ranks for ranks in range(1, 9) if not any(size % ranks for size in sizes)]


def shape_of(model: PreTrainedModel) -> LanguageConfig:
    of = model.config
    return LanguageConfig(
        layers=of.num_hidden_layers, hidden=of.hidden_size, ffn=of.intermediate_size, heads=of.num_attention_heads,
        groups=of.num_key_value_heads, vocabulary=of.vocab_size, experts=getattr(of, "num_local_experts", 0),
        rope_theta=of.rope_parameters["rope_theta"], norm_epsilon=of.rms_norm_eps,
    )  # fmt: skip


def assert_same_weights(folder: Path, model: PreTrainedModel) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())


def extras_of(hidden: int, rng: random.Random, *, has_skip_token: bool) -> dict[str, torch.Tensor]:
    """What SPHINX adds to a language model, drawn."""
    channels, queries = rng.choice([5, 12]), rng.choice([3, 8])
    shapes = {f"{name}.{part}": shape for name, size in (("visual_proj", channels), ("qformer_proj", queries))
              for part, shape in (("0.weight", (hidden, size)), ("0.bias", (hidden,)), ("1.weight", (hidden,)),
                                  ("1.bias", (hidden,)))}  # fmt: skip
    names = ["start_tag", "end_tag", *["skip_token"] * has_skip_token]
    return {name: torch.randn(shape) for name, shape in (shapes | dict.fromkeys(names, (hidden,))).items()}


def refused(source: Path, message: str, form: str = "hf", wanted: WriteOptions | None = None, **options) -> None:
    """A conversion fails with this message and leaves nothing under the final name."""
    target = source.parent / "refused"
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, target, form, wanted or WriteOptions(), **options)
    assert "\n" not in str(caught.value)
    assert not target.exists()
