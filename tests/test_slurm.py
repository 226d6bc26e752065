"""Jobs of slurm/ on the cluster that `sinfo` finds; every interruption ends in the metrics of a run without one.

On a cluster whose nodes do not share this machine's /tmp, give pytest a --basetemp that they do share. Where a node may
be crashed, SLURM_TEST_CRASH_NODE and SLURM_TEST_BOOT_NODE say how: commands in which {} is the node.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from evaluation_double import write_pope
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sphinx.__main__ import main

pytestmark = pytest.mark.timeout(1500)  # every process of a job imports everything anew

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "slurm").iterdir())
SETTINGS = {"training.steps": 80, "checkpoint.interval": 10, "run.print_interval": 20, "parallel.encoder": 1}
EXACT = ("step", "sample_ids", "loss", "loss_pairs", "loss_text", "gradient_norm", "learning_rate", "bad_pairs")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def call(*words: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)


@dataclass
class Job:
    """A submitted job.

    Attributes:
        number: its id.
        folder: where it was submitted.
    """

    number: str
    folder: Path
    last: dict[str, str] = field(default_factory=dict)

    def look(self) -> dict[str, str]:
        """What Slurm knows of it now."""
        found = call("scontrol", "--oneliner", "show", "job", self.number)
        assert not found.returncode, found.stderr
        self.last = dict(re.findall(r"(\w+)=(\S*)", found.stdout))
        return self.last

    def wait(self, seconds: float = 400) -> tuple[str, int]:
        """Its last state, and how often it was restarted. Slurm lets a requeued job wait for a while."""
        deadline = time.monotonic() + seconds
        while (state := self.look()["JobState"]) not in ENDED:
            assert time.monotonic() < deadline, f"{state} after {seconds} s\n{self.text()}"
            time.sleep(0.3)
        return state, int(self.last["Restarts"])

    def text(self) -> str:
        """The job's own log, and all that its ranks printed."""
        logs = [*self.folder.glob(f"*-{self.number}.log"), *self.folder.glob(f"*/slurm/{self.number}/*.log")]
        return "\n".join(f"--- {log}\n{log.read_text()}" for log in logs)


@dataclass
class Cluster:
    """Where jobs are submitted.

    Attributes:
        folder: where their configurations and runs live.
        nodes: names of the idle nodes.
    """

    folder: Path
    nodes: list[str]
    jobs: list[Job] = field(default_factory=list)

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"SPHINX_ROOT": str(ROOT), "SPHINX_VENV": sys.prefix} | more

    def submit(self, *words: object, **environment: str) -> Job:
        """`sbatch` with these arguments."""
        made = call("sbatch", "--parsable", *words, cwd=self.folder, env=self.environment(**environment))
        assert not made.returncode, made.stderr
        return self.follow(made.stdout.strip())

    def follow(self, number: str) -> Job:
        self.jobs.append(Job(number, self.folder))
        return self.jobs[-1]


def idle_nodes() -> list[str]:
    """Names of the nodes that no job is on."""
    return sorted(set(call("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").stdout.split()))


@pytest.fixture
def cluster(tmp_path):
    """The cluster, if there is one with three idle nodes that see `tmp_path`."""
    if shutil.which("sinfo") is None:
        pytest.skip("no Slurm here: sinfo is not found")
    found = call("sinfo", "--noheader", "--Node", "--format=%N")
    if found.returncode:
        pytest.skip(f"no Slurm cluster answers: {found.stderr.strip().splitlines()[-1]}")
    if (count := len(set(found.stdout.split()))) < 3:
        pytest.skip(f"three nodes are needed, Slurm has {count}")
    deadline = time.monotonic() + 120  # the jobs of the test before may still be completing, a node of it be booting
    while len(nodes := idle_nodes()) < 3:
        if time.monotonic() > deadline:
            pytest.skip(f"three idle nodes are needed, Slurm has {len(nodes)}")
        time.sleep(0.5)
    if call("srun", "--nodes=1", "test", "-d", tmp_path).returncode:
        pytest.skip(f"nodes do not see {tmp_path}; give a --basetemp that they share")
    cluster = Cluster(tmp_path, nodes)
    yield cluster
    for job in cluster.jobs:
        if job.look()["JobState"] not in ENDED:
            call("scancel", job.number)


@pytest.fixture(scope="module")
def references():
    """What `uninterrupted` gives, once it is known."""
    return []


@pytest.fixture
def uninterrupted(train, references):
    """The metrics of the run that the jobs here repeat, on ranks of one machine and without interruption."""
    if not references:
        references.append(exact(train(3, SETTINGS, name="whole").folder))
    return references[0]


