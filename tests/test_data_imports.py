"""What reading data imports: nothing of the engines, and nothing that only prepares data."""

import subprocess
import sys
from pathlib import Path

from test_layering import MODULES, PACKAGE, imports

ENGINES = {"deepspeed", "megatron", "timm", "transformers"}


def imported_by(modules: str, libraries: set[str]) -> str:
    """Which of some libraries a process has imported once it has imported these modules."""
    code = f"import sys; from megatron_sphinx.{modules}; print(sorted({libraries} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return done.stdout


def test_reading_data_imports_no_engine():
    """Each would cost seconds at the start of every process that only reads."""
    assert imported_by("data import batches, config, pixels, plan, sources", ENGINES) == "[]\n"


def test_what_prepares_data_imports_nothing_that_is_slow():
    """So that its commands answer to --help at once."""
    rooms = "prepare import conversations, documents, marks, pairs, tasks, text"
    assert imported_by(rooms, ENGINES | {"pyarrow", "pymupdf", "torch", "webdataset"}) == "[]\n"


def test_preparing_text_and_pairs_imports_no_engine(tiny, tmp_path):
    """They would take longer to import than small data takes to prepare."""
    (tmp_path / "t.jsonl").write_text('{"text": "red paint"}\n')
    names = f"{str(tmp_path / 't.jsonl')!r}, {str(tmp_path / 'out')!r}, {str(tiny.folder / 'tokenizer.model')!r}"
    code = (
        f"cli import main; file, out, model = {names}; "
        "main.main(['prepare', 'text', file, out, '--tokenizer', model]); "
        f"main.main(['prepare', 'pairs', {str(tiny.folder / 'pictures')!r}, out + '2', '--tokenizer', model])"
    )
    assert imported_by(code, ENGINES | {"torch"}).splitlines()[-1] == "[]"


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
