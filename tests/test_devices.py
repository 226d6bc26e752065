"""What each rank computes on: a GPU of its own, or all of them on the CPU. No test here needs a GPU."""

import os
import random
import re
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from megatron_sphinx import config as configuration
from megatron_sphinx import device
from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.parallel import devices
from megatron_sphinx.parallel.devices import VisibleDevices, assign

pytest_plugins = ["fake_devices"]

ASK_ANOTHER = devices._visible_to_another_process
ROOT = Path(__file__).parents[1]
FEWER = "start no more ranks on a host than it has GPUs (parallel.encoder=0 needs none for encoders)"


def ranks_seeing(*ranks: tuple[str, int, str]) -> list[VisibleDevices]:
    """Ranks, given by their host, local rank, and a letter for each GPU that they see."""
    return [VisibleDevices(host=host, local_rank=local, gpus=[*gpus]) for host, local, gpus in ranks]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([("x", 0, "a")], [0]),
        ([("x", 0, "abcd")], [0]),
        ([("x", 0, "abc"), ("x", 1, "abc"), ("x", 2, "abc")], [0, 1, 2]),
        ([("x", 0, "a"), ("x", 1, "b"), ("x", 2, "c"), ("x", 3, "d")], [0, 0, 0, 0]),  # --gpus-per-task=1
        ([("x", 0, "ab"), ("x", 1, "cd")], [0, 1]),  # --gpus-per-task=2
        ([("x", 0, "ab"), ("x", 1, "ab"), ("y", 0, "cd"), ("y", 1, "cd")], [0, 1, 0, 1]),
        ([("x", 0, "ab"), ("x", 1, "ab"), ("y", 0, "c"), ("z", 0, "d")], [0, 1, 0, 0]),
        ([("vm", 0, "a"), ("vm", 0, "b")], [0, 0]),  # two machines of one name
    ],
)
@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_rank_takes_a_gpu_of_its_own(asked, ranks, expected):
    assert assign(asked, ranks_seeing(*ranks)) == (expected, "")
    assert assign("cpu", ranks_seeing(*ranks)) == ([None] * len(ranks), "")


@pytest.mark.parametrize(
    ("ranks", "missing", "remedy"),
    [
        ([("x", n, "a") for n in range(3)], "3 ranks on host x share 1 GPU", FEWER),
        ([("x", n, "ab") for n in range(3)], "3 ranks on host x share 2 GPUs", FEWER),
        (
            [("x", 0, "ab"), ("x", 1, "ab"), ("y", 0, "c"), ("y", 1, "c")],
            "2 ranks on host y share 1 GPU",
            FEWER,
        ),
        (
            [("x", 0, "ab"), ("x", 1, "ab"), ("y", 0, "")],
            "rank 2 on host y sees no GPU",
            "give every host of the job GPUs",
        ),
        (
            [("x", 0, "ab"), ("x", 0, "ab")],
            "ranks 0 and 1 on host x take one and the same GPU, as LOCAL_RANK is 0 and 0",
            "start the ranks with torchrun or srun, which number those of a host",
        ),
    ],
)
def test_ranks_without_a_gpu_of_their_own_are_refused_or_all_take_the_cpu(ranks, missing, remedy):
    with pytest.raises(ConfigError) as refused:
        assign("cuda", ranks_seeing(*ranks))
    assert str(refused.value) == f"run.device=cuda: {missing}; {remedy}, or use run.device=cpu"
    note = f"run.device=auto: {missing}, so all ranks compute on the CPU; to compute on GPUs {remedy}"
    assert assign("auto", ranks_seeing(*ranks)) == ([None] * len(ranks), note)
    assert assign("cpu", ranks_seeing(*ranks)) == ([None] * len(ranks), "")


def test_a_job_without_gpus_takes_the_cpu_and_says_nothing_of_it_unless_they_should_be_there():
    blind = [VisibleDevices(host="x", local_rank=0), VisibleDevices(host="x", local_rank=1)]
    assert assign("auto", blind) == ([None, None], "")
    old = [VisibleDevices(host="x", local_rank=0, reason="The driver is too old (found version 11040)")]
    devices_of_ranks, note = assign("auto", old)
    assert devices_of_ranks == [None]
    assert "rank 0 on host x sees no GPU (The driver is too old (found version 11040)), so all ranks" in note
    with pytest.raises(ConfigError, match=r"^run\.device=cuda: rank 0 on host x sees no GPU; give every host of the "):
        assign("cuda", blind)


