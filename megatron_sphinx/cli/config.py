"""Print the configuration as a run would take it: presets, files and key=value in one, every value spelled out.

    megatron-sphinx config CONFIG [key=value ...]
    megatron-sphinx config --get run.folder [--get KEY ...] CONFIG [key=value ...]

With --get only the values of those keys, a line each: texts as they are, anything else as JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_sphinx.cli.command import add_configuration
from megatron_sphinx.errors import ConfigError, nearest

if TYPE_CHECKING:
    from megatron_sphinx.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_configuration(parser)
    parser.add_argument(
        "--get", action="append", default=[], metavar="KEY", help="print the value of this key only, e.g. run.folder"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx import config as configuration

    config = configuration.load(args.config, args.overrides)
    if not args.get:
        print(config.to_yaml(), end="")
        return 0
    values = [value_of(config, key) for key in args.get]  # all are known before one is printed
    for value in values:
        print(value if isinstance(value, str) else json.dumps(value))
    return 0


def value_of(config: Config, key: str) -> Any:
    """Look up a dotted key; a whole number in it picks a list's item, counted from 0.

    Raises:
        ConfigError: there is no such key.
    """
    value: Any = asdict(config)
    path = ""
    for name in key.split("."):
        if isinstance(value, dict):
            items = value
        elif isinstance(value, list | tuple):
            items = {str(number): item for number, item in enumerate(value)}
        else:
            raise ConfigError(f"{key}: {path.rstrip('.')} is a single value, not a section")
        if name not in items:
            known = [path + other for other in items]
            raise ConfigError(f"{path}{name}: unknown key; {nearest(f'{path}{name}', known)}")
        value, path = items[name], f"{path}{name}."
    return value
