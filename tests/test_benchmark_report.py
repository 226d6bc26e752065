"""Reports of measured points: communication by axis, scaling curves, tables, and what is needed to repeat them."""

import json
import sys
from importlib import metadata

import pytest
from PIL import Image

from megatron_sphinx.__main__ import main
from megatron_sphinx.benchmark import report
from megatron_sphinx.benchmark.communication import seconds_by_axis
from megatron_sphinx.benchmark.scaling import curves
from megatron_sphinx.errors import DataError

pytest_plugins = ["fake_runs"]


def test_the_report_says_how_to_repeat_it(runs, tiny, tmp_path, monkeypatch):
    config = tiny.write(tmp_path / "c.yaml")
    argv = ["benchmark", str(config), "--ranks", "2", "--steps", "2", "--sweep", "parallel.encoder=1,0"]
    argv += ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "orig_argv", ["megatron-sphinx", *argv])
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert main(argv) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    for said in (
        f"megatron-sphinx {' '.join(argv)}", f"torch: {metadata.version('torch')}", "megatron-core: 0.",
        "deepspeed: 0.", "OMP_NUM_THREADS=7", "Abacus 9 (gloo, 3 threads)", "n0: 2", "| torchrun |", "revision: ",
        "`parallel.encoder=0` on 2 ranks differs from it by `parallel.encoder=0`", "hidden: 32",
        "On the same samples, the tokens a second of `parallel.encoder=1` are 1.00 times those of `parallel.encoder=0`",
        "| data groups | features groups |", "| encoder (1) |", "| 1 | encoder | n0 |", "![", "(points.png)",
    ):  # fmt: skip
        assert said in text, said
    assert "## Failed" not in text
    assert "## Scaling" not in text
    assert Image.open(tmp_path / "out" / "points.png").size[0] > 500


# communication


def event(name, begin, end, cat="user_annotation", **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6, "args": args}


def test_operations_of_gloo_are_given_their_groups_in_their_order():
    def call(name, at, peer):
        return event(name, at, at, **{"Concrete Inputs": ["", "", str(peer), "0"]})

    events = [
        event("gloo:all_reduce", 6, 9), event("gloo:all_reduce", 1, 3), event("gloo:all_reduce", 2, 4),
        event("gloo:broadcast", 8, 10), event("aten::mm", 0, 20), {"ph": "M", "name": "process_name"},
        call("c10d::recv_", 0, 4), event("gloo:recv", 0, 20), call("c10d::recv_", 11, 1), event("gloo:recv", 11, 13),
        call("c10d::send", 12, 3), event("gloo:send", 12, 14), event("gloo:barrier", 30, 31),
    ]  # fmt: skip
    names = [("all_reduce", "tp"), ("broadcast", "dp"), ("all_reduce", "tp"), ("all_reduce", "dp"), ("gather", "tp")]
    recorded = [{"profiling_name": f"gloo:{name}", "process_group": ("7", group)} for name, group in names]
    found = seconds_by_axis(events, recorded, language=4)
    assert found == pytest.approx({"tensor": 3, "data": 4, "pipeline": 3, "unknown": 1})


def test_kernels_of_nccl_name_their_groups():
    names = [("ncclDevKernel_AllReduce", "tp_cp"), ("ncclDevKernel_SendRecv", "pp"), ("ncclDevKernel_Reduce", "own")]
    events = [
        event(name, n, n + 2, cat="kernel", **{"Process Group Description": group})
        for n, (name, group) in enumerate(names)
    ]
    assert seconds_by_axis(events, [], language=8) == pytest.approx({"tensor": 2, "pipeline": 2, "unknown": 2})


# scaling


def point(ranks, positions, tokens_per_second, encoder=0, text_tokens=0, **model):
    """A made-up point."""
    sizes = {"pairs_per_step": positions, "text_tokens_per_step": 0, "conversations_per_step": 0, "row_multiple": 1}
    paths = dict.fromkeys(("pairs", "conversations", "text", "tokenizer"), f"of {ranks}")
    config = {
        "run": {"folder": f"{ranks}"},
        "checkpoint": {},
        "data": sizes | paths | {"sequence_length": 8},
        "model": {"preset": None, "layers": 2} | model,
        "parallel": {"tensor": 1, "pipeline": 1, "encoder": encoder},
    }
    work = {"positions": positions, "pairs": positions / 10, "text_tokens": text_tokens}
    named = {"ranks": ranks, "tokens_per_second": tokens_per_second, "is_synthetic": False}
    return named | {"config": config, "work": work}


