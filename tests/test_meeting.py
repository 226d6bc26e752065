"""How the ranks of a job find each other, and what is said within seconds where they cannot."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from threading import Timer

import pytest
from conftest import Ranks
from test_faults import ENDLESS, wait_for_steps
from torch._C._distributed_c10d import HashStore

from megatron_sphinx import console
from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import MeetingError
from megatron_sphinx.parallel import meeting
from megatron_sphinx.parallel.meeting import Address, meet
from megatron_sphinx.parallel.place import Place, find_place

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS")
HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def environment(monkeypatch):
    """`environment(values)` lets a launcher have set just these."""

    def put(values: dict[str, str]) -> None:
        for name in (*NAMES, *(name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_")))):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    put({})
    return put


# numbers


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (HERE | {"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one: is no whole number; it is what a launcher"),
        (HERE | {"RANK": "", "WORLD_SIZE": "2"}, "RANK=: is no whole number"),
        (HERE | {"RANK": "1.0", "WORLD_SIZE": "2"}, r"RANK=1\.0: is no whole number"),
        (HERE | {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1: must be from 0 to 1"),
        (HERE | {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: must be from 0 to 1"),
        (HERE | {"RANK": "9" * 400, "WORLD_SIZE": "2"}, "RANK=9+: is no whole number"),
        (HERE | {"WORLD_SIZE": "2"}, "RANK=: is not set, though WORLD_SIZE=2; start the ranks by torchrun or srun"),
        (HERE | {"RANK": "1"}, "RANK=1: must be from 0 to 0"),
        (HERE | {"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be at least 1"),
        (HERE | {"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two: is no whole number"),
        (HERE | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK=x: is no whole number"),
        (HERE | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-3"}, "LOCAL_RANK=-3: must be at least 0"),
        (
            HERE | {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"},
            "LOCAL_RANK=4: must be from 0 to 3",
        ),
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS=many: is no whole number"),
    ],
    ids=str,
)
def test_a_wrong_number_is_refused(environment, values, said):
    environment(values)
    with pytest.raises(MeetingError, match=f"^{said}"):
        find_place()


def test_a_wrong_number_is_said_on_whichever_rank_has_it(environment, capsys, tmp_path):
    environment(HERE | {"RANK": "7", "WORLD_SIZE": "2"})
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("megatron-sphinx train: RANK=7: must be from 0 to 1")


def test_places(environment):
    for values, place in (
        ({}, (0, 1)),
        (HERE | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4)),
        (HERE | {"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, (2, 4)),
    ):
        environment(values)
        assert find_place() == place


# addresses


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "MASTER_ADDR=: is not set, so the ranks have nowhere to meet"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT=: is not set"),
        (HERE | {"MASTER_PORT": "http"}, "MASTER_PORT=http: is no whole number"),
        (HERE | {"MASTER_PORT": "0"}, "MASTER_PORT=0: must be from 1 to 65535"),
        (HERE | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536: must be from 1 to 65535"),
    ],
    ids=str,
)
def test_an_address_that_is_none_is_refused(environment, values, said):
    environment(values)
    with pytest.raises(MeetingError, match=said):
        Address.read()


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("a..b", r"MASTER_ADDR=a\.\.b: is no known host \(.+\); give the host that rank 0 runs on"),
        ("127.0.0.1", r"MASTER_ADDR=127.0.0.1 MASTER_PORT=\d+: nothing has listened there for \d s \(Connection "
                      r"refused\), so that rank 0 is missing; start rank 0 on that host"),
    ],
)  # fmt: skip
def test_where_nobody_is_nobody_waits(environment, monkeypatch, host, said):
    monkeypatch.setattr(meeting, "_ANSWER_SECONDS", 0.5)
    environment({"MASTER_ADDR": host, "MASTER_PORT": str(free_port())})
    begin = time.monotonic()
    with pytest.raises(MeetingError, match=said):
        meet(Place(1, 2), 600)
    assert time.monotonic() - begin < 5


def test_the_address_must_lead_to_rank_0():
    with pytest.raises(
        MeetingError, match=r"leads to another job's meeting place, not to host .*; give the name of this"
    ):
        meeting._require_own(HashStore(), HashStore(), Address("n7", 29500))


# ranks that meet without torchrun


@pytest.fixture
def start_bare(start_ranks, tiny, tmp_path):
    """`start_bare(numbers, world)` starts ranks of these numbers, which have no store but the first rank's."""

    def start(numbers: list[int], worlds: list[int], port: int, **settings: object) -> Ranks:
        config = tiny.write(tmp_path / "run.yaml", {"run.storage_timeout": 60, **settings})

        def work() -> int:
            own = int(os.environ["RANK"])
            meeting._ANSWER_SECONDS, meeting._PATIENCE_SECONDS = 5.0, 0.5
            os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")
            os.environ |= {"RANK": str(numbers[own]), "WORLD_SIZE": str(worlds[own]), "MASTER_PORT": str(port)}
            return main(["train", str(config)])

        return start_ranks(len(numbers), work)

    return start


