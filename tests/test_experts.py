"""Mixture of experts: grouped products, the routers' losses, and the whole model against Hugging Face's Mixtral."""

import json
import os
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from test_model import all_but_feed_forward, groups, text_batch
from transformers import MixtralConfig, MixtralForCausalLM

from megatron_sphinx.__main__ import main
from megatron_sphinx.device import current_platform
from megatron_sphinx.model import experts
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig, VisualExpertConfig
from megatron_sphinx.model.experts import IMAGE, PADDING, TEXT, GroupedExperts, Routing
from megatron_sphinx.model.kernels import torch_kernels
from megatron_sphinx.model.language import build_language, draw_weights
from megatron_sphinx.model.sphinx import SphinxModel, routing_of
from megatron_sphinx.model.vision import VisualProjection


def random_shape(seed: int) -> LanguageConfig:
    rng = random.Random(seed)
    count = rng.choice([2, 3, 4, 8])
    kv, head = rng.choice([1, 2, 3]), rng.choice([4, 6])
    return LanguageConfig(
        layers=rng.randint(1, 3),
        hidden=2 * kv * head,
        ffn=rng.randint(5, 40),
        heads=2 * kv,
        groups=kv,
        vocabulary=rng.randint(20, 200),
        experts=count,
        experts_per_token=rng.randint(2, min(count, 3)),
        init_std=0.2,
    )


# grouped products


def loop(module: GroupedExperts, hidden, counts, weights):
    """One expert after the other, in plain words."""
    parts = []
    for rows, first, second in zip(hidden.split(counts), module.weight1, module.weight2, strict=True):
        gate, up = (rows @ first.t()).chunk(2, -1)
        parts.append((F.silu(gate) * up) @ second.t())
    return torch.cat(parts) * weights[:, None]


