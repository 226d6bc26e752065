"""Settings of checkpoints: honoured with the format's own defaults, refused by name and value, or of no matter."""

import json
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from llamas import drawn_model, refused, save, shape_of
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, MixtralConfig

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.settings import huggingface as keys
from megatron_sphinx.settings.keys import Values

CONFIGS = {keys.LLAMA: LlamaConfig, keys.MISTRAL: MistralConfig, keys.MIXTRAL: MixtralConfig}


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """One model in every format, with its configuration in the file that the format has."""
    source = save(drawn_model(random.Random(1), experts=0, groups=2, layers=1), tmp_path / "hf")
    for form in ("internlm2", "meta", "accessory", "megatron"):
        convert(source, tmp_path / form, form, WriteOptions())
    return {path.name: path for path in tmp_path.iterdir()}


def change(path: Path, **values: object) -> None:
    """Set keys of a JSON file; ... removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


# refused by name and value


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
SCALED = [
    ("hf", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("hf", {"rope_scaling": LLAMA3}),
    ("hf", {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}),
    ("hf", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("hf", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}),
    ("hf", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}}),
    ("hf", {"rope_scaling": {"type": "what is to come"}}),
    ("hf", {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2}}),
    ("hf", {"rope_scaling": 2.0}),
    ("internlm2", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("meta", {"use_scaled_rope": True}),
    ("meta", {"use_scaled_rope": 1}),
    ("meta", {"rope_scaling_factor": 32.0}),
    ("meta", {"yarn": {"factor": 16}}),
    ("accessory", {"rope_scaling": 0.5}),
]


def config_of(folder: Path, form: str) -> Path:
    return folder / ("params.json" if form == "meta" else "config.json")


@pytest.mark.parametrize(("form", "values"), SCALED)
def test_scaled_positions_are_refused_whatever_they_are_called(folders, form, values):
    path = config_of(folders[form], form)
    change(path, **values)
    ((key, _),) = values.items()
    refused(folders[form], rf"{path.name}: {key}=.*: positions are not scaled here; give a model with")


OTHERS = [
    ("hf", "attention_bias", True, "there are no biases here"),
    ("hf", "attention_bias", "false", "there are no biases here"),
    ("hf", "mlp_bias", True, "there are no biases here"),
    ("internlm2", "bias", True, "there are no biases here"),
    ("internlm2", "bias", ..., "there are no biases here where it is absent, as here; give a model with bias=False"),
    ("hf", "hidden_act", "gelu", "another activation than SwiGLU's"),
    ("hf", "attention_dropout", 0.1, "there is no dropout here"),
    ("hf", "tie_word_embeddings", "yes", "is neither true nor false; give a model with tie_word_embeddings=False"),
    ("hf", "partial_rotary_factor", 0.5, "whole heads are rotated here"),
    ("hf", "sliding_window", 16, "attention is over all positions here"),
    ("hf", "layer_types", ["sliding_attention"], "attention is over all positions here"),
    ("hf", "quantization_config", {"quant_method": "gptq", "bits": 4}, "weights are not quantized here"),
    ("hf", "quantization_config", {"quant_method": "awq"}, "weights are not quantized here"),
    ("hf", "add_cross_attention", True, "this is a decoder alone"),
    ("hf", "pruned_heads", {"0": [1]}, "no heads are left out here"),
    ("hf", "model_type", "mistral", "is not that of LlamaForCausalLM"),
    ("hf", "architectures", ["GPT2LMHeadModel"], "unknown; known: LlamaForCausalLM, MistralForCausalLM, "),
    ("hf", "architectures", ["LlamaForCausalLM", "Other"], "unknown; known: "),
    ("hf", "head_dim", 3, "heads are hidden_size/num_attention_heads="),
    ("hf", "rope_theta", 5.0, "has two values; remove one"),
    ("meta", "sliding_window", 4096, "attention is over all positions here"),
    ("meta", "use_biases", True, "there are no biases here"),
    ("meta", "quantization_args", {"scheme": "int4"}, "weights are not quantized here"),
    ("meta", "lora_args", {"rank": 16}, "low-rank differences are not added here"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "key", "value", "message"), OTHERS)
def test_what_is_computed_otherwise_is_refused(folders, form, key, value, message):
    path = config_of(folders[form], form)
    change(path, **{key: value})
    refused(folders[form], rf"{path.name}: {key}=.*{message}")


@pytest.mark.parametrize("form", ["hf", "internlm2", "meta", "accessory"])
@pytest.mark.parametrize("value", [7, "x" * 1000, None, {"deep": [[1]]}])
def test_an_unknown_key_is_refused_until_it_is_ignored(folders, tmp_path, run_tool, form, value):
    path = config_of(folders[form], form)
    change(path, logit_softcap=value, other=1)
    refused(
        folders[form],
        rf"{path.name}: logit_softcap=.*, other=1: unknown, and may change what the model computes; if not, convert, "
        rf"mix or inspect it with --ignore logit_softcap --ignore other",
    )
    refused(folders[form], rf"{path.name}: other=1: unknown", ignored=["logit_softcap"])
    ignore = ("--ignore", "logit_softcap", "--ignore", "other")
    status, out, _ = run_tool("convert_checkpoint.py", folders[form], tmp_path / "out", "--to", "hf", *ignore)
    assert status == 0
    assert f"{path}: other=1 is ignored" in out.splitlines()
    assert "other" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert run_tool("inspect_checkpoint.py", folders[form])[0] == 2
    assert run_tool("inspect_checkpoint.py", folders[form], *ignore)[0] == 0


def test_what_the_weights_are_read_by_cannot_be_ignored(folders):
    refused(folders["hf"], "--ignore hidden_size: is what the weights are read by; leave", ignored=["hidden_size"])


def test_what_is_unknown_inside_a_setting_is_named(folders, tmp_path):
    change(folders["hf"] / "config.json", rope_scaling={"type": "default", "twist": 2})
    refused(folders["hf"], "config.json: rope_scaling.twist=2: unknown, .*--ignore rope_scaling.twist")
    convert(folders["hf"], tmp_path / "out", "hf", WriteOptions(), ignored=["rope_scaling.twist"])
    change(folders["meta"] / "params.json", moe={"num_shared": 2})
    refused(folders["meta"], "params.json: moe.num_shared=2: unknown, .*--ignore moe.num_shared")


# what is no matter


@pytest.mark.parametrize(
    "values",
    [
        {"sliding_window": None}, {"sliding_window": 10**6}, {"sliding_window": 16, "use_sliding_window": False},
        {"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 1.0}}, {"hidden_act": "swish"},
        {"layer_types": ["full_attention"]}, {"pretraining_tp": 4}, {"attention_dropout": 0}, {"head_dim": None},
        {"output_router_logits": True}, {"quantization_config": None}, {"architectures": None},
        {"architectures": "LlamaForCausalLM"}, {"model_type": ...},
    ],
)  # fmt: skip
def test_what_changes_nothing_is_taken(folders, tmp_path, values):
    change(folders["hf"] / "config.json", **values)
    convert(folders["hf"], tmp_path / "out", "hf", WriteOptions(), verify=True)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_key_that_transformers_writes_is_known_and_defaults_are_its_own(architecture):
    theirs = CONFIGS[architecture]()
    table = keys.table_of(architecture)
    assert table.unknown(theirs.to_dict()) == []
    shape = keys.shape_of({}, architecture, Path("config.json"))
    names = {"layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size",
             "heads": "num_attention_heads", "groups": "num_key_value_heads", "vocabulary": "vocab_size",
             "norm_epsilon": "rms_norm_eps", "experts": "num_local_experts",
             "experts_per_token": "num_experts_per_tok"}  # fmt: skip
    assert shape.pop("rope_theta") == theirs.rope_parameters["rope_theta"]
    assert shape == {name: getattr(theirs, names[name]) for name in shape}
    defaults = keys.DEFAULTS[architecture]
    assert (defaults.window, defaults.positions) == (
        getattr(theirs, "sliding_window", None),
        theirs.max_position_embeddings,
    )


def test_a_mistral_without_a_window_is_a_llama(folders, tmp_path):
    path = folders["hf"] / "config.json"
    change(path, architectures=[keys.MISTRAL], model_type="mistral")
    change(path, max_position_embeddings=32768)
    refused(folders["hf"], "sliding_window=4096: .* where it is absent, as here; give a model with sliding_window=null")
    change(path, sliding_window=None)
    convert(folders["hf"], tmp_path / "out", "hf", WriteOptions())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_defaults_of_meta(folders):
    path = folders["meta"] / "params.json"
    change(path, norm_eps=..., rope_theta=..., n_kv_heads=..., hidden_dim=...)
    shape = open_checkpoint(folders["meta"]).model.language
    assert (shape.norm_epsilon, shape.rope_theta) == (1e-5, 1e4)
    change(path, head_dim=shape.hidden // shape.heads)  # of Mistral
    assert open_checkpoint(folders["meta"]).model.language.rope_theta == 1e6
    change(path, multiple_of=1000)
    refused(
        folders["meta"], "params.json: the width of feed-forward layers is 1000 by this file, .* by the tensors; give"
    )
    change(path, multiple_of=..., vocab_size=7)
    refused(folders["meta"], "params.json: vocab_size is 7 by this file, .* by the tensors; give files that belong")


# what cannot be


@pytest.mark.parametrize(
    ("form", "key", "value", "message"),
    [
        ("hf", "hidden_size", "64", "must be a whole number, at least 1"),
        ("hf", "num_hidden_layers", 9999, "describes 9999 layers, its files hold 12 tensors"),
        ("hf", "num_hidden_layers", 10**9, "layers=1000000000: must be at most 10,000"),
        ("hf", "num_hidden_layers", 10**400, "layers=10+"),
        ("hf", "num_hidden_layers", 1.0, "must be a whole number, at least 1"),
        ("hf", "num_attention_heads", 0, "must be a whole number, at least 1"),
        ("hf", "rope_theta", "1e4", "must be a number above 0"),
        ("hf", "rms_norm_eps", -1, "must be a number above 0"),
        ("hf", "rms_norm_eps", float("nan"), "must be a number above 0"),
        ("hf", "vocab_size", True, "must be a whole number, at least 1"),
        ("meta", "n_layers", 10**9, "layers=1000000000: must be at most 10,000"),
        ("meta", "n_layers", ..., "n_layers=None: must be a whole number"),
        ("meta", "dim", [64], "must be a whole number"),
        ("meta", "moe", [1], "moe=.*: must hold keys"),
        ("accessory", "n_layers", 10**9, "layers=1000000000: must be at most 10,000"),
        ("accessory", "moe", [1], "moe=.*: must hold keys"),
    ],
)
def test_what_cannot_be_is_refused_before_memory_is_taken(folders, form, key, value, message):
    change(config_of(folders[form], form), **{key: value} | ({"rope_parameters": ...} if key == "rope_theta" else {}))
    refused(folders[form], message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 10**9}, "layers=1000000000: must be at most 10,000"),
        ({"layers": "2"}, "does not describe a LLaMA or a Mixtral"),
        ({"novelty": 1}, "novelty: unknown key"),
        (None, "does not describe a LLaMA or a Mixtral"),
    ],
)
def test_a_manifest_of_ours_that_describes_no_model(folders, values, message):
    path = folders["megatron"] / "checkpoint.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["model"] = values and manifest["identity"]["model"] | values
    path.write_text(json.dumps(manifest))
    refused(folders["megatron"], message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "cannot be read"),
        (b'{"a": ' * 100_000, "cannot be read"),
        (b"[]", "holds no keys"),
        (b'{"hidden_size": 64, "hidden_size": 32}', r"cannot be read \('hidden_size' is there twice\)"),
        ("{}".encode("utf-16"), "cannot be read"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(folders, content, message):
    for form in ("hf", "meta", "accessory"):
        path = config_of(folders[form], form)
        path.write_bytes(content)
        refused(folders[form], rf"{path.name}: {message}.*; give a whole checkpoint")


# Megatron-LM's arguments


ARGUMENTS = {"position_embedding_type": "rope", "swiglu": True, "normalization": "RMSNorm", "train_iters": 5}


@pytest.fixture
def torch_dist(tmp_path):
    model = drawn_model(random.Random(1), experts=0, groups=2, layers=1)
    convert(save(model, tmp_path / "hf"), tmp_path / "dist", "torch_dist", WriteOptions())

    def told(**values: object) -> None:
        given = Namespace(**ARGUMENTS | values, dtype=torch.bfloat16, function=json.dumps)
        torch.save({"args": given, "iteration": 3}, tmp_path / "dist" / "common.pt")

    return tmp_path / "dist", shape_of(model), told


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_rope_scaling": True}, "use_rope_scaling=True: positions are not scaled here"),
        ({"rotary_percent": 0.5}, "rotary_percent=0.5: whole heads are rotated here"),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm': another norm than RMSNorm"),
        ({"rotary_base": 5}, "rotary_base=5.0, --preset has model.rope_theta="),
        ({"num_layers": 7}, "num_layers=7, --preset has model.layers=1; name its own shape"),
        ({"num_attention_heads": 6}, "num_attention_heads=6, --preset has model.heads="),
    ],
)
def test_arguments_of_megatron_lm_are_looked_at(torch_dist, values, message):
    folder, shape, told = torch_dist
    told()
    convert(folder, folder.parent / "out", "hf", WriteOptions(), shape=shape)
    told(**values)
    refused(folder, rf"common.pt: {message}", shape=shape)


def test_values():
    values = Values({"a": None, "b": {"c": 3}}, Path("x.json"))
    assert (values.whole("a", 7), values.section("b").whole("c"), values.has("a")) == (7, 3, False)


def test_a_mistral_has_its_logits_as_a_llama(tmp_path):
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 8}  # fmt: skip
    model = MistralForCausalLM(MistralConfig(**shape, sliding_window=None, initializer_range=0.2)).eval()
    convert(save(model, tmp_path / "mistral"), tmp_path / "ours", "megatron", WriteOptions())
    convert(tmp_path / "ours", tmp_path / "llama", "hf", WriteOptions())
    tokens = torch.arange(40)[None] * 7 % 96
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    with torch.no_grad():
        assert torch.equal(llama(tokens).logits, model(tokens).logits)
