"""The language model against Hugging Face's, and pictures among text."""

import random
from dataclasses import replace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig, VisualExpertConfig
from megatron_sphinx.model.attention import PackedAttention, PackedRows, RMSNorm, rotation
from megatron_sphinx.model.kernels import _Rotate, torch_kernels
from megatron_sphinx.model.language import build_language, draw_weights
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.sphinx import SphinxModel, place_views
from megatron_sphinx.model.vision import VisualProjection
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import job

CPU = torch.device("cpu")


def groups() -> ProcessGroups:
    job.find_place()
    job.join("cpu", 30)
    return ProcessGroups.create(ParallelLayout(world=1, config=ParallelConfig()), "gloo")


def random_shape(seed: int) -> LanguageConfig:
    """Odd group counts, any feed-forward width, any vocabulary."""
    rng = random.Random(seed)
    kv, per_group, head = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 3]), rng.choice([4, 8, 10])
    return LanguageConfig(
        layers=rng.randint(1, 3),
        hidden=kv * per_group * head,
        ffn=rng.randint(5, 60),
        heads=kv * per_group,
        groups=kv,
        vocabulary=rng.randint(20, 300),
        rope_theta=rng.choice([1e4, 1e6]),
        norm_epsilon=rng.choice([1e-5, 1e-6]),
        init_std=0.2,
    )


def build(config: LanguageConfig, dtype: torch.dtype = torch.float32) -> SphinxModel:
    here = groups()
    language = build_language(config, here, dtype=dtype, sequence_length=64)
    experts = (VisualExpertConfig(name="dinov2_small", weights="random"),)
    vision = VisualProjection(VisionConfig(experts=experts, grid=4), config.hidden, dtype=dtype, device=CPU)
    model = SphinxModel(language, vision, here)
    draw_weights(model, config, here, seed=4)
    return model


def all_but_feed_forward(config: LanguageConfig, model: SphinxModel) -> dict[str, torch.Tensor]:
    """What LLaMA and Mixtral have in common, under Hugging Face's names."""
    ours, head = model.language.state_dict(), config.hidden // config.heads
    state = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][: config.vocabulary],
        "lm_head.weight": ours["output_layer.weight"][: config.vocabulary],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
    }
    for layer in range(config.layers):
        here, there = f"decoder.layers.{layer}", f"model.layers.{layer}"
        qkv = ours[f"{here}.self_attention.linear_qkv.weight"].view(config.groups, -1, head, config.hidden)
        q, k, v = qkv[:, :-2], qkv[:, -2], qkv[:, -1]
        state |= {
            f"{there}.self_attn.q_proj.weight": q.reshape(-1, config.hidden),
            f"{there}.self_attn.k_proj.weight": k.reshape(-1, config.hidden),
            f"{there}.self_attn.v_proj.weight": v.reshape(-1, config.hidden),
            f"{there}.self_attn.o_proj.weight": ours[f"{here}.self_attention.linear_proj.weight"],
            f"{there}.input_layernorm.weight": ours[f"{here}.input_layernorm.weight"],
            f"{there}.post_attention_layernorm.weight": ours[f"{here}.pre_mlp_layernorm.weight"],
        }
    return state


def llama_of(config: LanguageConfig, model: SphinxModel) -> LlamaForCausalLM:
    """Hugging Face's model with the same weights."""
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.ffn,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.groups,
            rms_norm_eps=config.norm_epsilon, rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    ours, state = model.language.state_dict(), all_but_feed_forward(config, model)
    for layer in range(config.layers):
        here, there = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        gate, up = ours[f"{here}.linear_fc1.weight"].chunk(2)
        state |= {
            f"{there}.gate_proj.weight": gate,
            f"{there}.up_proj.weight": up,
            f"{there}.down_proj.weight": ours[f"{here}.linear_fc2.weight"],
        }
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def text_batch(documents: list[torch.Tensor]) -> MicroBatch:
    """Documents behind one another, each predicting its next token."""
    targets = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in documents])
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        tokens=torch.cat(documents), targets=targets, lengths=tuple(map(len, documents)),
        target_positions=(targets >= 0).nonzero().flatten(),
        sample_of_token=torch.full((sum(map(len, documents)),), -1), view_positions=none, skip_positions=none,
        sample_of_view=none,
        row_of_token=torch.zeros(sum(map(len, documents)), dtype=torch.int64), rows=1,
        samples=(), documents=tuple(range(len(documents))),
    )  # fmt: skip


