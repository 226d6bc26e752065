"""What a check finds: named values, each with what it was judged by, that processes hand on as lines of JSON."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the report.

    Attributes:
        section: the part of the check that it belongs to.
        name: what was checked or measured.
        values: numbers and texts by their names, units in the names.
        is_right: whether it keeps its bound; None where it is a measurement without one.
        is_required: whether the whole check fails where it does not keep its bound.
        absent: why it could not be had here; empty where it could.
    """

    section: str
    name: str
    values: Values = field(default_factory=dict)
    is_right: bool | None = None
    is_required: bool = False
    absent: str = ""

    @property
    def verdict(self) -> str:
        """Say in a word how it ended: pass, FAIL, missed, absent, or nothing for a plain measurement."""
        if self.absent:
            return "FAIL" if self.is_required else "absent"
        if self.is_right is None:
            return ""
        return "pass" if self.is_right else "FAIL" if self.is_required else "missed"


Note = Callable[[Finding], None]  # hears of a finding as soon as there is one


def append(path: Path, finding: Finding) -> None:
    """Write a finding behind those that a file has: what a process has found stays where it is killed later."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(finding)) + "\n")


def read(path: Path) -> list[Finding]:
    """Read the findings of a file; none where it is not there, or ends in the middle of a line."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Finding(**json.loads(line)))
        except ValueError:  # its writer was killed
            break
    return found


def is_passed(findings: Iterable[Finding]) -> bool:
    """Tell whether every finding that must keep its bound does."""
    return all(finding.verdict != "FAIL" for finding in findings)
