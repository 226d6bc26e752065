"""gpu-check: its arithmetic on made-up numbers, each of its parts in small on the CPU, and all of it (slow)."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.config import Config
from megatron_sphinx.gpu_check import check, kernels, report, runs, steps, trace, worker
from megatron_sphinx.gpu_check.findings import Finding, append, is_passed, read
from megatron_sphinx.gpu_check.peaks import kind_of
from megatron_sphinx.gpu_check.processes import Clock, TimeIsUpError
from megatron_sphinx.gpu_check.runs import Runs
from megatron_sphinx.gpu_check.scales import FULL, SMALL
from megatron_sphinx.run import start_clock
from megatron_sphinx.sizing import hardware

# traces


def event(cat, name, ts, dur, tid=1, correlation=None):
    """An event of a trace."""
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": {"correlation": correlation}}


# A step of 100 us: one kernel started inside a range of its own thread, one beside it, one by another thread meanwhile.
ON_GPU = [
    event("user_annotation", trace.STEP, 1000, 100),
    event("user_annotation", trace.GRADIENTS, 1010, 20, tid=2),
    event("gpu_user_annotation", trace.GRADIENTS, 1010, 90, tid=7),
    event("cuda_runtime", "cudaLaunchKernel", 1012, 2, tid=2, correlation=1),
    event("cuda_driver", "cuLaunchKernel", 1015, 2, tid=1, correlation=2),
    event("cuda_runtime", "cudaLaunchKernel", 1040, 2, tid=2, correlation=3),
    event("kernel", "add", 1020, 8, tid=7, correlation=1),
    event("kernel", "gemm", 1024, 36, tid=8, correlation=2),
    event("kernel", "gemm", 1060, 20, tid=7, correlation=3),
    event("gpu_memcpy", "copy", 1090, 4, tid=7, correlation=None),
]


def test_kernels_are_charged_to_the_range_that_their_thread_was_in():
    found = trace.shares(ON_GPU)
    assert found["step_seconds"] == pytest.approx(100e-6)
    assert found["gpu_busy_share"] == pytest.approx(0.64), "from 1020 to 1080 and 4 more, overlaps counted once"
    assert found["gradient_share"] == pytest.approx(0.08)


def test_without_a_range_of_gradients_there_is_no_share_of_them():
    assert trace.shares([one for one in ON_GPU if one["name"] != trace.GRADIENTS])["gradient_share"] is None


def test_kernels_are_listed_by_their_time():
    rows = trace.heaviest(ON_GPU, 2)
    assert [(row["kernel"], row["milliseconds"], row["calls"]) for row in rows] == [
        ("gemm", 0.056, 2),
        ("add", 0.008, 1),
    ]
    assert rows[0]["share"] == pytest.approx(56 / 68)


def test_operations_on_a_cpu_are_listed_by_their_own_time():
    events = [
        event("cpu_op", "linear", 0, 100), event("cpu_op", "mm", 10, 60), event("cpu_op", "copy", 20, 10),
        event("cpu_op", "mm", 200, 5), event("cpu_op", "mm", 40, 3, tid=2), event("cuda_runtime", "x", 0, 900),
    ]  # fmt: skip
    rows = {row["kernel"]: (row["milliseconds"], row["calls"]) for row in trace.heaviest(events)}
    assert rows == {"mm": (0.058, 3), "linear": (0.040, 1), "copy": (0.010, 1)}


def test_a_real_trace_has_the_ranges_that_are_looked_for(tmp_path):
    with torch.profiler.profile() as profile, torch.profiler.record_function(trace.STEP):
        torch.ones(64, 64) @ torch.ones(64, 64)
        with torch.profiler.record_function(trace.GRADIENTS):
            torch.ones(512, 512) @ torch.ones(512, 512)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = trace.read(tmp_path / "trace.json")
    assert 0 < trace.shares(events)["gradient_share"] < 1
    assert trace.shares(events)["gpu_busy_share"] is None
    assert "aten::mm" in {row["kernel"] for row in trace.heaviest(events)}


# comparisons of runs


def line(step, **values):
    """A line of metrics."""
    return {"step": step, "loss": 1.0, "loss_pairs": 1.0, "loss_text": None, "gradient_norm": 2.0} | values


def test_resumed_steps_must_be_equal_to_the_last_bit():
    whole = [line(2), line(3, loss=0.1 + 0.2)]
    assert runs.compare_bits(whole, [line(2), line(3, loss=0.1 + 0.2)]) == (
        {"steps": 2, "first_to_differ": "none"},
        True,
    )
    assert runs.compare_bits(whole, [line(2), line(3, loss=0.3)]) == ({"steps": 2, "first_to_differ": 3}, False)
    assert not runs.compare_bits(whole, [line(2)])[1], "a step is missing"
    assert not runs.compare_bits([], [])[1]


def test_devices_may_differ_by_rounding_only():
    right = [line(0), line(1)]
    near = runs._near("x", right, [line(0), line(1, gradient_norm=2.00001)], runs.JUDGED, 1e-5)
    assert near.is_right
    assert near.values["gradient_norm"] == pytest.approx(5e-6)
    for wrong in ([line(0), line(1, gradient_norm=2.0001)], [line(0)], [line(0), line(1, loss_text=1.0)],
                  [line(0, loss=None), line(1)]):  # fmt: skip
        assert runs._near("x", right, wrong, runs.JUDGED, 1e-5).verdict == "FAIL"


# the table


def row(name, seconds, **values):
    """What a process has found of one kind of step."""
    return Finding(section="fast", name=name, values={"seconds": seconds, "targets": 100, "warmup": 3} | values)


def ours(kind, rows, seconds, **values):
    """What a process has found of our steps."""
    facts = {"kind": kind, "micro_batch_rows": rows, "flops": 300.0, "peak_flops": 1000.0}
    return row(f"ours {kind} {rows}", seconds, **facts, **values)


def peer(kind, size, seconds):
    """What a process has found of the peer's steps."""
    name = f"peer {kind} {size[0]} {size[1]}"
    return row(name, seconds, kind=kind, size=list(size), padded_positions=7)


