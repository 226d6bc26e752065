"""Logits of what is written in Meta's and LLaMA2-Accessory's formats, from formulas, beside those of transformers."""

import json
import random
from pathlib import Path

import pytest
import torch
from llamas import drawn_model, ranks_of, save
from torch.nn import functional as F

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions


def merged(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The shards of a consolidated checkpoint put together as fairscale's layers share their matrices."""
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
    shards = [shard.get("model", shard) for shard in shards]
    found = {}
    for name in dict.fromkeys(name for shard in shards for name in shard):
        parts, last = [shard[name] for shard in shards if name in shard], name.removesuffix(".weight").split(".")[-1]
        if ".experts." in name or last in ("gate", "norm", "attention_norm", "ffn_norm"):
            whole = parts[0]
        elif name.endswith(("w1", "w2", "w3")):  # sparse: a slice of every expert
            whole = parts
        else:
            whole = torch.cat(parts, 1 if last in ("tok_embeddings", "wo", "w2") else 0)
        found[name.removeprefix(prefix)] = whole
    return found


def reference_logits(weights: dict, about: dict, tokens: torch.Tensor) -> torch.Tensor:
    """LLaMA and Mixtral from their formulas: neighbouring channels of a head are turned as complex numbers.

    Source: RoFormer, arXiv:2104.09864, equation 34; LLaMA, arXiv:2302.13971; Mixtral, arXiv:2401.04088, equation 1.
    """
    heads, groups = about["n_heads"], about["n_kv_heads"]
    width = about["dim"] // heads
    angles = torch.outer(torch.arange(len(tokens)), about["rope_theta"] ** (-torch.arange(0, width, 2) / width))
    turned = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + about["norm_eps"]) * weights[name]

    def rope(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turned).flatten(-2)

    def swiglu(x, w1, w2, w3):
        return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    def feed_forward(x, at):
        if "moe" not in about:
            return swiglu(x, *(weights[f"{at}.feed_forward.w{n}.weight"] for n in (1, 2, 3)))
        at = f"{at}.feed_forward" if f"{at}.feed_forward.gate.weight" in weights else f"{at}.block_sparse_moe"
        best = (x @ weights[f"{at}.gate.weight"].T).topk(2)
        out = torch.zeros_like(x)
        for expert in range(about["moe"]["num_experts"]):
            if f"{at}.w1" in weights:  # rows of one expert after the other, in every slice; w2 lies transposed
                count = about["moe"]["num_experts"]
                w1, w2, w3 = (
                    torch.cat([part.view(count, -1, x.shape[1])[expert] for part in weights[f"{at}.{name}"]])
                    for name in ("w1", "w2", "w3")
                )
                w2 = w2.T
            else:
                w1, w2, w3 = (weights[f"{at}.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
            share = (best.values.softmax(-1) * (best.indices == expert)).sum(-1, keepdim=True)
            out += share * swiglu(x, w1, w2, w3)
        return out

    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(about["n_layers"]):
        at = f"layers.{layer}"
        h = norm(x, f"{at}.attention_norm.weight")
        q, k, v = ((h @ weights[f"{at}.attention.{w}.weight"].T).unflatten(-1, (-1, width)) for w in ("wq", "wk", "wv"))
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (rope(k), v))
        scores = torch.einsum("qhc,khc->hqk", rope(q), k) / width**0.5
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khc->qhc", scores, v).flatten(1) @ weights[f"{at}.attention.wo.weight"].T
        x = x + feed_forward(norm(x, f"{at}.ffn_norm.weight"), at)
    return norm(x, "norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize("experts", [0, 6])
@pytest.mark.parametrize("form", ["meta", "accessory", "accessory sparse"])
@pytest.mark.parametrize("seed", range(2))
def test_interleaved_rope_gives_the_logits_of_transformers(tmp_path, form, experts, seed):
    rng = random.Random(seed)
    model = drawn_model(rng, experts=experts, std=0.1)
    form, _, kind = form.partition(" ")
    here = save(model, tmp_path / "hf")
    ranks = 1 if form == "meta" and experts else rng.choice(ranks_of(model, is_sparse=bool(kind)))
    convert(here, tmp_path / "there", form, WriteOptions(ranks, is_sparse=bool(kind)))
    about = json.loads((tmp_path / "there" / ("params.json" if form == "meta" else "config.json")).read_text())
    tokens = torch.randint(0, 90, (17,))
    found = reference_logits(merged(tmp_path / "there", "llma."), about, tokens)
    with torch.no_grad():
        torch.testing.assert_close(found, model(tokens[None]).logits[0], rtol=0, atol=1e-5)
