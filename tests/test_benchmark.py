"""Measured points: what is run, the arithmetic of tables and curves on made-up runs, and real runs on gloo ranks."""

import io
import json
import runpy
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from conftest import size_of
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.benchmark import report, sweep, synthetic
from megatron_sphinx.benchmark.communication import seconds_by_axis
from megatron_sphinx.benchmark.scaling import curves
from megatron_sphinx.benchmark.summary import MeasuredRun
from megatron_sphinx.benchmark.sweep import BenchmarkError, Measurement
from megatron_sphinx.data.loader import BatchBuilder, make_planner, open_sources, views_in
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.errors import ConfigError, DataError, FolderError
from megatron_sphinx.model.architecture import EXPERTS
from megatron_sphinx.model.encoders import encoder_work
from megatron_sphinx.model.views import place, views_of

TOOLS = Path(__file__).parents[1] / "tools"


def planner_of(config):
    sources = open_sources(config.data, config.model)
    return make_planner(config.data, sources, config.model, config.vision, replicas=1, seed=config.run.seed)


class Runs:
    """Runs that end at once, of the samples and the work that the configuration asks for.

    Attributes:
        asked: configuration and ranks of each.
        seconds: of each step of each run, from its configuration and how many there were before it.
        samples: what names a run's samples.
        error: what a run ends with, from its configuration; nothing where it ends well.
    """

    def __init__(self):
        self.asked, self.seconds = [], lambda config, before: [1.0] * 99
        self.samples = self.error = lambda config: ""

    def __call__(self, how, config, folder):
        taken = self.seconds(config, len(self.asked))[: how.warmup + how.steps]
        self.asked.append((config, how.ranks))
        if error := self.error(config):
            raise BenchmarkError(error)
        lines = [
            {
                "step": step,
                "sample_ids": f"{self.samples(config)} {step}",
                "step_seconds": seconds,
                "tokens_per_second": 600 / seconds,
                "exposed_encoder_seconds": seconds / 4,
                "data_wait_seconds": seconds / 10,
                "feature_bytes": 1000 * (step + 1),
            }
            for step, seconds in enumerate(taken)
        ][how.warmup :]
        plan = planner_of(config).step(0)
        text_tokens, views = sum(tokens for _, _, tokens in plan.text), len(views_in(plan.rows))
        work = {"positions": plan.positions, "pairs": len(plan.pairs), "text_tokens": text_tokens, "views": views}
        work["language_flops"] = 8e9
        encoders = config.parallel.encoder
        ranks = [self.rank(rank, lines, work) for rank in range(how.ranks - encoders)]
        ranks += [self.encoder(how.ranks - encoders + n, work["views"] / encoders) for n in range(encoders)]
        return MeasuredRun(lines, ranks)

    def rank(self, rank, lines, work):
        names = {"seconds": 1.0, "data_wait_seconds": 0.1, "exposed_encoder_seconds": 0.25 / (rank + 1)}
        steps = {name: [line["step_seconds"] * share for line in lines] for name, share in names.items()}
        own = {"role": "language", "steps": steps, "work": work, "communication": {"data": 0.125 * (rank + 1)}}
        return self.facts(rank) | own

    def encoder(self, rank, views):
        spent = {"read_seconds": 1.0, "encode_seconds": 5.0, "send_seconds": 4.0}
        return (
            self.facts(rank) | {"role": "encoder", "views_per_step": views, "communication": {"features": 0.4}} | spent
        )

    def facts(self, rank):
        return {
            "rank": rank, "host": f"n{rank // 2}", "device": "Abacus 9", "threads": 3, "backend": "gloo",
            "layout": "as it is", "peak_flops": 2e10, "peak_memory_bytes": 2**30 + rank,
        }  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    fake = Runs()
    monkeypatch.setattr(sweep, "_run", fake)
    return fake


@pytest.fixture
def how(tiny, tmp_path):
    """`how(**changes)` is a Measurement of the small model."""
    config = tiny.write(tmp_path / "c.yaml")
    defaults = {"config": config, "ranks": 2, "steps": 3, "warmup": 1, "repeats": 2, "folder": tmp_path / "bench"}
    return lambda **changes: Measurement(**defaults | changes)


# points


