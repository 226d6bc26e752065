"""The package's dependency rules, checked on its source text."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_sphinx"
ORDER = [
    "errors", "parsing", "ranges", "values", "console", "paths", "remote", "lock", "saved", "unpickling", "settings",
    "tensors", "device", "liveness", "parallel", "model", "data", "prepare", "stage", "checkpoint", "generation",
    "training", "config_names", "config", "config_reference", "run", "serving", "evaluation", "cascades", "sizing",
    "benchmark", "gpu_check", "cli", "__main__",
]  # fmt: skip
OWNERS = {
    "deepspeed": {"training/deepspeed_setup.py", "gpu_check/peer.py"},
    "megatron.core.parallel_state": {"parallel/groups.py"},
    "megatron.core.tensor_parallel.random": {"parallel/seeding.py", "device.py"},
    "timm": {"model/visual_experts.py", "model/expert_files.py", "prepare/classes.py"},
    "av": {"generation/videos.py"},
    "ijson": {"evaluation/readers/rows.py"},
    "transformers": {"model/visual_experts.py", "gpu_check/peer.py", "cascades/sam.py"},
    "cv2": {"cascades/opencv.py"},
    "skimage": {"cascades/scikit_image.py"},
    "fsspec": {"data/files.py", "remote.py"},
    "upath": {"remote.py"},
    "megatron.core.datasets": {"data/text.py", "gpu_check/workload.py"},
    "pymupdf": {"prepare/pdf.py"},
    "gradio": {"serving/page.py"},
    "lmms_eval": {"evaluation/adapters/lmms_eval.py"},
    "vlmeval": {"evaluation/adapters/vlmevalkit.py"},
    "openpyxl": {"evaluation/exports.py"},
    "openai": {"serving/client.py"},
    "fastapi": {"serving/server.py"},
    "starlette": {"serving/server.py", "serving/chat_endpoint.py", "serving/exchange.py"},
    "uvicorn": {"serving/process.py"},
    "prometheus_client": {"serving/prometheus.py"},
    "xxhash": {"checkpoint/digests.py"},
}
LIGHT = ["errors.py", "parsing.py", "ranges.py", "values.py", "paths.py", "config.py", "config_names.py",
         "config_reference.py", "parallel/layout.py",
         "model/architecture.py", "model/views.py",
         "data/config.py", "data/packing.py", "data/plan.py", "data/shuffle.py", "data/streams.py",
         "prepare/boxes.py", "prepare/coco.py", "prepare/lines.py", "prepare/records.py", "prepare/tasks.py",
         "generation/requests.py", "generation/ticks.py",
         *(f"evaluation/metrics/{path.name}" for path in sorted((PACKAGE / "evaluation/metrics").glob("*.py"))),
         "stage/dealing.py", "liveness/progress.py", "liveness/stalls.py", "training/divergence.py",
         "training/memory.py", "training/optimizer.py", "checkpoint/digests.py", "checkpoint/formats/registry.py",
         "saved.py", "tensors/entries.py", "tensors/read.py", "tensors/write.py", "tensors/distributed.py",
         "checkpoint/convert.py", "checkpoint/streams.py", "checkpoint/inspect.py", "checkpoint/weight_names.py",
         "sizing/activations.py", "sizing/counts.py", "sizing/hardware.py", "sizing/memory.py",
         "sizing/search.py", "sizing/step_time.py", "sizing/work.py", "sizing/published.py"]  # fmt: skip
MODULES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def imports(module: Path, *, of_top_only: bool = False) -> set[str]:
    """Every module that a file imports, in the form a.b.c."""
    tree = ast.parse((PACKAGE / module).read_text())
    nodes = tree.body if of_top_only else list(ast.walk(tree))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down(module):
    own = ORDER.index(module.parts[0].removesuffix(".py"))
    for name in imports(module):
        parts = name.split(".")
        if parts[0] == "megatron_sphinx" and parts[1] != "__version__":
            other = ORDER.index(parts[1])
            assert other < own or (other == own and len(module.parts) > 1), f"{module} may not import {name}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_foreign_libraries_have_owners(module):
    for name in imports(module):
        for owned, owners in OWNERS.items():
            if name == owned or name.startswith(f"{owned}."):
                assert str(module) in owners, f"only {sorted(owners)} may import {owned}"


@pytest.mark.parametrize("module", LIGHT)
def test_planning_needs_no_torch(module):
    assert not {name.split(".")[0] for name in imports(Path(module))} & {"torch", "megatron", "deepspeed", "timm"}


def test_no_module_stands_outside_the_order():
    assert {module.parts[0].removesuffix(".py") for module in MODULES} == set(ORDER)


def imported_modules(module: Path) -> set[Path]:
    """The package's own modules that a file imports as it is loaded."""
    names = {name.removeprefix("megatron_sphinx.") for name in imports(module, of_top_only=True)}
    paths = {Path(*name.split(".")).with_suffix(".py") for name in names}
    return (paths | {path.parent.with_suffix(".py") for path in paths if path.parent.name}) & set(MODULES)


@pytest.mark.parametrize("module", ["checkpoint/mix.py", "checkpoint/convert.py"])
def test_tools_for_checkpoints_load_no_torch(module):
    """Nor does any module that they import, nor a format, which is imported by its name."""
    left, seen = {Path(module), *(path for path in MODULES if path.parts[:2] == ("checkpoint", "formats"))}, set[Path]()
    while left:
        one = left.pop()
        seen.add(one)
        left |= imported_modules(one) - seen
    found = {str(path): {name.split(".")[0] for name in imports(path, of_top_only=True)} for path in seen}
    assert not {path for path, names in found.items() if names & {"torch", "megatron", "deepspeed", "transformers"}}
    assert "tensors/write.py" in found


def test_modules_import_each_other_in_one_direction():
    TopologicalSorter({module: imported_modules(module) for module in MODULES}).prepare()  # raises CycleError


def test_no_room_is_more_than_a_fifth_of_the_package():
    lines = Counter[str]()
    for module in MODULES:
        lines[module.parts[0]] += len((PACKAGE / module).read_text().splitlines())
    room, count = lines.most_common(1)[0]
    assert count <= lines.total() / 5, f"{room}: {count} of {lines.total()} lines"
