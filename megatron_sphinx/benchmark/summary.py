"""Sums up the runs of a point: medians over all their measured steps, for the whole, for roles and for ranks."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from megatron_sphinx.config import Config
from megatron_sphinx.model.expert_work import WORK

PROFILED = 3  # steps of a measured run that are profiled, behind those that are measured


@dataclass(frozen=True)
class MeasuredRun:
    """A run that the benchmark has measured.

    Attributes:
        lines: the lines of metrics.jsonl for its measured steps.
        ranks: what the observer of each rank has written, by rank.
    """

    lines: list[dict[str, Any]]
    ranks: list[dict[str, Any]]


def summary(config: Config, runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    """Sum up the runs of a point: medians over all their measured steps.

    Args:
        config: the point's configuration.
        runs: its runs, one or more.
    """
    lines = [line for run in runs for line in run.lines]
    seconds = [line["step_seconds"] for line in lines]
    work = dict(runs[0].ranks[0]["work"])
    samples = [line["sample_ids"] for line in runs[0].lines]
    view_flops = sum(WORK[item.name].flops for item in config.vision.experts)
    work["encoder_work"] = float(work["views"] * view_flops)
    colocated = 0.0 if config.parallel.encoder else work["encoder_work"]
    language = (work["language_flops"] + colocated) / (len(runs[0].ranks) - config.parallel.encoder)
    per_rank = []
    for rank, first in enumerate(runs[0].ranks):
        flops = first["views_per_step"] * view_flops if first["role"] == "encoder" else language
        per_rank.append(_rank([run.ranks[rank] for run in runs], flops, median(seconds)))
    tokens_per_second = median(line["tokens_per_second"] for line in lines)
    hosts: dict[str, int] = {}
    for row in per_rank:
        hosts[row["host"]] = hosts.get(row["host"], 0) + 1
    return {
        "layout": per_rank[0]["layout"],
        "hosts": hosts,
        "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:16],
        "work": work,
        "step_seconds": median(seconds),
        "step_seconds_p95": float(np.percentile(seconds, 95)),
        "steps_of_runs": [[line["step_seconds"] for line in run.lines] for run in runs],
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_rank": tokens_per_second / len(per_rank),
        "samples_per_second": work["pairs"] / median(seconds),
        "exposed_encoder_share": sum(line["exposed_encoder_seconds"] for line in lines) / sum(seconds),
        "data_wait_share": sum(line["data_wait_seconds"] for line in lines) / sum(seconds),
        "feature_bytes_per_step": median(line["feature_bytes"] for line in lines),
        "roles": {role: _role(per_rank, role) for role in dict.fromkeys(rank["role"] for rank in per_rank)},
        "per_rank": per_rank,
    }


def _rank(runs: Sequence[Mapping[str, Any]], flops: float, step_seconds: float) -> dict[str, Any]:
    """Sum up one rank over all runs of a point.

    Args:
        runs: what the rank's observer has written in each run.
        flops: FLOPs that the rank computes for a step.
        step_seconds: seconds of a step.
    """
    first = runs[0]
    row = {name: first[name] for name in ("rank", "role", "host", "device", "threads", "backend", "layout")}
    row["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in runs)
    row["peak_flops"] = median(run["peak_flops"] for run in runs)
    row["flops_per_second"] = flops / step_seconds
    row["utilization"] = row["flops_per_second"] / row["peak_flops"]
    axes = dict.fromkeys(axis for run in runs for axis in run["communication"])
    row["communication"] = {axis: median(run["communication"].get(axis, 0.0) for run in runs) for axis in axes}
    if first["role"] == "encoder":
        spent = {name: sum(run[f"{name}_seconds"] for run in runs) for name in ("read", "encode", "send")}
        row["views_per_step"] = fmean(run["views_per_step"] for run in runs)
        row["busy_share"], row["data_wait_share"] = (spent[name] / sum(spent.values()) for name in ("encode", "read"))
        return row
    steps = {name: [value for run in runs for value in run["steps"][name]] for name in first["steps"]}
    seconds = steps["seconds"]
    row |= {"step_seconds": median(seconds), "step_seconds_p95": float(np.percentile(seconds, 95))}
    row["data_wait_share"] = sum(steps["data_wait_seconds"]) / sum(seconds)
    row["exposed_encoder_share"] = sum(steps["exposed_encoder_seconds"]) / sum(seconds)
    return row


def _role(per_rank: Sequence[Mapping[str, Any]], role: str) -> dict[str, Any]:
    """Sum up the ranks of a role: FLOPs and peaks added, memory of the one with most, shares and times averaged."""
    ranks = [rank for rank in per_rank if rank["role"] == role]
    flops, peak = (sum(rank[name] for rank in ranks) for name in ("flops_per_second", "peak_flops"))
    axes = dict.fromkeys(axis for rank in ranks for axis in rank["communication"])
    means = ("step_seconds", "step_seconds_p95", "data_wait_share", "exposed_encoder_share", "busy_share")
    return {
        "ranks": len(ranks),
        "flops_per_second": flops,
        "peak_flops": peak,
        "utilization": flops / peak,
        "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks),
        **{name: fmean(rank[name] for rank in ranks) for name in means if name in ranks[0]},
        "communication": {axis: fmean(rank["communication"].get(axis, 0.0) for rank in ranks) for axis in axes},
    }