def test_points_are_all_combinations():
    points = sweep.points_of(["parallel.encoder=1,0", "data.text=[a,b],c"])
    assert list(points) == [
        "parallel.encoder=1 data.text=[a, b]", "parallel.encoder=1 data.text=c",
        "parallel.encoder=0 data.text=[a, b]", "parallel.encoder=0 data.text=c",
    ]  # fmt: skip
    assert points["parallel.encoder=0 data.text=[a, b]"] == ["parallel.encoder=0", 'data.text=["a", "b"]']
    assert sweep.points_of([]) == {"as configured": []}


@pytest.mark.parametrize("wrong", [["a"], ["a="], ["=1"], ["a=[1"], ["a=1,2", "a=3"]])
def test_no_sweeps(wrong):
    with pytest.raises(ConfigError, match=r"--sweep .*: must read key.path=value,value,... with another key each time"):
        sweep.points_of(wrong)


def test_names_of_files():
    names = [
        "parallel.encoder=1",
        "data.text=a/b",
        "data.text=a b",
        "data.text=a_b",
        "x" * 300 + "/1",
        "x" * 300 + "/2",
    ]
    files = [sweep.file_name(name) for name in names]
    assert files[0] == names[0]
    assert len(set(files)) == len(names)
    assert not any("/" in file or len(file) > 130 for file in files)


@pytest.mark.parametrize(("name", "value"), [("ranks", 0), ("steps", 0), ("warmup", -1), ("repeats", 0)])
def test_too_few(how, name, value):
    with pytest.raises(ConfigError, match=f"--{name}={value}: must be at least {value + 1}"):
        how(**{name: value})


def test_a_folder_that_cannot_be_made(how, tmp_path):
    with pytest.raises(
        FolderError, match=r"--output=.*c.yaml: cannot be made \(Not a directory\); give another folder"
    ):
        sweep.measure(how(folder=tmp_path / "c.yaml"), {"it": []})


# turns and medians


