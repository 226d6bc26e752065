"""POPE in its official layout, answered by a trained model: two replicas are as one, and prefixes are found."""

import re

from evaluation_double import write_pope
from test_answers_ranks import leaving

from megatron_sphinx.__main__ import main


def test_two_replicas_answer_as_one_and_prefixes_are_found(train, tiny, run_ranks, tmp_path):
    shape = {"training.steps": 2, "optimizer.learning_rate": 0.1, "vision.views": 5, "data.sequence_length": 400}
    run = train(1, shape)
    write_pope(tmp_path / "data", sorted((tiny.folder / "pictures").glob("*.png"))[:3])

    def evaluate(name: str):
        words = [
            "evaluate",
            "pope",
            "--data",
            str(tmp_path / "data"),
            "--model",
            str(run.folder),
            "--cache-gib",
            "0.01",
        ]
        return leaving(lambda: main([*words, "--output", str(tmp_path / name)]))

    alone = run_ranks(1, evaluate("alone")).text(0)
    share = re.search(r"; ([\d.]+)% of (\d+) prompt tokens were in the prefix cache", alone)
    assert share, alone
    assert float(share[1]) > 50, "six questions about each picture share it"
    assert "POPE: " in alone
    assert "18 of 18 questions" in alone
    run_ranks(2, evaluate("together"))
    for name in ("pope/answers.jsonl", "report.json", "report.md"):
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
