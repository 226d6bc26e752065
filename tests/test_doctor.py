"""The page that `doctor` prints, and what it takes for broken."""

import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_sphinx.__main__ import main
from megatron_sphinx.cli import doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def page(capsys):
    """`page(*words)` is the exit status of doctor, and the lines that it prints."""

    def run(*words: object) -> tuple[int, list[str]]:
        status = main(["doctor", *map(str, words)])
        out, error = capsys.readouterr()
        assert error == ""
        return status, out.splitlines()

    return run


def test_the_page_says_what_there_is_and_what_a_run_will_use(page, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("SLURM_JOB_ACCOUNT", "nobody's business")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    status, lines = page(tiny.write(tmp_path / "c.yaml"), "run.folder=" + str(tmp_path / "a" / "b"))
    values = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines if line.startswith("  "))
    assert (status, lines[-1]) == (0, "all that every run needs is there")
    assert lines[0].startswith(f"megatron-sphinx 0.1.0 in {ROOT / 'megatron_sphinx'}, Python 3.")
    assert all(values[name] == metadata.version(name) for name in doctor.REQUIRED)
    assert values["flash-attn"] == "not installed (for transformer-engine's attention)"
    assert (values["device"], values["collectives"]) == ("cpu", "gloo")
    assert values["attention"] == "torch's scaled_dot_product_attention"
    assert values["kernels"].startswith("torch 2.")
    assert (values["SLURM_PROCID"], values["MASTER_ADDR"]) == ("3", "node1")
    assert values["CUDA_VISIBLE_DEVICES"] == "(empty)"
    assert "SLURM_JOB_ACCOUNT" not in values
    free = float(values[str(tmp_path / "a" / "b")].partition(" GB free")[0].replace(",", ""))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.2, abs=1)
    assert not (tmp_path / "a").exists(), "nothing is made"


def test_kernels_that_a_run_cannot_have_are_broken(page, tiny, tmp_path):
    status, lines = page(tiny.write(tmp_path / "c.yaml"), "model.kernels=liger")
    assert status == 1
    assert lines[-1].startswith("broken: model.kernels=liger: runs on GPUs only")


def test_without_a_configuration_the_page_is_of_this_folder(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, lines = page()
    assert status == 0
    assert f"  {tmp_path}  " in lines[lines.index("run folder") + 1]


def test_a_required_package_that_does_not_import_is_broken(page, monkeypatch):
    monkeypatch.setitem(doctor.REQUIRED, "webdataset", "no_such_module_here")
    monkeypatch.setitem(sys.modules, "timm", None)
    status, lines = page()
    assert status == 1
    assert lines[-2:] == [
        "broken: timm: not installed",
        "broken: webdataset: not installed",
    ]
    assert "what a run will use" not in lines


def test_without_torch_the_page_is_printed_nevertheless(page, monkeypatch, tiny, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    status, lines = page(tiny.write(tmp_path / "c.yaml"))
    assert (status, lines[-1]) == (1, "broken: torch: not installed")
    assert "devices" not in lines
    assert "run folder" in lines


def test_a_package_that_fails_while_it_is_imported_is_one_line(page, tmp_path, monkeypatch):
    (tmp_path / "rotten.py").write_text("print('noise')\nraise OSError('undefined symbol:\\n  _ZN3')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(doctor.OPTIONAL, "rotten", ("rotten", "nothing"))
    status, lines = page()
    assert status == 0, "no run needs it"
    (line,) = [line for line in lines if line.startswith("  rotten")]
    assert line.endswith("does not import: OSError: undefined symbol: _ZN3 (for nothing)")
    assert not [line for line in lines if "noise" in line]


def test_a_package_of_another_version_is_broken(page, monkeypatch):
    required = ["torch>=99,<100", "timm>=0.1", "shtab>=99; extra == 'completion'", "no-such-package>=1"]
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    status, lines = page()
    assert status == 1
    assert lines[-1] == f"broken: torch: {metadata.version('torch')} is installed, <100,>=99 is needed"


def test_a_device_that_a_run_would_be_refused_is_broken(page, tiny, tmp_path):
    status, lines = page(tiny.write(tmp_path / "c.yaml", {"run.device": "cuda"}))
    assert status == 1
    assert lines[-1].startswith("broken: run.device=cuda: rank 0 on host ")
    assert "sees no GPU" in lines[-1]


def test_a_run_folder_that_cannot_be_written_is_broken(page, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    status, lines = page(tiny.write(tmp_path / "c.yaml"), f"run.folder={tmp_path}/file/run")
    assert status == 1
    assert (
        lines[-1] == f"broken: run.folder={tmp_path}/file/run: {tmp_path}/file cannot be written; give another folder"
    )


def test_a_wrong_configuration_is_the_users_mistake(tiny, tmp_path, capsys):
    assert main(["doctor", str(tiny.write(tmp_path / "c.yaml")), "run.foldr=x"]) == 2
    assert capsys.readouterr() == ("", "megatron-sphinx doctor: run.foldr: unknown key; did you mean run.folder?\n")


def test_all_that_an_installation_asks_for_is_looked_at():
    """What setup.py requires, and the extras that users install."""
    text = (ROOT / "setup.py").read_text()
    required = re.findall(
        r'^        "([\w-]+)[^"]*",$', text.partition("install_requires=[")[2].partition("]")[0], re.MULTILINE
    )
    assert set(required) == doctor.REQUIRED.keys()
    extras = re.findall(r'^[A-Z]+ = \["([\w-]+)', text, re.MULTILINE)
    looked_at = {
        "transformers", "pymupdf", "shtab", "liger-kernel", "gguf", "fastapi", "gradio", "av", "openai",
        "universal-pathlib", "opencv-python-headless",
    }  # fmt: skip
    assert set(extras) == looked_at <= doctor.OPTIONAL.keys()
