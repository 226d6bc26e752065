"""Runs that begin with a checkpoint of any format, in any layout, without converting it first."""

import random
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_frozen import VIEWS
from test_model import build, text_batch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.formats.megatron import specs_of_model
from megatron_sphinx.checkpoint.mapping.conversion import Conversion
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.checkpoint.slices import TensorSlice
from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.checkpoint.weights import fill
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.shards import Block, WeightShard

STILL = {
    "training.steps": 1,
    "optimizer.learning_rate": 0.0,
    "optimizer.minimum_learning_rate": 0.0,
    "optimizer.weight_decay": 0.0,
}
EXACT = ("loss", "loss_pairs", "loss_text", "gradient_norm")


def transformers_model(shape: LanguageConfig, seed: int) -> PreTrainedModel:
    """Hugging Face's model of a shape, every weight drawn."""
    values = {
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.groups, "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.norm_epsilon, "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
    }  # fmt: skip
    torch.manual_seed(seed)
    if shape.experts:
        more = {"num_local_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
        model = MixtralForCausalLM(MixtralConfig(**values, **more))
    else:
        model = LlamaForCausalLM(LlamaConfig(**values))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.1)
    return model.eval()


def shape_of(tiny, experts: int = 0, **others) -> LanguageConfig:
    return LanguageConfig(**tiny.values["model"] | {"experts": experts, "norm_epsilon": 1e-5} | others)


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# what a run begins with


@pytest.mark.parametrize(
    ("form", "world", "layout"),
    [
        ("hf", 1, {}),
        ("hf", 2, {"parallel.tensor": 2, "parallel.sequence": True}),
        ("meta", 3, {"parallel.pipeline": 2, "parallel.encoder": 1}),
        ("hf", 2, {"parallel.expert": 2, "model.experts": 4}),
        ("torch_dist", 2, {"model.experts": 4}),
    ],
    ids=["one", "tensor", "pipeline", "expert", "replicas"],
)
def test_a_run_begins_with_it_as_if_it_had_been_converted(train, tiny, tmp_path, form, world, layout):
    model = transformers_model(shape_of(tiny, layout.get("model.experts", 0)), seed=world)
    source = save(model.to(torch.bfloat16) if world == 1 else model, tmp_path / "source")
    convert(source, tmp_path / "converted", "megatron", WriteOptions())
    if form != "hf":
        convert(source, tmp_path / form, form, WriteOptions(2 if form == "meta" else 1))
        source = tmp_path / form
    direct = train(world, STILL | layout | {"model.weights": str(source)}, "direct")
    assert f"begins with the weights of {source}, new projections and tags" in direct.ranks.text(0)
    converted = train(world, STILL | layout | {"model.weights": str(tmp_path / "converted")}, "indirect")
    weights = load_weights(direct.folder)
    assert is_same(weights, load_weights(converted.folder))
    language = load_weights(tmp_path / "converted")
    assert is_same(language, {name: weights[name] for name in language})
    for one, other in zip(direct.metrics, converted.metrics, strict=True):
        assert [one[name] for name in EXACT] == [other[name] for name in EXACT]


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_released_sphinx_goes_on_with_its_projections(train, tmp_path, is_sparse):
    model = {"model.experts": 4} if is_sparse else {}
    first = train(1, model | {"training.steps": 1}, "first")
    convert(first.folder, tmp_path / "released", "accessory", WriteOptions(2, is_sparse=is_sparse))
    layout = {"parallel.expert": 2} if is_sparse else {"parallel.tensor": 2}
    second = train(2, STILL | VIEWS | model | layout | {"model.weights": str(tmp_path / "released")}, "second")
    assert ", a new skip token" in second.ranks.text(0)
    found, left = load_weights(second.folder), load_weights(first.folder)
    assert found.keys() - left.keys() == {"vision.skip_token"}
    for name, weight in left.items():
        if "word_embeddings" in name or "output_layer" in name:
            assert not found[name][300:].any(), "padding is made, not kept"
            weight[300:] = 0
        assert torch.equal(found[name], weight), name


