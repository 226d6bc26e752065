"""What reading data imports: nothing of the engines, and nothing that only prepares data."""

import subprocess
import sys
from pathlib import Path

from test_layering import MODULES, PACKAGE, imports


def test_reading_data_imports_no_engine():
    """Each would cost seconds at the start of every process that only reads."""
    read = "batches, config, pixels, plan, sources"
    engines = {"deepspeed", "megatron", "timm", "transformers"}
    code = f"import sys; from megatron_sphinx.data import {read}; print({engines} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def reached_from(start: set[Path]) -> set[Path]:
    """The modules of the package that these import, and those that the imported ones import, wherever they do it."""
    files = {".".join(module.with_suffix("").parts): module for module in MODULES}
    reached, left = set(), set(start)
    while left:
        module = left.pop()
        reached.add(module)
        names = {name.removeprefix("megatron_sphinx.") for name in imports(module)}
        names |= {
            name.rpartition(".")[0] for name in names
        }  # of `from a.b import c` both a.b.c and a.b may be a module
        left |= {files[name] for name in names & files.keys()} - reached
    return reached


def test_a_run_needs_all_of_the_data_room_and_nothing_that_prepares():
    reached = reached_from({module for module in MODULES if module.parts[0] == "run"})
    assert {module for module in MODULES if module.parts[0] == "data"} <= reached
    assert not {str(module) for module in reached if module.parts[0] == "prepare"}
