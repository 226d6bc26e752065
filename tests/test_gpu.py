"""What CUDA does otherwise, on one GPU; `make test_gpu`. Each test is a process: this one does not see the GPU."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def start():
    """`start(*words)` runs the command where it sees the GPUs; its standard output. Skips where there is none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    visible = os.environ["GPUS_OF_TESTS"]
    environment |= {"OMP_NUM_THREADS": "4"} | ({} if visible == "all" else {"CUDA_VISIBLE_DEVICES": visible})
    look = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    has_driver = any(Path("/dev").glob("nvidia[0-9]*"))
    said = (
        subprocess.run(look, capture_output=True, text=True, check=True, env=environment).stdout if has_driver else ""
    )
    if said.strip() != "True":
        pytest.skip("needs a GPU that torch can use")

    def run(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_sphinx", *map(str, words)],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def found(start, tmp_path_factory):
    """What the check finds in small on the GPU, by name."""
    path = tmp_path_factory.mktemp("check") / "check.json"
    start("gpu-check", "--scale", "small", "--minutes", 10, "--out", path)
    told = json.loads(path.read_text())
    assert told["device"] == "cuda"
    return {one["name"]: one for one in told["findings"]}


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_the_gpu_computes_what_the_cpu_does(found, model):
    assert found[f"{model}, GPU against CPU in fp32"]["verdict"] == "pass"


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_run_on_the_gpu_goes_on_to_the_last_bit(found, model):
    assert found[f"{model}, resumed after step 2"]["verdict"] == "pass"


@pytest.mark.parametrize("path", ["as trained", "by document", "varlen"])
@pytest.mark.parametrize("rows", ["documents", "full row"])
def test_attention_is_right(found, path, rows):
    absent = found.get(f"attention {path}", {}).get("absent")
    if absent:
        pytest.skip(absent)
    assert found[f"attention {path}, {rows}"]["verdict"] == "pass"


def test_features_do_not_depend_on_their_batch(found):
    assert found["bits of features in other batches"]["verdict"] == "pass"


def test_the_profile_sees_kernels(found):
    assert 0 < found["mixed step"]["values"]["gpu_busy_share"] <= 1
    assert not found["kernel 1"]["values"]["kernel"].startswith("aten::")


def test_a_run_on_the_gpu_writes_a_trace_with_kernels(start, tiny, tmp_path):
    profile = {"start": 1, "steps": 1}
    config = tiny.write(tmp_path / "run.yaml", {"run.device": "cuda", "training.profile": profile})
    start("train", config)
    with gzip.open(tmp_path / "run" / "profile" / "rank_0_steps_1-1.json.gz") as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert {"kernel", "user_annotation"} <= kinds
    shares = [
        json.loads(text)["gpu_busy_share"] for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(share is None or 0 <= share <= 1 for share in shares)
