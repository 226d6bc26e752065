"""Layouts: the choice among those that fit, what is printed of them, and why others are refused."""

import json
from pathlib import Path

import pytest

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.sizing import memory, search
from megatron_sphinx.sizing.layouts import request_of


@pytest.mark.parametrize("kind", ["a100-80g", "h100-80g"])
def test_the_best_layout_is_the_fastest_of_those_that_fit(kind):
    config = configuration.load(Path("sphinx_7b"))
    job, origin = request_of(config, nodes=2, ranks_per_node=4, kind=kind)
    assert origin.startswith("expected")
    found, refusals = search.search(job)
    times = [candidate.seconds.total for candidate in found]
    assert times == sorted(times)
    assert len(found) > 20
    for candidate in found:
        assert memory.heaviest(candidate.memory)[1] <= job.hardware.usable_bytes
        again = search.evaluate(job, candidate.config)  # as the command line would build it
        assert again.seconds == candidate.seconds
    assert refusals.counts["out of memory"] > 0
    assert "GB of 72.0 GB" in refusals.examples["out of memory"]


def test_more_memory_refuses_less():
    config = configuration.load(Path("sphinx_13b"))
    refused = []
    for kind in ("a100-40g", "a100-80g", "h200-141g"):
        job, _ = request_of(config, nodes=1, ranks_per_node=8, kind=kind)
        refused.append(search.search(job)[1].counts.get("out of memory", 0))
    assert refused == sorted(refused, reverse=True)
    assert refused[0] > refused[-1]


def test_the_command_prints_a_table_and_json(capsys):
    args = ["plan", "sphinx_tiny", "--nodes", "1", "--gpus-per-node", "4", "--gpu", "a100-80g"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "4 ranks, a100-80g" in out
    assert "layouts can be run" in out
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["best"][0]
    assert f"the first one: {' '.join(best['overrides'])}" in out
    assert best["step_seconds"] == pytest.approx(
        sum(value for name, value in best["seconds"].items() if name != "encoder")
    )
    assert set(best["bytes"]) >= {"language stage 0"}
    assert main(["plan", "sphinx_tiny", *best["overrides"], *args[2:], "--as-configured", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["best"][0]
    assert alone["step_seconds"] == pytest.approx(best["step_seconds"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sphinx_13b", "parallel.tensor=1", "parallel.sequence=false", "--as-configured", "--gpu", "a100-40g"],
         "language stage 0 needs"),
        (["sphinx_moe", "--gpu", "a100-40g"], "none of the"),
        (["sphinx_7b", "--gpu", "a100"], "--gpu=a100: unknown; did you mean a100-"),
        (["sphinx_7b", "--gpu", "absent.yaml"], "--gpu=absent.yaml: No such file"),
        (["sphinx_7b", "data.pairs_per_step=2", "data.text_tokens_per_step=0", "data.row_multiple=1",
          "--as-configured", "--gpu", "a100-80g"], "makes 1 rows a step for 8 data-parallel replicas"),
        (["sphinx_7b", "parallel.tensor=3", "--as-configured", "--gpu", "a100-80g"], "parallel.tensor=3: must divide"),
        (["sphinx_7b", "parallel.pipeline=3", "--as-configured", "--gpu", "a100-80g"], "must divide the 8 language"),
        (["--nodes", "1"], "plan: give a configuration"),
        (["sphinx_7b", "--calibrate", "here"], "--calibrate=here: must be the path of a .yaml"),
    ],
)  # fmt: skip
def test_refusals(args, message, capsys):
    nodes = [] if "--nodes" in args or "--calibrate" in args else ["--nodes", "1", "--gpus-per-node", "8"]
    assert main(["plan", *args, *nodes]) == 2
    assert message in capsys.readouterr().err
