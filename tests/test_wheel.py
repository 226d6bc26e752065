"""The built wheel, in a folder of its own and without the repository: data is prepared, a run made, weights handled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow  # each command is a process that imports everything anew

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(command: list[object], **options: object) -> str:
    """What a command prints; fails with all of that where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300, **options)
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Where the wheel is installed, built from a copy: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "megatron_sphinx", source / "megatron_sphinx", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source]
    done = subprocess.run([*map(str, build)], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode and "setuptools" in done.stderr and "No module named" in done.stderr:
        pytest.skip("the wheel cannot be built without a network: setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel])
    return folder / "site"


@pytest.fixture
def command(installed, tmp_path):
    """`command(*words)` is what the installed program prints, in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(installed)
    (tmp_path / "work").mkdir()

    def start(*words: object) -> str:
        return run([sys.executable, "-m", "megatron_sphinx", *words], cwd=tmp_path / "work", env=environment)

    return start


def test_an_installed_package_goes_from_pictures_to_mixed_weights(command, installed, tiny, tmp_path):
    work = tmp_path / "work"
    assert command("doctor").startswith(f"megatron-sphinx 0.1.0 in {installed}/megatron_sphinx, ")
    shutil.copytree(tiny.folder / "pictures", work / "pictures")
    shutil.copy(tiny.folder / "text.jsonl", work)
    shutil.copy(tiny.folder / "tokenizer.model", work)
    assert "pairs: 60 pairs in 1 shards, " in command(
        "prepare", "pairs", "pictures", "pairs", "--tokenizer", "tokenizer.model"
    )
    assert "text: 50 documents, " in command("prepare", "text", "text.jsonl", "text", "--tokenizer", "tokenizer.model")
    values = json.loads(json.dumps(tiny.values))
    values["run"]["folder"] = "run"
    values["data"] |= {"pairs": "pairs", "text": "text", "tokenizer": "tokenizer.model"}
    values["training"]["steps"], values["checkpoint"]["interval"] = 2, 1
    (work / "run.yaml").write_text(yaml.safe_dump(values))
    assert command("config", "--get", "run.folder", "run.yaml") == "run\n"
    assert [json.loads(line) for line in command("plan", "step", "run.yaml").splitlines()]
    assert "layouts can be run" in command("plan", "layouts", "run.yaml", "--gpus-per-node", "2")
    command("train", "run.yaml")
    assert len((work / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    steps = [f"run/checkpoints/step_0000000{number}" for number in (1, 2)]
    exported = command("convert", "run", "exported", "--to", "hf")
    mixed = command("mix", "--real", steps[0], "--synthetic", steps[1], "--beta", "0.25", "--output", "mixed")
    assert "tensors mixed" in mixed
    described = json.loads(command("inspect", "mixed", "--json"))
    assert described["format"] == "megatron"
    assert f"{described['parameters']['all']:,} parameters" in exported


def test_the_program_has_its_name(installed):
    program = installed / "bin" / "megatron-sphinx"
    said = run([program, "--version"], env=os.environ | {"PYTHONPATH": str(installed)}, cwd=installed.parent)
    assert said == "megatron-sphinx 0.1.0\n"
