"""How long a rank communicates in each process group, from what torch's profiler and flight recorder saw."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The axis that each process group of parallel/groups.py belongs to, by the group's description.
AXES = {
    "tp": "tensor", "tp_cp": "tensor", "dp": "data", "dp_cp": "data", "pp": "pipeline", "flags": "pipeline",
    "mp": "replica", "ep": "expert", "tp_ep": "expert", "expt_tp": "expert", "expt_dp": "expert data",
    "language": "language", "default_pg": "world",
}  # fmt: skip
UNKNOWN = "unknown"
_MESSAGES = {"gloo:send": "c10d::send", "gloo:recv": "c10d::recv_"}  # operations, and the calls that name their peers


def seconds_by_axis(
    events: Iterable[Mapping[str, Any]], recorded: Sequence[Mapping[str, Any]], *, language: int
) -> dict[str, float]:
    """Count for each axis the seconds in which at least one of its operations was under way on this rank.

    An operation lasts from its call until it is complete, waiting for its peers counted; features are left out, for
    they are received long before anybody waits for them. NCCL's kernels name their groups. Gloo's operations do not in
    the profiler, but the flight recorder has them in the same order, with their groups; it knows no messages between
    two ranks, so those that do not come from an encoder are the pipeline's.

    Args:
        events: events of a trace that torch.profiler exported, taken with shapes.
        recorded: entries of the flight recorder that were made meanwhile.
        language: number of language ranks; encoder ranks have higher numbers.

    Returns:
        Seconds by the names of AXES, or UNKNOWN.
    """
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    gloo_events: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in sorted((event for event in events if event.get("ph") == "X"), key=lambda event: float(event["ts"])):
        name = event["name"]
        if event.get("cat") == "kernel" and name.startswith("nccl"):
            spans[_axis(event["args"].get("Process Group Description"))].append(_span(event))
        elif name.startswith("gloo:") or name in _MESSAGES.values():
            gloo_events[name].append(event)
    for name, operations in gloo_events.items():
        if name in _MESSAGES:
            peers = [int(call["args"]["Concrete Inputs"][2]) for call in gloo_events.get(_MESSAGES[name], [])]
            axes = ["features" if peer >= language else "pipeline" for peer in peers]
        elif name.startswith("gloo:"):
            axes = [_axis(entry["process_group"][1]) for entry in recorded if entry["profiling_name"] == name]
        else:
            continue
        if len(axes) != len(operations):
            axes = [UNKNOWN] * len(operations)
        for axis, event in zip(axes, operations, strict=True):
            spans[axis].append(_span(event))
    return {axis: _covered(parts) for axis, parts in spans.items() if axis != "features"}


def _axis(description: object) -> str:
    """The axis of the process group with this description."""
    return AXES.get(str(description), UNKNOWN)


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    """Begin and end of an event, in microseconds."""
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Count the seconds that at least one of the spans covers; they are in microseconds, sorted by their begin."""
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e6