def test_variants_take_turns_and_their_medians_are_compared(runs, how, capsys):
    seconds = {1: ([90, 1, 2, 6], [90, 3, 4, 5]), 0: ([0.1, 8, 8, 8], [0.1, 8, 8, 8])}
    runs.seconds = lambda config, before: seconds[config.parallel.encoder][before // 2]
    variants = {"one": ["parallel.encoder=1"], "two": ["parallel.encoder=0", "run.seed=5"]}
    points = sweep.compare(how(overrides=("run.seed=4", "loss.text_weight=0.5")), variants)
    assert [config.parallel.encoder for config, _ in runs.asked] == [1, 0, 1, 0]
    assert [config.run.seed for config, _ in runs.asked] == [4, 5, 4, 5]
    assert {(config.loss.text_weight, ranks) for config, ranks in runs.asked} == {(0.5, 2)}
    one = points["one"]
    expected = {
        "tokens_per_second": (600 / 3 + 600 / 4) / 2, "samples_per_second": 6 / 3.5, "step_seconds": 3.5,
        "step_seconds_p95": 5.75, "exposed_encoder_share": 0.25, "data_wait_share": 0.1,
        "feature_bytes_per_step": 3000, "tokens_per_second_per_rank": (600 / 3 + 600 / 4) / 4,
    }  # fmt: skip
    assert {name: one[name] for name in expected} == pytest.approx(expected)
    assert one["steps_of_runs"] == [[1, 2, 6], [3, 4, 5]]
    assert points["two"]["samples_per_second"] == 0.75
    assert sweep.ratios(list(points.values())) == {"two": pytest.approx(one["tokens_per_second"] / (600 / 8))}
    assert "run 1/2 of one: 300 tokens/s, 2.000 s/step\n" in capsys.readouterr().out


def test_what_roles_and_ranks_do(runs, how):
    runs.seconds = lambda config, before: [1.0, 2.0, 2.0, 2.0]
    variants = {"stage": ["parallel.encoder=1"], "colocated": []}
    points = sweep.compare(how(ranks=3), variants)
    stage, colocated = points["stage"], points["colocated"]
    names = [item.name for item in configuration.load(how().config).vision.experts]
    view_flops = sum(encoder_work(EXPERTS[name])[0] for name in names)
    views = stage["work"]["views"]
    assert views == 6
    assert (stage["hosts"], list(stage["roles"])) == ({"n0": 2, "n1": 1}, ["language", "encoder"])
    language, encoder = stage["roles"]["language"], stage["roles"]["encoder"]
    assert (language["ranks"], encoder["ranks"]) == (2, 1)
    assert language["flops_per_second"] == pytest.approx(8e9 / 2)
    assert language["utilization"] == pytest.approx(8e9 / 2 / 4e10)
    assert encoder["flops_per_second"] == pytest.approx(views * view_flops / 2)
    assert (encoder["busy_share"], encoder["data_wait_share"]) == (0.5, 0.1)
    assert language["communication"] == {"data": (0.125 + 0.25) / 2}
    assert language["exposed_encoder_share"] == pytest.approx((0.25 + 0.125) / 2)
    assert language["peak_memory_bytes"] == 2**30 + 1
    all_flops = (8e9 + views * view_flops) / 2
    assert colocated["roles"]["language"]["flops_per_second"] == pytest.approx(all_flops)
    assert [rank["flops_per_second"] for rank in colocated["per_rank"]] == pytest.approx([all_flops / 3] * 3)


def test_other_samples_are_not_compared(runs, how):
    runs.samples = lambda config: config.run.seed
    variants = {"a": ["run.seed=1"], "b": ["run.seed=2"]}
    with pytest.raises(BenchmarkError, match="b: trained on other samples than a; give it the same data"):
        sweep.compare(how(), variants)
    assert sweep.ratios(sweep.measure(how(), variants)) == {}


def test_a_comparison_needs_all_its_runs(runs, how):
    runs.error = lambda config: "out of luck" if config.run.seed == 2 else ""
    with pytest.raises(BenchmarkError, match="b: out of luck"):
        sweep.compare(how(), {"a": ["run.seed=1"], "b": ["run.seed=2"]})


# the command


def test_the_command(runs, tiny, tmp_path, capsys):
    runs.seconds = lambda config, before: [2.0, 2.0, 2.0] if config.parallel.encoder else [3.0, 3.0, 3.0]
    config = tiny.write(tmp_path / "c.yaml")
    options = ["--ranks", "4", "--steps", "2", "--warmup", "1", "--repeats", "2", "--output", str(tmp_path / "out")]
    sweeps = ["--sweep", "parallel.encoder=2,0"]
    assert main(["benchmark", str(config), "training.precision=bf16", *options, *sweeps]) == 0
    assert [config.parallel.encoder for config, _ in runs.asked] == [2, 0, 2, 0]
    assert {(config.training.precision, ranks) for config, ranks in runs.asked} == {("bf16", 4)}
    *_, stage, colocated, path, last = capsys.readouterr().out.splitlines()
    assert stage.split() == ["parallel.encoder=2", "300", "2.000", "2.000", "10.0%", "25.0%", "2,500"]
    assert colocated.split()[:3] == ["parallel.encoder=0", "200", "3.000"]
    assert path == f"the whole report: {tmp_path / 'out' / 'report.md'}"
    found = json.loads(last)
    assert found == {
        "ranks": 4, "tokens_per_second": {"parallel.encoder=2": 300.0, "parallel.encoder=0": 200.0}, "failed": [],
        "ratios": {"parallel.encoder=0": pytest.approx(1.5)},
    }  # fmt: skip
    point = json.loads((tmp_path / "out" / "points" / "parallel.encoder=0.json").read_text())
    assert (point["tokens_per_second"], point["config"]["training"]["precision"]) == (200, "bf16")


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


def test_a_point_that_fails_is_reported_and_the_others_go_on(runs, tiny, tmp_path, capsys):
    runs.error = lambda config: "ended with status 9\nthe lights went out" if config.run.seed == 8 else ""
    config = tiny.write(tmp_path / "c.yaml")
    options = ["--ranks", "2", "--steps", "1", "--warmup", "0", "--output", str(tmp_path / "out")]
    sweeps = ["--sweep", "run.seed=8,9", "--sweep", "parallel.tensor=1,3"]
    assert main(["benchmark", str(config), *options, *sweeps]) == 1
    assert [config.run.seed for config, _ in runs.asked] == [8, 9, 9]
    out = capsys.readouterr().out
    assert "run.seed=8 parallel.tensor=1 failed: ended with status 9\n" in out
    found = json.loads(out.splitlines()[-1])
    assert found["failed"] == [f"run.seed={seed} parallel.tensor={size}" for seed, size in ((8, 1), (8, 3), (9, 3))]
    assert found["ratios"] == {}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "`run.seed=8 parallel.tensor=1` on 2 ranks:\n\n```\nended with status 9\nthe lights went out\n```" in text
    assert "parallel.tensor=3: must divide" in text


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("sh -c 'echo one >&2; echo two >&2; exit 3'", "ended with status 3\none\ntwo\nsh -c"),
        ("sh -c 'echo noise >&2; echo megatron-sphinx measure: a=1: wrong >&2; echo more >&2; exit 2'",
         "ended with status 2\nmegatron-sphinx measure: a=1: wrong\nsh -c"),
        ("sh -c 'for n in 1 2 torch/distributed/elastic/api.py 4; do echo $n >&2; done; exit 1'",
         "ended with status 1\n1\n2\nsh -c"),
        ("true", "--launcher=true: started 0 ranks, not --ranks=2; let both agree"),
        ("no_such_launcher", "--launcher=no_such_launcher: No such file or directory; give a command to begin with"),
    ],
)  # fmt: skip
def test_launchers_that_fail(how, launcher, said):
    (point,) = sweep.measure(how(launcher=launcher), {"it": []})
    assert point["error"].startswith(said)


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