def lines_of(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


def exact(folder: Path) -> list[list]:
    """All of a run's metrics that do not depend on the clock."""
    return [[line[name] for name in EXACT] for line in lines_of(folder)]


def wait_for_steps(job: Job, folder: Path, steps: int) -> None:
    """Until the job has done so many steps."""
    deadline = time.monotonic() + 200
    while len(lines_of(folder)) < steps:
        assert job.look()["JobState"] not in ENDED, job.text()
        assert time.monotonic() < deadline, job.text()
        time.sleep(0.1)


def test_shellcheck_finds_nothing():
    if (shellcheck := shutil.which("shellcheck", path=f"{sys.prefix}/bin:{os.environ['PATH']}")) is None:
        pytest.skip("shellcheck is not installed")
    found = call(shellcheck, "--external-sources", *SCRIPTS, ROOT / ".ci" / "run", cwd=ROOT)
    assert not found.returncode, found.stdout


@pytest.mark.parametrize("script", ["chain.sh", "benchmark.sh"])
def test_what_submits_jobs_says_how_it_is_used(script):
    refused = call(ROOT / "slurm" / script)
    assert refused.returncode == 2
    assert refused.stderr.startswith("usage: ")


@pytest.mark.slow
def test_what_cannot_be_started_is_said(cluster, tiny):
    allocation = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": ",".join(cluster.nodes[:2]), "SLURM_NNODES": "2"}
    refused = call(ROOT / "slurm" / "launch.sh", "true",
                   env=cluster.environment(LAUNCHER="torchrun", SLURM_NTASKS="3", **allocation))  # fmt: skip
    assert refused.returncode == 2
    assert refused.stderr == "LAUNCHER=torchrun: 3 ranks do not divide into 2 nodes; use LAUNCHER=srun\n"
    config = tiny.write(cluster.folder / "run.yaml", {"training.step": 3})
    jobs = [cluster.submit("--ntasks=1", ROOT / "slurm" / "train.sbatch", config, SPHINX_ROOT=str(root))
            for root in (cluster.folder, ROOT)]  # fmt: skip
    said = ["holds no slurm/env.sh: call sbatch in the repository's root, or set SPHINX_ROOT to it",
            "megatron-sphinx config: training.step: unknown key; did you mean training.steps?"]  # fmt: skip
    for job, message in zip(jobs, said, strict=True):
        assert job.wait() == ("FAILED", 0)
        assert job.last["ExitCode"] == "2:0"
        assert message in job.text()


@pytest.mark.slow
def test_requeued_on_three_nodes_a_job_goes_on_with_the_code_it_began_with(cluster, tiny, uninterrupted):
    config = tiny.write(cluster.folder / "run.yaml", SETTINGS)
    code = cluster.folder / "code"
    for name in ("megatron_sphinx", "slurm", "tools"):
        shutil.copytree(ROOT / name, code / name)
    words = ["--nodes=3", "--ntasks-per-node=1", code / "slurm" / "train.sbatch", config]
    job = cluster.submit(*words, SPHINX_ROOT=str(code))
    wait_for_steps(job, cluster.folder / "run", 15)
    shutil.rmtree(code)
    config.write_text("nonsense")
    assert not call("scontrol", "requeue", job.number).returncode
    assert job.wait() == ("COMPLETED", 1), job.text()
    assert exact(cluster.folder / "run") == uninterrupted
    kept = cluster.folder / "run" / "slurm" / job.number
    assert len([*kept.glob("*.log")]) == 3, "a file of each node"
    assert "rank 2: encoder" in job.text()
    assert "resumed after step " in job.text()
    assert not [*cluster.folder.glob(".sphinx-*")]


@pytest.mark.slow
def test_usr1_before_the_time_limit_saves_and_requeues(cluster, tiny, uninterrupted):
    config = tiny.write(cluster.folder / "run.yaml", SETTINGS)
    job = cluster.submit("--nodes=2", "--ntasks=3", ROOT / "slurm" / "train.sbatch", config)
    wait_for_steps(job, cluster.folder / "run", 5)
    assert not call("scancel", "--batch", "--signal=USR1", job.number).returncode
    assert job.wait() == ("COMPLETED", 1), job.text()
    assert exact(cluster.folder / "run") == uninterrupted
    assert "stopped by a signal, the state is saved; requeued" in job.text()
    first, last = sorted((cluster.folder / "run" / "slurm" / job.number).glob("*.log"))
    assert "language" in first.read_text()
    assert set(re.findall(r"\[(\w+) rank (\d)\]", last.read_text())) == {("encoder", "2")}


@pytest.mark.slow
def test_torchrun_on_two_nodes_is_requeued_as_well(cluster, tiny, uninterrupted):
    config = tiny.write(cluster.folder / "run.yaml", SETTINGS)
    script = ROOT / "slurm" / "train.sbatch"
    job = cluster.submit("--nodes=2", "--ntasks-per-node=2", script, config, "parallel.encoder=2", LAUNCHER="torchrun")
    wait_for_steps(job, cluster.folder / "run", 5)
    assert not call("scancel", "--batch", "--signal=USR1", job.number).returncode
    assert job.wait() == ("COMPLETED", 1), job.text()
    assert exact(cluster.folder / "run") == uninterrupted


@pytest.mark.slow
def test_a_node_crashes_and_the_job_goes_on_on_others(cluster, tiny, uninterrupted):
    commands = [os.environ.get(f"SLURM_TEST_{name}_NODE") for name in ("CRASH", "BOOT")]
    if not all(commands):
        pytest.skip("SLURM_TEST_CRASH_NODE and SLURM_TEST_BOOT_NODE do not say how a node is crashed and booted here")
    config = tiny.write(cluster.folder / "run.yaml", SETTINGS)
    job = cluster.submit("--nodes=2", "--ntasks=3", ROOT / "slurm" / "train.sbatch", config)
    wait_for_steps(job, cluster.folder / "run", 15)
    node = call("scontrol", "show", "hostnames", job.last["NodeList"]).stdout.split()[-1]
    crash, boot = (shlex.split(command.format(node)) for command in commands)
    try:
        assert not call(*crash).returncode
        assert not call("scontrol", "update", f"nodename={node}", "state=down", "reason=test").returncode
        assert job.wait() == ("COMPLETED", 1), job.text()
    finally:
        assert not call(*boot).returncode
        call("scontrol", "update", f"nodename={node}", "state=resume")
    assert node not in call("scontrol", "show", "hostnames", job.last["NodeList"]).stdout.split()
    assert exact(cluster.folder / "run") == uninterrupted


@pytest.mark.slow
def test_a_crash_is_not_requeued(cluster, tiny):
    """Nor under torchrun, where an earlier run was stopped by a signal."""
    config = tiny.write(cluster.folder / "run.yaml", {"optimizer.learning_rate": 1e30})
    (cluster.folder / "run").mkdir()
    (cluster.folder / "run" / "ended.json").write_text('{"status": 75}')
    job = cluster.submit("--ntasks=1", ROOT / "slurm" / "train.sbatch", config, LAUNCHER="torchrun")
    assert job.wait() == ("FAILED", 0), job.text()
    assert job.last["ExitCode"] == "1:0"
    assert "failed with status 1, not requeued" in job.text()
    assert "loss is nan" in job.text()


@pytest.mark.slow
def test_usr1_is_heard_by_ranks_that_only_start_and_restarts_have_a_bound(cluster, tiny):
    config = tiny.write(cluster.folder / "run.yaml", {"training.steps": 500})
    job = cluster.submit("--ntasks=1", ROOT / "slurm" / "train.sbatch", config, SPHINX_MAX_REQUEUES="0")
    while "output of the ranks" not in job.text():
        time.sleep(0.05)
    assert not call("scancel", "--batch", "--signal=USR1", job.number).returncode
    assert job.wait() == ("FAILED", 0), job.text()
    assert job.last["ExitCode"] == "75:0"
    assert len(lines_of(cluster.folder / "run")) < 500
    assert "restarted 0 times, SPHINX_MAX_REQUEUES=0: gives up; submit it again to go on" in job.text()
    assert not call("scontrol", "requeue", job.number).returncode
    assert job.wait() == ("FAILED", 1), job.text()
    assert "restarted 1 times, SPHINX_MAX_REQUEUES=0: gives up" in job.text()


@pytest.fixture
def chain(cluster, tiny):
    """`chain(**environment)` submits the chain, of one rank a job; its jobs, in order."""

    def submit(**environment: str) -> list[Job]:
        names = ("real", "synthetic", "stage2")
        configs = [tiny.write(cluster.folder / f"{name}.yaml", {"training.steps": 2}) for name in names]
        made = call(ROOT / "slurm" / "chain.sh", *configs, "--ntasks=1", cwd=cluster.folder,
                    env=cluster.environment(BETA="0.6", **environment))  # fmt: skip
        assert not made.returncode, made.stderr
        jobs = dict(reversed(line.split()) for line in made.stdout.splitlines())
        first = ["convert"] if "CONVERT" in environment else []
        assert [*jobs] == [*first, "real", "synthetic", "theta_mix", "stage2"]
        return [cluster.follow(number) for number in jobs.values()]

    return submit


@pytest.mark.slow
def test_a_chain_goes_from_a_released_model_and_captions_to_tasks(cluster, chain, tiny):
    shape = tiny.values["model"]
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=shape["hidden"], intermediate_size=shape["ffn"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["groups"],
        vocab_size=shape["vocabulary"], rms_norm_eps=1e-5,
    ))  # fmt: skip
    model.save_pretrained(cluster.folder / "llama")
    convert, *jobs = chain(CONVERT=str(cluster.folder / "llama"))
    assert convert.wait() == ("COMPLETED", 0), convert.text()
    for job in jobs:
        assert job.wait() == ("COMPLETED", 0), job.text()
    begin = f"begins with the weights of {cluster.folder}/real/converted, new projections and tags"
    assert begin in jobs[0].text()
    assert f"begins with the weights of {cluster.folder}/real/checkpoints/step_00000002" in jobs[1].text()
    assert f"{cluster.folder}/stage2/theta_mix: " in jobs[2].text()
    assert f"begins with the weights of {cluster.folder}/stage2/theta_mix" in jobs[3].text()
    mixed = json.loads((cluster.folder / "stage2" / "theta_mix" / "checkpoint.json").read_text())["interpolation"]
    assert [one["share"] for one in mixed["inputs"]] == [0.6, 0.4]
    assert len(lines_of(cluster.folder / "stage2")) == 2