@pytest.mark.parametrize("seed", range(200))
def test_no_two_ranks_ever_share_a_gpu(seed):
    rng = random.Random(seed)
    ranks = []
    for host in range(rng.randint(1, 3)):
        count, gpus = rng.randint(1, 5), [f"{host}.{n}" for n in range(rng.randint(0, 5))]
        rng.shuffle(gpus)
        own = rng.randint(1, 2)
        views = {
            "all": [gpus] * count,
            "own": [gpus[own * n : own * (n + 1)] for n in range(count)],
            "some": [rng.sample(gpus, rng.randint(0, len(gpus))) for _ in range(count)],
        }[rng.choice(["all", "own", "some"])]
        ranks += [VisibleDevices(host=str(host), local_rank=n, gpus=view) for n, view in enumerate(views)]
    taken = [sight.gpus[sight.local_rank % len(sight.gpus)] if sight.gpus else None for sight in ranks]
    is_enough = None not in taken and len(set(taken)) == len(taken)
    found, note = assign("auto", ranks)
    if is_enough:
        assert [sight.gpus[gpu] for sight, gpu in zip(ranks, found, strict=True)] == taken
        assert assign("cuda", ranks) == (found, note) == (found, "")
    else:
        assert found == [None] * len(ranks)
        assert bool(note) == any(sight.gpus for sight in ranks)
        with pytest.raises(ConfigError, match=r"^run\.device=cuda: [^\n]+; [^\n]+, or use run\.device=cpu$"):
            assign("cuda", ranks)


def test_ranks_agree_over_their_store(run_ranks, fake_gpus, monkeypatch):
    """Each looks for itself, at its own time; the platform that each is given is kept instead of used."""
    fake_gpus("a", "b", "c")

    def check(own: bool) -> None:
        rank = int(os.environ["RANK"])
        time.sleep(0.3 * (2 - rank))
        monkeypatch.setattr(devices, "use_platform", lambda gpu: gpu)
        if own:
            monkeypatch.setattr(devices, "_visible_to_another_process", lambda: (["abc"[rank]], ""))
        store, *_ = next(rendezvous("env://"))
        assert devices.choose("auto", store, rank, 3) == (0 if own else rank, "")

    run_ranks(3, lambda: check(own=False))
    run_ranks(3, lambda: check(own=True))


def test_three_ranks_on_one_gpu_train_on_the_cpu_and_say_so(train, fake_gpus):
    fake_gpus("GPU-1")
    said = train(3, {"parallel.encoder": 1}).ranks.text()
    note = f"run.device=auto: 3 ranks on host {socket.gethostname()} share 1 GPU, so all ranks compute on the CPU; "
    assert said.count(note) == 1
    assert "= 3 ranks, cpu, fp32" in said
    assert re.search(r"^kernels: torch 2\.\S+; attention: torch's scaled_dot_product_attention$", said, re.MULTILINE)


def test_on_the_cpu_no_gpu_is_touched_or_asked_for(train, fake_gpus, monkeypatch):
    fake_gpus("GPU-1", "GPU-2")
    monkeypatch.setattr(devices, "visible", None)
    monkeypatch.setattr(devices, "_visible_to_another_process", None)
    for world in (1, 2):
        said = train(world, {"run.device": "cpu"}, name=f"of_{world}").ranks.text()
        assert f"= {world} ranks, cpu, fp32" in said
        assert "run.device" not in said


@pytest.mark.parametrize("world", [1, 3])
def test_cuda_without_gpus_is_one_line_and_status_2_on_all_ranks(train, monkeypatch, world):
    monkeypatch.setattr(device, "_chosen", None)
    said = train(world, {"run.device": "cuda"}, status=2).ranks.text()
    line = (
        rf"megatron-sphinx train: run\.device=cuda: rank 0 on host {re.escape(socket.gethostname())} sees no GPU "
        r"\(.+\); give every host of the job GPUs, or use run\.device=cpu\n"
    )
    assert re.fullmatch(line, said), said