@pytest.mark.parametrize("padding", [0.0, 2.0, 1e9], ids=["grouped", "either", "padded"])
@pytest.mark.parametrize("seed", range(8))
def test_grouped_experts_are_a_loop_over_experts(monkeypatch, seed, padding):
    monkeypatch.setattr(experts, "_MOST_PADDING", padding)
    monkeypatch.setattr(experts, "current_platform", lambda: replace(current_platform(), has_fast_batches=True))
    rng = random.Random(seed)
    count, hidden, ffn = rng.randint(1, 6), rng.choice([3, 8, 16]), rng.choice([5, 8, 12])
    config = SimpleNamespace(
        moe_ffn_hidden_size=ffn, expert_tensor_parallel_size=1, hidden_size=hidden, params_dtype=torch.float32
    )
    module = GroupedExperts(count, config, kernels=torch_kernels())
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    counts = [rng.choice([0, 1, 2, 7]) for _ in range(count)]
    if seed == 0:
        counts = [0] * count  # a rank whose experts nobody wants
    rows = torch.randn(sum(counts), hidden, requires_grad=True)
    weights = torch.rand(sum(counts), requires_grad=True)
    gradient = torch.randn(sum(counts), hidden)
    inputs = [rows, weights, *module.parameters()]
    ours, none = module(rows, torch.tensor(counts), weights)
    assert none is None
    wanted = loop(module, rows, counts, weights)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    for found, expected in zip(
        torch.autograd.grad(ours, inputs, gradient), torch.autograd.grad(wanted, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-4
        )  # every weight has a gradient, also where there are no rows


def test_experts_are_padded_only_where_the_processor_gains_by_it(monkeypatch):
    """Without AMX the padded batch takes longer than one product after the other."""
    taken = []
    for way in ("_padded_experts", "_grouped_experts"):
        monkeypatch.setattr(experts, way, lambda *args, way=way: taken.append(way) or args[-4])
    config = SimpleNamespace(
        moe_ffn_hidden_size=8, expert_tensor_parallel_size=1, hidden_size=8, params_dtype=torch.float32
    )
    module = GroupedExperts(2, config, kernels=torch_kernels())
    for has_fast_batches in (True, False):
        platform = replace(current_platform(), has_fast_batches=has_fast_batches)
        monkeypatch.setattr(experts, "current_platform", lambda platform=platform: platform)
        with torch.no_grad():
            module(torch.randn(4, 8), torch.tensor([2, 2]), torch.ones(4))
    assert taken == ["_padded_experts", "_grouped_experts"]
    assert current_platform().has_fast_batches is bool(torch.cpu.get_capabilities().get("amx_tile"))


def train_in_another_way_on_each_rank(config):
    is_first = os.environ["RANK"] == "0"
    experts._MOST_PADDING = float("inf")
    experts.current_platform = lambda: replace(current_platform(), has_fast_batches=is_first)
    return main(["train", str(config)])


def test_ranks_that_compute_experts_in_different_ways_agree(train, start_ranks, tiny, tmp_path):
    settings = {"model.experts": 4, "model.balance_loss_coefficient": 0.1}
    wanted = train(1, settings).metrics
    config = tiny.write(tmp_path / "two.yaml", settings)
    ranks = start_ranks(2, lambda: train_in_another_way_on_each_rank(config))
    assert ranks.wait() == [0, 0], ranks.text()
    lines = [json.loads(line) for line in (config.with_suffix("") / "metrics.jsonl").read_text().splitlines()]
    for line, reference in zip(lines, wanted, strict=True):
        for name in ("loss", "gradient_norm"):
            assert line[name] == pytest.approx(reference[name], rel=1e-5)


# routers


def mixtral(config: LanguageConfig) -> SphinxModel:
    here = groups()
    language = build_language(config, here, dtype=torch.float32, sequence_length=64)
    expert = (VisualExpertConfig(name="dinov2_small", weights="random"),)
    vision = VisualProjection(
        VisionConfig(experts=expert, grid=4), config.hidden, dtype=torch.float32, device=torch.device("cpu")
    )
    model = SphinxModel(language, vision, here)
    draw_weights(model, config, here, seed=4)
    return model


def check_losses_of_routers(seed: int):
    rng = random.Random(seed)
    config = random_shape(seed)
    router = mixtral(config).language.decoder.layers[0].mlp.router
    router.balance, router.z_loss = 0.3, 0.2
    rows, step_tokens = rng.randint(1, 3), 1000
    lengths = [rng.randint(1, 9) for _ in range(rows)]
    row = torch.repeat_interleave(torch.arange(rows), torch.tensor(lengths))
    row = torch.cat([row, torch.full((2,), -1)])[
        torch.randperm(sum(lengths) + 2, generator=torch.Generator().manual_seed(seed))
    ]
    kind = torch.where(row < 0, PADDING, torch.where(row % 2 == 0, TEXT, IMAGE))
    logits = torch.randn(len(row), 1, config.experts, requires_grad=True)
    router.routing_of_batch = Routing(row.where(row >= 0, rows), kind, torch.tensor(lengths), 1 / step_tokens)
    weights, chosen = router.routing(logits)
    (found,) = torch.autograd.grad(weights.sum() * 0, logits)  # only what is attached
    wanted = 0.0
    flat = logits.flatten(0, 1)
    for number, length in enumerate(lengths):
        own = flat[row == number]
        taken = chosen[row == number].sum(0)
        balance = switch_load_balancing_loss_func(
            own.softmax(-1), taken, length, config.experts_per_token, config.experts, 0.3
        )
        size = 0.2 * own.logsumexp(-1).square().mean()
        wanted = wanted + (balance + size) * length / step_tokens  # a row weighs as much as it has tokens
    torch.testing.assert_close(found, torch.autograd.grad(wanted, logits)[0])
    load = router.routing_of_batch.load[1]
    for kind_number in (TEXT, IMAGE):
        assert torch.equal(load[kind_number], chosen[kind == kind_number].sum(0))
    top = flat.topk(config.experts_per_token, -1)
    expected = torch.zeros_like(flat).scatter(1, top.indices, top.values.softmax(-1))
    torch.testing.assert_close(weights, expected)  # softmax over the chosen logits only


@pytest.mark.parametrize("seed", range(4))
def test_routers_balance_each_row_as_megatron_does_a_batch(run_ranks, seed):
    run_ranks(1, lambda: check_losses_of_routers(seed))


# the whole model


def mixtral_of(config: LanguageConfig, model: SphinxModel) -> MixtralForCausalLM:
    """Hugging Face's model with the same weights."""
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.ffn,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.groups,
            num_local_experts=config.experts, num_experts_per_tok=config.experts_per_token, sliding_window=None,
            rms_norm_eps=config.norm_epsilon, rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False, head_dim=config.hidden // config.heads, experts_implementation="eager",
        )
    )  # fmt: skip
    ours, state = model.language.state_dict(), all_but_feed_forward(config, model)
    for layer in range(config.layers):
        here, there = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        state |= {
            f"{there}.gate.weight": ours[f"{here}.router.weight"],
            f"{there}.experts.gate_up_proj": ours[f"{here}.experts.weight1"],
            f"{there}.experts.down_proj": ours[f"{here}.experts.weight2"],
        }
    theirs.load_state_dict(state, strict=True)
    return theirs.train()


