"""Two jobs in one run folder: the second is told of the first, unless that was killed."""

import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import kill
from test_faults import ENDLESS, wait_for_steps

from megatron_sphinx import lock
from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import FolderError
from megatron_sphinx.lock import NAME, Hold, RunLock


@pytest.fixture
def take(tmp_path):
    """`take()` takes the lock of a folder; all are given back at the end."""
    taken, said = [], []

    def take_one() -> tuple[RunLock, list[str]]:
        taken.append(RunLock(tmp_path / "run", said.append))
        return taken[-1], said

    yield take_one
    for one in taken:
        one.release()


def write(folder: Path, **changes: object) -> None:
    """The lock of another process, something of it changed."""
    folder.mkdir(exist_ok=True)
    owner = lock._this_process() | {"host": "n7", "pid": 77, "job": None} | changes
    (folder / NAME).write_text(f"{json.dumps(owner)}\n{0:020d}\n")


def test_a_second_one_names_the_first_until_that_is_given_back(take, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    first, _ = take()
    wanted = (
        rf"run\.folder={tmp_path}/run: Slurm job 31, process {os.getpid()} on \S+, since \d{{4}}-\d\d-\d\d \S+ is "
        r"writing it; end that job or wait for it, or give another folder"
    )
    with pytest.raises(FolderError, match=wanted):
        take()
    first.require()
    first.release()
    assert not (tmp_path / "run" / NAME).exists()
    take()


def test_a_process_that_was_killed_has_left_it(take, tmp_path):
    if (pid := os.fork()) == 0:
        RunLock(tmp_path / "run", lambda _: None)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    _, said = take()
    assert re.fullmatch(rf"the run folder was left behind by process {pid} on .*, which is gone", said[0])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]


def test_the_number_of_a_process_may_be_given_again(take, tmp_path):
    write(tmp_path / "run", pid=os.getpid(), begun="1")
    take()
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_a_job_that_slurm_began_again_takes_it_at_once(take, tmp_path, monkeypatch):
    write(tmp_path / "run", boot="other", job="5", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begin = time.monotonic()
    take()
    assert time.monotonic() - begin < 5


def test_another_machine_is_listened_for(take, tmp_path, monkeypatch):
    """As over NFS: its processes cannot be seen, but whether it goes on writing its number."""
    monkeypatch.setattr(lock, "_SILENCE_SECONDS", 4.0)
    write(tmp_path / "run", boot="other")
    if (pid := os.fork()) == 0:
        file = os.open(tmp_path / "run" / NAME, os.O_RDWR)
        place = os.fstat(file).st_size - 21
        while not time.sleep(1):
            os.pwrite(file, f"{time.monotonic_ns():020d}".encode(), place)
    try:
        with pytest.raises(FolderError, match=r"process 77 on n7, since \S+ \S+ is writing it"):
            take()
    finally:
        kill(pid)
    _, said = take()
    assert said[-2] == said[0]
    assert re.match(r"waits up to 4 s for a sign of process 77 on n7, since .*, which has the run folder", said[0])
    assert "which is gone" in said[-1]


def test_one_that_stood_still_finds_that_another_has_taken_it(take, tmp_path):
    first, _ = take()
    write(tmp_path / "run", token="other")
    with pytest.raises(
        FolderError, match=r"process 77 on n7, since .* has taken it while this job stood still; it writ"
    ):
        first.require()
    first.release()
    assert (tmp_path / "run" / NAME).exists(), "it is the other one's"


def test_a_lock_that_somebody_removed_is_made_again(take, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.05)
    first, _ = take()
    (tmp_path / "run" / NAME).unlink()
    first.require()
    with pytest.raises(FolderError, match="is writing it"):
        take()
    before = (tmp_path / "run" / NAME).read_text()
    time.sleep(0.2)
    now = (tmp_path / "run" / NAME).read_text()
    assert (before != now, before.partition("\n")[0]) == (True, now.partition("\n")[0]), "the number still changes"


def test_a_holder_finds_out_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.05)
    hold = Hold(tmp_path / "run", rank=0)
    hold.take()
    hold.look()
    write(tmp_path / "run", token="other")
    time.sleep(0.3)
    with pytest.raises(FolderError, match=r"process 77 on n7, since .* has taken it while this job stood still"):
        hold.look()
    hold.give_back(0)
    assert not (tmp_path / "run" / "ended.json").exists(), "that is the other one's to write"


