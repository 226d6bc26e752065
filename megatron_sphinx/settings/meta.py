"""The keys of Meta's and Mistral's params.json, and of LLaMA2-Accessory's config.json, which are alike."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.settings.keys import Fault, Fixed, KeyTable, Values

_HONOURED = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "multiple_of",
    "ffn_dim_multiplier", "hidden_dim", "head_dim", "moe", "sliding_window", "max_seq_len", "max_position_embeddings",
}  # fmt: skip
_EXPERTS = {"num_experts", "num_experts_per_tok"}
_SCALED = "positions are not scaled here"
_BIAS = "there are no biases here"
_QUANTIZED = "weights are not quantized here"
_ADAPTED = "low-rank differences are not added here"
# Source: meta-llama/llama-models, models/llama3/args.py; mistralai/mistral-inference, args.py; LLaMA2-Accessory,
# accessory/model/LLM/llama.py, whose rope_scaling multiplies the positions.
_FIXED = {
    "use_scaled_rope": Fixed((False,), _SCALED),
    "rope_scaling": Fixed((1.0,), _SCALED),
    "rope_scaling_factor": Fixed((1.0,), _SCALED),
    "yarn": Fixed((), _SCALED),
    "llama_4_scaling": Fixed((), _SCALED),
    "use_biases": Fixed((False,), _BIAS),
    "attn_bias": Fixed((False,), _BIAS),
    "causal": Fixed((True,), "attention is causal here"),
    "tied_embeddings": Fixed((False,), "the output layer has weights of its own here"),
    "quantization": Fixed(({},), _QUANTIZED),
    "quantization_args": Fixed(({},), _QUANTIZED),
    "lora": Fixed(({},), _ADAPTED),
    "lora_args": Fixed(({},), _ADAPTED),
}
_FREE = {"dtype", "max_batch_size", "model_parallel_size", "model_type", "torch_dtype"}
# How LLaMA2-Accessory trains: what is trained, what is loaded before, what the balance of experts weighs.
_FREE_IN_ACCESSORY = {"load_pretrained_visual_encoder", "trainable_mode", "load_balancing_weight"}
_MULTIPLE = 256  # of the width of feed-forward layers, where only its factor is told


def _faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    moe = values.get("moe")
    for key, value in moe.items() if isinstance(moe, Mapping) else ():
        if key not in _EXPERTS:
            reason = f"unknown, and may change what the model computes; if not, go on with --ignore moe.{key}"
            yield Fault(f"moe.{key}", value, reason)
    window = values.get("sliding_window")
    positions = values.get("max_seq_len") or values.get("max_position_embeddings")
    if window is not None and not (type(window) is int and type(positions) is int and window >= positions):
        reason = "attention is over all positions here; give a model with sliding_window=null"
        yield Fault("sliding_window", window, reason)


META = KeyTable(_HONOURED, _FIXED, _FREE, _faults)
ACCESSORY = KeyTable(_HONOURED, _FIXED, _FREE | _FREE_IN_ACCESSORY, _faults)


def shape_of_params(params: Mapping[str, Any], ffn: int, vocabulary: int, path: Path) -> dict[str, Any]:
    """Return the fields of the language model that a params.json describes.

    Args:
        params: its content, which may leave two widths open.
        ffn: width of the feed-forward layers, as the tensors have it; 0 where they lack it.
        vocabulary: size of the vocabulary, as the tensors have it; 0 where they lack it.
        path: the file, for messages.

    Raises:
        CheckpointError: a value is missing, none of its kind, or not that of the tensors.
    """
    values = Values(params, path)
    moe = values.section("moe")
    dim, heads = values.whole("dim"), values.whole("n_heads")
    # Mistral's files tell these widths, Meta's a factor
    is_mistral = any(values.has(key) for key in ("hidden_dim", "head_dim")) or bool(moe)
    shape: dict[str, Any] = {
        "layers": values.whole("n_layers"),
        "hidden": dim,
        "ffn": _agreed(ffn, _ffn_of(values, dim), "the width of feed-forward layers", path),
        "heads": heads,
        "groups": values.whole("n_kv_heads", heads),
        "vocabulary": vocabulary or 1,
        "rope_theta": values.number("rope_theta", 1e6 if is_mistral else 1e4),
        "norm_epsilon": values.number("norm_eps", 1e-5),
    }
    if (rows := values.whole("vocab_size", -1, least=-1)) > 0 and vocabulary:
        _agreed(vocabulary, rows, "vocab_size", path)
    _agreed(dim // heads, values.whole("head_dim", dim // heads or 1), "dim/n_heads, which head_dim is here,", path)
    if moe:
        shape["experts"] = moe.whole("num_experts", 8)
        shape["experts_per_token"] = moe.whole("num_experts_per_tok", 2)
    return shape


def _ffn_of(values: Values, dim: int) -> int:
    """Width of the feed-forward layers, as the released code finds it; 0 where nothing is told.

    Source: LLaMA 2's llama/model.py, FeedForward.
    """
    if values.has("hidden_dim"):
        return values.whole("hidden_dim", 1)
    if not (values.has("multiple_of") or values.has("ffn_dim_multiplier")):
        return 0
    plain = int(values.number("ffn_dim_multiplier", 1.0) * int(2 * 4 * dim / 3))
    multiple = values.whole("multiple_of", _MULTIPLE)
    return -(-plain // multiple) * multiple


def _agreed(found: int, told: int, what: str, path: Path) -> int:
    """A size that the tensors and the file tell alike, or one of both."""
    if found and told and found != told:
        raise CheckpointError(
            f"{path}: {what} is {told} by this file, {found} by the tensors; give files that belong together"
        )
    return found or told or 1
