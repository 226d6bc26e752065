"""Readers of benchmarks over damaged files: they raise nothing but our own error."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mutations import mutated
from official_layouts import LAYOUTS

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.benchmarks.registry import named, names

_ENDINGS = (".json", ".jsonl", ".tsv", ".csv", ".txt", ".p", ".parquet")
_ODD = [None, True, -1, 1.5, float("nan"), "", "x", [], [1], {}, {"a": 1}, "\ud800", 10**30, "../x", "/etc/x", "a\0b"]
_WITH_FILES = [name for name in names() if name not in ("imagenet", "classes")]


def spots(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values are in JSON."""
    yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from spots(value, (*path, key))


def replaced(content: bytes, rng: Random) -> bytes:
    """JSON, or a line of JSON lines, with an odd value somewhere, or without one of its values."""
    lines = content.decode().splitlines()
    place = rng.randrange(len(lines))
    whole = json.loads(lines[place])
    path = rng.choice(list(spots(whole)))
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    if not path:
        whole = rng.choice(_ODD)
    elif rng.random() < 0.3:
        del holder[path[-1]]
    else:
        holder[path[-1]] = rng.choice(_ODD)
    lines[place] = json.dumps(whole)
    return "\n".join(lines).encode()


def check(name: str, data: Path, count: int) -> None:
    """Read a benchmark again and again, each time with one damaged file."""
    folder = named(name).folder_in(data)
    LAYOUTS[name](folder, Random(name))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in _ENDINGS)
    for number in range(count):
        rng = Random(f"{name} {number}")
        path = rng.choice(files)
        content = path.read_bytes()
        is_json = path.suffix in (".json", ".jsonl")
        path.write_bytes(replaced(content, rng) if is_json and rng.random() < 0.7 else mutated(content, rng))
        with suppress(DataError):
            list(named(name).samples(data))
        path.write_bytes(content)


@pytest.mark.parametrize("name", _WITH_FILES)
def test_a_few_damaged_files_are_read_or_refused(name, tmp_path):
    check(name, tmp_path, 4)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", _WITH_FILES)
def test_many_damaged_files_are_read_or_refused(name, tmp_path):
    check(name, tmp_path, 1000)
