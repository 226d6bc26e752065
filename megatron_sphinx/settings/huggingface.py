"""The keys of transformers' config.json for Llama, Mistral, Mixtral and InternLM2, with the defaults of each."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.settings.keys import Fault, Fixed, KeyTable, Values, shortened

LLAMA, MISTRAL, MIXTRAL = "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"
INTERNLM2 = "InternLM2ForCausalLM"


class Defaults(NamedTuple):
    """What an architecture has where its config.json does not say.

    Source: transformers, models/*/configuration_*.py; internlm/internlm2-7b, configuration_internlm2.py.
    """

    model_type: str
    ffn: int = 11008
    groups: int = 0  # as many as heads
    positions: int = 2048
    epsilon: float = 1e-6
    theta: float = 1e4
    vocabulary: int = 32000
    experts: int = 0
    window: int | None = None


DEFAULTS = {
    LLAMA: Defaults("llama"),
    MISTRAL: Defaults("mistral", 14336, 8, 131072, window=4096),
    MIXTRAL: Defaults("mixtral", 14336, 8, 131072, 1e-5, 1e6, experts=8),
    INTERNLM2: Defaults("internlm2", vocabulary=103168),
}

_HONOURED = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "sliding_window", "layer_types", "max_position_embeddings",
}  # fmt: skip
_ROUTED = {"num_local_experts", "num_experts_per_tok"}
_BIAS = "there are no biases here"
_DROPOUT = "there is no dropout here"
_ENCODER = "this is a decoder alone"
_FIXED = {
    "hidden_act": Fixed(("silu", "swish"), "another activation than SwiGLU's"),
    "attention_bias": Fixed((False,), _BIAS),
    "mlp_bias": Fixed((False,), _BIAS),
    "qkv_bias": Fixed((False,), _BIAS),
    "attention_dropout": Fixed((0.0,), _DROPOUT),
    "hidden_dropout": Fixed((0.0,), _DROPOUT),
    "resid_pdrop": Fixed((0.0,), _DROPOUT),
    "embd_pdrop": Fixed((0.0,), _DROPOUT),
    "attn_pdrop": Fixed((0.0,), _DROPOUT),
    "tie_word_embeddings": Fixed((False, True), "is neither true nor false"),
    "partial_rotary_factor": Fixed((1.0,), "whole heads are rotated here"),
    "use_sliding_window": Fixed((False,), "attention is over all positions here"),
    "quantization_config": Fixed(({},), "weights are not quantized here"),
    "compression_config": Fixed(({},), "weights are not quantized here"),
    "add_cross_attention": Fixed((False,), _ENCODER),
    "is_encoder_decoder": Fixed((False,), _ENCODER),
    "cross_attention_hidden_size": Fixed((), _ENCODER),
    "tie_encoder_decoder": Fixed((False,), _ENCODER),
    "pruned_heads": Fixed(({},), "no heads are left out here"),
}
# What tells how text is generated, how a class of transformers is called or returns, or how weights were drawn.
_FREE = {
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "_flash_attn_2_enabled", "_name_or_path", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_range", "is_decoder", "label2id", "length_penalty", "mask_token_id", "max_length",
    "max_sequence_length", "max_window_layers", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "original_max_position_embeddings", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "router_aux_loss_coef", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip
# Of these, what a conversion to a format with such a file does not take along: it says it of what it writes.
_OF_THE_FILE = {"auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_commit_hash"}

# Source: transformers, modeling_rope_utils.py.
_ROPE_TYPE = ("rope_type", "type")
_ROPE_FREE = {"rope_theta", *_ROPE_TYPE}  # whatever the type
_ROPE_OF_TYPE = {  # those of other types change nothing where the type is one of these
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "short_factor",
    "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip
_NOT_SCALED = "positions are not scaled here; give a model without it"


def table_of(architecture: str) -> KeyTable:
    """Return the table of an architecture's config.json."""
    defaults, fixed = DEFAULTS[architecture], dict(_FIXED)
    if architecture == INTERNLM2:
        fixed["bias"] = Fixed((False,), _BIAS, otherwise=True)
    if defaults.experts:
        fixed["router_jitter_noise"] = Fixed((0.0,), "there is no noise in the router here")

    def faults(values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from _faults_of_class(values, architecture)
        yield from _faults_of_rope(values)
        yield from _faults_of_attention(values, defaults)

    return KeyTable(_HONOURED | (_ROUTED if defaults.experts else set()), fixed, _FREE, faults)


def kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json says beside the weights: tokens, positions, how text is generated."""
    said = {key: value for key, value in values.items() if key in _FREE - _OF_THE_FILE}
    if (positions := values.get("max_position_embeddings")) is not None:
        said["max_position_embeddings"] = positions
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if _type_of(rope) == "dynamic":
        said["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return said


def shape_of(config: Mapping[str, Any], architecture: str, path: Path) -> dict[str, Any]:
    """Return the fields of the language model that a config.json describes.

    Raises:
        CheckpointError: a value is none of its kind.
    """
    values, defaults = Values(config, path), DEFAULTS[architecture]
    heads = values.whole("num_attention_heads", 32)
    shape: dict[str, Any] = {
        "layers": values.whole("num_hidden_layers", 32),
        "hidden": values.whole("hidden_size", 4096),
        "ffn": values.whole("intermediate_size", defaults.ffn),
        "heads": heads,
        "groups": values.whole("num_key_value_heads", defaults.groups or heads),
        "vocabulary": values.whole("vocab_size", defaults.vocabulary),
        "rope_theta": theta_of(config, defaults.theta, path),
        "norm_epsilon": values.number("rms_norm_eps", defaults.epsilon),
    }
    if defaults.experts:
        shape["experts"] = values.whole("num_local_experts", defaults.experts)
        shape["experts_per_token"] = values.whole("num_experts_per_tok", 2)
    head = values.whole("head_dim", shape["hidden"] // heads or 1)
    if head * heads != shape["hidden"]:
        raise CheckpointError(
            f"{path}: head_dim={head}: heads are hidden_size/num_attention_heads={shape['hidden'] / heads:g} wide "
            f"here; give a model whose heads are"
        )
    return shape


def theta_of(config: Mapping[str, Any], default: float, path: Path) -> float:
    """Return the base of the rotary frequencies, wherever a config.json has it.

    Raises:
        CheckpointError: it has several, or one that is none.
    """
    values = Values(config, path)
    places = [values, values.section("rope_scaling"), values.section("rope_parameters")]
    found = {place.number("rope_theta", default) for place in places if place.has("rope_theta")}
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: rope_theta={' and '.join(f'{theta:g}' for theta in sorted(found))}: has two values; remove one"
        )
    return found.pop() if found else default


def _type_of(rope: Any) -> str:
    """The type of scaled positions; plain ones where it is not told."""
    names = [rope[key] for key in _ROPE_TYPE if rope.get(key) is not None] if isinstance(rope, Mapping) else [rope]
    return str(names[0]) if names else "default"


def _faults_of_class(values: Mapping[str, Any], architecture: str) -> Iterator[Fault]:
    """A model_type that is another one's: transformers goes by that, other programs by `architectures`."""
    known = values.get("model_type")
    if known is not None and known != DEFAULTS[architecture].model_type:
        yield Fault("model_type", known, f"is not that of {architecture}; give files that belong together")


def _faults_of_rope(values: Mapping[str, Any]) -> Iterator[Fault]:
    for key in ("rope_scaling", "rope_parameters"):
        if (rope := values.get(key)) is None or rope == {}:
            continue
        if not isinstance(rope, Mapping):
            yield Fault(key, rope, _NOT_SCALED)
            continue
        kinds = {str(rope[name]) for name in _ROPE_TYPE if rope.get(name) is not None} or {"default"}
        # `dynamic`, as InternLM2 has it, changes positions behind max_position_embeddings only
        is_plain = kinds <= {"default", "dynamic"} or (kinds == {"linear"} and rope.get("factor") == 1)
        if not is_plain:
            yield Fault(key, rope, _NOT_SCALED)
            continue
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            yield Fault(f"{key}.partial_rotary_factor", rope["partial_rotary_factor"], "whole heads are rotated here")
        for name in rope:
            if name not in _ROPE_FREE | _ROPE_OF_TYPE | {"partial_rotary_factor"}:
                reason = f"unknown, and may change what the model computes; if not, go on with --ignore {key}.{name}"
                yield Fault(f"{key}.{name}", rope[name], reason)


def _faults_of_attention(values: Mapping[str, Any], defaults: Defaults) -> Iterator[Fault]:
    """Attention over some of the positions only, as far as there are more than those."""
    window = values.get("sliding_window", defaults.window)
    positions = values.get("max_position_embeddings") or defaults.positions
    is_wide = all(type(value) is int for value in (window, positions)) and window >= positions
    if window is not None and not is_wide and values.get("use_sliding_window") is not False:
        given = "" if "sliding_window" in values else " where it is absent, as here"
        reason = f"attention is over all positions here{given}; give a model with sliding_window=null"
        yield Fault("sliding_window", window, reason)
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        others = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else kinds
        yield Fault("layer_types", others, f"attention is over all positions here; {shortened('full_attention')} is")