def test_turns_are_joined_and_laid_beside_the_best_peer():
    predicted = {"memory_bytes": 100, "predicted_memory_bytes": 120.0, "predicted_seconds": 0.55}
    found = [
        ours("mixed", 8, [9.0, 9.0, 9.0, 0.5, 0.5], **predicted), ours("mixed", 8, [9.0, 9.0, 9.0, 0.6, 1.3]),
        ours("captions", 4, [9.0, 9.0, 9.0, 1.0]), ours("captions", 8, [9.0, 9.0, 9.0, 0.8]),
        peer("captions", (8, 1), [9.0, 9.0, 9.0, 1.0]), peer("captions", (16, 1), [9.0, 9.0, 9.0, 1.4]),
        Finding(section="fast", name="peer captions 40 1", absent="does not fit"),
    ]  # fmt: skip
    rows = {one.name: one for one in check.table_of(found, is_judged=True)}
    mixed = rows["ours, mixed, 8 rows a micro-batch"]
    assert mixed.values["seconds"] == pytest.approx(0.55), "the median behind each turn's warm-up"
    assert mixed.values["worst_over_median"] == pytest.approx(1.3 / 0.55)
    assert (mixed.values["steps"], mixed.values["bound"], mixed.verdict) == (4, 0.55, "missed")
    assert rows["predicted seconds, mixed, 8 rows"].verdict == "pass"
    assert rows["predicted memory, mixed, 8 rows"].verdict == "missed"
    ratio = rows["captions, over the best peer"]
    assert (ratio.values["ratio"], ratio.values["bound"], ratio.verdict) == (pytest.approx(1.25), 1.5, "missed")
    assert "text, over the best peer" not in rows
    on_cpu = {one.name: one for one in check.table_of(found, is_judged=False)}
    assert on_cpu["captions, over the best peer"].verdict == ""
    assert is_passed(rows.values()), "only what is right must keep its bounds"


def test_the_peer_gets_its_fastest_micro_batch():
    found = [
        peer("captions", (8, 1), [9.0, 9.0, 9.0, 1.0, 1.1]), peer("captions", (16, 1), [9.0, 9.0, 9.0, 0.9, 0.9]),
        peer("text", (1, 2), [9.0, 9.0, 9.0, 3.0]), peer("text", (1, 4), [1.0, 1.0, 1.0, 3.1]),
    ]  # fmt: skip
    assert check._best_sizes(found) == {"captions": [[16, 1]], "text": [[1, 2]], "mixed": [[16, 2]]}
    assert check._best_sizes(found[:2]) == {"captions": [[16, 1]]}


