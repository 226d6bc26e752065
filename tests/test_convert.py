"""Conversion of checkpoints: every way leaves every bit, logits are those of transformers, bad inputs are named."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from megatron_sphinx.checkpoint.conversion import Conversion, Source
from megatron_sphinx.checkpoint.convert import convert, open_checkpoint
from megatron_sphinx.checkpoint.formats import huggingface
from megatron_sphinx.checkpoint.formats.base import Wanted
from megatron_sphinx.checkpoint.keymap import Model
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.run import job

TOOLS = Path(__file__).parents[1] / "tools"


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
    torch.manual_seed(rng.randrange(2**31))
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


def target_of(model: PreTrainedModel, rng: random.Random) -> tuple[str, Wanted]:
    """A format, and how it is divided, that this model can have."""
    experts = getattr(model.config, "num_local_experts", 0)
    form = rng.choice(["hf", "meta", "accessory", "megatron", "torch_dist"] + ([] if experts else ["internlm2"]))
    is_sparse = rng.random() < 0.5
    sizes = ranks_of(model, is_sparse=is_sparse)
    ranks = rng.choice(sizes) if form == "accessory" or (form == "meta" and not experts) else 1
    return form, Wanted(ranks, None, rng.choice([3000, 10**9]), is_sparse=is_sparse)


@pytest.mark.parametrize("seed", range(8))
def test_any_way_through_the_formats_leaves_every_bit_and_the_logits(tmp_path, seed):
    rng = random.Random(seed)
    model = drawn_model(rng, experts=rng.choice([0, 6, 8, 2]) if seed % 2 else 0)
    model = model.to(torch.bfloat16) if rng.random() < 0.3 else model
    here, way = save(model, tmp_path / "0", rng.choice(["3KB", "5GB"])), []
    if rng.random() < 0.3 and (here / "model.safetensors").is_file():
        torch.save(load_file(here / "model.safetensors"), here / "pytorch_model.bin")
        (here / "model.safetensors").rename(tmp_path / "model.safetensors")
    for hop in range(4):
        form, wanted = target_of(model, rng)
        way.append((form, wanted))
        there = tmp_path / f"{hop + 1}"
        convert(here, there, form, wanted, shape=shape_of(model), verify=True)
        here = there
    convert(here, tmp_path / "last", "hf", Wanted(dtype=model.dtype), shape=shape_of(model))
    first, last = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (save(model, tmp_path / "first"), tmp_path / "last")
    )
    tokens = torch.randint(0, 90, (2, 11))
    with torch.no_grad():
        assert torch.equal(last(tokens).logits, first(tokens).logits), way
    assert_same_weights(tmp_path / "last", model)


def extras_of(hidden: int, rng: random.Random, *, has_skip_token: bool) -> dict[str, torch.Tensor]:
    """What SPHINX adds to a language model, drawn."""
    channels, queries = rng.choice([5, 12]), rng.choice([3, 8])
    shapes = {f"{name}.{part}": shape for name, size in (("visual_proj", channels), ("qformer_proj", queries))
              for part, shape in (("0.weight", (hidden, size)), ("0.bias", (hidden,)), ("1.weight", (hidden,)),
                                  ("1.bias", (hidden,)))}  # fmt: skip
    names = ["start_tag", "end_tag", *["skip_token"] * has_skip_token]
    return {name: torch.randn(shape) for name, shape in (shapes | dict.fromkeys(names, (hidden,))).items()}


@pytest.mark.parametrize("has_skip_token", [False, True])
@pytest.mark.parametrize("experts", [0, 6])
def test_projections_tags_and_skip_token_go_along(tmp_path, experts, has_skip_token):
    rng = random.Random(experts)
    model = drawn_model(rng, experts=experts)
    extras = extras_of(model.config.hidden_size, rng, has_skip_token=has_skip_token)
    here = save(model, tmp_path / "0")
    save_file(extras, here / "sphinx.safetensors")
    forms = ["megatron", "hf"] if has_skip_token else ["accessory", "megatron", "accessory", "hf"]
    for hop, form in enumerate(forms):
        there = tmp_path / f"{hop + 1}"
        convert(here, there, form, Wanted(is_sparse=True), verify=True)
        here = there
    found = load_file(here / "sphinx.safetensors")
    assert found.keys() == extras.keys()
    assert all(torch.equal(found[name], weight) for name, weight in extras.items())
    assert_same_weights(here, model)
    with pytest.raises(CheckpointError, match="--to meta: has no place for projections and tags; use accessory"):
        convert(here, tmp_path / "meta", "meta", Wanted())
    with pytest.raises(CheckpointError, match="--to torch_dist: has no place for projections and tags"):
        convert(here, tmp_path / "dist", "torch_dist", Wanted())
    if has_skip_token:
        with pytest.raises(CheckpointError, match="--to accessory: has no skip token; use hf or megatron"):
            convert(here, tmp_path / "accessory", "accessory", Wanted())


def gpt_of(shape: LanguageConfig) -> GPTModel:
    """megatron-core's own GPT as Megatron-LM builds it: its local layers, nothing of ours."""
    config = TransformerConfig(
        num_layers=shape.layers, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads, num_query_groups=shape.groups, kv_channels=shape.hidden // shape.heads,
        normalization="RMSNorm", layernorm_epsilon=shape.norm_epsilon, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
        masked_softmax_fusion=False, bias_activation_fusion=False, gradient_accumulation_fusion=False,
        num_moe_experts=shape.experts or None, moe_router_topk=shape.experts_per_token,
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall",
        moe_ffn_hidden_size=shape.ffn if shape.experts else None,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=shape.experts or None, normalization="RMSNorm")
    if shape.experts:  # under the name that transformer-engine's layers give it
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return GPTModel(
        config, spec, shape.padded_vocabulary, 64, position_embedding_type="rope", rotary_base=shape.rope_theta,
        share_embeddings_and_output_weights=False,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("experts", [0, 4])
def test_megatron_core_loads_what_is_written_for_it_and_the_other_way(tmp_path, run_ranks, experts):
    model = drawn_model(random.Random(3), experts=experts, std=0.1)
    convert(save(model, tmp_path / "hf"), tmp_path / "dist", "torch_dist", Wanted())
    tokens = torch.randint(0, 90, (1, 9))
    with torch.no_grad():
        wanted = model(tokens).logits

    def check():
        job.find_place()
        job.join("cpu", 30)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        gpt = gpt_of(shape_of(model))
        state = {name: part for name, part in gpt.sharded_state_dict().items() if not name.endswith("_extra_state")}
        gpt.load_state_dict(dist_checkpointing.load(state, str(tmp_path / "dist"), strict="raise_all"), strict=False)
        positions = torch.arange(tokens.shape[1])[None]
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
        if not experts:  # its router needs a GPU
            with torch.no_grad():
                found = gpt(tokens, positions, mask)[..., : model.config.vocab_size]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        (tmp_path / "again").mkdir()
        dist_checkpointing.save(gpt.sharded_state_dict(), str(tmp_path / "again"))

    run_ranks(1, check)
    convert(tmp_path / "again", tmp_path / "back", "hf", Wanted(), shape=shape_of(model))
    assert_same_weights(tmp_path / "back", model)


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
    convert(here, tmp_path / "there", form, Wanted(ranks, is_sparse=bool(kind)))
    about = json.loads((tmp_path / "there" / ("params.json" if form == "meta" else "config.json")).read_text())
    tokens = torch.randint(0, 90, (17,))
    found = reference_logits(merged(tmp_path / "there", "llma."), about, tokens)
    with torch.no_grad():
        torch.testing.assert_close(found, model(tokens[None]).logits[0], rtol=0, atol=1e-5)


# what is refused


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(source: Path, message: str, form: str = "hf", wanted: Wanted | None = None, **options) -> None:
    """A conversion fails with this message and leaves nothing under the final name."""
    target = source.parent / "refused"
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, target, form, wanted or Wanted(), **options)
    assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.fixture