def check_losses_are_transformers(shape: LanguageConfig, folder: Path, theirs: PreTrainedModel):
    model = build(shape)
    named = dict(model.language.named_parameters())
    pieces = [
        TensorSlice(f"master/language.{name}", tuple(w.shape), Block((0,) * w.ndim, tuple(w.shape)), w.detach())
        for name, w in named.items()
    ]
    fill(open_checkpoint(folder), pieces)
    document = torch.randint(shape.vocabulary, (50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(text_batch([document]), torch.empty(0, model.vision.config.feature_values))
        logits = theirs(document[None]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="none")
    torch.testing.assert_close(ours.flatten()[: len(wanted)], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("experts", [0, 4])
def test_the_losses_are_transformers(run_ranks, tiny, tmp_path, experts):
    shape = shape_of(tiny, experts, rope_theta=1e6)
    theirs = transformers_model(shape, seed=5)
    source = save(theirs, tmp_path / "hf")
    run_ranks(1, lambda: check_losses_are_transformers(shape, source, theirs))


@pytest.mark.parametrize("seed", range(6))
def test_any_pieces_are_the_whole(tmp_path, seed):
    """A rank's part of a weight begins and ends anywhere, in the middle of a head as well."""
    rng = random.Random(seed)
    groups, queries, half = rng.choice([2, 4]), rng.choice([1, 3]), rng.choice([2, 3])
    shape = LanguageConfig(
        layers=rng.randint(1, 2), hidden=2 * groups * queries * half, ffn=rng.choice([6, 10]), heads=groups * queries,
        groups=groups, vocabulary=rng.choice([40, 128, 130]), experts=rng.choice([0, 2, 6]),
    )  # fmt: skip
    folder = save(transformers_model(shape, seed), tmp_path / "source")
    form = ("hf", "meta", "accessory", "accessory", "megatron", "torch_dist")[seed]
    ranks = 2 if form == "accessory" or (form == "meta" and not shape.experts) else 1
    convert(folder, tmp_path / form, form, WriteOptions(ranks, is_sparse=seed == 3))
    opened = open_checkpoint(tmp_path / form, shape)
    conversion = Conversion(opened.source, list(specs_of_model(opened.model)))
    for item in specs_of_model(opened.model):
        memory = torch.full((torch.Size(item.shape).numel(),), torch.nan)
        shard = WeightShard(item.name, item.shape, (Block((0,) * len(item.shape), item.shape),), True, False)
        cuts = sorted({0, len(memory), *(rng.randrange(len(memory)) for _ in range(4))})
        pieces = []
        for start, stop in pairwise(cuts):
            for block, at in shard.boxes(start, stop - start):
                count = torch.Size(block.shape).numel()
                pieces.append(TensorSlice(item.name, item.shape, block, memory[at : at + count].view(block.shape)))
        fill(opened, pieces)
        assert torch.equal(memory.view(item.shape), torch.from_numpy(conversion.make(item))), item.name


# what is refused


def said(train, overrides: dict, world: int = 1) -> str:
    ended = train(world, STILL | overrides, "refused", status=2)
    (line,) = [line for line in ended.ranks.text().splitlines() if line.startswith("megatron-sphinx train: ")]
    return line


def test_another_model_is_refused(train, tiny, tmp_path):
    source = {"model.weights": str(save(transformers_model(shape_of(tiny), 0), tmp_path / "hf"))}
    way_out = "configure the same model, tokenizer and encoders, or begin with other weights"
    line = said(train, source | {"model.hidden": 64})
    assert f"model.weights={tmp_path}/hf: was made with model.hidden=32, this run has 64; {way_out}" in line
    assert "was made with model.rope_theta=10000.0, this run has 50000.0" in said(
        train, source | {"model.rope_theta": 5e4, "parallel.tensor": 2}, world=2
    )


def test_other_projections_and_another_tokenizer_are_refused(train, tiny, tmp_path):
    first = train(1, {"training.steps": 1}, "first")
    convert(first.folder, tmp_path / "hf", "hf", WriteOptions())
    for source in (first.folder, tmp_path / "hf"):
        one_expert = {"vision.experts": [{"name": "dinov2_small", "weights": "random"}]}
        line = said(train, one_expert | {"model.weights": str(source)})
        assert re.search(r"was made with channels\.visual_proj=192, this run has 96; (with vision|configure)", line)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"another")
    line = said(train, {"model.weights": str(tmp_path / "hf")})
    assert re.search(r"model\.weights=\S+hf: was made with tokenizer=[0-9a-f]{64}, this run has [0-9a-f]{64}; c", line)
    shutil.copy(tiny.folder / "tokenizer.model", tmp_path / "hf")
    train(1, STILL | {"model.weights": str(tmp_path / "hf")}, "taken")


def test_what_is_damaged_or_unknown_is_refused_in_one_line(train, tiny, tmp_path):
    folder = save(transformers_model(shape_of(tiny), 0), tmp_path / "hf")
    victim = sorted(folder.glob("*.safetensors"))[1]
    content = victim.read_bytes()
    victim.write_bytes(content[:-100])
    line = said(train, {"model.weights": str(folder)}, world=2)
    assert f"model.weights={victim}: cannot be read as safetensors (" in line
    victim.unlink()
    assert f"model.weights={folder}: {victim.name} is missing; fetch it again" in said(
        train, {"model.weights": str(folder)}
    )
    assert "model.weights=/nowhere: no such folder" in said(train, {"model.weights": "/nowhere"})
    (tmp_path / "empty").mkdir()
    line = said(train, {"model.weights": str(tmp_path / "empty")}, world=2)
    assert f"model.weights={tmp_path}/empty: no checkpoint of a known format; give a folder with" in line
