"""Conversion of checkpoints: every way leaves every bit and the logits, what was stopped goes on, memory is bounded."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from llamas import assert_same_weights, drawn_model, extras_of, ranks_of, save, shape_of
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch_arrays import type_of
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats import huggingface
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.run import job

TOOLS = Path(__file__).parents[1] / "tools"


def target_of(model: PreTrainedModel, rng: random.Random) -> tuple[str, WriteOptions]:
    """A format, and how it is divided, that this model can have."""
    experts = getattr(model.config, "num_local_experts", 0)
    form = rng.choice(["hf", "meta", "accessory", "megatron", "torch_dist"] + ([] if experts else ["internlm2"]))
    is_sparse = rng.random() < 0.5
    sizes = ranks_of(model, is_sparse=is_sparse)
    ranks = rng.choice(sizes) if form == "accessory" or (form == "meta" and not experts) else 1
    return form, WriteOptions(ranks, None, rng.choice([3000, 10**9]), is_sparse=is_sparse)


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
    convert(here, tmp_path / "last", "hf", WriteOptions(dtype=type_of(model.dtype)), shape=shape_of(model))
    first, last = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (save(model, tmp_path / "first"), tmp_path / "last")
    )
    tokens = torch.randint(0, 90, (2, 11))
    with torch.no_grad():
        assert torch.equal(last(tokens).logits, first(tokens).logits), way
    assert_same_weights(tmp_path / "last", model)


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
        convert(here, there, form, WriteOptions(is_sparse=True), verify=True)
        here = there
    found = load_file(here / "sphinx.safetensors")
    assert found.keys() == extras.keys()
    assert all(torch.equal(found[name], weight) for name, weight in extras.items())
    assert_same_weights(here, model)
    with pytest.raises(CheckpointError, match="--to meta: has no place for projections and tags; use accessory"):
        convert(here, tmp_path / "meta", "meta", WriteOptions())
    with pytest.raises(CheckpointError, match="--to torch_dist: has no place for projections and tags"):
        convert(here, tmp_path / "dist", "torch_dist", WriteOptions())
    if has_skip_token:
        with pytest.raises(CheckpointError, match="--to accessory: has no skip token; use hf or megatron"):
            convert(here, tmp_path / "accessory", "accessory", WriteOptions())


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
    convert(save(model, tmp_path / "hf"), tmp_path / "dist", "torch_dist", WriteOptions())
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
    convert(tmp_path / "again", tmp_path / "back", "hf", WriteOptions(), shape=shape_of(model))
    assert_same_weights(tmp_path / "back", model)


# how it is done


def test_copies_that_differ_between_ranks_are_told_and_no_fault_of_what_is_written(tmp_path):
    """The ranks of meta hold the norms alike; the first one's are taken, by --verify too."""
    model = drawn_model(random.Random(5), experts=0, groups=4)
    convert(save(model, tmp_path / "hf"), tmp_path / "meta", "meta", WriteOptions(2))
    file = tmp_path / "meta" / "consolidated.01.pth"
    weights = torch.load(file, weights_only=True)
    torch.save(weights | {"norm.weight": weights["norm.weight"] + 0.5}, file)
    done = convert(tmp_path / "meta", tmp_path / "back", "hf", WriteOptions(), verify=True)
    assert [name for name, _ in done.differing] == ["norm.weight"]
    assert done.differing[0][1] == pytest.approx(0.5, rel=1e-5)
    assert_same_weights(tmp_path / "back", model)


def test_a_killed_conversion_goes_on_where_it_was(tmp_path):
    model = drawn_model(random.Random(1), experts=0, layers=40)
    source, target, partial = save(model, tmp_path / "hf"), tmp_path / "target", tmp_path / ".target.partial"
    convert(source, tmp_path / "whole", "megatron", WriteOptions())
    if (pid := os.fork()) == 0:
        convert(source, target, "megatron", WriteOptions())
        os._exit(0)
    journal = partial / ".files"
    while not journal.is_file() or journal.read_text().count("\n") < 20:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    done = {line.split()[1]: (partial / line.split()[1]).stat().st_mtime_ns
            for line in journal.read_text().splitlines()[1:]}  # fmt: skip
    assert not target.exists()
    convert(source, target, "megatron", WriteOptions())
    assert all((target / name).stat().st_mtime_ns == at for name, at in done.items())
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name for path in target.iterdir()}
    assert len(done) < len(files) - 2
    assert all((target / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


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
    files, about = huggingface.plan(Model(shape), WriteOptions(shard_bytes=2 * 10**8), {})
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


def test_a_preset_gives_the_shape_of_torch_dist(tmp_path, run_tool, tiny):
    shape = LanguageConfig(**tiny.values["model"])
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers, vocab_size=300,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, rms_norm_eps=shape.norm_epsilon,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    convert(save(model, tmp_path / "hf"), tmp_path / "dist", "torch_dist", WriteOptions())
    arguments = (tmp_path / "dist", tmp_path / "back", "--to", "hf", "--preset", tiny.write(tmp_path / "run.yaml"))
    assert run_tool("convert_checkpoint.py", *arguments)[0] == 0
    assert_same_weights(tmp_path / "back", model)
