"""How a run is asked to stop, from its first moment to its last, and what it does where nobody listens."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
from conftest import fork_store, kill
from test_faults import ENDLESS, wait_for_steps
from torch._C._distributed_c10d import HashStore

from megatron_sphinx import console
from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.liveness import stop
from megatron_sphinx.liveness.stop import StopSignal
from megatron_sphinx.parallel import launch

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")


def forked(work) -> int:
    """The exit status of a process that does some work."""
    if (pid := os.fork()) == 0:
        os._exit(work() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path.name} does not come"
        time.sleep(0.01)
    return path.read_text()


# the signal


def in_foreign_code(seconds: float) -> None:
    """Block in C++ as a collective does: Python calls none of its handlers meanwhile."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=seconds))
    with suppress(RuntimeError):
        store.get("what nobody sets")


def send(number: int, times: int) -> int:
    """A process that sends signals to this one, a while from now and from each other."""
    if (pid := os.fork()) == 0:
        for _ in range(times):
            time.sleep(0.4)
            os.kill(os.getppid(), number)
        os._exit(0)
    return pid


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_heard_while_the_process_is_in_foreign_code(name):
    def work() -> int:
        send(signal.Signals[name], 1)
        with StopSignal() as stop:
            heard: list[float] = []
            begin = time.monotonic()

            def listen() -> None:
                while not stop.has_come:
                    time.sleep(0.01)
                heard.append(time.monotonic() - begin)

            Thread(target=listen, daemon=True).start()
            in_foreign_code(1.5)
            return 0 if heard and heard[0] < 1.2 and stop.reason == name else 1

    assert forked(work) == 0


def test_a_second_interrupt_leaves_at_once_even_in_foreign_code(capfd):
    def work() -> int:
        send(signal.SIGINT, 2)
        with StopSignal():
            in_foreign_code(30)
        return 1

    begin = time.monotonic()
    assert forked(work) == 130
    assert time.monotonic() - begin < 10
    said = capfd.readouterr().err
    assert "interrupted: saves the state at the end of this step; interrupt again to leave at once, unsaved" in said
    assert "interrupted again: leaves at once, unsaved" in said


def test_signals_are_given_back(monkeypatch):
    before = [signal.getsignal(signal.Signals[name]) for name in NAMES]
    with StopSignal() as stop:
        assert not stop.has_come
        assert all(signal.getsignal(signal.Signals[name]) not in before for name in NAMES)
    assert [signal.getsignal(signal.Signals[name]) for name in NAMES] == before


def test_nohup_is_obeyed():
    def work() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.3)
            return int(stop.has_come)

    assert forked(work) == 0


# runs


@pytest.mark.parametrize(
    ("number", "told", "encoders"), [(signal.SIGINT, 0, 1), (signal.SIGHUP, 1, 1), (signal.SIGUSR1, 1, 0)]
)
def test_a_run_saves_and_says_how_it_ended(train, number, told, encoders):
    folder, ranks = train.start(2, ENDLESS | {"parallel.encoder": encoders})
    wait_for_steps(folder, 2)
    os.kill(ranks.pids[told], number)
    assert ranks.wait() == [75, 75], ranks.text()
    (saved,) = complete(folder / "checkpoints")
    end = [line for line in ranks.text(0).splitlines() if line.startswith("stopped by ")]
    by = f"{number.name} to {'encoder' if encoders else 'language'} rank 1" if told else number.name
    steps = int(saved.name.removeprefix("step_"))
    assert end == [
        f"stopped by {by} after {steps} of 100000 steps; checkpoint {saved}, plot {folder / 'loss.png'}; "
        f"the same command goes on"
    ]
    assert "Traceback" not in ranks.text()
    done = train(2, {"training.steps": steps, "parallel.encoder": encoders}).ranks.text(0)
    known = f"training.steps={steps}: nothing to train, {steps} steps were done before"
    assert f"{known}; checkpoint {saved}, plot {folder / 'loss.png'}; raise training.steps to go on\n" in done


def test_a_run_that_began_anew_says_how_it_goes_on(train):
    """The same command would begin anew once more."""
    folder, ranks = train.start(1, ENDLESS | {"checkpoint.resume": "none"})
    wait_for_steps(folder, 1)
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.wait() == [75]
    assert ranks.text().rstrip().endswith("; go on with checkpoint.resume=auto")


def test_a_rank_that_waits_for_others_in_vain_leaves(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "run.yaml")

    def work() -> int:
        os.environ["WORLD_SIZE"] = "2"  # the other one never comes
        stop._MEETING_SECONDS = 0.5
        return main(["train", str(config)])

    ranks = start_ranks(1, work)
    time.sleep(1)
    begin = time.monotonic()
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.wait() == [75]
    assert time.monotonic() - begin < 10
    assert ranks.text() == "stopped by SIGTERM before the ranks had met; nothing new to save\n"