def check_packed_rows_equal_llama(seed: int):
    config = random_shape(seed)
    model, generator = build(config), torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    lengths = sorted(rng.choice([1, 3, 7, 7, 20, 41]) for _ in range(6))
    documents = [torch.randint(config.vocabulary, (n,), generator=generator) for n in lengths]
    batch, features = text_batch(documents), torch.empty(0, model.vision.config.feature_values)
    ours = batch.spread(model(batch, features))
    theirs = llama_of(config, model)
    at = 0
    for document in documents:
        logits = theirs(document[None]).logits[0]
        if len(document) > 1:
            wanted = torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="none")
            torch.testing.assert_close(ours[at : at + len(document) - 1], wanted, rtol=1e-4, atol=1e-5)
        at += len(document)
    changed = [
        documents[-1] if n == len(documents) - 1 else (d + 1) % config.vocabulary for n, d in enumerate(documents)
    ]
    again = batch.spread(model(text_batch(changed), features))
    assert torch.equal(again[-len(documents[-1]) :], ours[-len(documents[-1]) :])  # no document sees another


@pytest.mark.parametrize("seed", range(8))
def test_packed_rows_give_the_losses_that_llama_gives_each_document_alone(run_ranks, seed):
    run_ranks(1, lambda: check_packed_rows_equal_llama(seed))


def check_gradients_equal_llama():
    config = random_shape(3)
    model = build(config)
    document = torch.randint(config.vocabulary, (20,), generator=torch.Generator().manual_seed(0))
    model(text_batch([document]), torch.empty(0, model.vision.config.feature_values)).sum().backward()
    theirs = llama_of(config, model).train()
    logits = theirs(document[None]).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="sum").backward()
    down = model.language.decoder.layers[0].mlp.linear_fc2.weight.grad
    torch.testing.assert_close(down, theirs.model.layers[0].mlp.down_proj.weight.grad, rtol=1e-4, atol=1e-5)
    embedding = model.language.embedding.word_embeddings.weight.grad
    torch.testing.assert_close(
        embedding[: config.vocabulary], theirs.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5
    )
    assert all(weight.grad is not None for weight in model.parameters())  # zero pictures still reach the projections


def test_gradients_are_llamas_and_text_reaches_every_weight(run_ranks):
    run_ranks(1, check_gradients_equal_llama)


def check_views_stand_behind_bos():
    config = random_shape(1)
    model = build(config)
    block = model.vision.config.tokens_per_view
    features = torch.randn(2, model.vision.config.feature_values).to(torch.bfloat16)
    tokens = torch.cat([torch.tensor([1]), torch.zeros(block, dtype=torch.int64), torch.tensor([5, 6, 2])])
    batch = MicroBatch(
        tokens=tokens.repeat(2), targets=torch.full((2 * len(tokens),), 5), lengths=(len(tokens),) * 2,
        target_positions=torch.arange(2 * len(tokens)),
        sample_of_token=torch.tensor([0, 1]).repeat_interleave(len(tokens)),
        view_positions=torch.cat([torch.arange(block) + 1, torch.arange(block) + 1 + len(tokens)]),
        skip_positions=torch.zeros(0, dtype=torch.int64), sample_of_view=torch.tensor([0, 1]),
        row_of_token=torch.zeros(2 * len(tokens), dtype=torch.int64), rows=1,
        samples=(0, 1), documents=(),
    )  # fmt: skip
    both = model(batch, features)
    swapped = model(batch, features.flip(0))
    torch.testing.assert_close(both, swapped.view(2, -1).flip(0).flatten())
    assert not torch.allclose(both[block:], both.view(2, -1).flip(0).flatten()[block:])
    theirs = llama_of(config, model)
    embedded = theirs.model.embed_tokens(tokens).clone()
    embedded[1 : 1 + block] = model.vision(features[:1])[0]
    wanted = torch.nn.functional.cross_entropy(theirs(inputs_embeds=embedded[None]).logits[0],
                                               torch.full((len(tokens),), 5), reduction="none")  # fmt: skip
    torch.testing.assert_close(both[: len(tokens)], wanted, rtol=1e-4, atol=1e-5)


def check_logits_stand_where_targets_are():
    config = random_shape(5)
    model, documents = build(config), [torch.arange(4), torch.arange(9), torch.arange(9) + 3]
    whole, features = text_batch(documents), torch.empty(0, model.vision.config.feature_values)
    losses, seen = whole.spread(model(whole, features)), []
    model.language.output_layer.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output[0])))
    for kept in (torch.tensor([2, 5, 11, 20]), torch.tensor([], dtype=torch.int64)):
        out = model(replace(whole, target_positions=kept), features)
        torch.testing.assert_close(out, losses[kept])
        model.zero_grad()
        out.sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())  # the replicas' reductions stay in step
    assert seen == [4, 0]


