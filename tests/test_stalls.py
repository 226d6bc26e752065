"""Who is blamed where a job stands still, and who is slow: judged by what the ranks say of themselves."""

import random
from dataclasses import replace

import pytest

from megatron_sphinx.config import RunConfig
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.liveness.progress import Activity, Beat
from megatron_sphinx.liveness.stalls import LastBeat, find_stall, find_stragglers


def heard(
    who: str, doing: Activity, seconds: float, *, silent: float = 0.0, step: int = 5, waits: bool = False
) -> LastBeat:
    return LastBeat(Beat(1, who, "n0", doing.name, step, None, seconds, waits or doing.is_waiting, "", None), silent)


JUDGE = {"timeout": 60.0, "storage_timeout": 600.0, "silence": 60.0}


def test_waiting_for_files_or_working_hard_is_no_stall():
    busy = heard("a", Activity.COMPUTING, 59)
    assert find_stall([busy, heard("b", Activity.COMPUTING, 59, waits=True)], **JUDGE) is None
    for doing in (Activity.STARTING, Activity.SAVING):
        assert find_stall([heard("a", doing, 599), heard("b", Activity.SENDING, 599)], **JUDGE) is None
        assert find_stall([heard("a", doing, 600), heard("b", Activity.SENDING, 599)], **JUDGE).startswith(
            "run.storage_timeout=600: a on host n0 is stuck for 600 s in step 5, "
        )
    assert find_stall([heard("a", Activity.ENDING, 599), busy], **JUDGE) is None


def test_who_is_silent_is_blamed_before_who_is_late_and_who_is_late_before_who_works():
    silent, late = heard("silent", Activity.COMPUTING, 3, silent=61), heard("late", Activity.READING, 61)
    working, waiting = (
        heard("working", Activity.UPDATING, 3),
        heard("waiting", Activity.COMPUTING, 70, step=4, waits=True),
    )
    everyone = [waiting, working, late, silent]
    random.shuffle(everyone)
    for blamed in (silent, late, working, waiting):
        said = find_stall(everyone, **JUDGE)
        assert said.startswith(f"run.timeout=60: {blamed.beat.who} on host n0 ")
        everyone.remove(blamed)
        assert (", the first, waiting, in step 4, forward and backward;" in said) == bool(everyone)
    assert "waits, as all do, for 70 s in step 4, forward and backward; look there" in said


def test_ranks_at_the_same_place_are_named_together():
    ranks = [heard(f"r{n}", Activity.COMPUTING, 70, waits=True) for n in range(5)]
    said = find_stall(ranks, **JUDGE)
    assert all(f"r{n} on host n0 waits, as all do, for 70 s" in said for n in range(3))
    assert " and 2 more; look there" in said


@pytest.mark.parametrize("seed", range(5))
def test_stragglers_are_those_slower_than_the_median(seed):
    rng = random.Random(seed)
    beats = [
        replace(heard(f"r{n}", Activity.READING, 0).beat, probe_seconds=rng.uniform(1.0, 1.2))
        for n in range(rng.randint(2, 9))
    ]
    assert find_stragglers(beats, 1.3) == {}
    slow = rng.randrange(len(beats))
    beats[slow] = replace(beats[slow], probe_seconds=2.4)
    assert list(find_stragglers(beats, 1.3)) == [f"r{slow} on host n0"]
    assert 2.0 <= find_stragglers(beats, 1.3)[f"r{slow} on host n0"] <= 2.4
    unknown = [replace(beat, probe_seconds=None) for beat in beats]
    assert find_stragglers([beats[slow], *unknown], 1.3) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timeout": 2.0}, r"run\.timeout=2\.0: must be at least 3; ranks are heard of only so often"),
        ({"storage_timeout": 9.0}, r"run\.storage_timeout=9\.0: must be at least run\.timeout=600\.0"),
        ({"straggler_interval": -1}, r"run\.straggler_interval=-1: must be at least 0"),
        ({"straggler_ratio": 1.0}, r"run\.straggler_ratio=1\.0: must be above 1"),
    ],
    ids=str,
)
def test_impossible_limits_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(folder="runs/x", **values)
