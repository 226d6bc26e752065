"""Points of a sweep: what is run, in turn, on made-up runs; what is summed up; what the command prints."""

import json

import pytest

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.benchmark import sweep
from megatron_sphinx.benchmark.sweep import BenchmarkError
from megatron_sphinx.errors import ConfigError, FolderError
from megatron_sphinx.model.expert_work import WORK

pytest_plugins = ["fake_runs"]

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
    view_flops = sum(WORK[name].flops for name in names)
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
