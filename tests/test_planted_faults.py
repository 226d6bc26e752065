"""The faults that tools/mutate.py plants: each still has its place in the package. Planting them takes minutes."""

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MUTATE = runpy.run_path(str(ROOT / "tools" / "mutate.py"))
FAULTS = MUTATE["read_faults"]()


def test_there_are_thirty_in_many_rooms():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    assert len({fault.place(ROOT).parent for fault in FAULTS}) >= 8


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_one_place_and_leaves_python(fault):
    path = fault.place(ROOT)
    whole = path.read_text()
    broken = ast.dump(ast.parse(whole.replace(fault.text, fault.instead)))
    assert broken != ast.dump(ast.parse(whole))
    assert fault.tests
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in fault.tests)


def test_a_passage_that_is_gone_is_said():
    with pytest.raises(ValueError, match="x: the passage stands 0 times in the package, it must once: nowhere at all"):
        MUTATE["Fault"](name="x", text="nowhere at all", instead="", tests=("test_plan",)).place(ROOT)
