"""Formats as records: a seventh one, registered here, is converted, mixed and inspected like those of the package."""

import ast
import json
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from llamas import assert_same_weights, drawn_model, extras_of, save, shape_of
from numpy.lib import format as npy
from safetensors.torch import save_file

from megatron_sphinx.checkpoint import inspect
from megatron_sphinx.checkpoint.convert import convert, task_of
from megatron_sphinx.checkpoint.formats import registry
from megatron_sphinx.checkpoint.formats.format import Format, PlannedFile, SourceCheckpoint, WriteOptions, WritePlan
from megatron_sphinx.checkpoint.mapping.axes import CANONICAL_AXES, Model
from megatron_sphinx.checkpoint.mapping.conversion import TensorSource
from megatron_sphinx.checkpoint.mapping.rules import canonical_rules, specs_of
from megatron_sphinx.checkpoint.mix import interpolate
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.tensors.dtypes import BFLOAT16, FLOAT32
from megatron_sphinx.tensors.entries import Entry
from megatron_sphinx.tensors.write import TensorFile

ROOT = Path(__file__).parents[1]
# The toy: each weight, layers stacked, under its canonical name in one .npz, the shape of the model in model.json.
NPZ, RULES = "weights.npz", canonical_rules(CANONICAL_AXES)


class NpzFile(TensorFile):
    """Collects tensors and writes them when it is closed."""

    def __init__(self, path, contents):
        self.path, self.contents = path, contents
        self.data = {name: bytearray() for name in contents}

    def append(self, name, data):
        self.data[name] += data

    def append_range(self, *_):
        return 0

    def close(self):
        arrays = {name: np.frombuffer(self.data[name], np.float32).reshape(shape)
                  for name, (shape, _) in self.contents.items()}  # fmt: skip
        np.savez(self.path, **arrays)


def read_npz(path: Path) -> dict[str, Entry]:
    entries = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        for member in archive.infolist():
            raw.seek(member.header_offset + 26)
            start = member.header_offset + 30 + sum(np.frombuffer(raw.read(4), "<u2").tolist())
            raw.seek(start)
            npy.read_magic(raw)
            shape, _, _ = npy.read_array_header_1_0(raw)
            entries[member.filename.removesuffix(".npy")] = Entry.contiguous(path, raw.tell(), shape, FLOAT32)
    return entries


def open_npz(folder: Path, _: LanguageConfig | None) -> SourceCheckpoint:
    values = json.loads((folder / "model.json").read_text())
    model = Model(LanguageConfig(**values.pop("language")), **values)
    entries = {(NPZ, name): entry for name, entry in read_npz(folder / NPZ).items()}
    source = TensorSource(str(folder), list(specs_of(RULES, model, NPZ)), entries)
    return SourceCheckpoint(folder, "npz", "one file", model, source)


def plan_npz(model: Model, options: WriteOptions, encoders) -> WritePlan:
    values = {"channels": model.channels, "queries": model.queries, "has_skip_token": model.has_skip_token}
    about = {"language": model.language.shape, **values}
    return WritePlan([PlannedFile(NPZ, tuple(specs_of(RULES, model, NPZ)))], {"model.json": about})


