"""Mutated checkpoints: whatever is damaged, convert, inspect and mix say so in one line, soon and in little memory."""

import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from llamas import drawn_model, save

from megatron_sphinx.checkpoint import inspect
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mix import interpolate
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.errors import CheckpointError

QUICK, SLOW = 60, 2000  # mutated files of each kind
SECONDS, GROWTH = 10.0, 10**9  # the most that one may take: of time, and of bytes in memory
FILES = {  # format, size of a shard, and the file that is mutated
    "config.json": ("hf", "1GB"),
    "model.safetensors": ("hf", "1GB"),
    "model.safetensors.index.json": ("hf", "8KB"),
    "params.json": ("meta", "1GB"),
    "consolidated.00.pth": ("meta", "1GB"),
    "checkpoint.json": ("megatron", "1GB"),
    ".metadata": ("megatron", "1GB"),
    "meta.json": ("accessory", "1GB"),
}
VALUES = [
    None, True, False, 0, 1, -1, 7, 2**31, 10**9, 10**30, 0.5, float("nan"), float("inf"), -1e308, "", "64", "x" * 5000,
    "\ud800", "../x", "/etc/passwd", "\0", [], [1], [[]], {}, {"a": 1}, {"type": "linear"}, ["LlamaForCausalLM"],
]  # fmt: skip
KEYS = ["rope_scaling", "yarn", "quantization_config", "x", "moe", "layer_types", "sliding_window", "head_dim"]


def paths_of(value: object, path: tuple = ()) -> list[tuple]:
    """The places of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in items for found in paths_of(inner, (*path, key)))]


def mutated_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with a value replaced, removed or doubled."""
    values = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([found for found in paths_of(values) if found] or [()])
        if not path:
            return json.dumps(rng.choice(VALUES)).encode()
        node = values
        for key in path[:-1]:
            node = node[key]
        match rng.randrange(4):
            case 0:
                del node[path[-1]]
            case 1 if isinstance(node, dict):
                node[rng.choice(["rope_scaling", "yarn", "quantization_config", "x", "moe", "layer_types"])] = (
                    rng.choice(VALUES)
                )
            case _:
                node[path[-1]] = rng.choice(VALUES)
    return json.dumps(values).encode()


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file with bytes changed, put in, taken out or cut off; most at its beginning and end, where headers are."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        size = len(data)
        place = rng.choice(
            [rng.randrange(size), rng.randrange(min(400, size)), size - 1 - rng.randrange(min(300, size))]
        )
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.choice(b'\0\xff{}[]",:0129.\x80')
            case 2:
                del data[place : place + rng.randint(1, 20)]
            case 3:
                data[place:place] = rng.randbytes(rng.randint(1, 20))
            case 4:
                del data[place:]
            case _:
                other = rng.randrange(size)
                data[place : place + 8] = data[other : other + 8]
        if not data:
            return b""
    return bytes(data)


@pytest.fixture
def try_all(tmp_path) -> Callable[[str, int, int], None]:
    """Damages a file again and again, and looks at what each tool makes of it."""

    def run(name: str, first: int, count: int) -> None:
        form, shard = FILES[name]
        source = save(drawn_model(random.Random(1), experts=0, groups=2, layers=2), tmp_path / "source", shard)
        folder = tmp_path / "folder"
        if form == "hf":
            source.rename(folder)
        else:
            convert(source, folder, form, WriteOptions())
        shutil.copytree(folder, tmp_path / "whole")
        whole = (folder / name).read_bytes()
        before = peak()
        for seed in range(first, first + count):
            rng = random.Random(f"{name} {seed}")
            is_json = name.endswith(".json") and rng.random() < 0.7
            (folder / name).write_bytes((mutated_json if is_json else mutated_bytes)(whole, rng))
            begin = time.monotonic()
            try:
                fault = look_at(folder, tmp_path / "whole", tmp_path / "target", rng)
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}") from error
            assert "\n" not in fault, f"{name}, seed {seed}"
            assert len(fault) < 3000, f"{name}, seed {seed}"
            assert time.monotonic() - begin < SECONDS, f"{name}, seed {seed}"
        assert peak() - before < GROWTH

    return run


def look_at(folder: Path, whole: Path, target: Path, rng: random.Random) -> str:
    """Convert, inspect or mix a checkpoint; our own error, which is returned, is what may come of it."""
    fault = ""
    try:
        match rng.randrange(4):
            case 0:
                inspect.digests(open_checkpoint(folder))
            case 1:
                interpolate([whole, folder][:: rng.choice([1, -1])], {target: (0.5, 0.5)})
            case _:
                done = convert(folder, target, rng.choice(["hf", "internlm2", "meta", "megatron"]), WriteOptions())
                total, parts = done.balance.rpartition(" tensors = ")[::2]
                assert int(total.split()[-1]) == sum(int(part.split()[0]) for part in parts.split(" (")[0].split(" + "))
    except CheckpointError as error:
        fault = str(error)
    for path in (target, target.with_name(f".{target.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)
    return fault


def peak() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", FILES)
def test_a_mutated_checkpoint_is_one_line_or_is_read(try_all, name):
    try_all(name, 0, QUICK)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", FILES)
def test_many_mutated_checkpoints_are_one_line_or_are_read(try_all, name):
    try_all(name, QUICK, SLOW)
