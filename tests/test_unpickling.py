"""Nothing that a file of somebody else names is called: payloads against every reader of what is pickled."""

import copyreg
import io
import json
import os
import pickle
import posix
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from llamas import drawn_model, save, shape_of
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
)
from torch.jit.unsupported_tensor_ops import execWrapper
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.checkpoint.slices import TensorSlice, read_tensors
from megatron_sphinx.checkpoint.steps import complete
from megatron_sphinx.checkpoint.store import CheckpointStore, load_weights
from megatron_sphinx.checkpoint.weight_names import weight_shapes
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import CheckpointError, ConfigError, DataError
from megatron_sphinx.model.expert_files import _read
from megatron_sphinx.model.shards import Block
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import job
from megatron_sphinx.tensors.read import read_distributed, read_torch
from megatron_sphinx.unpickling import load_torch, metadata_of

ROOT = Path(__file__).parents[1]
METADATA = "torch.distributed.checkpoint.metadata"
CODE = 0x7A5E  # of an extension


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.made_of = function, arguments

    def __reduce__(self):
        return self.made_of


class Makes:
    """Makes a folder where it is made."""

    def __init__(self, folder: str) -> None:
        os.mkdir(folder)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """A name by STACK_GLOBAL, which takes dots."""
    return text(module) + text(attribute) + b"\x93"


def call(module: str, function: str, argument: str) -> bytes:
    return b"\x80\x04" + name(module, function) + text(argument) + b"\x85R."


def shell(target: Path) -> str:
    return f"mkdir {target}"


def of_getattr(target: Path) -> bytes:
    """getattr(import_module("os"), "system")(...), no name of which is one of os."""
    module = name("importlib", "import_module") + text("os") + b"\x85R"
    return (
        b"\x80\x04" + name("builtins", "getattr") + module + text("system") + b"\x86R" + text(shell(target)) + b"\x85R."
    )


def of_build(target: Path) -> bytes:
    """A class of torch's is given a __setstate__, which BUILD then calls."""
    kind = name(METADATA, "BytesStorageMetadata")
    attributes = b"N}" + text("__setstate__") + name("posix", "system") + b"s\x86"  # (None, {"__setstate__": ...})
    return b"\x80\x04" + kind + attributes + b"b0" + kind + b")\x81" + text(shell(target)) + b"b."


def of_extension(target: Path) -> bytes:
    """A call by an extension code that this process has in its cache."""
    copyreg.add_extension("posix", "mkdir", CODE)
    made = pickle.dumps(Calls(posix.mkdir, str(target)), 4)
    copyreg.remove_extension("posix", "mkdir", CODE)
    copyreg._extension_cache[CODE] = posix.mkdir
    return made


def of_library(target: Path) -> bytes:
    """A class that a library has told torch to take, as megatron-core and torch.distributed do with theirs."""
    torch.serialization.add_safe_globals([Makes])
    return pickle.dumps(Calls(Makes, str(target)), 2)


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda target: pickle.dumps(Calls(os.system, shell(target))),
    "protocol 0": lambda target: f"cposix\nsystem\n(S'{shell(target)}'\ntR.".encode(),
    "INST": lambda target: f"(S'{shell(target)}'\niposix\nsystem\n.".encode(),
    "Popen": lambda target: pickle.dumps(Calls(subprocess.run, ["mkdir", str(target)])),
    "eval": lambda target: call("builtins", "eval", f"__import__('os').mkdir({str(target)!r})"),
    "getattr": of_getattr,
    "torch's shell": lambda target: call("torch.utils.collect_env", "run", shell(target)),
    "torch's exec": lambda target: pickle.dumps(Calls(execWrapper, f"import os; os.mkdir({str(target)!r})", {}, {})),
    "torch's name with dots": lambda target: call("torch.serialization", "os.system", shell(target)),
    "metadata's name with dots": lambda target: call(METADATA, "os.system", shell(target)),
    "megatron's name with dots": lambda target: call(
        "megatron.core.datasets.indexed_dataset", "os.system", shell(target)
    ),
    "BUILD": of_build,
    "nested": lambda target: pickle.dumps(Metadata({}, planner_data={"a": [Calls(os.system, shell(target))]})),
    "pickle in a pickle": lambda target: pickle.dumps(
        Calls(pickle.loads, pickle.dumps(Calls(os.system, shell(target))))
    ),
    "extension code": of_extension,
    "what a library allowed": of_library,
}


