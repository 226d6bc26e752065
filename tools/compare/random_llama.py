"""Writes Llamas of Hugging Face's format with random weights, of any size, for comparisons of what reads them."""

import json
import math
from collections.abc import Iterator
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HIDDEN, FFN, HEADS, GROUPS, VOCABULARY = 2048, 5632, 32, 4, 32000  # TinyLlama's
_POOL = 2**24 + 1  # random numbers, used again and again
_KEYS = HIDDEN // HEADS * GROUPS
_LAYER = {
    "input_layernorm": (HIDDEN,), "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (_KEYS, HIDDEN),
    "self_attn.v_proj": (_KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN), "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
}  # fmt: skip
_LAYER_VALUES = sum(map(math.prod, _LAYER.values()))
LARGEST_BYTES = 2 * VOCABULARY * HIDDEN  # of a tensor


def write_llama(folder: Path, gigabytes: float, *, seed: int = 0, file_bytes: int = 10**9) -> None:
    """Write a Llama of TinyLlama's widths, with as many layers as make so many GB of bf16 weights.

    Args:
        folder: to make.
        gigabytes: of the weights.
        seed: of their values, which are normal with a deviation of 0.02.
        file_bytes: the most that a file of weights holds, where it holds more than one tensor.
    """
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / _LAYER_VALUES))
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32) * np.float32(0.02)
    values = _endless((drawn.view(np.uint32) >> 16).astype(np.uint16))
    files = list(_files(layers, file_bytes))
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["model.safetensors"]
    for name, shapes in zip(names, files, strict=True):
        _write(folder / name, shapes, values)
    if len(files) > 1:
        where = {tensor: name for name, shapes in zip(names, files, strict=True) for tensor in shapes}
        total = 2 * sum(math.prod(shape) for shapes in files for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(layers)))


def _endless(pool: NDArray[np.uint16]) -> Iterator[NDArray[np.uint16]]:
    """Give blocks of values for as long as they are taken, each begun elsewhere in the pool."""
    for begin in cycle(range(0, 2**20, 4099)):
        yield pool[begin : begin + 2**20]


def _files(layers: int, file_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Share out names and shapes of all tensors to files."""
    whole = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    ends = {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    of_layers = ((f"model.layers.{i}.{name}.weight", shape) for i in range(layers) for name, shape in _LAYER.items())
    file: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, shape in chain(whole.items(), of_layers, ends.items()):
        size = 2 * math.prod(shape)
        if file and held + size > file_bytes:
            yield file
            file, held = {}, 0
        file[name] = shape
        held += size
    yield file


def _write(path: Path, shapes: dict[str, tuple[int, ...]], values: Iterator[NDArray[np.uint16]]) -> None:
    """Write a file of safetensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for block in islice(values, -(-end // 2**21)):
            out.write(block.data[: (end + len(text) + 8 - out.tell()) // 2])


def _config(layers: int) -> dict[str, object]:
    """Return what config.json says of such a model."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "num_hidden_layers": layers, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