def test_the_share_of_gradients_has_a_bound():
    found = [Finding(section="profile", name="mixed step", values={"gradient_share": share}) for share in (0.08, 0.09)]
    assert [one.verdict for one in check._profile_of(found)] == ["pass", "missed"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("NVIDIA H100 80GB HBM3", "h100-80g"), ("NVIDIA H200", "h200-141g"), ("NVIDIA A100-SXM4-80GB", "a100-80g"),
     ("NVIDIA H100 PCIe", None), ("NVIDIA H200 NVL", None), ("NVIDIA GeForce RTX 4090", None)],
)  # fmt: skip
def test_cards_are_known_by_the_names_of_their_driver(name, kind):
    assert kind_of(name) == kind
    assert kind is None or hardware.load(kind).flops.bf16 > 1e14


# what is printed and written

FOUND = [
    Finding(section="right", name="a", values={"difference": 1e-6, "bound": 1e-5}, is_right=True, is_required=True),
    Finding(section="right", name="b|c", absent="no such kernel"),
    Finding(section="fast", name="d", values={"seconds": 0.5, "bytes": 123456}, is_right=False),
    Finding(section="fast", name="e", values={"share": None}),
]
WRONG = Finding(section="right", name="f", values={}, is_right=False, is_required=True)


def test_the_table_has_a_line_for_each_finding_and_a_verdict_for_each_section():
    lines = report.table(FOUND).splitlines()
    assert [" ".join(text.split()) for text in lines] == [
        "right", "a pass difference 1e-06 bound 1e-05", "b|c absent not on this device: no such kernel",
        "fast", "d missed seconds 0.5 bytes 123,456", "e share -",
        "right: pass, 1 of 1 bounds kept", "fast: 0 of 1 bounds kept",
    ]  # fmt: skip
    assert report.verdicts([*FOUND, WRONG])[0] == "right: FAIL, 1 of 2 bounds kept"
    assert is_passed(FOUND)
    assert not is_passed([*FOUND, WRONG])
    assert not is_passed([Finding(section="right", name="g", absent="a run has failed", is_required=True)])


def test_the_page_and_the_json_say_what_they_were_made_with():
    told = report.report_of([*FOUND, WRONG], scale="full", device="cpu", seconds=12.3)
    page = report.page(told, FOUND)
    assert page.startswith(f"# gpu-check of {told['date']}\n\ncpu; revision ")
    assert f"torch {metadata.version('torch')}" in page
    assert "| b\\|c | absent | not on this device: no such kernel |" in page
    back = json.loads(report.as_json(told))
    assert (back["is_passed"], back["scale"], len(back["findings"])) == (False, "full", 5)
    assert {"torch", "megatron-core", "deepspeed"} <= set(back["environment"]["versions"])
    assert back["findings"][2]["verdict"] == "missed"


def test_findings_survive_a_writer_that_is_killed(tmp_path):
    path = tmp_path / "found.jsonl"
    assert read(path) == []
    for finding in FOUND:
        append(path, finding)
    path.write_text(path.read_text() + '{"section": "ri')
    assert read(path) == FOUND


# processes


def test_processes_end_well_or_say_why(tmp_path):
    clock = Clock(time.monotonic() + 60)
    assert clock.wait(clock.start(["-c", "print(1)"], tmp_path / "a.txt")) == ""
    assert (tmp_path / "a.txt").read_text() == "1\n"
    fault = clock.wait(clock.start(["-c", "import sys; sys.exit('no such\\nthing')"], tmp_path / "b.txt"))
    assert fault == "status 1: no such thing"
    sleeping = clock.start(["-c", "import time; time.sleep(60)"], tmp_path / "c.txt")
    assert clock.wait(sleeping, until=lambda: True) == ""
    assert sleeping.popen.poll() == -9
    late = clock.start(["-c", "import time; time.sleep(60)"], tmp_path / "d.txt")
    assert Clock(time.monotonic() + 0.2).wait(late) == "ended: the time of --minutes is spent"
    assert late.popen.poll() == -9
    with pytest.raises(TimeIsUpError, match="left out: the time of --minutes is spent"):
        Clock(time.monotonic() + 1).start(["-c", ""], tmp_path / "e.txt")


def test_what_there_is_no_time_for_is_left_out(tmp_path):
    found = check.check(SMALL, "cpu", ["right", "fast", "profile"], minutes=0.01, folder=tmp_path)
    assert not [one for one in found if one.values]
    assert {one.absent.rpartition(": ")[2] for one in found if "left out" in one.absent} == {
        "the time of --minutes is spent"
    }
    assert not is_passed(found), "what is not shown to be right is not passed"


