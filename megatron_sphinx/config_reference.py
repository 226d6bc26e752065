"""The reference of every configuration key, made from the docstrings, types and defaults of the Config classes.

`python -m megatron_sphinx.config_reference > docs/configuration.md` writes the page; a test holds it to this.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_sphinx.config import PRESETS, Config, presets
from megatron_sphinx.ranges import range_of

WORDS = {
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
}
HEAD = """# Configuration

<!-- Made by `python -m megatron_sphinx.config_reference`: change the docstrings of the Config classes, not this. -->

A run is described by one YAML file of sections, such as [examples/demo.yaml](../examples/demo.yaml). A key is written
`section.key` in messages and on the command line. An unknown key, a value of the wrong type or one out of range is
refused in one line before anything is started, with the nearest known key or the values that fit.

## Where a value comes from

Of all that give a value for a key, the one furthest down this list counts:

1. **The default** in the tables below. A key without one must be given by something further down.
2. **The recipe**, where `training.recipe` names one: a file of `megatron_sphinx/presets/recipes/` with the batch, the
   schedule and the length of a training stage.
3. **The preset**, where `model.preset` names one: a file of `megatron_sphinx/presets/` with a model of the papers,
   which also names its recipe. A run may name another recipe than its preset does.
4. **The bases** of the file: `base: other.yaml`, or a list of them, the last above the others. A path is relative to
   the file that names it, and a base may have bases of its own.
5. **The file** that the command is given.
6. **The command line**: `key.path=value`, the last of several for one key. A value is YAML; a whole number in the path
   picks an item of a list, as in `vision.experts.0.weights=random`.

Sections are laid over one another key by key; a list or a single value replaces the whole of what is below it.

In the tables a step is an optimizer step, a pass goes over all pairs or conversations once, and a number without a unit
is a pure number.

`megatron-sphinx config CONFIG key=value` prints the result, every value spelled out, and with `--get KEY` only one of
them; a run keeps it as `config.yaml` in its folder. In place of a file, a command takes the name of a preset: a run of
it, with paths of data that are only an example.
"""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One configuration key, as the reference prints it.

    Attributes:
        name: the dotted path, with `<n>` for the number of an item of a list.
        kind: the type of its values, in words.
        bounds: the range of a number, in words; empty for what is no number.
        default: what holds where nothing gives the key, as YAML; empty where it must be given.
        unit: what a number counts or is measured in; empty for a pure number, and for what is no number.
        text: what the key does, and which values fit.
    """

    name: str
    kind: str
    bounds: str
    default: str
    unit: str
    text: str


def attributes(cls: type) -> dict[str, tuple[str, str]]:
    """Read the `Attributes:` section of a class's docstring: the unit and the text of each attribute, by its name.

    An attribute is written `name: text` or `name (unit): text`; lines that go on are indented further.
    """
    section = re.search(r"^Attributes:\n((?: +.*\n?|\n)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    texts: dict[str, tuple[str, str]] = {}
    name = ""
    for line in section.group(1).splitlines() if section else ():
        if entry := re.fullmatch(r" {4}(\w+)(?: \(([\w -]+)\))?: (.*)", line):
            name, unit, text = entry.groups("")
            texts[name] = unit, text
        elif line.strip():
            unit, text = texts[name]
            texts[name] = unit, f"{text} {line.strip()}"
    return texts


def keys_of(cls: type, path: str = "") -> Iterator[Key]:
    """List every key below a class, section by section in the order of its fields; each begins with `path`."""
    texts, types, noted = attributes(cls), get_type_hints(cls), get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        name, kind = f"{path}{item.name}", types[item.name]
        if is_dataclass(kind):
            yield from keys_of(kind, f"{name}.")  # type: ignore[arg-type]
            continue
        unit, text = texts.get(item.name, ("", ""))
        bounds = str(range_of(noted[item.name])[1] or "")
        yield Key(name=name, kind=_kind(kind), bounds=bounds, default=_default(item), unit=unit, text=text)
        if get_origin(kind) is tuple and is_dataclass(inner := get_args(kind)[0]):
            yield from keys_of(inner, f"{name}.<n>.")  # type: ignore[arg-type]


def _kind(kind: Any) -> str:
    """Name a type in words: what YAML has to hold for it."""
    if get_origin(kind) in (UnionType, Union):
        return " or ".join("null" if option is NoneType else _kind(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if hasattr(inner, "from_text"):  # an item may be given by a single text, and a single item without its list
            return "path, section, or list of these"
        return "list of sections" if is_dataclass(inner) else f"list of {WORDS[inner][1]}"
    return WORDS[kind][0]


def _default(item: Field[Any]) -> str:
    """Write the default of a field as YAML has it; empty where there is none."""
    if item.default is MISSING:
        return ""
    value = list(item.default) if isinstance(item.default, tuple) else item.default
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def reference() -> str:
    """Write docs/configuration.md: where values come from, then a table of keys for each section."""
    lines = [HEAD, *_recipes()]
    known = list(keys_of(Config))
    purposes, types = attributes(Config), get_type_hints(Config)
    for section in fields(Config):
        cls = types[section.name]
        file = f"{cls.__module__.replace('.', '/')}.py"
        lines += [f"## {section.name}", ""]
        lines += [f"{_sentence(purposes[section.name][1])} `{cls.__name__}` in [{file}](../{file}).", ""]
        lines += ["| key | type | range | default | unit | what it does |", "|---|---|---|---|---|---|"]
        lines += [_row(key) for key in known if key.name.startswith(f"{section.name}.")]
        lines += [""]
    return "\n".join(lines)


def _recipes() -> Iterator[str]:
    """Write the names of the presets, and the values that each recipe gives, which are read from its file."""
    yield "### Presets and recipes"
    yield ""
    yield f"Presets: {', '.join(f'`{name}`' for name in presets())}. What each is: [family.md](family.md)."
    yield ""
    yield "| `training.recipe` | gives |"
    yield "|---|---|"
    for name in presets("recipes"):
        values = yaml.safe_load((PRESETS / "recipes" / f"{name}.yaml").read_text())
        given = [f"`{section}.{key}={value}`" for section, inner in values.items() for key, value in inner.items()]
        yield f"| `{name}` | {', '.join(given)} |"
    yield ""


def _row(key: Key) -> str:
    """Write the row of a section's table for one key."""
    default = f"`{key.default}`" if key.default else "must be given"
    return f"| `{key.name}` | {key.kind} | {key.bounds} | {default} | {key.unit} | {_sentence(key.text)} |"


def _sentence(text: str) -> str:
    """Begin a text with a capital and end it with a period; a bar in it would end a table's cell, and is escaped."""
    return (text[:1].upper() + text[1:].rstrip(".") + ".").replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
