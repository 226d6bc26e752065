"""Wrong paths and values: each command refuses them before it imports what takes seconds; plans need none of that."""

import pytest
from test_cli import watch

SLOW = {"torch", "megatron", "deepspeed", "timm", "transformers", "matplotlib", "pandas", "fastapi"}
INPUT, OUTPUT = ["--input", "NOWHERE"], ["--output", "NEW"]
PREPARED = ["NOWHERE", "NEW", "--tokenizer", "NOWHERE"]
REFUSED = [
    ["convert", "NOWHERE", "NEW", "--to", "hf"], ["convert", "HERE", "NEW", "--to", "megatron"],
    ["inspect", "NOWHERE"], ["mix", "--real", "NOWHERE", "--synthetic", "NOWHERE", "--beta", "0.5", *OUTPUT],
    ["mix", "--real", "HERE", "--synthetic", "HERE", "--beta", "1.5", *OUTPUT],
    ["train", "NOWHERE"], ["train", "NOWHERE", "--check"], ["train", "sphinx_tiny", "--check", "parallel.tensor=3"],
    ["config", "NOWHERE"], ["packing", "NOWHERE"], ["measure", "NOWHERE"], ["doctor", "NOWHERE"],
    ["views", "NOWHERE"], ["report", "NOWHERE", *OUTPUT],
    ["benchmark", "NOWHERE", "--ranks", "1", *OUTPUT], ["benchmark", "sphinx_tiny", "--ranks", "0", *OUTPUT],
    ["plan", "NOWHERE"], *(["plan", kind, "NOWHERE"] for kind in ("sizes", "step", "layouts", "dry-run")),
    ["plan", "calibrate", "NOWHERE", *OUTPUT], ["plan", "layouts", "sphinx_tiny", "--gpu", "NOWHERE"],
    ["generate", "NOWHERE", *INPUT, *OUTPUT], ["generate", "HERE", *INPUT, *OUTPUT],
    ["generate", "HERE", *INPUT, *OUTPUT, "--config", "NOWHERE"],
    ["generate", "HERE", *INPUT, *OUTPUT, "--tokenizer", "NOWHERE"],
    ["export-embeddings", "NOWHERE", *INPUT, *OUTPUT], ["export-embeddings", "HERE", *INPUT, *OUTPUT],
    ["evaluate", "pope", "--data", "NOWHERE", "--model", "HERE", *OUTPUT],
    ["evaluate", "pope", "--data", "HERE", *OUTPUT], ["evaluate", "pope", "--data", "HERE", "--model", "HERE", *OUTPUT],
    ["judge", "NOWHERE", "--data", "HERE", "--endpoint", "http://127.0.0.1:9/v1", "--judge-model", "none"],
    ["serve", "NOWHERE"], ["serve", "HERE"], ["chat", "HERE"], ["serve", "HERE", "--template", "none-such"],
    ["chat", "NOWHERE"], ["chat", "HERE", "NOWHERE"], ["chat", "HERE", "--top-p", "7"],
    *(["prepare", kind, *PREPARED] for kind in ("pairs", "text", "conversations")),
    ["prepare", "pairs", *PREPARED, "--held-out", "3"], ["prepare", "tasks", "caption", "NOWHERE", "NEW"],
    ["prepare", "ocr", "NOWHERE", "NEW"], ["prepare", "som", "mark", "NOWHERE", "NOWHERE", "NEW"],
    ["prepare", "som", "merge", "NOWHERE", "NOWHERE", "NEW"], ["gpu-check", "none-such"], ["demo", "--port", "-1"],
    ["cascade", "segment", "--picture", "NOWHERE", "--model", "NOWHERE", *OUTPUT],
    ["cascade", "inpaint", "--picture", "NOWHERE", "--model", "HERE", "--sam", "NOWHERE", *OUTPUT],
    ["cascade", "describe", "--picture", "NOWHERE", "--model", "HERE", *OUTPUT],
    ["cascade", "video", "--video", "NOWHERE", "--question", "what?", "--model", "HERE", *OUTPUT],
]  # fmt: skip
PLANNED = [
    ["plan", "sizes", "sphinx_moe"], ["plan", "sphinx_tiny", "--json"], ["plan", "published"],
    ["plan", "layouts", "sphinx_tiny", "--nodes", "1", "--gpus-per-node", "2"],
]  # fmt: skip


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_is_wrong_is_said_before_anything_slow_is_imported(tmp_path, words):
    places = {"NOWHERE": tmp_path / "nowhere", "HERE": tmp_path, "NEW": tmp_path / "new"}
    status, out, error, modules = watch("-m", "megatron_sphinx", *(places.get(word, word) for word in words))
    assert (status, out) == (2, "")
    command, *rest = error.splitlines()
    assert command.startswith(f"megatron-sphinx {words[0]}")
    assert ": " in command
    assert not rest
    assert not modules & SLOW
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", PLANNED, ids=" ".join)
def test_a_plan_imports_nothing_slow(words):
    status, out, error, modules = watch("-m", "megatron_sphinx", *words)
    assert (status, error) == (0, "")
    assert out
    assert not modules & SLOW