def test_a_part_that_breaks_costs_no_other_part_its_findings(monkeypatch, tmp_path):
    def broken(_):
        raise KeyError("phases")

    monkeypatch.setattr(runs, "demo", broken)
    monkeypatch.setattr(runs, "startup", lambda _: Finding(section="fast", name="start-up"))
    monkeypatch.setattr(check.Check, "job", lambda *_, **__: [])
    found = check.check(SMALL, "cpu", ["fast"], minutes=1, folder=tmp_path)
    assert [(one.name, one.absent) for one in found] == [("demo-like run", "KeyError: 'phases'"), ("start-up", "")]
    monkeypatch.setattr(runs, "right", broken)
    assert not is_passed(check.check(SMALL, "cpu", ["right"], minutes=1, folder=tmp_path))


def test_a_start_is_reported_with_what_its_run_has_kept(monkeypatch, tmp_path):
    def start(self, *_):
        target = self.folder_of("startup")
        target.mkdir(parents=True)
        start_clock.keep(target, 2.0, [{"imports": 0.5, "build_model": 1.5}])
        words = ["-c", f"import pathlib; pathlib.Path({str(target / 'metrics.jsonl')!r}).write_text('{{}}')"]
        return self.clock.start(words, tmp_path / "log.txt")

    monkeypatch.setattr(Runs, "start", start)
    found = runs.startup(Runs(SMALL, "cpu", tmp_path, Clock(time.monotonic() + 60)))
    assert (found.values["phase_imports"], found.values["phase_build_model"]) == (0.5, 1.5)
    assert found.values["seconds"] > 0
    assert not found.absent


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rihgt"], "gpu-check rihgt: no such section; name some of right, fast, profile, or none"),
        (["--minutes", "0"], "--minutes=0.0: must be more than 0"),
        ([], "--scale=full: needs a GPU (none was found); run it where there is one, or give --scale small"),
    ],
)
def test_mistakes_are_said_in_one_line(words, message, capsys):
    assert main(["gpu-check", *words]) == 2
    assert capsys.readouterr().err == f"megatron-sphinx gpu-check: {message}\n"


# its parts in small, each on a rank of its own


def do(tmp_path, name, **options):
    """Do a job of the check as its process does; on one rank of a test."""
    out = tmp_path / f"{name}.jsonl"
    job = worker.Job(name=name, scale="small", device="cpu", folder=str(tmp_path), out=str(out), options=options)
    (tmp_path / "job.json").write_text(json.dumps(asdict(job)))
    worker.main(tmp_path / "job.json")


def test_attention_and_features_are_right_here(run_ranks, tmp_path):
    run_ranks(1, lambda: do(tmp_path, "kernels"))
    found = {one.name: one for one in read(tmp_path / "kernels.jsonl")}
    assert [one.verdict for one in found.values()] == ["pass"] * 4 + ["absent", "pass"]
    assert found["attention varlen"].absent == "torch's varlen attention runs on CUDA only"
    assert found["bits of features in other batches"].values == {"views": 11, "orders": 3, "differ": "none"}


def check_wrong_attention_is_found():
    """A document sees the one before it; a row's last position is not seen."""
    kernels.current_platform()
    tensors = list(kernels._drawn(40, (4, 2, 2, 4), 64, torch.Generator().manual_seed(0)))
    assert max(kernels.roundings_off(kernels.training_path, tensors, [20, 20]).values()) < kernels.ROUNDINGS

    def leaking(query, key, value, lengths):
        return kernels.training_path(query, key, value, [sum(lengths)])

    def hiding(query, key, value, lengths):
        value = torch.cat([value[:-1], torch.zeros_like(value[-1:])])
        return kernels.training_path(query, key, value, lengths)

    for wrong in (leaking, hiding):
        assert max(kernels.roundings_off(wrong, tensors, [20, 20]).values()) > 3 * kernels.ROUNDINGS


def test_wrong_attention_is_found(run_ranks):
    run_ranks(1, check_wrong_attention_is_found)


def test_our_steps_are_measured_and_profiled_here(run_ranks, tmp_path):
    run_ranks(1, lambda: do(tmp_path, "ours", has_rows=True, has_profile=True))
    found = {one.name: one for one in read(tmp_path / "ours.jsonl")}
    assert set(found) == {
        *(f"ours {kind} {rows}" for kind, rows in (("mixed", 1), ("mixed", 2), ("captions", 2), ("text", 2))),
        *(f"kernel {number}" for number in range(1, 11)), "mixed step",
    }  # fmt: skip
    for one in list(found.values())[:4]:
        assert len(one.values["seconds"]) == SMALL.warmup + SMALL.steps
        assert one.values["flops"] > 0
    assert found["ours text 2"].values["targets"] == found["ours text 2"].values["positions"] == 4 * SMALL.length
    assert found["mixed step"].values["step_seconds"] > 0


