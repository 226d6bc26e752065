"""The tools for checkpoints start fast since they import no torch, whatever format they read and write."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mixes import SMALL, is_same, make, tensors

ROOT = Path(__file__).parents[1]
TOOLS = """
import json, sys
from pathlib import Path
sys.modules.update(dict.fromkeys(("torch", "megatron", "deepspeed", "transformers", "timm")))  # none can be imported
from megatron_sphinx.checkpoint import inspect
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mix import interpolate
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.model.architecture import LanguageConfig

folder, shape = Path(sys.argv[1]), LanguageConfig(**json.loads(sys.argv[2]))
for form in sys.argv[3:]:
    one, other = (folder / f"{form}_{number}" for number in (1, 2))
    convert(folder / "1", one, form, WriteOptions(), verify=form != "torch_dist")
    convert(folder / "2", other, form, WriteOptions())
    convert(one, folder / f"{form}_back", "hf", WriteOptions(), shape=shape, verify=True)
    first, second = (open_checkpoint(path, shape) for path in (one, other))
    assert inspect.digests(first) != inspect.digests(second)
    assert inspect.total(inspect.compare(first, second)).norm
    interpolate([one, other], {folder / f"{form}_mix": (0.5, 0.5)}, shape=shape)
print("done", [name for name in sys.modules if name.startswith("torch.")])
"""
FORMS = ("hf", "internlm2", "meta", "accessory", "megatron", "torch_dist")


def test_no_tool_for_checkpoints_imports_torch(tmp_path):
    sources = [make(tmp_path / str(seed), seed) for seed in (1, 2)]
    done = subprocess.run(
        [sys.executable, "-c", TOOLS, str(tmp_path), json.dumps(SMALL.shape), *FORMS],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["done []"], done.stderr
    for form in FORMS:
        assert is_same(tensors(tmp_path / f"{form}_back"), tensors(sources[0])), form


def test_a_wrong_path_is_refused_before_anything_is_read(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sphinx", "convert", str(tmp_path / "none"), "out", "--to", "hf"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode
    assert done.stderr.splitlines()[-1].endswith("none: no such folder; give the folder of a checkpoint")
