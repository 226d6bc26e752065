"""Reads a trace of torch's profiler: the heaviest kernels, how long the device was at work, what a range started."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

STEP, GRADIENTS = "the profiled step", "gradients"  # ranges that the measured code marks
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_STARTS = ("cuda_runtime", "cuda_driver")
_ON_CPU = "cpu_op"

Event = dict[str, Any]
Interval = tuple[float, float]


def read(path: Path) -> list[Event]:
    """Read the events that take time from a trace that `export_chrome_trace` has written."""
    return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def length_of(intervals: Iterable[Interval]) -> float:
    """Measure how much time intervals cover together, those that overlap counted once."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def heaviest(events: Sequence[Event], count: int = 10) -> list[dict[str, Any]]:
    """List the kernels that take most time: name, milliseconds, calls, share of all; on a CPU operations of torch.

    Of an operation of torch only its own time counts, without that of operations that it calls.
    """
    times: dict[str, list[float]] = defaultdict(list)
    kernels = [event for event in events if event.get("cat") in _ON_DEVICE]
    for name, microseconds in ((event["name"], event["dur"]) for event in kernels) if kernels else _own_times(events):
        times[name].append(microseconds)
    whole = sum(map(sum, times.values()))
    largest = sorted(times, key=lambda name: -sum(times[name]))[:count]
    return [
        {
            "kernel": name,
            "milliseconds": sum(times[name]) / 1000,
            "calls": len(times[name]),
            "share": sum(times[name]) / whole,
        }
        for name in largest
    ]


def _own_times(events: Sequence[Event]) -> Iterator[tuple[str, float]]:
    """Yield each operation of torch with its own microseconds."""
    by_thread: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == _ON_CPU:
            by_thread[event["tid"]].append(event)
    for own in by_thread.values():
        above: list[list[Any]] = []  # end, name, own time of the operations that are not over
        for event in sorted(own, key=lambda event: (event["ts"], -event["dur"])):
            while above and above[-1][0] <= event["ts"]:
                yield above[-1][1], above.pop()[2]
            if above:
                above[-1][2] -= event["dur"]
            above.append([event["ts"] + event["dur"], event["name"], event["dur"]])
        for _, name, microseconds in above:
            yield name, microseconds


def shares(events: Sequence[Event]) -> dict[str, Any]:
    """Tell which share of the range STEP the device was at work, and for what the ranges GRADIENTS had started.

    Returns:
        `step_seconds`; `gpu_busy_share`, None on a CPU; `gradient_share`, None where no range has that name: of the
        device's kernels that were started inside such a range, on a CPU of the ranges themselves.
    """
    (step,) = [event for event in events if event["name"] == STEP and event.get("cat") == "user_annotation"]
    marked = [event for event in events if event["name"] == GRADIENTS and event.get("cat") == "user_annotation"]
    kernels = [event for event in events if event.get("cat") in _ON_DEVICE]
    chosen = list(_started_in(marked, events, kernels)) if kernels else marked
    seconds = step["dur"] / 1e6
    return {
        "step_seconds": seconds,
        "gpu_busy_share": length_of(map(_interval, kernels)) / 1e6 / seconds if kernels else None,
        "gradient_share": length_of(map(_interval, chosen)) / 1e6 / seconds if marked else None,
    }


def _started_in(ranges: Sequence[Event], events: Sequence[Event], kernels: Sequence[Event]) -> Iterator[Event]:
    """Yield the kernels that a thread started while it was inside one of its ranges."""
    by_thread: dict[Any, list[Interval]] = defaultdict(list)
    for event in ranges:
        by_thread[event["tid"]].append(_interval(event))
    inside = set()
    for event in events:
        if event.get("cat") in _STARTS and any(
            first <= event["ts"] <= last for first, last in by_thread.get(event["tid"], ())
        ):
            inside.add(event.get("args", {}).get("correlation"))
    inside.discard(None)
    return (kernel for kernel in kernels if kernel.get("args", {}).get("correlation") in inside)


def _interval(event: Event) -> Interval:
    """Give begin and end of an event, in microseconds."""
    return event["ts"], event["ts"] + event["dur"]
