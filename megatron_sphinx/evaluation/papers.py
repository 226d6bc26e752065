"""The numbers of the papers, as `papers.yaml` has them: by model and by column."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.parsing import read_yaml

_PATH = Path(__file__).with_name("papers.yaml")


def models() -> list[str]:
    """Return the names of the models that the papers give numbers of."""
    names: dict[str, None] = {}
    for table in _tables():
        names |= dict.fromkeys(table["models"])
    return list(names)


def numbers_of(model: str) -> Mapping[str, float]:
    """Return what the papers give for a model, by column.

    Raises:
        ConfigError: there is no model of that name.
    """
    known = models()
    if model not in known:
        near = get_close_matches(model, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"--paper={model}: unknown; {hint}")
    return {column: value for table in _tables() for column, value in table["models"].get(model, {}).items()}


def _tables() -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = read_yaml(_PATH)["tables"]
    return tables