def check_model_equals_mixtral(seed: int):
    config = random_shape(seed)
    model, generator = mixtral(config), torch.Generator().manual_seed(seed)
    documents = [torch.randint(config.vocabulary, (n,), generator=generator) for n in (5, 9, 9, 30)]
    batch = text_batch(documents)
    out = model(batch, torch.empty(0, model.vision.config.feature_values), routing_of(batch, 1.0))
    losses = batch.spread(out)
    theirs, at, total = mixtral_of(config, model), 0, 0.0
    for document in documents:
        logits = theirs(document[None]).logits[0]
        wanted = F.cross_entropy(logits[:-1], document[1:], reduction="none")
        torch.testing.assert_close(losses[at : at + len(document) - 1], wanted, rtol=1e-4, atol=1e-5)
        total, at = total + wanted.sum(), at + len(document)
    out.sum().backward()
    total.backward()
    ours, layer = model.language.decoder.layers[0].mlp, theirs.model.layers[0].mlp
    for found, expected in (
        (ours.experts.weight1, layer.experts.gate_up_proj),
        (ours.experts.weight2, layer.experts.down_proj),
        (ours.router.weight, layer.gate.weight),
    ):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_packed_rows_give_the_losses_that_mixtral_gives_each_document_alone(run_ranks, seed):
    run_ranks(1, lambda: check_model_equals_mixtral(seed))


# runs


def test_the_balance_loss_balances(train):
    settings = {"model.experts": 4, "training.steps": 25, "optimizer.learning_rate": 2e-2, "model.init_std": 0.3}
    found = {}
    for coefficient in (0.0, 1.0):
        lines = train(1, settings | {"model.balance_loss_coefficient": coefficient}, name=f"b{coefficient}").metrics
        found[coefficient] = lines[-1]["balance_loss"]
        for line in lines:
            for name in ("expert_load_text", "expert_load_image"):
                assert len(line[name]) == 2  # layers
                assert all(sum(layer) == pytest.approx(1.0, abs=1e-5) for layer in line[name])
    assert found[1.0] < 1.02  # 1 is even
    assert found[0.0] > found[1.0]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("layers", [None, 1])
def test_activation_checkpointing_changes_nothing(train, recompute, layers):
    settings = {
        "model.experts": 4,
        "model.balance_loss_coefficient": 0.1,
        "model.layers": 3,
        "data.micro_batch_rows": 1,
    }
    plain = train(2, settings | {"parallel.pipeline": 2}, name="plain").metrics
    if layers is not None and recompute == "full":
        settings["training.checkpointed_layers"] = layers
    again = {"training.activation_checkpointing": recompute, "parallel.pipeline": 2}
    lines = train(2, settings | again, name="again").metrics
    for line, wanted in zip(lines, plain, strict=True):
        for name in ("loss", "gradient_norm", "balance_loss"):
            assert line[name] == pytest.approx(wanted[name], rel=1e-5)
        assert line["expert_load_text"] == wanted["expert_load_text"]
