"""What a check prints and writes: a table, one JSON object, and a page for docs/."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_sphinx.benchmark.environment import environment
from megatron_sphinx.errors import FolderError
from megatron_sphinx.gpu_check.findings import Finding, is_passed
from megatron_sphinx.gpu_check.scales import SECTIONS

MORE_PACKAGES = ("liger-kernel", "transformers", "nvidia-ml-py")
_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]


def report_of(found: Sequence[Finding], *, scale: str, device: str, seconds: float) -> dict[str, Any]:
    """Join what was found with what it was found on: card, driver, versions, revision, date."""
    made_with = environment()
    for package in MORE_PACKAGES:
        try:
            made_with["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "cards": _cards() if device == "cuda" else [],
        "scale": scale,
        "seconds": seconds,
        "is_passed": is_passed(found),
        "environment": made_with,
        "findings": [asdict(finding) | {"verdict": finding.verdict} for finding in found],
    }


def _cards() -> list[str]:
    """Ask the driver for the name, the version of the driver, and the memory of each GPU; empty where it is silent."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def shown(value: Any) -> str:
    """Write a value so that a person reads it: numbers to four digits, bytes and counts in full."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def values_of(finding: Finding) -> str:
    """Write the values of a finding in one line, or why there are none."""
    if finding.absent:
        return f"not on this device: {finding.absent}" if finding.verdict == "absent" else finding.absent
    return "  ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in finding.values.items())


def verdicts(found: Sequence[Finding]) -> list[str]:
    """Say how many bounds each section keeps, and of right whether it passed."""
    lines = []
    for section in SECTIONS:
        own = [finding for finding in found if finding.section == section]
        judged = [finding for finding in own if finding.verdict in ("pass", "FAIL", "missed")]
        if not own:
            continue
        kept = sum(finding.verdict == "pass" for finding in judged)
        word = "" if section != "right" else "pass, " if is_passed(own) else "FAIL, "
        lines.append(f"{section}: {word}{kept} of {len(judged)} bounds kept")
    return lines


def table(found: Sequence[Finding]) -> str:
    """Lay out the findings as text: name, verdict, values."""
    width = max((len(finding.name) for finding in found), default=0)
    lines = []
    for section in SECTIONS:
        own = [finding for finding in found if finding.section == section]
        lines += [section, *(f"  {one.name:{width}}  {one.verdict:6}  {values_of(one)}" for one in own)] if own else []
    return "\n".join([*lines, *verdicts(found)])


def page(report: dict[str, Any], found: Sequence[Finding]) -> str:
    """Write the findings as a page of Markdown."""
    versions = report["environment"]["versions"]
    made_on = ", ".join(report["cards"]) or report["device"]
    lines = [
        f"# gpu-check of {report['date']}",
        "",
        f"{made_on}; revision {report['environment']['revision'] or 'unknown'}; scale {report['scale']}; "
        f"{report['seconds']:.0f} s.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
    ]
    for section in SECTIONS:
        own = [finding for finding in found if finding.section == section]
        if own:
            lines += ["", f"## {section}", "", "| what | verdict | values |", "|---|---|---|"]
            lines += [f"| {_cell(one.name)} | {one.verdict} | {_cell(values_of(one))} |" for one in own]
    return "\n".join([*lines, "", *(f"* {line}" for line in verdicts(found)), ""])


def _cell(text: str) -> str:
    """Write a text so that it stays in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def write(path: Path, text: str, flag: str) -> None:
    """Write one of the check's files.

    Raises:
        FolderError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise FolderError(f"{flag}={path}: cannot be written ({error.strerror}); give another path") from error


def as_json(report: dict[str, Any]) -> str:
    """Write a report as JSON."""
    return json.dumps(report, indent=1) + "\n"
