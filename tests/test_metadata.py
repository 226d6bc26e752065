"""Metadata of distributed checkpoints that is damaged or old; and that one module alone unpickles."""

import ast
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_sphinx.checkpoint.slices import torch_metadata
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.unpickling import metadata_of

ROOT = Path(__file__).parents[1]


# what is damaged otherwise


def metadata(**changes: object) -> Metadata:
    """The metadata of one tensor, something of it wrong."""
    corner, shape = torch.Size([0]), torch.Size([4])
    values = {"file": "__0_0.distcp", "offset": 0, "length": 9, "transforms": None, "size": shape, "dtype": torch.float}
    values |= changes
    properties = TensorProperties()
    properties.dtype = values["dtype"]
    about = TensorStorageMetadata(properties, values["size"], [ChunkStorageMetadata(corner, shape)])
    info = _StorageInfo(values["file"], values["offset"], values["length"], values["transforms"])
    return Metadata({"w": about}, storage_data={MetadataIndex("w", corner): info}, storage_meta=StorageMeta(Path("a")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "../other/__0_0.distcp"}, r"'../other/__0_0.distcp' is no name of a file in it"),
        ({"file": "/tmp/secret"}, r"'/tmp/secret' is no name of a file in it"),
        ({"file": ".."}, r"'..' is no name of a file in it"),
        ({"offset": -1}, r"\(-1, 9\) are no sizes"),
        ({"length": "9"}, r"\(0, '9'\) are no sizes"),
        ({"transforms": ["zstd"]}, r"is transformed by \['zstd'\], which is not known here"),
        ({"size": (4.0,)}, r"are no sizes"),
        ({"dtype": "float"}, r"'float' is no type of a tensor"),
    ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path, changes, message):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata()))
    assert torch_metadata(metadata_of(tmp_path)).storage_data == metadata().storage_data
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata(**changes)))
    with pytest.raises(CheckpointError, match=rf"\.metadata: is damaged \(.*{message}.*\); give a whole checkpoint"):
        metadata_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x7f.", r"it holds LONG_BINPUT 2147483647"),
        (b"\x80\x02N2.", r"it holds DUP"),
        (b"\x80\x02\x82\x01.", r"it holds EXT1"),
        (b"(" * 30_000 + b"t" * 30_000 + b".", r"is not of a torch\.distributed\.checkpoint"),
        (b"", r"cannot be read"),
        (b"garbage", r"cannot be read"),
    ],
)
def test_a_bomb_is_one_line(tmp_path, content, message):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refused:
        metadata_of(tmp_path)
    assert len(str(refused.value)) < 500


def test_names_of_older_versions_of_torch_are_known(tmp_path):
    """TensorProperties has moved since."""
    (tmp_path / ".metadata").write_bytes(
        pickle.dumps(metadata(), 2)
        .replace(
            b"torch.distributed.checkpoint.metadata\nTensorProperties",
            b"torch.distributed._shard.sharded_tensor.metadata\nTensorProperties",
        )
        .replace(
            b"torch.distributed.checkpoint.metadata\n_MEM_FORMAT",
            b"torch.distributed._shard.sharded_tensor.metadata\nMEM_FORMAT",
        )
    )
    assert torch_metadata(metadata_of(tmp_path)).storage_data == metadata().storage_data


# the one module


FORBIDDEN = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {"torch.load", "torch.serialization.load", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "torch.package"}
UNLIMITED = {"FileSystemReader", "DefaultLoadPlanner"}  # what unpickles in these is replaced in one place
SOURCES = sorted(path for folder in ("megatron_sphinx", "tools", "examples") for path in (ROOT / folder).rglob("*.py"))


def imported(node: ast.AST) -> list[str]:
    """What a statement imports, in the form a.b.c."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_unpickles(path):
    if path == ROOT / "megatron_sphinx" / "unpickling.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = imported(node)
        assert not {name.split(".")[0] for name in names} & FORBIDDEN, f"line {node.lineno} imports {names}"
        assert not LOADERS & set(names), f"line {node.lineno} imports {names}"
        if path.name != "slices.py":
            assert not {name.split(".")[-1] for name in names} & UNLIMITED, f"line {node.lineno} imports {names}"
        if isinstance(node, ast.Import):
            assert all(alias.asname is None for alias in node.names if alias.name == "torch"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in LOADERS, f"line {node.lineno}"
            assert node.attr != "read_metadata", f"line {node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"line {node.lineno}"
