"""docs/configuration.md: every key of the configuration is on it, with what it does, as the Config classes have it."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megatron_sphinx import config_reference
from megatron_sphinx.config import Config

ROOT = Path(__file__).parents[1]
KEYS = {key.name: key for key in config_reference.keys_of(Config)}
UNITS = {"seconds", "steps", "passes", "pairs", "conversations", "tokens", "positions", "rows", "views", "patches",
         "layers", "channels", "heads", "experts", "ranks", "stages", "threads", "checkpoints", "micro-batches",
         "standard deviations"}  # fmt: skip


def test_the_reference_of_the_configuration_is_made_anew():
    """`python -m megatron_sphinx.config_reference > docs/configuration.md` brings it up to date."""
    assert (ROOT / "docs" / "configuration.md").read_text() == config_reference.reference()


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_every_key_is_described(key):
    assert len(key.text.split()) >= 4, f"{key.name} needs a description in the Attributes of its class"
    assert not key.unit or key.unit in UNITS, f"{key.unit} is no unit; known: {sorted(UNITS)}"
    assert not key.unit or "number" in key.kind, f"{key.name} has a unit, but is no number"


def config_classes(cls: type = Config) -> Iterator[type]:
    """The whole configuration's class, and those of its sections and of the items of their lists."""
    yield cls
    for kind in get_type_hints(cls).values():
        for inner in (kind, *get_args(kind)):
            if is_dataclass(inner):
                yield from config_classes(inner)


def test_descriptions_are_of_fields_that_exist():
    for cls in config_classes():
        assert set(config_reference.attributes(cls)) == set(cls.__dataclass_fields__), cls.__name__


def test_keys_have_their_type_default_and_unit():
    timeout, weight, lists = KEYS["run.timeout"], KEYS["data.pairs.<n>.weight"], KEYS["parallel.pipeline_layers"]
    assert (timeout.kind, timeout.default, timeout.unit) == ("number", "600.0", "seconds")
    assert (weight.kind, weight.default, weight.unit) == ("number or null", "null", "")
    assert (lists.kind, lists.default, lists.unit) == ("list of whole numbers or null", "null", "layers")
    assert (KEYS["data.text"].kind, KEYS["vision.experts"].kind) == (
        "path, section, or list of these",
        "list of sections",
    )
    assert KEYS["run.folder"].default == ""
    assert len(KEYS) > 80