FORMAT = Format(
    name="npz",
    is_here=lambda folder: (folder / NPZ).is_file(),
    open=open_npz,
    plan=plan_npz,
    files=(NPZ,),
    companions=frozenset({"small.pt"}),
    dtype=FLOAT32,
    read_file=read_npz,
    create_file=NpzFile,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The toy is known while a test runs, as a format of a user's own module would be."""
    monkeypatch.setattr(registry, "_MODULES", dict(registry._MODULES))
    monkeypatch.setitem(sys.modules, "toy_npz", sys.modules[__name__])
    registry.register("npz", "toy_npz")


CASES = [(other, experts) for other in ("hf", "internlm2", "meta", "accessory", "megatron", "torch_dist")
         for experts in (0, 4) if (other, experts) != ("internlm2", 4)]  # fmt: skip


@pytest.mark.parametrize(("other", "experts"), CASES)
def test_a_seventh_format_is_converted_to_and_from_every_other_to_the_bit(tmp_path, other, experts):
    model = drawn_model(random.Random(experts), experts=experts)
    save(model, tmp_path / "hf")
    shape = shape_of(model)
    convert(tmp_path / "hf", tmp_path / "there", other, WriteOptions(), shape=shape)
    convert(tmp_path / "there", tmp_path / "npz", "npz", WriteOptions(), shape=shape, verify=True)
    assert {path.name for path in (tmp_path / "npz").iterdir()} == {NPZ, "model.json"}
    convert(tmp_path / "npz", tmp_path / "again", other, WriteOptions(), verify=True, shape=shape)
    convert(tmp_path / "again", tmp_path / "back", "hf", WriteOptions(), shape=shape)
    assert_same_weights(tmp_path / "back", model)
    held = np.load(tmp_path / "npz" / NPZ)
    assert np.array_equal(held["output"], model.lm_head.weight.detach().numpy())


def test_a_seventh_format_keeps_what_sphinx_adds_is_inspected_and_mixed(tmp_path):
    inputs = []
    for seed in range(2):
        model = drawn_model(random.Random(3), experts=0)
        for weight in model.parameters():
            weight.data.add_(seed)
        folder = save(model, tmp_path / f"hf{seed}")
        extras = extras_of(model.config.hidden_size, random.Random(3), has_skip_token=True)
        save_file(extras, folder / "sphinx.safetensors")
        (folder / "tokenizer.model").write_text("t")
        convert(folder, tmp_path / f"{seed}", "npz", WriteOptions(), verify=True)
        inputs.append(tmp_path / f"{seed}")
        opened = open_checkpoint(inputs[-1])
        assert (opened.format, inspect.describe(opened)["dtypes"]) == ("npz", {"float32": len(opened.source.specs)})
        assert not any(one.norm for one in inspect.compare(opened, open_checkpoint(folder)))
    (inputs[0] / "small.pt").write_bytes(b"small")
    (inputs[0] / "optimizer.pt").write_bytes(b"large")
    interpolate(inputs, {tmp_path / "mix": (0.25, 0.75)})
    found, sides = np.load(tmp_path / "mix" / NPZ), [np.load(folder / NPZ) for folder in inputs]
    assert set(found) == set(sides[0])
    for name in found:
        wanted = torch.from_numpy(sides[0][name]) * 0.25 + torch.from_numpy(sides[1][name]) * 0.75
        assert torch.equal(torch.from_numpy(found[name]), wanted), name
    names = {path.name for path in (tmp_path / "mix").iterdir()}
    assert names == {NPZ, "model.json", "small.pt", "tokenizer.model", "interpolation.json"}


KNOWN = ("model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "consolidated.00-of-NN.model.pth", NPZ)


def test_a_seventh_format_is_refused_what_it_does_not_take(tmp_path):
    folder = save(drawn_model(random.Random(1), experts=0), tmp_path / "hf")
    with pytest.raises(CheckpointError, match="--tensor-parallel 2: npz does not divide tensors; leave it out"):
        convert(folder, tmp_path / "npz", "npz", WriteOptions(2))
    convert(folder, tmp_path / "npz", "npz", WriteOptions())
    (tmp_path / "npz" / NPZ).rename(tmp_path / "npz" / "other.npz")
    with pytest.raises(
        CheckpointError, match=rf"no checkpoint of a known format; give a folder with {', '.join(KNOWN)}, or"
    ):
        open_checkpoint(tmp_path / "npz")


def test_the_formats_of_the_package_are_known_by_their_names():
    assert registry.names() == ("hf", "internlm2", "meta", "accessory", "megatron", "torch_dist", "npz")
    assert all(registry.format_named(name).name == name for name in registry.names())
    assert {form.name for form in registry.formats()} == set(registry.names())
    options = WriteOptions.__dataclass_fields__.keys() - {"dtype"}
    assert set().union(*(form.options for form in registry.formats())) == options


def test_no_program_asks_for_a_format_by_its_name():
    """What differs between formats stands in their records, which the programs ask."""
    folders = [ROOT / "megatron_sphinx" / "checkpoint", ROOT / "megatron_sphinx" / "tensors"]
    modules = [path for folder in folders for path in folder.rglob("*.py") if path.parent.name != "formats"]
    names = {*registry.names(), "llma."}
    assert len(modules) > 20
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not texts & names, f"{path.name}, line {node.lineno}: {ast.unparse(node)}"


# what a run imports


def module_of(name: str) -> Path | None:
    """The file of a module of the package, or of what it is in."""
    path = ROOT.joinpath(*name.split("."))
    for found in (path.with_suffix(".py"), path / "__init__.py"):
        if found.is_file():
            return found
    return None


def imported_at_once(path: Path) -> set[str]:
    """Names of the package that a file imports when it is imported: not in functions, nor for type checkers."""
    names: set[str] = set()
    nodes = list(ast.parse(path.read_text()).body)
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Try | ast.With) or (
            isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"
        ):
            nodes += ast.iter_child_nodes(node)
    return {name for name in names if name.startswith("megatron_sphinx") and module_of(name)}


def reached(starts: set[str]) -> set[str]:
    """All modules that are imported with some."""
    known, left = set(), list(starts)
    while left:
        if (name := left.pop()) not in known:
            known.add(name)
            left += imported_at_once(module_of(name))
    return known


def test_a_run_imports_no_format_and_no_converter_until_weights_are_opened():
    package = ROOT / "megatron_sphinx"
    starts = {f"megatron_sphinx.run.{path.stem}" for path in (package / "run").glob("*.py")}
    starts = {name.removesuffix(".__init__") for name in starts} | {"megatron_sphinx.__main__"}
    modules = reached(starts)
    room = {name.removeprefix("megatron_sphinx.checkpoint.") for name in modules if ".checkpoint." in name}
    assert {"store", "weights", "slices", "steps"} <= room
    offline = {"convert", "mix", "blend", "pairing", "inspect", "open", "selection", "encoders", "journal", "bar"}
    assert not room & offline
    assert {name for name in room if name.startswith("formats")} <= {"formats.registry"}  # which knows names alone
    assert not [name for name in modules if name.startswith("megatron_sphinx.tensors")]
    opened = reached({"megatron_sphinx.checkpoint.open"})  # else this test could not fail
    assert "megatron_sphinx.checkpoint.formats.format" in opened


def test_weights_of_one_format_import_no_other():
    """The names of all formats are known without torch, and a format is imported when it is asked for."""
    known = reached({"megatron_sphinx.checkpoint.formats.registry"})
    assert known == {"megatron_sphinx.checkpoint.formats.registry", "megatron_sphinx.errors"}
    of_megatron = {name.rpartition(".")[2] for name in reached({"megatron_sphinx.checkpoint.formats.megatron"})}
    assert not of_megatron & {"huggingface", "internlm2", "meta", "accessory", "torch_dist", "convert"}


def test_a_conversion_that_an_earlier_version_was_stopped_in_goes_on():
    """What its journal was begun with is what it is begun with now, in the words of that time."""
    options = WriteOptions(tensor_parallel=2, dtype=BFLOAT16, shard_bytes=7, is_sparse=True, views=5)
    model = Model(LanguageConfig(layers=1, hidden=8, ffn=8, heads=2, groups=2, vocabulary=9))
    task = ["accessory", "Wanted(tensor_parallel=2, dtype=torch.bfloat16, shard_bytes=7, is_sparse=True)"]
    assert task_of("accessory", options, model)[:2] == task
    assert task_of("accessory", options, model)[2].startswith("Model(language=LanguageConfig(")


def test_a_format_that_nobody_knows_is_named():
    with pytest.raises(CheckpointError, match="npy: is no format of checkpoints; use one of hf, internlm2, meta, "):
        registry.format_named("npy")
