"""Files of JSON lines in the run folder, each of a step: read, and cut back where steps are done again."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_sphinx.console import say


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file; what a run has left half written is none. No file has no lines."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def cut_back(path: Path, start: int) -> None:
    """Keep the lines of the steps before `start`; those of steps that are done again go to a file beside it."""
    if not path.is_file():
        return
    kept: list[str] = []
    superseded: list[str] = []
    for text in path.read_text().splitlines():
        try:
            (kept if json.loads(text)["step"] < start else superseded).append(text)
        except ValueError:  # the last line of a run that was killed while writing it
            continue
    if superseded:
        beside = path.with_name(f"{path.stem}.superseded{path.suffix}")
        with beside.open("a") as file:
            file.writelines(text + "\n" for text in superseded)
            file.flush()
            os.fsync(file.fileno())
        say(f"{path.name}: {len(superseded)} lines of steps that are done again are kept in {beside.name}")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(text + "\n" for text in kept))
    os.replace(partial, path)
