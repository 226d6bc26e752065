"""The trace of chosen steps that a run writes, and how busy a GPU is said to be."""

import gzip
import json
import time

import pytest

from megatron_sphinx import config as configuration
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.training.gpu_busy import GpuBusy

PROFILE = {"start": 1, "steps": 2, "ranks": [0, 1]}


def ranges(path) -> list[tuple[str, float, float]]:
    """The marked ranges of a trace: name, begin, end; in the order in which they began."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    found = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"]
    return sorted(found, key=lambda found: found[1])


def test_traces_of_both_roles_hold_the_steps_asked_for_and_losses_stay(train):
    plain = train(2, {"parallel.encoder": 1, "training.steps": 4}, name="plain")
    traced = train(2, {"parallel.encoder": 1, "training.steps": 4, "training.profile": PROFILE}, name="traced")
    for key in ("loss", "loss_pairs", "loss_text", "gradient_norm"):
        assert [line[key] for line in traced.metrics] == [line[key] for line in plain.metrics], key
    folder = traced.folder / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [f"rank_{rank}_steps_1-2.json.gz" for rank in (0, 1)]
    assert not (plain.folder / "profile").exists()
    expected = {
        0: {"reading data", "features", "forward", "backward", "updating the weights", "writing the metrics"},
        1: {"reading data", "encoding", "waiting for its features to be taken"},
    }
    for rank, inner in expected.items():
        found = ranges(folder / f"rank_{rank}_steps_1-2.json.gz")
        steps = [(name, begin, end) for name, begin, end in found if name.startswith("step ")]
        assert [name for name, _, _ in steps] == ["step 1", "step 2"]
        for _, begin, end in steps:
            assert inner <= {name for name, first, last in found if begin <= first and last <= end}
    assert "steps 1 to 2 of rank 1 are profiled in " in traced.ranks.text(1)
    assert {line["gpu_busy_share"] for line in plain.metrics} == {None}


def test_a_profile_ends_with_the_run(train):
    run = train(1, {"training.profile": {"start": 2, "steps": 1}})
    assert [path.name for path in (run.folder / "profile").iterdir()] == ["rank_0_steps_2-2.json.gz"]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"start": -1}, r"training\.profile\.start=-1: must be at least 0"),
        ({"steps": -1}, r"training\.profile\.steps=-1: must be at least 0"),
        ({"ranks": []}, r"training\.profile\.ranks=\[\]: names no rank; name some, or set training\.profile\.steps=0"),
        ({"start": 2, "steps": 2}, r"training\.profile\.start=2: with training\.profile\.steps=2 the profile ends "
                                   r"after the run, whose last step is 2; let it end by then"),
    ],
)  # fmt: skip
def test_steps_that_a_run_does_not_have_are_refused(profile, message, tiny, tmp_path):
    path = tiny.write(tmp_path / "c.yaml", {"training.profile": profile})
    with pytest.raises(ConfigError, match=message):
        configuration.load(path)


def test_steps_are_also_refused_where_epochs_give_their_number(tiny, tmp_path):
    profile = {"start": 10, "steps": 1}
    path = tiny.write(tmp_path / "c.yaml", {"training.steps": 0, "training.epochs": 1, "training.profile": profile})
    config = configuration.load(path)
    assert config.with_epochs_in_steps(66).training.steps == 11
    with pytest.raises(ConfigError, match=r"training\.profile\.start=10: .* whose last step is 9; let it end by then"):
        config.with_epochs_in_steps(60)


def test_ranks_that_a_job_does_not_have_are_refused(train):
    run = train(1, {"training.profile": {"steps": 1, "ranks": [0, 1]}}, status=2)
    assert "training.profile.ranks=[0, 1]: the job has no rank 1; name some from 0 to 0" in run.ranks.text()


def wait_for(condition):
    """Wait until a thread has done something."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_how_busy_a_gpu_is_is_the_mean_of_what_was_read_since():
    values = iter([50.0, 100.0, 90.0])
    read: list[float] = []

    def next_value():
        wait_for(lambda: len(read) < allowed)
        read.append(next(values))
        return read[-1]

    allowed = 2
    busy = GpuBusy(next_value, interval=0.0)
    wait_for(lambda: busy._count == 2)
    assert busy.share() == 0.75
    assert busy.share() == 1.0, "nothing was read since: what was read last"
    allowed = 3
    wait_for(lambda: busy._count == 1)
    assert busy.share() == 0.9
    allowed = 4  # the fourth reading fails, and ends the thread
    busy.close()
    assert busy.share() == 0.9


def test_a_gpu_that_nobody_can_read_has_no_value():
    def fail():
        raise ModuleNotFoundError("nvidia-ml-py is not installed")

    busy = GpuBusy(fail)
    busy.close()
    assert busy.share() is None
    assert GpuBusy(None).share() is None