def said_by(ranks: Ranks) -> list[str]:
    """The line of each rank that it ended with, empty where it had none."""
    lines = [[line for line in log.read_text().splitlines() if line.startswith("megatron-")] for log in ranks.logs]
    assert all(len(line) <= 1 for line in lines), ranks.text()
    assert "Traceback" not in ranks.text()
    return ["".join(line) for line in lines]


def test_bare_ranks_meet_and_train(start_bare):
    ranks = start_bare([0, 1], [2, 2], free_port())
    assert ranks.wait() == [0, 0], ranks.text()
    assert "done after 3 of 3 steps" in ranks.text(0)


def test_a_port_in_use_is_named(start_bare):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        ranks = start_bare([0, 1], [2, 2], port)
        assert ranks.wait(30) == [2, 2]
    first, second = said_by(ranks)
    assert re.search(rf"MASTER_PORT={port}: is in use on host \S+, where rank 0 would let the ranks meet; end", first)
    assert f"MASTER_PORT={port}: something listens there that is not the meeting place of a job" in second


def test_a_missing_rank_is_named_soon_and_ends_the_wait(start_bare):
    port = free_port()
    ranks = start_bare([0, 2], [3, 3], port, **{"run.timeout": 3, "run.storage_timeout": 3})
    assert ranks.wait(30) == [2, 2]
    where = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: ranks 0, 2 of 3 are there, 1 missing"
    assert f"waits for ranks: {where}\n" in ranks.text(0)
    assert said_by(ranks) == [f"megatron-sphinx train: {where}; start them all, each with its own RANK", ""]


def test_a_rank_that_comes_twice_is_named(start_bare):
    ranks = start_bare([0, 1, 1], [3, 3, 3], free_port())
    assert ranks.wait(30) == [2, 2, 2]
    said = said_by(ranks)
    assert re.search(r"RANK=1: process \d+ on host \S+ and process \d+ on host \S+ both say so at MASTER_ADDR", said[0])
    assert sorted(said[1:]) == ["", said[0]]


@pytest.mark.parametrize("worlds", [[2, 3], [3, 2]])
def test_ranks_that_count_differently_are_named(start_bare, worlds):
    ranks = start_bare([0, 1], worlds, free_port())
    assert ranks.wait(30) == [2, 2]
    first = said_by(ranks)[0]
    assert re.search(r"WORLD_SIZE=\d: .*; give all ranks of the job one WORLD_SIZE$", first)


def test_a_first_rank_that_leaves_again_is_named(monkeypatch):
    class Gone:
        def compare_set(self, *_):
            raise RuntimeError("failed to recv, got 0 bytes\nframe #0: c10::Error")

    monkeypatch.setattr(meeting, "_connect", lambda *_, **__: HashStore())
    monkeypatch.setattr(meeting, "PrefixStore", lambda *_: Gone())
    for name, value in HERE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MeetingError, match="the first rank, where the ranks meet, has left again; see what it says"):
        meet(Place(1, 2), 5)


# last words


@pytest.mark.slow
def test_a_first_rank_that_is_killed_is_one_line(tiny, tmp_path):
    config, port = tiny.write(tmp_path / "run.yaml", ENDLESS | {"parallel.encoder": 1}), str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_sphinx", "train", str(config)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=(tmp_path / f"{rank}.log").open("w"), stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        wait_for_steps(tmp_path / "run", 2)
        ranks[0].send_signal(signal.SIGKILL)
        assert ranks[1].wait(60) == 1
    finally:
        for rank in ranks:
            rank.kill()
    said = (tmp_path / "1.log").read_text()
    assert "[encoder rank 1] leaves: the first rank, where the store was, ended the job (it is gone: killed, or" in said
    assert "frame #" not in said


def test_torchrun_is_told_the_first_last_words(monkeypatch, tmp_path, capsys):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    console.last_words("the cause")
    console.last_words("what follows from it")
    console.leave_to_torchrun("what another rank says")
    assert capsys.readouterr().err == "the cause\nwhat follows from it\n"
    told = json.loads(path.read_text())["message"]
    assert told["message"] == told["extraInfo"]["py_callstack"] == "the cause"
    assert abs(int(told["extraInfo"]["timestamp"]) - time.time()) < 60
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(Path("/proc/none/error.json")))
    console.last_words("where it cannot be written it is said all the same")


def test_in_a_slurm_job_a_late_first_rank_is_waited_for(monkeypatch, capsys):
    """Nodes of one job may start minutes apart; meanwhile it is said who is missing."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(meeting, "_ANSWER_SECONDS", 0.5)
    port = free_port()
    address = Address("127.0.0.1", port)
    timeout = timedelta(seconds=60)
    late = Timer(1.5, lambda: stores.append(meeting._listen(address, timeout)))
    stores = []
    late.start()
    assert meeting._connect(address, timeout, is_first=False)
    late.join()
    said = f"MASTER_PORT={port}: nothing listens there yet (Connection refused): rank 0 is missing"
    assert said in capsys.readouterr().out
