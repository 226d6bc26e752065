"""Models whose output layer is their embedding: read everywhere, as two weights that are equal."""

import json
import random
from pathlib import Path

import pytest
import torch
from llamas import model_of, refused, save
from safetensors.torch import load_file, save_file
from test_weights import shape_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megatron_sphinx.checkpoint import inspect
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mix import interpolate
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.checkpoint.store import load_weights

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def tied(seed: int, experts: int = 0) -> PreTrainedModel:
    """A small Llama or Mixtral, tied as SmolLM2 is, every weight drawn."""
    rng = random.Random(seed)
    shape = {
        "hidden_size": 24, "intermediate_size": rng.choice([24, 40]), "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": 3, "num_key_value_heads": rng.choice([1, 3]), "vocab_size": rng.choice([97, 120]),
        "tie_word_embeddings": True,
    }  # fmt: skip
    return model_of(shape, experts=experts, seed=seed, std=0.2)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(30)[None]).logits


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("size", ["3KB", "5GB"])
def test_it_comes_back_as_two_equal_weights(tmp_path, experts, size):
    source = save(tied(experts, experts), tmp_path / "tied", size)
    done = convert(source, tmp_path / "ours", "megatron", WriteOptions(), verify=True)
    (note,) = (note for note in done.notes if "tie_word_embeddings" in note)
    assert note.endswith(f"config.json: tie_word_embeddings=true: {OUTPUT} is {EMBEDDING}; here they are two, and are "
                         f"written as two")  # fmt: skip
    weights = load_weights(tmp_path / "ours")
    assert torch.equal(weights["language.embedding.word_embeddings.weight"], weights["language.output_layer.weight"])
    for form, start in (("meta", source), ("hf", tmp_path / "ours")):
        convert(start, tmp_path / form, form, WriteOptions(), verify=True)
    convert(tmp_path / "meta", tmp_path / "through meta", "hf", WriteOptions())
    for end in ("hf", "through meta"):
        assert json.loads((tmp_path / end / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(logits(tmp_path / end), logits(source))


def test_its_tensors_are_counted_once(tmp_path):
    source = save(tied(1), tmp_path / "tied")
    names = load_file(source / "model.safetensors").keys()
    assert OUTPUT not in names
    done = convert(source, tmp_path / "hf", "hf", WriteOptions())
    assert done.balance == f"{source}: {len(names)} tensors = {len(names)} made into {len(names) + 1} + 0 left out"
    opened = open_checkpoint(source)
    assert inspect.describe(opened)["tensors"] == len(names)
    assert {name.partition(": ")[2] for name in inspect.digests(opened)} == set(names)
    found = inspect.compare(opened, open_checkpoint(tmp_path / "hf"))
    assert {one.name.partition(": ")[2] for one in found} >= {EMBEDDING, OUTPUT}
    assert not any(one.norm for one in found)


def test_a_mix_is_tied_again(tmp_path):
    sources = [save(tied(3), tmp_path / "one"), tmp_path / "other"]
    other = tied(3)
    for weight in other.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    save(other, sources[1])
    done = interpolate(sources, {tmp_path / "mix": (0.25, 0.75)})
    count = len(load_file(sources[0] / "model.safetensors"))
    assert done.balances[0] == f"{sources[0]}: {count} tensors = {count} mixed + 0 left out"
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "mix")
    assert mixed.lm_head.weight is mixed.model.embed_tokens.weight
    wanted = 0.25 * load_file(sources[0] / "model.safetensors")[EMBEDDING] + 0.75 * other.lm_head.weight
    torch.testing.assert_close(mixed.lm_head.weight, wanted)


def test_an_output_layer_that_is_there_is_taken(tmp_path):
    source = save(tied(5), tmp_path / "hf")
    held = load_file(source / "model.safetensors")
    save_file(held | {OUTPUT: held[EMBEDDING] + 1}, source / "model.safetensors", {"format": "pt"})
    done = convert(source, tmp_path / "out", "hf", WriteOptions())
    assert any(note.endswith(f"tie_word_embeddings=true: {OUTPUT}, which is there all the same, is taken")
               for note in done.notes)  # fmt: skip
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[OUTPUT], held[EMBEDDING] + 1)
    assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_what_ties_nothing_is_refused(tmp_path):
    source = save(tied(6), tmp_path / "hf")
    path = source / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"tie_word_embeddings": "yes"}))
    refused(source, r"config\.json: tie_word_embeddings='yes': is neither true nor false; give a model with tie_word")
    path.write_text(json.dumps(said | {"tie_word_embeddings": False}))
    refused(source, rf"holds no {OUTPUT}; give a whole checkpoint")
    path.write_text(json.dumps(said))
    held = load_file(source / "model.safetensors")
    del held[EMBEDDING]
    save_file(held, source / "model.safetensors", {"format": "pt"})
    refused(source, rf"holds no {EMBEDDING}; give a whole checkpoint")


def test_a_run_begins_with_it(train, tiny, tmp_path):
    shape = shape_of(tiny)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, vocab_size=shape.vocabulary,
        rms_norm_eps=shape.norm_epsilon, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    source = save(model, tmp_path / "tied")
    still = {"training.steps": 1, "optimizer.learning_rate": 0.0, "optimizer.minimum_learning_rate": 0.0}
    run = train(2, still | {"parallel.tensor": 2, "model.weights": str(source)}, "begun")
    found = load_weights(run.folder)
    for name in ("language.embedding.word_embeddings.weight", "language.output_layer.weight"):
        assert torch.equal(found[name][: shape.vocabulary], model.lm_head.weight.detach())