def test_a_copy_of_a_run_folder_is_not_locked_by_the_first(take, tmp_path):
    take()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    RunLock(tmp_path / "copy", print).release()
    assert (tmp_path / "run" / NAME).exists()


def test_a_file_system_without_links_has_locks_too(take, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first, _ = take()
    with pytest.raises(FolderError, match="is writing it"):
        take()
    first.require()
    first.release()
    take()


def test_a_link_that_was_made_though_the_answer_was_lost_counts(take, monkeypatch):
    link = os.link

    def twice(*paths: Path) -> None:
        link(*paths)
        link(*paths)

    monkeypatch.setattr(os, "link", twice)
    first, _ = take()
    first.require()


def test_a_process_of_another_user_is_there(take, tmp_path, monkeypatch):
    def hidden(pid: int, _: int) -> None:
        raise PermissionError(errno.EPERM, str(pid))

    write(tmp_path / "run", begun="1")
    monkeypatch.setattr(os, "kill", hidden)
    monkeypatch.setattr(lock, "_begun", lambda _: None)
    with pytest.raises(FolderError, match=r"process 77 on n7, since .* is writing it"):
        take()


def test_a_holder_says_that_it_lives(take, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.05)
    first, _ = take()
    seen = {(tmp_path / "run" / NAME).read_text() for _ in range(20) if not time.sleep(0.05)}
    assert len(seen) > 3
    assert len({text.partition("\n")[0] for text in seen}) == 1
    first.require()


@pytest.mark.parametrize("left", ["", "{", "[]\n", "{}\n0\n"])
def test_a_lock_that_says_nothing_is_listened_for_and_taken(take, tmp_path, monkeypatch, left):
    monkeypatch.setattr(lock, "_SILENCE_SECONDS", 0.5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).write_text(left)
    take()


def test_of_many_at_once_one_takes_it(tmp_path):
    for _ in range(5):
        write(tmp_path, begun="1", pid=1)  # left behind
        pids = []
        for number in range(12):
            if (pid := os.fork()) == 0:
                try:
                    RunLock(tmp_path, lambda _: None)
                except FolderError:
                    os._exit(0)
                (tmp_path / f"taken_{number}").touch()
                while not (tmp_path / "all others are done").exists():  # while it is held, nobody else may take it
                    time.sleep(0.01)
                os._exit(0)
            pids.append(pid)
        while len(pids) > 1:
            ended = {pid: os.waitpid(pid, os.WNOHANG) for pid in pids}
            pids = [pid for pid, (is_ended, status) in ended.items() if not is_ended or status]
            time.sleep(0.01)
        (tmp_path / "all others are done").touch()
        assert os.waitpid(pids[0], 0)[1] == 0
        assert len(list(tmp_path.glob("taken_*"))) == 1
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        FolderError, match=r"run\.folder=\S+file/run: cannot be written \(Not a directory\); make room or"
    ):
        RunLock(tmp_path / "file" / "run", lambda _: None)


# whole jobs


def test_two_jobs_in_one_folder_do_not_harm_each_other(train):
    folder, first = train.start(1, ENDLESS)
    wait_for_steps(folder, 2)
    second = train(2, status=2)
    said = second.ranks.text(0)
    assert f"run.folder={folder}: process {first.pids[0]} on " in said
    assert said.count("is writing it; end that job or wait for it, or give another folder") == 1
    assert "Traceback" not in second.ranks.text()
    assert not (folder / "ended.json").exists(), "the first goes on"
    os.kill(first.pids[0], signal.SIGKILL)
    first.wait()
    on = train(1)
    assert f"the run folder was left behind by process {first.pids[0]} on " in on.ranks.text()
    assert not (folder / NAME).exists()


def test_ranks_of_slurm_that_cannot_meet_do_not_train_alone(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "run.yaml")

    def alone(is_told: bool) -> int:
        for known in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(known, None)
        os.environ |= {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"} | ({"WORLD_SIZE": "1"} if is_told else {})
        return main(["train", str(config)])

    refused = start_ranks(1, lambda: alone(is_told=False))
    assert refused.wait() == [2]
    assert not (tmp_path / "run").exists()
    assert start_ranks(1, lambda: alone(is_told=True)).wait() == [0]