def test_a_run_that_fails_says_where_its_state_is(train):
    begun = train(1, {"training.steps": 2})
    failed = train(1, {"training.steps": 9, "optimizer.learning_rate": 1e30, "checkpoint.interval": 100}, status=1)
    end = r"^failed after \d of 9 steps; checkpoint (\S+), plot \S+/loss\.png$"
    (kept,) = re.findall(end, failed.ranks.text(), re.MULTILINE)
    assert Path(kept) == complete(begun.folder / "checkpoints")[-1]


def early(config: Path, folder: Path, rank: int) -> subprocess.Popen:
    """A rank in a process of its own, which imports all that it needs."""
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_sphinx", "train", str(config)],
        env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        stdout=(folder / f"{rank}.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_signal_during_the_imports_ends_all_ranks_with_a_word(tiny, tmp_path, monkeypatch):
    store, port = fork_store()
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in known.items():
        monkeypatch.setenv(name, str(value))
    config = tiny.write(tmp_path / "run.yaml", ENDLESS | {"parallel.encoder": 1})
    ranks = [early(config, tmp_path, rank) for rank in range(2)]
    try:
        time.sleep(0.4)  # Python has begun, torch is not imported yet
        ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait(60) for rank in ranks] == [75, 75], (tmp_path / "0.log").read_text()
    finally:
        for rank in ranks:
            rank.kill()
        kill(store)
    said = (tmp_path / "0.log").read_text()
    assert "stopped by SIGTERM to encoder rank 1 before the first step; nothing new to save" in said
    assert json.loads((tmp_path / "run" / "ended.json").read_text()) == {"status": 75}


# nobody listens


def deaf(config: Path, stream: str) -> int:
    """Train where standard output is a pipe that nobody reads, is closed, or is a disk that is full."""
    if stream == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    elif stream == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        os.close(1)
        sys.stdout = None
    try:
        return main(["train", str(config)])
    finally:
        sys.stdout = sys.stderr


@pytest.mark.parametrize("stream", ["pipe", "closed", "full"])
def test_output_without_a_reader_goes_on_in_a_file(start_ranks, tiny, tmp_path, stream):
    config = tiny.write(tmp_path / "run.yaml", {"parallel.encoder": 1})
    ranks = start_ranks(3, lambda: deaf(config, stream))
    assert ranks.wait() == [0, 0, 0], ranks.text()
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \S+ a rank's output has no reader any more and goes on here", log[0])
    assert any(line.startswith("tensor 1 x data 2 + encoder 1 = 3 ranks") for line in log)
    assert log[-1].startswith("done after 3 of 3 steps; checkpoint ")
    assert "BrokenPipe" not in ranks.text()


def test_a_file_opened_later_does_not_become_standard_output(tmp_path):
    def work() -> int:
        os.close(1)
        console.reserve_streams()
        with (tmp_path / "data").open("w") as file:
            os.write(1, b"said by a library")
            return int(file.fileno() == 1)

    assert forked(work) == 0
    assert (tmp_path / "data").read_text() == ""


def test_where_the_file_cannot_be_written_nothing_is_said(tmp_path):
    (tmp_path / "file").touch()

    def work() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w")
        with console.enduring(tmp_path / "file" / "log.txt"):
            console.say("a line")
            console.say("and another")
        return 0

    assert forked(work) == 0


# launchers


def started(tmp_path: Path, trap: str) -> tuple[int, int]:
    """A process that runs a launcher, whose rank is a process of its own; and the rank."""
    script = f"trap '{trap}' TERM; setsid sleep 300 & rank=$!; echo $rank > {tmp_path}/rank; wait $rank; wait $rank"
    if (pid := os.fork()) == 0:
        launch._GRACE_SECONDS = 1.0
        try:
            with (tmp_path / "out").open("w") as out:
                sys.stderr = out
                os._exit(launch.run_launcher(["bash", "-c", script], stdout=out, stderr=out))
        except SystemExit as left:
            os._exit(int(left.code))
        finally:
            os._exit(1)
    return pid, int(wait_for(tmp_path / "rank"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_was_started_ends_with_who_started_it(tmp_path, number):
    pid, rank = started(tmp_path, "kill $rank")
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + number
    with pytest.raises(OSError, match="No such process") as gone:
        os.kill(rank, 0)
    assert gone.value.errno == errno.ESRCH
    assert f"ended by {number.name}, and so are the ranks that were started" in (tmp_path / "out").read_text()


def test_a_launcher_that_does_not_listen_is_killed(tmp_path):
    pid, rank = started(tmp_path, "")
    begin = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert time.monotonic() - begin < 10
    os.kill(rank, signal.SIGKILL)


def test_a_launcher_that_ends_gives_its_status(tmp_path):
    with (tmp_path / "out").open("w") as out:
        assert launch.run_launcher(["bash", "-c", "exit 3"], stdout=out, stderr=out) == 3
        with pytest.raises(OSError, match="No such file"):
            launch.run_launcher(["no such launcher"], stdout=out, stderr=out)