def test_logits_are_computed_where_there_is_a_target_only(run_ranks):
    run_ranks(1, check_logits_stand_where_targets_are)


def test_views_stand_right_behind_bos(run_ranks):
    run_ranks(1, check_views_stand_behind_bos)


def test_place_views():
    text = torch.zeros(6, 2, requires_grad=True)
    blocks = torch.arange(8.0).view(4, 2).requires_grad_()
    out = place_views(text, blocks, torch.tensor([1, 2, 4, 5]))
    assert out.tolist() == [[0, 0], [0, 1], [2, 3], [0, 0], [4, 5], [6, 7]]
    with pytest.raises(SphinxError, match="4 tokens of views for 3 positions; plan and encoders disagree"):
        place_views(text, blocks, torch.tensor([1, 2, 4]))


def test_projection_lays_out_start_queries_tokens_end():
    experts = tuple(VisualExpertConfig(name=name, weights="random") for name in ("blip2_qformer_small", "dinov2_small"))
    config = VisionConfig(experts=experts, grid=4)
    vision = VisualProjection(config, 12, dtype=torch.float32, device=CPU)
    torch.nn.init.constant_(vision.start_tag, 2.0)
    torch.nn.init.constant_(vision.end_tag, 3.0)
    features = torch.randn(2, config.feature_values)
    block = vision(features)
    assert block.shape == (2, config.tokens_per_view, 12)
    assert (block[:, 0] == 2).all()
    assert (block[:, -1] == 3).all()
    mixed, queries = features.split([17 * 96, 8 * 48], 1)
    assert torch.equal(block[:, 1:9], vision.qformer_proj(queries.view(2, 8, 48)))
    assert torch.equal(block[:, 9:-1], vision.visual_proj(mixed.view(2, 17, 96)))


@pytest.mark.parametrize("seed", range(4))
def test_packed_attention_equals_one_masked_softmax(seed):
    rng = random.Random(seed)
    lengths = sorted(rng.choice([1, 2, 5, 5, 9]) for _ in range(rng.randint(1, 7)))
    heads, kv, head, total = 6, rng.choice([1, 2, 3, 6]), 4, sum(lengths)
    q, k, v = torch.randn(total, heads, head), torch.randn(total, kv, head), torch.randn(total, kv, head)
    attention = PackedAttention(kernels=torch_kernels(), longest=9)
    out = attention(q, k, v, None, packed_seq_params=PackedRows.of(lengths, CPU))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (document[:, None] == document) & torch.ones(total, total, dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


@pytest.mark.parametrize("shape", [(5, 8), (3, 1, 8), (0, 1, 8)])
def test_rms_norm(shape):
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    norm = RMSNorm(config, 8, 1e-5, kernels=torch_kernels())
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(shape, requires_grad=True)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    found, gradient = norm(x), torch.randn(shape)
    torch.testing.assert_close(found, wanted)
    inputs = (x, norm.weight)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(wanted, inputs, gradient)
    )


@pytest.mark.parametrize("seed", range(3))
def test_attention_rotates_each_token_by_its_place_in_its_document(seed):
    """As complex numbers turn."""
    rng = random.Random(seed)
    lengths, heads, width = sorted(rng.choice([1, 2, 5, 9]) for _ in range(4)), 3, 8
    frequencies = 100.0 ** (-torch.arange(0, width, 2) / width)
    x = torch.randn(sum(lengths), heads, width, requires_grad=True)
    out = _Rotate.apply(x, *rotation(lengths, frequencies, torch.float32))
    places = torch.cat([torch.arange(length) for length in lengths])
    turns = torch.polar(torch.ones(()), places[:, None, None] * frequencies)
    turned = torch.complex(*x.chunk(2, -1)) * turns
    wanted = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(out, wanted)
    gradient = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(out, x, gradient), torch.autograd.grad(wanted, x, gradient))


@pytest.mark.parametrize(
    ("name", "sizes", "parameters"),
    [
        ("LLaMA2-7B", (32, 4096, 11008, 32, 32, 32000), 6_738_415_616),
        ("LLaMA2-13B", (40, 5120, 13824, 40, 40, 32000), 13_015_864_320),
        ("TinyLlama-1.1B", (22, 2048, 5632, 32, 4, 32000), 1_100_048_384),
    ],
)
def test_parameters_of_published_models(name, sizes, parameters):
    names = ("layers", "hidden", "ffn", "heads", "groups", "vocabulary")
    assert LanguageConfig(**dict(zip(names, sizes, strict=True))).parameters == parameters
