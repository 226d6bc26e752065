"""The demo end to end, but for the length of its training."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(run_ranks, monkeypatch):
    """`run_example(name, *args)` runs a program of examples/ in a process of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *args: object) -> str:
        def work() -> int:
            sys.argv = [name, *map(str, args)]
            return runpy.run_path(str(EXAMPLES / name))["main"]()

        return run_ranks(1, work).text()

    return run


def test_the_demo(run_example, run_ranks, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "run"
    said = run_example("demo_data.py", data)
    assert "1437 pairs, 360 held out" in said
    assert run_example("demo_data.py", data) == said  # there already
    names = {"pairs": "pairs", "text": "text", "tokenizer": "tokenizer.model"}
    overrides = [f"data.{key}={data / name}" for key, name in names.items()]
    overrides += [
        f"vision.experts.0.weights={data / 'efficientnet_lite0.pth'}",
        f"run.folder={folder}",
        "training.steps=2",
        "optimizer.warmup_steps=null",
    ]
    assert configuration.load(EXAMPLES / "demo.yaml", overrides).parallel.encoder == 1
    run_ranks(3, lambda: main(["train", str(EXAMPLES / "demo.yaml"), *overrides]))
    said = run_example("demo_evaluate.py", folder, folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() == {
        "steps", "seconds", "held_out_accuracy", "held_out_accuracy_generated", "held_out_accuracy_random_expert",
        "loss_pairs", "loss_text",
    }  # fmt: skip
    assert summary["steps"] == 2
    assert 0 <= summary["held_out_accuracy"] < 0.5  # nothing is learnt in two steps
    assert said.count(f"{summary['held_out_accuracy']:8.1%}") >= 2


@pytest.mark.parametrize(("climb", "status"), [(1.0, 0), (0.0, 1)])
def test_figure_7_says_whether_it_shows_what_the_papers_does(tmp_path, monkeypatch, capsys, climb, status):
    for kind in ("both", "captions", "text"):
        (tmp_path / kind).mkdir()
        lines = [
            {
                "loss_text": 4.0 + climb * step / 50 * (kind == "captions"),
                "loss_pairs": None if kind == "text" else 7.0 - step / 10,
            }
            for step in range(50)
        ]
        (tmp_path / kind / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["figure7.py", str(tmp_path)])
    assert runpy.run_path(str(EXAMPLES / "figure7.py"))["main"]() == status
    said = capsys.readouterr().out
    moved = climb * (49 + 40) / 2 / 50  # the mean of the last ten steps
    assert f"moves by {moved:+.3f} on captions only, by +0.000 on both" in said
    assert "text only            4.000 -> 4.000" in said
    assert (tmp_path / "figure7.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_experts_of_the_demo(run_example, run_ranks, tmp_path):
    data, folder, look = tmp_path / "data", tmp_path / "run", tmp_path / "look"
    run_example("demo_data.py", data)
    overrides = [f"vision.experts.0.weights={data / 'efficientnet_lite0.pth'}", "parallel={}", "training.steps=1",
                 "optimizer.warmup_steps=null", f"run.folder={folder}", f"data.tokenizer={data / 'tokenizer.model'}",
                 f"data.text={data / 'text'}", f"data.pairs={data / 'pairs'}"]  # fmt: skip
    run_ranks(1, lambda: main(["train", str(EXAMPLES / "demo_moe.yaml"), *overrides]))
    said = run_example("demo_experts.py", folder, look, "--limit", 5, "--keep", 6, 1)
    found = json.loads((look / "experts.json").read_text())
    assert [one["name"] for one in found["sweep"]] == [line.split()[0] for line in said.splitlines() if " %" in line]
    assert len(found["sweep"]) == 8 + 2 * (3 + 1 + 1)
    assert found["data"]["digits"]["units"] == 5
    assert all(0 <= value <= 100 for one in found["sweep"] for value in one["figures"].values())


@pytest.mark.slow
def test_the_family(run_example, run_ranks, tmp_path):
    """Stage 1 twice, theta_mix, stage 2 with experts and views that are skipped, held-out questions: a step of each."""
    demo, data = tmp_path / "demo", tmp_path / "family"
    run_example("demo_data.py", demo)
    said = run_example("family_data.py", data, "--demo", demo)
    assert "1437 digits with two captions, 2400 dialogs, 140 questions held out" in said

    def train(name: str, config: str, *more: str) -> Path:
        overrides = [f"vision.experts.0.weights={demo / 'efficientnet_lite0.pth'}", "parallel={}", "training.steps=1",
                     "optimizer.warmup_steps=null",
                     f"run.folder={tmp_path / name}", f"data.tokenizer={demo / 'tokenizer.model'}",
                     f"data.text={demo / 'text'}", *more]  # fmt: skip
        run_ranks(1, lambda: main(["train", str(EXAMPLES / config), *overrides]))
        return tmp_path / name

    real = train("real", "family_moe_stage1.yaml", f"data.pairs={data / 'real'}")
    syn = train("syn", "family_moe_stage1.yaml", f"data.pairs={data / 'syn'}", f"model.weights={real}")
    plot = tmp_path / "mix.png"
    found = json.loads(run_example("family.py", "mix", real, syn, tmp_path / "mixed", "--plot", plot, "--data", data)
                       .splitlines()[-1])  # fmt: skip
    assert found["beta"] == [0, 0.25, 0.5, 0.75, 1]
    assert all(loss > 0 for name in ("loss_real", "loss_syn") for loss in found[name])
    assert plot.is_file()
    folder = train("moe", "family_moe.yaml", f"data.conversations={data / 'corner'}",
                   f"model.weights={tmp_path / 'mixed' / 'beta_0.75'}")  # fmt: skip
    run_example("family.py", "test", folder)
    reached = json.loads((folder / "summary.json").read_text())
    assert {task: of_task["questions"] for task, of_task in reached.items()} == {
        "vqa": 60, "count": 60, "classify": 20
    }  # fmt: skip
    assert all(0 <= of_task["accuracy"] <= 1 for of_task in reached.values())
