"""What becomes of a run folder's checkpoints: none of the run's own goes, none is mixed with another run's."""

import errno
import random
import re
import shutil
from pathlib import Path

import pytest
from test_training import identical

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.manifest import read_manifest
from megatron_sphinx.checkpoint.mix import interpolate
from megatron_sphinx.checkpoint.steps import (
    complete,
    name_of,
    newest_of,
    off_the_line,
    prune,
    remove_remains,
    set_aside,
)
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.training import metrics

SIX = {"training.steps": 6, "checkpoint.interval": 1, "checkpoint.keep": 3}


def make(folder: Path, *steps: int | str) -> list[Path]:
    """Checkpoints that hold a manifest and nothing else."""
    paths = [folder / (step if isinstance(step, str) else name_of(step)) for step in steps]
    for path in paths:
        path.mkdir(parents=True)
        (path / "checkpoint.json").write_text("{}")
    return paths


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(checkpoint: Path) -> None:
    victim = next(checkpoint.glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


# one by one


def test_only_step_and_eight_digits_is_a_step(tmp_path):
    others = ("step_best", "step_00000009.bak", "step_9", "step_000000009", "Step_00000009", "step_0000000x")
    make(tmp_path, 3, 7, *others)
    (tmp_path / "step_00000008").mkdir()  # not complete
    assert [path.name for path in complete(tmp_path)] == ["step_00000003", "step_00000007"]
    assert newest_of(tmp_path).name == "step_00000007"
    set_aside(tmp_path, off_the_line(tmp_path, None, 0))
    assert names(tmp_path) == sorted([*others, "superseded_1"])
    assert names(tmp_path / "superseded_1") == ["step_00000003", "step_00000007", "step_00000008"]
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint; train first"):
        newest_of(tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_pruned_is_older_than_what_is_kept(tmp_path, seed):
    rng = random.Random(seed)
    steps = rng.sample(range(1, 30), rng.randint(1, 8))
    newest, keep = rng.choice(steps), rng.randint(1, 4)
    protected = rng.sample(steps, rng.randint(0, 2))
    make(tmp_path, *steps, "step_best")
    prune(tmp_path / name_of(newest), keep=keep, protected=[tmp_path / name_of(step) for step in protected])
    before = sorted(step for step in steps if step <= newest)
    wanted = {*before[-keep:], *protected, *(step for step in steps if step > newest)}
    assert names(tmp_path) == sorted([*map(name_of, wanted), "step_best"])


def test_a_run_that_begins_elsewhere_comes_from_none_of_the_steps(tmp_path, monkeypatch):
    (elsewhere,) = make(tmp_path / "other", 4)
    found = make(tmp_path / "run", 2, 4, 6)
    assert off_the_line(tmp_path / "run", elsewhere, 4) == found
    assert off_the_line(tmp_path / "run", found[1], 4) == found[2:]
    (tmp_path / "link").symlink_to(found[1])
    assert off_the_line(tmp_path / "run", tmp_path / "link", 4) == found[2:]
    assert off_the_line(tmp_path / "nowhere", None, 0) == []
    for name in ("step_best", "a_copy"):  # names say nothing
        (copy,) = make(tmp_path / "run", name)
        assert off_the_line(tmp_path / "run", copy, 2) == found[1:]
    monkeypatch.chdir(tmp_path / "run")
    assert off_the_line(tmp_path / "run", Path("step_00000004"), 4) == found[2:]


def test_a_step_that_a_link_leads_to_is_a_step(tmp_path):
    (archived,) = make(tmp_path / "archive", 4)
    folder = tmp_path / "run"
    found = make(folder, 2, 6)
    link = folder / archived.name
    link.symlink_to(archived)
    assert off_the_line(folder, link, 4) == found[1:]
    (newest,) = make(folder, 8)
    assert prune(newest, keep=1, protected=[]) == []
    assert names(folder) == ["step_00000008"]
    assert (archived / "checkpoint.json").exists()


def test_what_cannot_be_removed_is_said_and_hidden(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")  # as over NFS, where a file is open

    make(tmp_path, 2, 4)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    (line,) = prune(tmp_path / "step_00000004", keep=1, protected=[])
    assert re.search(r"step_00000002: could not be removed whole \(Directory not empty\); remove it yourself", line)
    assert [path.name for path in complete(tmp_path)] == ["step_00000004"]
    remove_remains(tmp_path)
    assert names(tmp_path) == [".step_00000002.pruned", "step_00000004"]
    monkeypatch.undo()
    remove_remains(tmp_path)
    assert names(tmp_path) == ["step_00000004"]


def test_the_newest_is_moved_first(tmp_path, monkeypatch):
    moved = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (moved.append(path.name), rename(path, to)))
    set_aside(tmp_path, make(tmp_path, 2, 6, 4))
    assert moved == ["step_00000006", "step_00000004", "step_00000002"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '"x"', '{"step": 1, "files": {}}', '{"step": 1, "identity": {}, "files": []}']
)
def test_a_manifest_that_describes_no_checkpoint_is_refused(tmp_path, content):
    (path,) = make(tmp_path, 3)
    (path / "checkpoint.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.weights=\S+step_00000003: .*; give a step_\.\.\. folder"):
        read_manifest(path, "model.weights")


# runs


def test_a_run_begun_anew_in_a_used_folder_keeps_what_it_saves(train):
    old = train(1, SIX)
    config, lines = (old.folder / "config.yaml").read_text(), old.metrics
    anew = train(1, {"checkpoint.resume": "none", "training.steps": 3, "checkpoint.interval": 1, "run.seed": 8})
    checkpoints = anew.folder / "checkpoints"
    assert names(checkpoints) == ["step_00000002", "step_00000003", "superseded_1"]
    assert names(checkpoints / "superseded_1") == ["step_00000004", "step_00000005", "step_00000006"]
    assert f"this run does not go on from there, moved to {checkpoints / 'superseded_1'}" in anew.ranks.text()
    assert "metrics.jsonl: 6 lines of steps that are done again are kept in" in anew.ranks.text()
    assert identical(metrics.read(anew.folder / "metrics.superseded.jsonl"), lines)
    assert (anew.folder / "config.1.yaml").read_text() == config
    on = train(1, {"training.steps": 5, "checkpoint.interval": 1, "run.seed": 8})
    assert "resumed after step 3 from" in on.ranks.text()
    assert [line["step"] for line in on.metrics] == list(range(5))


def test_copies_of_the_users_are_neither_taken_nor_removed(train):
    run = train(1, {"training.steps": 3, "checkpoint.interval": 1})
    checkpoints = run.folder / "checkpoints"
    for name in ("step_best", "step_00000002.bak"):
        shutil.copytree(checkpoints / "step_00000002", checkpoints / name)
    on = train(1, {"training.steps": 6, "checkpoint.interval": 1})
    assert "resumed after step 3 from" in on.ranks.text()
    kept = ["step_00000002.bak", "step_00000003", "step_00000005", "step_00000006", "step_best"]
    assert names(checkpoints) == kept  # the third is what it went on from


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_damaged_checkpoints_are_passed_over_and_the_good_one_stays(train, resume):
    settings = SIX | {"parallel.encoder": 1}
    run = train(3, settings)
    checkpoints, whole = run.folder / "checkpoints", run.metrics
    for name in ("step_00000006", "step_00000005"):
        damage(checkpoints / name)
    more = {"checkpoint.resume": str(checkpoints / "step_00000004")} if resume == "path" else {}
    on = train(3, settings | {"checkpoint.keep": 1} | more)
    assert names(checkpoints) == ["step_00000004", "step_00000006", "superseded_1"]
    assert names(checkpoints / "superseded_1") == ["step_00000005", "step_00000006"]
    said = on.ranks.text(0)
    for name in ("step_00000006", "step_00000005"):
        line = f"passed over: checkpoint.resume={checkpoints / name}: __0_0.distcp is damaged (its checksum differs)"
        assert (line in said) == (resume == "auto")
    assert f"step_00000005, step_00000006: this run does not go on from there, moved to {checkpoints}/super" in said
    assert f"resumed after step 4 from {checkpoints}/step_00000004" in said
    assert identical(on.metrics, whole)
    assert [line["step"] for line in metrics.read(on.folder / "metrics.superseded.jsonl")] == [4, 5]


def test_nothing_is_moved_before_what_is_to_be_taken_is_taken(train):
    """Else the next start would begin anew."""
    run = train(1, {"training.steps": 2})
    checkpoints = run.folder / "checkpoints"
    before = names(checkpoints)
    mixed = run.folder.parent / "mixed"
    convert(run.folder, mixed, "megatron", WriteOptions())
    refused = train(2, {"checkpoint.resume": str(mixed), "training.steps": 3}, status=2).ranks.text(0)
    assert "holds only weights; begin a run with them: give it as model.weights" in refused
    assert names(checkpoints) == before
    shutil.rmtree(mixed)
    interpolate([run.folder, run.folder], {mixed: [0.5, 0.5]})
    refused = train(2, {"checkpoint.resume": str(mixed), "training.steps": 3}, status=2).ranks.text(0)
    assert "only weights; begin a run with them: give it as model.weights" in refused
    assert names(checkpoints) == before
    anew = {"checkpoint.resume": "none", "model.weights": str(run.folder), "training.steps": 1}
    said = train(1, anew).ranks.text()
    assert f"begins with the weights of {checkpoints}/step_00000002" in said
    assert names(checkpoints) == ["step_00000001", "superseded_1"]


def test_a_copy_of_the_users_is_gone_on_from_by_its_step(train):
    run = train(1, {"training.steps": 4, "checkpoint.interval": 1, "checkpoint.keep": 4})
    checkpoints = run.folder / "checkpoints"
    shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_best")
    slower = {"optimizer.learning_rate": 1e-3}
    train(1, slower | {"checkpoint.resume": str(checkpoints / "step_best"), "training.steps": 3})
    assert names(checkpoints)[-4:] == ["step_00000002", "step_00000003", "step_best", "superseded_1"]
    assert names(checkpoints / "superseded_1") == ["step_00000003", "step_00000004"]
    on = train(1, slower | {"training.steps": 5}).ranks.text()
    assert "resumed after step 3 from" in on


def test_where_all_are_damaged_a_run_does_not_begin_anew(train):
    run = train(1, SIX)
    for path in complete(run.folder / "checkpoints"):
        damage(path)
    before = names(run.folder / "checkpoints")
    refused = train(2, SIX | {"training.steps": 7}, status=2)
    assert "__0_0.distcp is damaged (its checksum differs); give an earlier one; 2 earlier ones are no better" in (
        refused.ranks.text(0)
    )
    assert names(run.folder / "checkpoints") == before