def test_the_peer_is_measured_here(run_ranks, tmp_path):
    pytest.importorskip("transformers", reason="transformers, the peer, is not installed")
    sizes = {"captions": [[4, 1], [8, 1]], "mixed": [[4, 1]]}
    run_ranks(1, lambda: do(tmp_path, "peer", sizes=sizes, warmup=1, steps=1))
    found = read(tmp_path / "peer.jsonl")
    assert [one.name for one in found] == ["peer captions 4 1", "peer captions 8 1", "peer mixed 4 1"]
    assert all(len(one.values["seconds"]) == 2 for one in found)
    assert found[0].values["padded_positions"] <= found[1].values["padded_positions"]


def test_a_peer_that_does_not_fit_ends_its_process(run_ranks, tmp_path, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "timed", run_out)
    run_ranks(1, lambda: do(tmp_path, "peer", sizes={"text": [[1, 1], [1, 2]]}, warmup=1, steps=1))
    assert [one.absent for one in read(tmp_path / "peer.jsonl")] == ["does not fit into the GPU's memory"]


def test_experts_and_encoders_are_measured_here(run_ranks, tmp_path):
    run_ranks(1, lambda: do(tmp_path, "parts"))
    found = {one.name: one.values for one in read(tmp_path / "parts.jsonl")}
    assert list(found) == [
        "MoE experts grouped, 64 tokens", "MoE experts loop, 64 tokens",
        "encoder dinov2_small, the default at once", "encoder dinov2_small, 2 at once", "encoders together",
    ]  # fmt: skip
    assert all(value > 0 for values in found.values() for value in values.values())


def test_runs_are_configured_like_the_demo(tmp_path):
    given = Runs(SMALL, "cpu", tmp_path, Clock(time.monotonic() + 60))
    dense, moe = (configuration.load(given.path_of(name)) for name in ("dense", "moe"))
    assert (dense.model.experts, moe.model.experts) == (0, 8)
    assert dense.data == moe.data
    assert Path(dense.data.tokenizer).exists()
    demo = configuration.load(Path(__file__).parents[1] / "examples" / "demo.yaml")
    full: Config = runs.prepared(FULL, tmp_path, has_experts=False)
    for section, keys in {"model": ("layers", "hidden", "ffn", "heads"), "optimizer": ("learning_rate", "weight_decay"),
                          "data": ("pairs_per_step", "text_tokens_per_step", "sequence_length", "micro_batch_rows"),
                          "loss": ("text_weight",)}.items():  # fmt: skip
        for key in keys:
            assert getattr(getattr(full, section), key) == getattr(getattr(demo, section), key), key


# all of it


@pytest.mark.slow
def test_the_whole_check_runs_in_small_on_a_cpu(tmp_path):
    pytest.importorskip("transformers", reason="transformers, the peer, is not installed")
    words = [
        "gpu-check",
        "--scale",
        "small",
        "--minutes",
        "8",
        "--out",
        tmp_path / "a.json",
        "--page",
        tmp_path / "a.md",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sphinx", *map(str, words)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "a.json").read_text())
    absent = {one["name"]: one["absent"] for one in told["findings"] if one["absent"]}
    assert absent == {
        "attention varlen": "torch's varlen attention runs on CUDA only",
        "dense, GPU against CPU in fp32": "this device is the CPU itself",
        "moe, GPU against CPU in fp32": "this device is the CPU itself",
        "liger kernels against torch's in bf16": "runs on CUDA only",
        "transformer_engine kernels against torch's in bf16": "runs on CUDA only",
    }
    names = {one["name"] for one in told["findings"]}
    assert {
        "dense, resumed after step 2", "moe, resumed after step 2", "captions, over the best peer",
        "mixed, over the best peer", "encoders together", "demo-like run, seconds a step", "kernel 10",
        "start-up of dense, seconds to the first step",
    } <= names  # fmt: skip
    assert done.stdout.splitlines()[-3] == "right: pass, 7 of 7 bounds kept"
    assert (tmp_path / "a.md").read_text().count("\n## ") == 3
