"""The device of a process: chosen once, for good; what libraries see of it; and programs that follow it."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.config import Config
from megatron_sphinx.device import Platform, current_platform, use_platform
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.parallel import devices
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.parallel.seeding import random_state, restore_random_state

pytest_plugins = ["fake_devices"]

ROOT = Path(__file__).parents[1]


def test_deepspeed_takes_no_device_of_its_own(start_ranks, tiny, tmp_path):
    """As with --gpus-per-task=1, where the fourth rank of a node sees one GPU; DeepSpeed's engine takes LOCAL_RANK."""
    config = tiny.write(tmp_path / "run.yaml", {"training.steps": 1})

    def work() -> int:
        from deepspeed.accelerator import get_accelerator

        taken = []
        os.environ["LOCAL_RANK"] = "3"
        type(get_accelerator()).set_device = lambda _, device: taken.append(device)
        return main(["train", str(config)]) or int(bool(taken))

    ranks = start_ranks(1, work)
    assert ranks.wait() == [0], ranks.text()


def test_a_process_computes_on_one_device_for_good(run_ranks, fake_gpus, monkeypatch):
    took = fake_gpus("GPU-1")
    monkeypatch.setattr(devices, "visible", lambda: (["GPU-1"], ""))

    def check() -> None:
        took_gpu = devices.choose("auto", HashStore(), 0, 1)
        assert took_gpu == (current_platform(), "")
        assert took_gpu[0] == Platform(torch.device("cuda", 0), "nccl", is_bf16_fast=True)
        assert took == [0]
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert devices.choose("cuda", HashStore(), 0, 1) == took_gpu
        with pytest.raises(ConfigError, match=r"run\.device=cpu: this process computes on cuda already; start another"):
            devices.choose("cpu", HashStore(), 0, 1)
        assert took == [0]

    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cudnn.allow_tf32
    run_ranks(1, check)


@pytest.mark.parametrize(("local", "visible", "gpu"), [(3, 1, 0), (3, 8, 3), (0, 1, 0), (5, 4, 1)])
def test_without_a_choice_a_process_takes_a_gpu_that_it_sees(run_ranks, fake_gpus, local, visible, gpu):
    took = fake_gpus(*map(str, range(visible)))

    def check() -> None:
        os.environ["LOCAL_RANK"] = str(local)
        assert current_platform().device == torch.device("cuda", gpu)
        assert took == [gpu]

    run_ranks(1, check)


def test_the_type_of_the_encoders_is_given_or_what_is_fast():
    fast, slow = (Platform(torch.device("cpu"), "gloo", is_bf16_fast=is_fast) for is_fast in (True, False))
    types = {
        precision: [each.encoder_dtype(precision) for each in (fast, slow)] for precision in ("auto", "bf16", "fp32")
    }
    assert types == {
        "auto": [torch.bfloat16, torch.float32], "bf16": [torch.bfloat16] * 2, "fp32": [torch.float32] * 2,
    }  # fmt: skip


def test_the_memory_of_a_machine_is_what_a_process_may_use_of_it():
    own = Platform(torch.device("cpu"), "gloo", is_bf16_fast=False).memory_bytes()
    assert 2**28 < own <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_cpu_hides_gpus_from_other_libraries(run_ranks, fake_gpus):
    fake_gpus("GPU-1")

    def check() -> None:
        assert torch.cuda.is_available()
        assert use_platform(None) is current_platform()
        assert not torch.cuda.is_available()
        assert os.environ["DS_ACCELERATOR"] == "cpu"
        with pytest.raises(AssertionError, match="this process computes on cpu already"):
            use_platform(0)

    run_ranks(1, check)


def test_cuda_is_left_alone_until_it_is_asked_for():
    """Torch looks for GPUs without initialising CUDA, and the tests' own processes see none."""
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    lines = (ROOT / "tests" / "conftest.py").read_text().splitlines()
    hides = next(n for n, line in enumerate(lines) if line.startswith('os.environ["CUDA_VISIBLE_DEVICES"] = ""'))
    assert hides < min(n for n, line in enumerate(lines) if re.match(r"(import|from) (torch|deepspeed|megatron)", line))


def test_generators_of_another_device_are_left_out(run_ranks):
    def check() -> None:
        use_platform(None)
        states = random_state()
        assert "cuda" not in states
        of_gpu = {"cpu": states["cpu"], "cuda": torch.zeros(16, dtype=torch.uint8)}
        torch.rand(3)
        restore_random_state(of_gpu | {"a stream": of_gpu["cuda"]})
        assert {name: state.tolist() for name, state in random_state().items()} == {
            name: state.tolist() for name, state in states.items()
        }

    run_ranks(1, check)


@pytest.fixture
def launched(monkeypatch, capsys):
    """`launched(gpus)` is what examples/launch.py says on a machine with so many GPUs, and the command it becomes."""
    launch = runpy.run_path(str(ROOT / "examples" / "launch.py"))

    def run_one(gpus: int, *words: str) -> tuple[str, list[str]]:
        became: list[list[str]] = []
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
            patch.setattr(torch.cuda, "device_count", lambda: gpus)
            patch.setattr(os, "execv", lambda _path, command: became.append(command))
            patch.setattr(sys, "argv", ["launch.py", *words])
            launch["main"]()
        return capsys.readouterr().out, became[0]

    return run_one


@pytest.mark.parametrize(
    ("gpus", "ranks", "overrides", "said"),
    [
        (0, 3, [], "3 ranks on CPUs: one for the encoders\n"),
        (1, 1, ["parallel.encoder=0", "parallel.expert=1"], "1 rank on 1 GPU, which encodes too\n"),
        (2, 2, ["parallel.encoder=0"], "2 ranks on 2 GPUs, which encode too\n"),
        (3, 3, [], "3 ranks on GPUs: one for the encoders\n"),
        (8, 3, [], "3 ranks on GPUs: one for the encoders\n"),
    ],
)
def test_the_demo_is_started_on_the_ranks_that_there_are_gpus_for(launched, gpus, ranks, overrides, said):
    words = ["-m", "megatron_sphinx", "train", "examples/demo.yaml", "training.steps=2", "optimizer.warmup_steps=null"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    assert launched(gpus, *words) == (said, [*torchrun, *words, *overrides])
    makefile = (ROOT / "Makefile").read_text()
    for path in map(Path, re.findall(r"\$\(RANKS\) -m megatron_sphinx train (examples/\w+\.yaml)", makefile)):
        config = configuration.load(ROOT / path, overrides)
        layout = ParallelLayout(world=ranks, config=config.parallel)
        assert config.data.row_multiple % layout.data == 0


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_demo_with_experts_trains_on_the_ranks_of_few_gpus(launched, run_ranks, tiny, tmp_path, gpus):
    _, command = launched(gpus)
    ranks, overrides = int(command[4]), command[5:]
    values = configuration.load(ROOT / "examples" / "demo_moe.yaml", overrides)
    model = tiny.values["model"] | {"experts": values.model.experts, "experts_per_token": 2}
    given = tiny.values | {"model": model, "parallel": {"encoder": 1, "expert": 2}}
    given["run"] = given["run"] | {"folder": str(tmp_path / "run")}
    file = tmp_path / "run.yaml"
    file.write_text(configuration.build(Config, given).to_yaml())
    run_ranks(ranks, lambda: main(["train", str(file), *overrides]))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
