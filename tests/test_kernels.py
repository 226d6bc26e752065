"""Which kernels a run takes, what it says of them, and that liger's compute what torch's do."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_sphinx.__main__ import main
from megatron_sphinx.device import Platform
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model import kernels
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.parallel.layout import ParallelConfig
from megatron_sphinx.sizing.activations import feed_forward_values

CPU = Platform(torch.device("cpu"), "gloo", is_bf16_fast=False)
GPU = Platform(torch.device("cuda", 0), "nccl", is_bf16_fast=True)
SHAPE = LanguageConfig(layers=1, hidden=8, ffn=16, heads=2, groups=2, vocabulary=10)


@pytest.fixture
def installed(monkeypatch):
    """`installed(package, ...)` lets only these optional packages import."""

    def choose_among(*packages: str) -> None:
        monkeypatch.setattr(kernels, "is_imported", lambda package: package in packages)
        monkeypatch.setattr(kernels, "liger_kernels", lambda: replace(kernels.torch_kernels(), name="liger"))

    return choose_among


@pytest.mark.parametrize(
    ("choice", "platform", "packages", "name"),
    [
        ("auto", CPU, ("liger_kernel", "transformer_engine"), "torch"),
        ("torch", CPU, (), "torch"),
        ("auto", GPU, (), "torch"),
        ("auto", GPU, ("transformer_engine",), "torch"),  # never what nobody has proven
        ("auto", GPU, ("liger_kernel", "transformer_engine"), "liger"),
        ("torch", GPU, ("liger_kernel",), "torch"),
        ("liger", GPU, ("liger_kernel",), "liger"),
        ("transformer_engine", GPU, ("transformer_engine",), "transformer_engine"),
    ],
)
def test_choice(installed, choice, platform, packages, name):
    installed(*packages)
    chosen = kernels.choose(choice, platform)
    assert chosen.name == name
    assert chosen.is_transformer_engine == (name == "transformer_engine")


@pytest.mark.parametrize(
    ("choice", "platform", "message"),
    [
        ("liger", CPU, "model.kernels=liger: runs on GPUs only, and this rank is on the CPU; use auto or torch"),
        ("transformer_engine", CPU, "model.kernels=transformer_engine: runs on GPUs only, and this rank is on the CPU"),
        ("liger", GPU, r"model.kernels=liger: liger_kernel does not import; pip install 'megatron-sphinx\[cuda\]', or"),
        ("transformer_engine", GPU, "model.kernels=transformer_engine: transformer_engine does not import; install tr"),
    ],
)
def test_kernels_that_cannot_be_had_are_refused(installed, choice, platform, message):
    installed()
    with pytest.raises(ConfigError, match=message):
        kernels.choose(choice, platform)


def test_what_a_run_says_of_them(installed):
    installed("transformer_engine")
    torches = f"torch {torch.__version__.partition('+')[0]}"
    assert kernels.describe("auto", CPU, "bf16") == (torches, "torch's scaled_dot_product_attention")
    assert kernels.describe("auto", GPU, "fp32") == (torches, "torch's scaled_dot_product_attention")
    assert kernels.describe("auto", GPU, "bf16") == (torches, "torch's varlen attention")
    name, attention = kernels.describe("transformer_engine", GPU, "bf16")
    assert (name.split()[0], attention) == ("transformer_engine", "transformer-engine's")


def test_the_key_is_no_part_of_what_weights_must_fit():
    assert replace(SHAPE, kernels="liger").shape == SHAPE.shape
    with pytest.raises(ConfigError, match=r"model\.kernels=ligr: unknown value; did you mean liger\?"):
        replace(SHAPE, kernels="ligr")


def test_liger_keeps_less_for_backward():
    """SiLU of the gate, which it computes again."""
    kept = [feed_forward_values(replace(SHAPE, kernels=name), ParallelConfig()) for name in ("torch", "liger")]
    assert kept == [4 * SHAPE.ffn, 3 * SHAPE.ffn]


def test_a_run_says_in_one_line_that_it_cannot_have_them(start_ranks, tiny, tmp_path):
    path = tiny.write(tmp_path / "c.yaml")
    ranks = start_ranks(2, lambda: main(["train", str(path), "model.kernels=liger", "run.device=cpu"]))
    assert ranks.wait() == [2, 2]
    assert ranks.text().count("train: model.kernels=liger: runs on GPUs only") == 1


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_ligers_kernels_compute_what_torchs_do():
    """Losses and all gradients of whole decoders, in fp32; the interpreter does not know bf16."""
    script = Path(__file__).parent / "liger_on_cpu.py"
    folders = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": folders, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "cross_entropy 6, norm 30, rotate 12, swiglu 12"
