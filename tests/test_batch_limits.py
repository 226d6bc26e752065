"""Files of questions and the model's limits: how many are on their way, a queue that is full, another template."""

import json
import os
from contextlib import suppress
from threading import Barrier, BrokenBarrierError

import pytest
from answers_double import Double, caption

from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import DataError
from megatron_sphinx.generation.answering import QueueFullError
from megatron_sphinx.serving import model
from megatron_sphinx.serving.answer_file import AnswerFile


def generate(monkeypatch, folder, double, *words, rows=2):
    """Run the command on rows of questions; the limits that the model was loaded with."""
    loaded = []
    monkeypatch.setattr(model, "load", lambda path, limits, **options: loaded.append(limits) or double)
    weights = folder / "model" / "consolidated.00.pth"  # which nobody opens
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(b"")
    os.utime(weights, (0, 0))
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"question": str(number)}) + "\n" for number in range(rows)))
    assert main(["generate", str(weights.parent), "--input", str(source), "--output", str(folder / "o"), *words]) == 0
    return loaded[0]


def test_a_queue_that_is_full_is_waited_for(monkeypatch, tmp_path):
    refused = []

    class Full(Double):
        def submit(self, prompt, sampling, listen):
            if self._now >= 3:
                refused.append(prompt)
                raise QueueFullError("waiting=3: as many requests as may are waiting already; ask again later")
            return super().submit(prompt, sampling, listen)

    limits = generate(monkeypatch, tmp_path, Full(caption, 0.002), "--in-flight", "2000", rows=12)
    assert limits.waiting == 2000
    assert refused
    answers = [json.loads(line)["answer"] for line in (tmp_path / "o").read_text().splitlines()]
    assert [answer.split("?")[0] for answer in answers] == [str(number) for number in range(12)]


def test_each_replica_has_as_many_on_their_way_as_it_computes_at_once(monkeypatch, tmp_path):
    all_there = Barrier(128, timeout=10)

    class Held(Double):
        def _run(self, text, ticket, listen):
            with suppress(BrokenBarrierError):
                all_there.wait()
            super()._run(text, ticket, listen)

    double = Held(caption)
    double.replicas = 2
    limits = generate(monkeypatch, tmp_path, double, rows=256)
    assert (double.most, limits.waiting) == (128, 1024)


@pytest.mark.parametrize(("name", "was", "other"), [
    ("template", "double", "llama2"), ("precision", "fp32", "bf16"), ("positions", 1000, 2000),
])  # fmt: skip
def test_answers_of_another_way_to_load_the_model_are_not_mixed(monkeypatch, tmp_path, capsys, name, was, other):
    generate(monkeypatch, tmp_path, Double(caption))
    double = Double(caption)
    double.identity = Double.identity | {name: other}
    if name == "positions":
        double.positions = other
    with pytest.raises(AssertionError):
        generate(monkeypatch, tmp_path, double)
    assert f"was begun with model.{name}={was}, not {other}; give another --output" in capsys.readouterr().err


def test_a_full_disk_is_told_by_one_error(tmp_path):
    def write():
        with AnswerFile(tmp_path / "o", {}) as file:
            file._journal = open("/dev/full", "r+b")  # noqa: SIM115
            file.add(0, {})

    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        write()


def test_what_is_refused_leaves_no_empty_journal_beside_a_finished_file(tmp_path):
    with AnswerFile(tmp_path / "o", {"prompt": "a"}) as file:
        file.finish()
    with pytest.raises(DataError, match="was begun with prompt=a, not b"):
        AnswerFile(tmp_path / "o", {"prompt": "b"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "o.settings.json"]