def test_more_ranks_than_gpus_are_one_line_where_the_first_rank_holds_the_store(start_ranks, fake_gpus, tiny, tmp_path):
    """As under srun: that rank must not take the store away before the others know."""
    fake_gpus()
    config = tiny.write(tmp_path / "run.yaml", {"run.device": "cuda"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    class SlowStore(PrefixStore):
        def get(self, key: str) -> bytes:
            time.sleep(1.0 * (key == "answer" and os.environ["RANK"] != "0"))
            return super().get(key)

    def work() -> int:
        os.environ["MASTER_PORT"] = str(port)
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
        devices.PrefixStore = SlowStore
        devices.visible = lambda: (["GPU-1"], "")
        return main(["train", str(config)])

    ranks = start_ranks(3, work)
    assert ranks.wait() == [2, 2, 2], ranks.text()
    missing = f"3 ranks on host {socket.gethostname()} share 1 GPU"
    assert ranks.text() == f"megatron-sphinx train: run.device=cuda: {missing}; {FEWER}, or use run.device=cpu\n"


def test_what_torch_sees_is_asked_of_this_process_or_of_another(monkeypatch):
    gpus, reason = devices.visible()
    assert gpus == []
    assert reason
    assert "\n" not in reason
    assert devices._visible_to_another_process() == ([], reason)


def test_a_job_does_not_compute_on_cpus_since_a_look_failed(fake_gpus, monkeypatch):
    fake_gpus("GPU-1")
    monkeypatch.setattr(devices, "_visible_to_another_process", ASK_ANOTHER)
    found = []
    for seconds, program in ((0.01, sys.executable), (60, "/bin/false")):
        monkeypatch.setattr(devices, "_MOST_SECONDS", seconds)
        monkeypatch.setattr(sys, "executable", program)
        found.append(devices.look("auto", is_alone=False))
    assert [sight.failure for sight in found] == ["torch took more than 0 s", "status 1"]
    seeing = VisibleDevices(host="x", local_rank=0, gpus=["a"])
    for sight in found:
        wanted = (
            rf"^run\.device=auto: rank 1 on host \S+ could not look for GPUs \({sight.failure}\); give run\.device=cuda"
        )
        with pytest.raises(ConfigError, match=wanted):
            assign("auto", [seeing, sight])


def test_gpus_that_slurm_has_given_do_not_idle(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert devices.look("auto", is_alone=False).is_given
    given = [VisibleDevices(host="x", local_rank=n, gpus=["a"], is_given=True) for n in range(2)]
    wanted = (
        r"^run\.device=auto: 2 ranks on host x share 1 GPU, though Slurm has given the job GPUs; start no more .*=cpu$"
    )
    with pytest.raises(ConfigError, match=wanted):
        assign("auto", given)
    assert assign("cpu", given) == ([None, None], "")
    assert assign("auto", given[:1]) == ([0], "")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert not devices.look("auto", is_alone=False).is_given


def test_a_driver_that_does_not_answer_is_said(monkeypatch, tmp_path):
    (tmp_path / "0000:1b:00.0").mkdir()
    monkeypatch.setattr(devices, "_DRIVER", tmp_path)
    assert devices.look("auto", is_alone=False).reason == "", "they are hidden"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _, note = assign("auto", [devices.look("auto", is_alone=False)])
    assert "sees no GPU (the driver has some, but does not answer for them), so all ranks compute on the CPU" in note


def test_a_rank_alone_asks_in_its_own_process(fake_gpus, monkeypatch):
    fake_gpus("GPU-1")
    monkeypatch.setattr(devices, "visible", lambda: (["GPU-1"], ""))
    monkeypatch.setattr(devices, "_visible_to_another_process", None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.look("auto", is_alone=True) == VisibleDevices(
        host=socket.gethostname(), local_rank=3, gpus=["GPU-1"]
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.look("auto", is_alone=True) == VisibleDevices(host=socket.gethostname(), local_rank=3)


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match=r"^run\.device=gpu: must be auto, cpu or cuda$"):
        configuration.load(ROOT / "examples" / "demo.yaml", ["run.device=gpu"])
    assert configuration.load(ROOT / "examples" / "demo.yaml").run.device == "auto"