@pytest.mark.slow
def test_a_chain_ends_with_the_job_that_fails(chain):
    jobs = chain(LAUNCHER="mpirun")
    assert [job.wait()[0] for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert "LAUNCHER=mpirun: unknown; use srun or torchrun" in jobs[0].text()


@pytest.mark.slow
def test_an_evaluation_over_two_nodes_goes_on_after_its_time_limit_and_is_that_of_one_process(
    cluster, train, tiny, run_ranks
):
    run = train(1, {"training.steps": 2, "data.sequence_length": 400})
    data, alone, job_output = (cluster.folder / name for name in ("data", "alone", "together"))
    write_pope(data, sorted((tiny.folder / "pictures").glob("*.png"))[:4], each=200)
    words = ["pope", "--data", str(data), "--model", str(run.folder), "--cache-gib", "0.01", "--output"]
    run_ranks(1, lambda: main(["evaluate", *words, str(alone)]))
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", ROOT / "slurm" / "evaluate.sbatch", *words, job_output)
    journal, deadline = job_output / "pope" / "answers.jsonl.partial", time.monotonic() + 200
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 20:
        assert job.look()["JobState"] not in ENDED, job.text()
        assert time.monotonic() < deadline, job.text()
        time.sleep(0.05)
    assert not call("scancel", "--signal=USR1", "--batch", job.number).returncode
    assert job.wait() == ("COMPLETED", 1), job.text()
    assert "the time limit is near: requeued" in job.text()
    for name in ("pope/answers.jsonl", "report.json", "report.md"):
        assert (job_output / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.slow
def test_a_benchmark_over_numbers_of_nodes_ends_in_one_report(cluster, tiny):
    config = tiny.write(cluster.folder / "run.yaml", {"data.pairs_per_step": 4, "data.text_tokens_per_step": 2000})
    made = call(
        ROOT / "slurm" / "benchmark.sh", config, "data.workers=1", "--ntasks-per-node=1", cwd=cluster.folder,
        env=cluster.environment(NODES="1 2", SPHINX_BENCHMARK="--steps 2 --warmup 1 --repeats 1"),
    )  # fmt: skip
    assert not made.returncode, made.stderr
    jobs = dict(reversed(line.split()) for line in made.stdout.splitlines())
    assert [*jobs] == ["nodes_1", "nodes_2", "report"]
    for number in jobs.values():
        job = cluster.follow(number)
        assert job.wait() == ("COMPLETED", 0), job.text()
    found = json.loads(job.text().splitlines()[-1])
    assert found["points"] == 3
    assert {(curve["kind"], *curve["ranks"]) for curve in found["curves"]} == {("strong", 1, 2), ("weak", 1, 2)}
    folder = cluster.folder / "runs" / "benchmark"
    assert (folder / "report.md").is_file()
    points = [json.loads(path.read_text()) for path in folder.glob("nodes_2/*/points/*.json")]
    assert [len(point["hosts"]) for point in points] == [2, 2]
    assert sorted(point["config"]["data"]["pairs_per_step"] for point in points) == [4, 8]