# synthetic data


@pytest.mark.parametrize("kind", ["pairs", "conversations"])
def test_synthetic_data_has_the_composition_of_the_step(tiny, tmp_path, kind):
    amounts = {"pairs_per_step": 0, "text_tokens_per_step": 200, f"{kind}_per_step": 300}
    path = tiny.write(tmp_path / "c.yaml", {f"data.{name}": value for name, value in amounts.items()})
    words = int(np.random.default_rng().integers(40, 3000))
    given = [*synthetic.PATHS, f"model.vocabulary={words}", "vision.experts.0.weights=no_such_file"]
    config = synthetic.prepared(configuration.load(path, given), tmp_path / "made")
    assert [item.weights for item in config.vision.experts] == ["random", "random"]
    sources = open_sources(config.data, config.model)
    sources.check()
    plan = planner_of(config).step(3)
    assert (len(plan.pairs), sum(tokens for _, _, tokens in plan.text)) == (300, 200)
    assert sources.tokenizer.encode("a b c") == [3, 4, 5]
    batch = BatchBuilder(config.data, sources, config.vision).build(plan.rows)
    assert (int(batch.tokens.max()) < words, len(batch.pairs), len(batch.sample_of_view)) == (True, 300, 300)
    reader = ImageReader(sources.pairs)
    for pair in plan.pairs[:2]:
        image = Image.open(io.BytesIO(reader.read(pair)))
        assert image.size == size_of(sources.pairs, pair)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "made").rglob("*")}
    assert synthetic.prepared(configuration.load(path, given), tmp_path / "made") == config
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "made").rglob("*")}


def test_too_few_words(tiny, tmp_path):
    path = tiny.write(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"model.vocabulary=3: synthetic text needs a word; use at least 4"):
        synthetic.prepared(configuration.load(path, ["model.vocabulary=3"]), tmp_path / "made")


# real runs


@pytest.mark.parametrize(
    ("sizes", "world", "axes"),
    [
        ({"tensor": 2, "pipeline": 2, "encoder": 1}, 5, {"tensor", "pipeline", "features"}),
        ({"tensor": 2, "sequence": True, "expert": 2}, 2, {"tensor", "expert", "replica"}),
    ],
)
def test_every_rank_tells_what_it_did(tiny, tmp_path, run_ranks, sizes, world, axes):
    overrides = {f"parallel.{name}": size for name, size in sizes.items()}
    overrides |= {"training.steps": 1 + 2 + 3} | ({"model.experts": 4} if "expert" in sizes else {})
    config = tiny.write(tmp_path / "c.yaml", overrides)
    run_ranks(world, lambda: main(["measure", str(config), "--steps", "2", "--warmup", "1"]))
    folder = config.with_suffix("")
    ranks = [json.loads((folder / "ranks" / f"{rank}.json").read_text()) for rank in range(world)]
    encoders = sizes.get("encoder", 0)
    assert [rank["role"] for rank in ranks] == ["language"] * (world - encoders) + ["encoder"] * encoders
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for rank in ranks[: world - encoders]:
        assert {len(values) for values in rank["steps"].values()} == {2}
        assert rank["work"]["pairs"] == 6
        others = {"language", "data", "expert data"}  # of one rank each, or of all
        assert axes <= set(rank["communication"]) <= axes | others
        assert all(0 <= share <= 1 for share in rank["communication"].values())
        assert all(rank["communication"][axis] > 0 for axis in axes - {"features"})
    assert ranks[0]["steps"]["seconds"] == [line["step_seconds"] for line in lines[1:3]]
    plans = planner_of(configuration.load(config))
    if encoders:
        views = sum(len(views_in(plans.step(step).rows)) for step in (1, 2)) / 2
        assert ranks[-1]["views_per_step"] == views == ranks[0]["work"]["views"]
        assert min(ranks[-1][f"{name}_seconds"] for name in ("read", "encode", "send")) >= 0
    assert not (folder / "checkpoints").exists()