def tiny_hf(tmp_path) -> tuple[PreTrainedModel, Path]:
    model = drawn_model(random.Random(1), experts=0)
    return model, save(model, tmp_path / "hf")


def test_a_repository_that_holds_both_kinds_of_files(tiny_hf, tmp_path):
    _, folder = tiny_hf
    (folder / "pytorch_model.bin").write_bytes(b"fetched by nobody")
    convert(folder, tmp_path / "target", "hf", Wanted(), verify=True)


def test_scaled_positions_are_refused_unless_they_are_far_behind(tiny_hf, tmp_path):
    _, folder = tiny_hf
    about = json.loads((folder / "config.json").read_text())
    for kind in ("dynamic", "linear"):
        scaled = about | {"rope_parameters": about["rope_parameters"] | {"rope_type": kind, "factor": 2.0}}
        (folder / "config.json").write_text(json.dumps(scaled))
        if kind == "dynamic":
            convert(folder, tmp_path / "target", "hf", Wanted(), verify=True)
        else:
            refused(folder, "config.json: rope_scaling={.*linear.*}: positions are not scaled here; give a model")


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_dropped_misnamed_misshaped_or_doubled_tensor_is_named(tmp_path, experts, seed):
    rng = random.Random(seed)
    model = drawn_model(rng, experts=experts)
    for form in ("hf", "meta", "accessory"):
        folder = tmp_path / form
        convert(save(model, tmp_path / "0"), folder, form, Wanted()) if form != "hf" else save(model, folder)
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
            r"in .* has shape \[.*\], its configuration says \[.*\]; give files that belong together|cannot|must",
        )
        if form == "accessory":
            write(weights | {name.removeprefix("llma."): weights[name]})
            refused(folder, f"holds {plain} twice, with and without llma.; remove one of them")
        write(weights)
        convert(folder, tmp_path / f"{form}_whole", "hf", Wanted())
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
    items = [*opened.source.stored]
    assert Conversion(opened.source, items).copies == []
    with pytest.raises(CheckpointError, match=r"0 of the .* elements of k in .*k_proj.weight would be used"):
        Conversion(opened.source, [item for item in items if "k_proj" not in item.name])
    broken = Source("s", [item for item in items if "k_proj" not in item.name], opened.source.entries)
    with pytest.raises(CheckpointError, match=r"holds what .*k_proj.weight needs nowhere \(k\)"):
        Conversion(broken, items)
    up = next(item for item in items if "up_proj" in item.name)
    overlapping = replace(up, box=up.box | {"f": (0, 5)})
    with pytest.raises(CheckpointError, match=r"holds what .*up_proj.weight needs twice \(up\)"):
        Conversion(Source("s", [*items, overlapping], opened.source.entries), items)


