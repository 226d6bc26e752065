"""How long a start took, by phase: what is measured, printed and kept."""

import json
import re
import subprocess
import sys
import time

import pytest

from megatron_sphinx.__main__ import main
from megatron_sphinx.device import own_cores
from megatron_sphinx.run import start_clock
from megatron_sphinx.run.phases import START, Role
from megatron_sphinx.run.start_clock import StartClock

RANKS = [
    {"imports": 2.0, "load_encoders": 6.04, "introduce": 0.01},
    {"imports": 2.5, "load_encoders": 4.0, "introduce": 0.02, "expert a": 5.0},
]


def test_a_start_in_one_line_tells_what_took_long():
    assert start_clock.line(12.34, RANKS) == "start: 12.3 s (load_encoders 6.0, expert a 5.0, imports 2.5)"
    assert start_clock.line(0.05, [{"imports": 0.05}]) == "start: 0.1 s (nothing took long)"


def test_the_table_names_the_slowest_rank_of_each_phase():
    rows = [line.split() for line in start_clock.table(RANKS)]
    assert rows == [
        ["phase", "slowest", "rank", "fastest"],
        ["imports", "2.50", "s", "1", "2.00", "s"],
        ["load_encoders", "6.04", "s", "0", "4.00", "s"],
        ["introduce", "0.02", "s", "1", "0.01", "s"],
        ["expert", "a", "5.00", "s", "1", "5.00", "s"],
    ]


def test_a_phase_that_fails_or_comes_twice_is_measured_too():
    clock, ended = StartClock(), []

    def fail() -> None:
        ended.append(True)
        raise KeyError("x")

    for _ in range(2):
        with pytest.raises(KeyError):
            clock.timed("a", fail)()
    assert clock.timed("b", lambda: 7)() == 7
    assert list(clock.seconds) == ["a", "b"]
    assert clock.seconds["a"] > 0
    clock.note("a", 10.0)
    assert clock.seconds["a"] > 10.0


def test_the_age_of_a_process_begins_before_its_imports():
    code = (
        "import time; time.sleep(0.5)\n"
        "from megatron_sphinx.run.start_clock import process_seconds\n"
        "before = process_seconds(); print(before, process_seconds() - before)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    age, more = map(float, done.stdout.split())
    assert 0.49 < age <= time.monotonic() - start + 0.02  # the kernel counts in hundredths
    assert more >= 0


def test_a_run_keeps_the_seconds_of_every_rank_and_prints_them_where_asked(start_ranks, tiny, tmp_path):
    config = tiny.write(tmp_path / "run.yaml", {"parallel.encoder": 1, "training.steps": 2})
    ranks = start_ranks(2, lambda: main(["train", str(config), "--profile"]))
    assert ranks.wait() == [0, 0], ranks.text()
    [folder] = [path.parent for path in tmp_path.rglob(start_clock.FILE)]
    kept = start_clock.read(folder)
    assert kept == json.loads((folder / "startup.json").read_text())
    language, encoder = kept["ranks"]
    phases = {phase.__name__ for phase in START[: START.index(Role.tell_seconds)]}
    for own in (language, encoder):
        assert own.keys() >= phases | {"imports", "join", "make_groups", "open_data"}
    assert {key for key in encoder if key.startswith("expert ")}
    assert not {key for key in language if key.startswith("expert ")}
    assert 0 < kept["start_seconds"] <= kept["first_step_seconds"]
    said = ranks.text(0)
    assert re.search(r"^start: \d+\.\d s \(", said, re.MULTILINE)
    assert re.search(r"^first step: done \d+\.\d s after the process began$", said, re.MULTILINE)
    assert re.search(r"^  phase +slowest +rank +fastest$", said, re.MULTILINE)
    assert "start:" not in ranks.text(1)


def test_encoders_load_beside_the_model_and_its_engine():
    begin, end = START.index(Role.begin_encoders), START.index(Role.load_encoders)
    assert {Role.build_model, Role.build_engine} <= {*START[begin:end]}


@pytest.mark.parametrize(("ranks", "cores"), [(None, 6), ("2", 3), ("4", 1), ("16", 1)])
def test_ranks_of_a_machine_share_its_cores(monkeypatch, ranks, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert own_cores() == cores