def test_a_real_sweep(tiny, tmp_path, capsys):
    """The whole command, on gloo ranks that torchrun starts, with data that is made up."""
    config = tiny.write(tmp_path / "c.yaml", {"data.tokenizer": "no_such_file", "data.pairs": "no_such_folder"})
    options = ["--ranks", "2", "--steps", "2", "--warmup", "1", "--repeats", "1", "--output", str(tmp_path / "out")]
    assert main(["benchmark", str(config), *options, "--synthetic", "--sweep", "parallel.encoder=1,0"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["ratios"]) == ["parallel.encoder=0"]
    assert min(found["tokens_per_second"].values()) > 0
    stage, colocated = report.read([tmp_path / "out"])[::-1]
    assert [rank["role"] for rank in stage["per_rank"]] == ["language", "encoder"]
    assert [rank["role"] for rank in colocated["per_rank"]] == ["language", "language"]
    assert (stage["work"]["pairs"], stage["work"]["text_tokens"]) == (6, 150)
    assert stage["feature_bytes_per_step"] > 0 == colocated["feature_bytes_per_step"]
    assert "data" in colocated["roles"]["language"]["communication"]
    assert "Synthetic data: 256 JPEG pictures" in (tmp_path / "out" / "report.md").read_text()


# tools/compare/skipping.py


@pytest.mark.parametrize(("views", "encoded", "ranks"), [(5, 3, 3), (10, 4, 1)])
def test_skipping(runs, tiny, tmp_path, run_ranks, views, encoded, ranks):
    runs.seconds = lambda config, before: [0.5 if config.vision.skip_padding_views else 1.25] * 3
    config = tiny.write(tmp_path / "c.yaml")
    options = [config, "data.pairs_per_step=7", "--views", views, "--ranks", ranks, "--steps", 2, "--warmup", 1]

    def work() -> int:
        sys.argv = ["skipping.py", "--config", *map(str, options), "--folder", str(tmp_path / "digits")]
        status = runpy.run_path(str(TOOLS / "compare" / "skipping.py"))["main"]()
        for config, world in runs.asked:
            assert (config.parallel.encoder, world) == (int(ranks > 1), ranks)
            assert (config.vision.views, config.vision.padding) == (views, "corner")
        return status

    *_, skipping, every, last = run_ranks(1, work).text().splitlines()
    found = json.loads(last)
    assert found["ratios"] == {"skipping": pytest.approx(2.5)}
    rows = found["variants"]
    assert (rows["skipping"]["views_per_step"], rows["all views"]["views_per_step"]) == (7 * encoded, 7 * views)
    saved = rows["all views"]["positions_per_step"] - rows["skipping"]["positions_per_step"]
    assert saved == 7 * (views - encoded) * (19 - 1)
    assert skipping.split()[:4] == ["skipping", "14.0", "0.500", str(7 * encoded)]
    assert every.split()[:5] == ["all", "views", "5.6", "1.250", str(7 * views)]
    if views == 5:
        check_captions(tmp_path / "digits" / "pairs", tiny)


def check_captions(folder: Path, tiny) -> None:
    """A caption names the digits of its picture, which scikit-learn has."""
    from sklearn.datasets import load_digits

    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    digits = load_digits()
    inked = 255 - np.rint(digits.images * (255 / 16))
    index = SampleIndex([folder])
    assert {size_of(index, pair) for pair in range(len(index))} == {(24, 8)}
    for pair in range(12):
        path = folder / "picture.png"
        path.write_bytes(ImageReader(index).read(pair))
        row = np.asarray(Image.open(path))
        parts = [row[:, 8 * part : 8 * part + 8] for part in range(3)]
        labels = [digits.target[(inked == part).all((1, 2))][0] for part in parts]
        caption = f"The digits {', '.join(words[label] for label in labels)}."
        assert index.caption(pair).tolist() == tiny.tokenizer.encode(caption)


# tools/views.py


@pytest.fixture
def run_views(tiny, tmp_path, monkeypatch, capsys):
    """`run_views(*indexes)` runs tools/views.py for the small encoders; its status, and what it printed."""
    config = tiny.write(tmp_path / "c.yaml")

    def run(*indexes: Path) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["views.py", *map(str, indexes), "--preset", str(config)])
        status = runpy.run_path(str(TOOLS / "views.py"))["main"]()
        out, error = capsys.readouterr()
        return status, out.splitlines(), error

    return run