@pytest.fixture(params=["hf", "bin", "meta", "accessory", "megatron", "torch_dist"])
def stored_file(request, tmp_path) -> tuple[PreTrainedModel, str, Path]:
    """A model, the format that it is stored in, and the first file of its tensors."""
    model, form = drawn_model(random.Random(1), experts=0), request.param
    folder = save(model, tmp_path / "hf")
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif form != "hf":
        convert(folder, tmp_path / "there", form, Wanted())
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
            convert(file.parent, tmp_path / "target", "hf", Wanted(), shape=shape_of(model))
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
    convert(source, tmp_path / "meta", "meta", Wanted(4))
    convert(source, tmp_path / "accessory", "accessory", Wanted(4))
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
        convert(folder, tmp_path / "there", "hf", Wanted())
    refused(tmp_path / "nowhere", "nowhere: no such folder; give the folder of a checkpoint")
    refused(tmp_path / "there", "no checkpoint of a known format; give a folder with model.safetensors")
    refused(folder, "--tensor-parallel 2: megatron does not divide tensors; leave it out", "megatron", Wanted(2))
    refused(folder, "7 tensor ranks: cannot share .* of .*; use a divisor", "meta", Wanted(7))
    experts = save(drawn_model(random.Random(2), experts=6), tmp_path / "experts")
    refused(experts, "--tensor-parallel: Mistral's checkpoints of experts are one file", "meta", Wanted(2))
    refused(experts, "--to internlm2: has no experts; use hf", "internlm2")
    refused(experts, "4 tensor ranks: cannot share", "accessory", Wanted(4))
    status, _, error = run_tool("convert_checkpoint.py", tmp_path / "nowhere", tmp_path / "x", "--to", "hf")
    assert status == 2
    assert error.splitlines()[-1] == (
        f"convert_checkpoint.py: {tmp_path}/nowhere: no such folder; give the folder of a checkpoint"
    )
    with pytest.raises(SystemExit):
        run_tool("convert_checkpoint.py", folder, tmp_path / "x", "--to", "gguf")
    convert(folder, tmp_path / "dist", "torch_dist", Wanted())
    refused(tmp_path / "dist", "does not tell its number of heads; name its shape: --preset")