def told(points):
    return [(c.kind, [(p["ranks"], p["work"]["positions"]) for p in c.points], c.efficiency) for c in curves(points)]


def test_strong_and_weak_scaling_are_told_apart():
    points = [point(2, 100, 10.0), point(4, 101, 16.0), point(8, 99, 20.0), point(4, 203, 19.0), point(8, 395, 30.0)]
    strong, weak = told(points)
    assert strong == ("strong", [(2, 100), (4, 101), (8, 99)], pytest.approx([1, 0.8, 0.5]))
    assert weak == ("weak", [(2, 100), (4, 203), (8, 395)], pytest.approx([1, 0.95, 0.75]))


def test_points_of_another_model_or_on_as_many_ranks_make_no_curve():
    assert told([point(2, 100, 10.0), point(4, 100, 10.0, layers=3)]) == []
    assert told([point(2, 100, 10.0), point(2, 100, 11.0)]) == []
    assert told([point(2, 100, 10.0), point(4, 100, 11.0, text_tokens=50)]) == []
    assert told([point(2, 100, 10.0), point(4, 150, 11.0), point(8, 100, 9.0) | {"error": "it did not end"}]) == []


def test_encoder_ranks_grow_with_the_ranks_unless_they_are_swept():
    growing = [point(4, 100, 10.0, encoder=1), point(8, 100, 16.0, encoder=2)]
    assert told(growing) == [("strong", [(4, 100), (8, 100)], pytest.approx([1, 0.8]))]
    swept = [point(ranks, 100, ranks + encoder, encoder=encoder) for ranks in (4, 8) for encoder in (1, 2)]
    assert [efficiency for _, _, efficiency in told(swept)] == [
        pytest.approx([1, 9 / 5 / 2]), pytest.approx([1, 10 / 6 / 2]),
    ]  # fmt: skip


def test_reports_of_several_folders_are_merged(runs, tiny, tmp_path, run_tool, capsys):
    """A folder for each number of nodes; in each the same step, and one with as much for each rank."""
    config = tiny.write(tmp_path / "c.yaml", {"data.text_tokens_per_step": 0})
    folders = [tmp_path / f"ranks{ranks}" for ranks in (1, 2, 4)]
    for ranks, folder in zip((1, 2, 4), folders, strict=True):
        runs.seconds = lambda config, before, ranks=ranks: [1 / ranks**0.5] * 9
        options = ["--ranks", str(ranks), "--steps", "2", "--repeats", "1", "--output", str(folder)]
        assert main(["benchmark", str(config), *options, "--sweep", f"data.pairs_per_step=12,{30 * ranks}"]) == 0
    capsys.readouterr()
    status, out, _ = run_tool("benchmark_report.py", *folders, "--output", tmp_path / "all")
    found = json.loads(out.splitlines()[-1])
    assert (status, found["points"]) == (0, 6)
    assert [(curve["kind"], curve["ranks"]) for curve in found["curves"]] == [
        ("strong", [1, 2, 4]),
        ("weak", [1, 2, 4]),
    ]
    assert found["curves"][0]["efficiency"] == pytest.approx([1, 0.5**0.5, 0.5])
    text = (tmp_path / "all" / "report.md").read_text()
    assert "# Benchmark on 1 and 2 and 4 ranks" in text
    assert "### Strong scaling (the same step on more ranks), model: tensor 1, pipeline 1, encoder 0" in text
    assert "### Weak scaling (the same work on each rank)" in text
    assert "70.7% |" in text
    assert Image.open(tmp_path / "all" / "scaling.png").size[0] > 500


def test_a_folder_without_points(tmp_path, run_tool):
    status, _, error = run_tool("benchmark_report.py", tmp_path, "--output", tmp_path / "all")
    assert (status, f"{tmp_path}: has no points/*.json; give folders that" in error) == (2, True)
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a.json: is no point \(.*\); measure it again"):
        report.read([tmp_path])
    some = {"name": "a", "steps": 1, "warmup": 1, "repeats": 1, "is_synthetic": True, "environment": {}}
    for text, message in {
        "[]": r"a\.json must hold an object with keys",
        '{"name": "a"}': r"a\.json: ranks: not given; the file is not whole",
        json.dumps(some | {"ranks": "two"}): r"a\.json: ranks=two: must be a whole number",
        '{"name": "a", "format": 7}': r"a\.json was made by a newer version \(format 7; this one knows 1\)",
    }.items():
        (tmp_path / "points" / "a.json").write_text(text)
        with pytest.raises(DataError, match=rf"a\.json: is no point \({message}.*\); measure it again"):
            report.read([tmp_path])