def shown(width: int, height: int, views: int, padding: str) -> int:
    """How many views hold a pixel of a picture: painted, so enlarged that the parts have whole pixels."""
    parts, side = {5: 2, 10: 3}[views], max(width, height)
    square = np.zeros((side * parts, side * parts), bool)
    left, top = (number * parts for number in place(width, height, padding))
    square[top : top + height * parts, left : left + width * parts] = True
    cuts = (square[y * side : (y + 1) * side, x * side : (x + 1) * side] for y in range(parts) for x in range(parts))
    assert len(views_of(parts)) == views
    return 1 + sum(bool(cut.any()) for cut in cuts)


def ratio_name(width: int, height: int) -> str:
    ratio = max(width, height) / min(width, height)
    limits = ((1, "1:1"), (1.4999, "below 3:2"), (1.9999, "3:2 to 2:1"), (2.9999, "2:1 to 3:1"))
    return next((name for limit, name in limits if ratio <= limit), "3:1 and more")


def test_what_skipping_saves(run_views, tiny, dialogs):
    """Pairs and conversations together, the latter one in four without a picture."""
    with_picture = [*range(60), *(number for number in range(40) if number % 4 != 3)]
    sizes = [Image.open(tiny.folder / "pictures" / f"{number:03d}.png").size for number in with_picture]
    status, lines, _ = run_views(tiny.folder / "pairs", dialogs)
    found = json.loads(lines[-1])
    assert (status, found["pictures"], len(found["rows"])) == (0, 90, 4)
    for row in found["rows"]:
        counts = np.array([shown(*size, row["views"], row["padding"]) for size in sizes])
        positions = counts * 19 + (row["views"] - counts)
        assert row["encoded_views"] == pytest.approx(counts.mean())
        assert row["positions"] == pytest.approx(positions.mean())
        assert row["encoder_gflop"] == pytest.approx(counts.mean() * found["gflop_per_view"])
        assert row["views_saved"] == pytest.approx(1 - counts.sum() / (90 * row["views"]))
        assert row["positions_saved"] == pytest.approx(1 - positions.sum() / (90 * row["views"] * 19))
        assert row["pixels"] == {5: 112, 10: 168}[row["views"]]
    assert [(row["views"], row["padding"]) for row in found["rows"]] == [
        (5, "corner"), (5, "centre"), (10, "corner"), (10, "centre"),
    ]  # fmt: skip
    assert 0.02 < found["rows"][0]["views_saved"] < found["rows"][2]["views_saved"]
    for name, shares in found["aspect_ratios"].items():
        wide = sum(width >= height and ratio_name(width, height) == name for width, height in sizes)
        tall = sum(width < height and ratio_name(width, height) == name for width, height in sizes)
        assert (shares["wide"], shares["tall"]) == pytest.approx((wide / 90, tall / 90))
    row = next(line for line in lines if line.startswith("   112      5  corner")).split()
    assert float(row[3]) == pytest.approx(found["rows"][0]["encoded_views"], abs=5e-4)


def test_an_index_that_is_none(run_views, tmp_path):
    status, _, error = run_views(tmp_path)
    assert status == 2
    assert "index.json: No such file or directory; make the index by megatron-sphinx prepare pairs" in error