# how it is done


def test_a_killed_conversion_goes_on_where_it_was(tmp_path):
    model = drawn_model(random.Random(1), experts=0, layers=40)
    source, target, partial = save(model, tmp_path / "hf"), tmp_path / "target", tmp_path / ".target.partial"
    convert(source, tmp_path / "whole", "megatron", Wanted())
    if (pid := os.fork()) == 0:
        convert(source, target, "megatron", Wanted())
        os._exit(0)
    journal = partial / ".files"
    while not journal.is_file() or journal.read_text().count("\n") < 20:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    done = {line.split()[1]: (partial / line.split()[1]).stat().st_mtime_ns
            for line in journal.read_text().splitlines()[1:]}  # fmt: skip
    assert not target.exists()
    convert(source, target, "megatron", Wanted())
    assert all((target / name).stat().st_mtime_ns == at for name, at in done.items())
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name for path in target.iterdir()}
    assert len(done) < len(files) - 2
    assert all((target / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


def test_what_a_conversion_of_something_else_left_is_not_taken(tiny_hf, tmp_path):
    _, folder = tiny_hf
    partial = tmp_path / ".target.partial"
    partial.mkdir()
    (partial / ".files").write_text("of something else\n- model.safetensors\n")
    convert(folder, tmp_path / "target", "hf", Wanted(), verify=True)


PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_stays_within_its_bound(tmp_path):
    """Peak resident memory of the tool: at most four of the largest tensors and 300 MB."""
    shape = LanguageConfig(layers=1, hidden=2048, ffn=5632, heads=32, groups=4, vocabulary=32000)
    files, about = huggingface.files(Model(shape), Wanted(shard_bytes=2 * 10**8))
    (tmp_path / "source").mkdir()
    for file in files:
        tensors = {item.name: torch.zeros(item.shape, dtype=torch.bfloat16) for item in file.tensors}
        save_file(tensors, tmp_path / "source" / file.name)
    for name, content in about.items():
        (tmp_path / "source" / name).write_text(json.dumps(content))
    tool = [sys.executable, "-c", PEAK, str(TOOLS / "convert_checkpoint.py"), str(tmp_path / "source")]
    done = subprocess.run(
        [*tool, str(tmp_path / "there"), "--to", "megatron"], capture_output=True, text=True, check=True
    )
    peak = 1024 * int(done.stdout.split()[-2])
    largest = shape.vocabulary * shape.hidden * torch.bfloat16.itemsize
    assert peak <= 4 * largest + 300 * 10**6


# what LLaMA2-Accessory has


def test_differences_are_added(tmp_path, run_tool):
    """As its weight_operate.py makes them: of a tuned checkpoint and of Meta's, whose names have no prefix."""
    base = drawn_model(random.Random(4), experts=0, groups=2).to(torch.bfloat16)
    tuned = drawn_model(random.Random(4), experts=0, groups=2).to(torch.bfloat16)
    for weight in tuned.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    convert(save(base, tmp_path / "base"), tmp_path / "meta", "meta", Wanted(2))
    source = save(tuned, tmp_path / "tuned")
    extras = extras_of(base.config.hidden_size, random.Random(1), has_skip_token=False)
    save_file(extras, source / "sphinx.safetensors")
    convert(source, tmp_path / "accessory", "accessory", Wanted(2))
    (tmp_path / "diff").mkdir()
    for rank in range(2):
        one = torch.load(tmp_path / "accessory" / f"consolidated.{rank:02d}-of-02.model.pth", weights_only=True)[
            "model"
        ]
        other = torch.load(tmp_path / "meta" / f"consolidated.{rank:02d}.pth", weights_only=True)
        diff = {
            name: weight.float() - other[plain].float() if (plain := name.removeprefix("llma.")) in other else weight
            for name, weight in one.items()
        }
        torch.save({"model": diff}, tmp_path / "diff" / f"consolidated.{rank:02d}-of-02.model-diff.pth")
    arguments = (tmp_path / "meta", tmp_path / "back", "--to", "hf", "--diff", tmp_path / "diff", "--verify")
    assert run_tool("convert_checkpoint.py", *arguments)[0] == 0
    assert_same_weights(tmp_path / "back", tuned)
    found = load_file(tmp_path / "back" / "sphinx.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in extras.items())
    refused(source, "--diff .*: can be added to a checkpoint of meta or accessory; .* is none", diff=tmp_path / "diff")
    (tmp_path / "diff" / "consolidated.01-of-02.model-diff.pth").unlink()
    refused(tmp_path / "meta", r"diff: has 1 of 2 shards \(.*model-diff.pth\); fetch all", diff=tmp_path / "diff")
    one = drawn_model(random.Random(4), experts=0, groups=1)
    convert(save(one, tmp_path / "one"), tmp_path / "meta1", "meta", Wanted())
    torch.save(diff, tmp_path / "diff" / "consolidated.01-of-02.model-diff.pth")
    refused(tmp_path / "meta1", "has 2 shards, SOURCE 1; convert SOURCE to as many", diff=tmp_path / "diff")
    diff["llma.norm.weight"] = torch.zeros(3)
    torch.save(diff, tmp_path / "diff" / "consolidated.01-of-02.model-diff.pth")
    shapes = r"llma.norm.weight has shape \[3\], SOURCE's \[.*\]; give the difference from this SOURCE"
    refused(tmp_path / "meta", shapes, diff=tmp_path / "diff")


def test_frozen_encoders_go_to_files_of_their_own_and_come_back(tmp_path):
    source = save(drawn_model(random.Random(4), experts=0, groups=2), tmp_path / "hf")
    extras = extras_of(
        json.loads((source / "config.json").read_text())["hidden_size"], random.Random(1), has_skip_token=False
    )
    save_file(extras, source / "sphinx.safetensors")
    (source / "encoders").mkdir()
    encoders = {"clip": {"llma.clip.visual.conv1.weight": torch.randn(3, 5)},
                "qformer": {"llma.qformer.query_tokens": torch.randn(2).half()}}  # fmt: skip
    for name, weights in encoders.items():
        save_file(weights, source / "encoders" / f"{name}.safetensors")
    convert(source, tmp_path / "accessory", "accessory", Wanted(2))
    for rank in range(2):
        shard = torch.load(tmp_path / "accessory" / f"consolidated.{rank:02d}-of-02.model.pth", weights_only=True)[
            "model"
        ]
        assert all(torch.equal(shard[name], weight) for one in encoders.values() for name, weight in one.items())
    convert(tmp_path / "accessory", tmp_path / "start", "megatron", Wanted())
    apart = (tmp_path / "start" / "encoders").rename(tmp_path / "apart")
    convert(tmp_path / "start", tmp_path / "again", "accessory", Wanted(2), encoders=apart)
    (tmp_path / "empty").mkdir()
    refused(
        source,
        r"empty: holds no \*.safetensors of frozen experts; known: clip, ",
        "accessory",
        encoders=tmp_path / "empty",
    )
    for rank in range(2):
        name = f"consolidated.{rank:02d}-of-02.model.pth"
        one, other = (
            torch.load(tmp_path / folder / name, weights_only=True)["model"] for folder in ("accessory", "again")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(weight, other[key]) for key, weight in one.items())
    (source / "encoders" / "clip.safetensors").rename(source / "encoders" / "clap.safetensors")
    refused(source, "encoders: clap: unknown; known: clip, openclip_convnext_xxl, dinov2_vitg14, qformer", "accessory")


@pytest.mark.parametrize("has_qformer", [False, True])
@pytest.mark.parametrize(("experts", "is_sparse", "views"), [(0, False, 1), (0, False, 5), (2, True, 5), (2, True, 1)])
def test_the_released_module_is_named(tmp_path, experts, is_sparse, views, has_qformer):
    model = drawn_model(random.Random(4), experts=experts)
    extras = extras_of(model.config.hidden_size, random.Random(1), has_skip_token=False)
    kept = {name: weight for name, weight in extras.items() if has_qformer or "qformer" not in name}
    save_file(kept, save(model, tmp_path / "hf") / "sphinx.safetensors")
    convert(tmp_path / "hf", tmp_path / "there", "accessory", Wanted(is_sparse=is_sparse), views=views)
    kind = "mixtral_sparse" if experts else "llama"
    light = "_light" if not experts and not has_qformer else ""
    wanted = f"{kind}_ens{'5' if views == 5 else ''}{light}"
    assert json.loads((tmp_path / "there" / "meta.json").read_text()) == {"llama_type": wanted}
    if experts or not has_qformer:
        refused(tmp_path / "hf", r"--views 10: LLaMA2-Accessory has no \w+_ens10", "accessory", views=10)
    if experts:
        refused(tmp_path / "hf", "has no mixtral_ens, but llama, .*, mixtral_sparse_ens5; use --sparse$", "accessory")


def test_a_preset_gives_the_shape_of_torch_dist(tmp_path, run_tool, tiny):
    shape = LanguageConfig(**tiny.values["model"])
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers, vocab_size=300,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, rms_norm_eps=shape.norm_epsilon,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    convert(save(model, tmp_path / "hf"), tmp_path / "dist", "torch_dist", Wanted())
    arguments = (tmp_path / "dist", tmp_path / "back", "--to", "hf", "--preset", tiny.write(tmp_path / "run.yaml"))
    assert run_tool("convert_checkpoint.py", *arguments)[0] == 0
    assert_same_weights(tmp_path / "back", model)


def test_a_released_model_begins_one_of_two_experts(tmp_path):
    """The columns of the projection that read ConvNeXt and DINOv2; no Q-Former, no CLIP."""
    source = save(drawn_model(random.Random(4), experts=0), tmp_path / "hf")
    extras = extras_of(
        json.loads((source / "config.json").read_text())["hidden_size"], random.Random(1), has_skip_token=False
    )
    extras["visual_proj.0.weight"] = torch.randn(len(extras["start_tag"]), 1024 + 3072 + 1536)
    save_file(extras, source / "sphinx.safetensors")
    (source / "encoders").mkdir()
    for name in ("clip", "dinov2_vitg14"):
        save_file({f"llma.{name}.x": torch.randn(2)}, source / "encoders" / f"{name}.safetensors")
    two, ends = ["clip_convnext_xxl", "dinov2_vitg14"], ["dinov2_vitg14", "blip2_qformer", "clip_vit_l14"]
    for form in ("hf", "megatron", "accessory"):
        whole = tmp_path / f"all_{form}"
        convert(source, whole, form, Wanted())
        for number, kept in enumerate((two, ends)):
            there, back = tmp_path / f"{form}{number}", tmp_path / f"{form}{number}_back"
            convert(whole, there, "megatron", Wanted(), experts=kept, verify=True)
            convert(there, back, "hf", Wanted())
            found, matrix = load_file(back / "sphinx.safetensors"), extras["visual_proj.0.weight"]
            columns = matrix[:, 1024:] if kept is two else torch.cat([matrix[:, :1024], matrix[:, 4096:]], 1)
            assert torch.equal(found.pop("visual_proj.0.weight"), columns)
            assert found.keys() == {name for name in extras if kept is ends or "qformer" not in name} - {
                "visual_proj.0.weight"
            }
            assert all(torch.equal(weight, extras[name]) for name, weight in found.items())
            names = {path.stem for path in (there / "encoders").iterdir()}
            assert names == ({"dinov2_vitg14"} if kept is two else {"clip", "dinov2_vitg14"})
    refused(source, "--experts: clip: unknown; known: clip_vit_l14, clip_convnext_xxl", experts=["clip"])
    refused(source, "--experts: needs at least one expert beside a Q-Former", experts=["blip2_qformer"])
    refused(tmp_path / "hf0", "projects 4608 channels; can be chosen from the 5632 of clip_vit_l14", experts=two)