@pytest.fixture(params=PAYLOADS)
def payload(request, tmp_path) -> Iterator[tuple[bytes, Path]]:
    """What must not be unpickled, and the folder that appears where it is."""
    target = tmp_path / "owned"
    yield PAYLOADS[request.param](target), target
    copyreg.clear_extension_cache()
    assert not target.exists()


def in_zip(payload: bytes) -> bytes:
    """A file of torch.save, its pickle another one."""
    saved, made = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.ones(2)}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(made, "w") as target:
        for member in source.namelist():
            target.writestr(member, payload if member.endswith("data.pkl") else source.read(member))
    return made.getvalue()


def in_old_file(payload: bytes) -> bytes:
    """A file as torch.save made them before 1.6."""
    head = (MAGIC_NUMBER, PROTOCOL_VERSION, {"protocol_version": PROTOCOL_VERSION, "little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in head) + payload


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, request) -> Path:
    """A run folder with a checkpoint of ours: one tensor, and an object of its rank."""
    folder = tmp_path_factory.mktemp("run")

    def save() -> None:
        store, pieces = opened(folder / "checkpoints")
        store.save(7, pieces, {"random": {"x": torch.ones(1)}}, bad_pairs=0)
        store.finish()

    if (pid := os.fork()) == 0:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        save()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return folder


def opened(folder: Path) -> tuple[CheckpointStore, list[TensorSlice]]:
    """A store of one rank, and a piece to be filled or kept."""
    job.find_place()
    job.join("cpu", 30)
    groups = ProcessGroups.create(ParallelLayout(world=1, config=ParallelConfig()), "gloo")
    store = CheckpointStore(folder, groups, keep=1, identity=dict, about={"layout": {}})
    return store, [TensorSlice("master/w", (2, 3), Block((0, 0), (2, 3)), torch.zeros(2, 3))]


def spoil(folder: Path, file: str, content: bytes) -> None:
    """Put a file into a checkpoint, with the checksum that it then has."""
    (folder / file).write_bytes(content)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"][file] = sha256(content).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


def spoil_part(folder: Path, name: str, content: bytes) -> None:
    """Let a tensor or object of a checkpoint be another file's whole content."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == name)
    metadata.storage_data[index] = _StorageInfo("__9_0.distcp", 0, len(content))
    spoil(folder, "__9_0.distcp", content)
    spoil(folder, ".metadata", pickle.dumps(metadata))


# the payloads


@pytest.mark.parametrize("kind", PAYLOADS)
def test_payloads_run_where_they_are_unpickled(kind, tmp_path):
    """Else the other tests could not fail."""
    target = tmp_path / "owned"
    made = PAYLOADS[kind](target)
    try:
        pickle.loads(made)
    finally:
        copyreg.clear_extension_cache()
        if kind == "BUILD":
            del BytesStorageMetadata.__setstate__
    assert target.is_dir()


# what is read without ranks


def test_no_metadata_is_run(payload, checkpoint, tmp_path):
    folder = tmp_path / "step_00000007"
    shutil.copytree(next((checkpoint / "checkpoints").iterdir()), folder)
    spoil(folder, ".metadata", payload[0])
    readers = (metadata_of, load_weights, weight_shapes, open_checkpoint, lambda path: read_distributed(path, ["w"]))
    for reader in readers:
        with pytest.raises(CheckpointError, match=r"\.metadata: (cannot be read|is not of|is damaged)"):
            reader(folder)


def test_no_tensor_that_is_said_to_be_an_object_is_run(payload, checkpoint, tmp_path):
    """Torch's own planner unpickles objects without limits."""
    folder = tmp_path / "step_00000007"
    shutil.copytree(next((checkpoint / "checkpoints").iterdir()), folder)
    spoil_part(folder, "master/w", in_zip(payload[0]))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["master/w"] = BytesStorageMetadata()
    spoil(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"step_00000007: cannot be read \(.+\); give an earlier one"):
        read_tensors(folder, {"master/w": torch.Size([2, 3])})


@pytest.mark.parametrize("wrap", [bytes, in_zip, in_old_file])
def test_no_torch_file_is_run(payload, tmp_path, wrap):
    file = tmp_path / "weights.pth"
    file.write_bytes(wrap(payload[0]))
    with pytest.raises(CheckpointError, match=r"weights.pth: cannot be read as a torch checkpoint"):
        read_torch(file)
    with pytest.raises(ConfigError, match=r"weights.pth cannot be read as weights"):
        _read(file, "clip")
    with pytest.raises(Exception, match=r"(?s).+"):
        load_torch(io.BytesIO(wrap(payload[0])))


def test_no_tokenizer_is_run(payload, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(payload[0])
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("form", ["meta", "accessory", "torch_dist"])
def test_no_released_checkpoint_is_run(payload, form, tmp_path):
    """Each format whose files are pickled, where it is opened to be converted, mixed or begun with."""
    source = save(drawn_model(random.Random(1), experts=0, layers=1), tmp_path / "hf")
    convert(source, tmp_path / form, form, WriteOptions())
    for victim in sorted((tmp_path / form).iterdir()):
        if victim.suffix in (".pth", ".distcp") or victim.name == ".metadata":
            whole = victim.read_bytes()
            victim.write_bytes(payload[0] if victim.name == ".metadata" else in_zip(payload[0]))
            with pytest.raises(CheckpointError, match=rf"{victim.name}: (cannot be read|is damaged|is not of)"):
                open_checkpoint(tmp_path / form, shape_of(drawn_model(random.Random(1), experts=0, layers=1)))
            victim.write_bytes(whole)


# what ranks read


def test_no_part_of_a_training_state_is_run(checkpoint, tmp_path, run_ranks):
    """Metadata, tensors and objects, of which each payload is tried, as `checkpoint.resume` reads them."""

    def check() -> None:
        (path,) = complete(checkpoint / "checkpoints")
        store, pieces = opened(tmp_path)
        assert torch.equal(store.load(path, pieces, ["random"])["random"]["x"], torch.ones(1))
        for number, make in enumerate(PAYLOADS.values()):
            content = make(tmp_path / "owned")
            for part in (".metadata", "master/w", "rank 0/random"):
                folder = tmp_path / f"{number} {part.replace('/', ' ')}"
                shutil.copytree(path, folder)
                if part == ".metadata":
                    spoil(folder, part, content)
                else:
                    spoil_part(folder, part, in_zip(content))
                assert store.choose(str(folder)), "checksums protect from nothing"
                with pytest.raises(CheckpointError, match=r"cannot be read|is not of|is damaged"):
                    store.load(folder, pieces, ["random"])
                assert not (tmp_path / "owned").exists(), part

    run_ranks(1, check)


@pytest.mark.parametrize("key", ["checkpoint.resume", "model.weights"])
def test_a_run_says_in_a_line_what_it_did_not_run(train, tmp_path, key):
    begun = train(1, {"training.steps": 2}, name="victim")
    newest = complete(begun.folder / "checkpoints")[-1]
    spoil(newest, ".metadata", PAYLOADS["os.system"](tmp_path / "owned"))
    said = train(2, {key: str(newest), "training.steps": 3}, name="other", status=2).ranks.text(0)
    assert "Traceback" not in said
    assert f"{newest / '.metadata'}: cannot be read (it names posix.system); give a whole checkpoint" in said
    assert not (tmp_path / "owned").exists()


def test_what_libraries_allow_torch_to_take_is_theirs_again(tmp_path):
    torch.serialization.add_safe_globals([Makes])
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    assert torch.equal(load_torch(tmp_path / "a.pth")["a"], torch.ones(1))
    assert Makes in torch.serialization.get_safe_globals()


def test_a_persistent_id_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + text("os") + b"Q.")
    with pytest.raises(CheckpointError, match="it holds BINPERSID"):
        metadata_of(tmp_path)
