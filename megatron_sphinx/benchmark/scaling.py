"""Weak and strong scaling among points, recognised from the points themselves. Arithmetic only."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

Point = Mapping[str, Any]
TOLERANCE = 0.05  # how far apart amounts of work may be that count as equal, relative to the larger one
_AMOUNTS = ("pairs_per_step", "conversations_per_step", "text_tokens_per_step", "row_multiple")  # keys of data
_PATHS = ("pairs", "conversations", "text", "tokenizer")  # keys of data
_WORK = ("pairs", "text_tokens", "positions")  # what makes the work of a step, in a point's `work`


@dataclass(frozen=True)
class Curve:
    """Points of one model and layout on growing numbers of ranks.

    Attributes:
        kind: strong, the same step on more ranks; or weak, the same work on each rank.
        label: what the points have in common.
        points: the points, by ascending number of ranks.
    """

    kind: str
    label: str
    points: tuple[Point, ...]

    @property
    def efficiency(self) -> list[float]:
        """For each point its tokens/s of a rank, over those of the point with the fewest ranks."""
        speeds = [point["tokens_per_second"] / point["ranks"] for point in self.points]
        return [speed / speeds[0] for speed in speeds]


def curves(points: Sequence[Point]) -> list[Curve]:
    """Find every curve that some points make.

    Points are of one curve where they have the same configuration but for the amounts of a step and the number of
    encoder ranks, on different numbers of ranks: a strong one where a step takes as many samples, text and positions,
    a weak one where it takes as many for each rank. Encoder ranks are taken to grow with the ranks, unless a number of
    ranks was measured with several numbers of them.
    """
    made: list[Curve] = []
    for group in _by(lambda point: _key(point, with_encoder=False), [p for p in points if "error" not in p]):
        for kind in ("strong", "weak"):
            for equal in _equal_work(group, is_per_rank=kind == "weak"):
                sizes = {(point["ranks"], point["config"]["parallel"]["encoder"]) for point in equal}
                is_swept = len(sizes) > len({ranks for ranks, _ in sizes})
                parts = _by(lambda point: _key(point, with_encoder=True), equal) if is_swept else [equal]
                made += [curve for part in parts if (curve := _curve(kind, part))]
    return made


def _by(key: Callable[[Point], str], points: Sequence[Point]) -> list[list[Point]]:
    """Group points by a key."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return list(groups.values())


def _curve(kind: str, points: Sequence[Point]) -> Curve | None:
    """Make a curve through points, the last one of each number of ranks; None where all have as many ranks."""
    chosen = {point["ranks"]: point for point in points}
    if len(chosen) < 2:
        return None
    ordered = tuple(chosen[ranks] for ranks in sorted(chosen))
    sizes = {
        name: {point["config"]["parallel"][name] for point in ordered} for name in ("tensor", "pipeline", "encoder")
    }
    layout = ", ".join(f"{name} {'/'.join(map(str, sorted(values)))}" for name, values in sizes.items())
    return Curve(kind, f"{ordered[0]['config']['model']['preset'] or 'model'}: {layout}", ordered)


def _equal_work(points: Sequence[Point], *, is_per_rank: bool) -> list[list[Point]]:
    """Group points by the work of a step, or of a step and a rank; works within TOLERANCE are equal."""
    groups: list[tuple[list[float], list[Point]]] = []
    for point in points:
        work = [point["work"][name] / (point["ranks"] if is_per_rank else 1) for name in _WORK]
        for group_work, group in groups:
            if all(isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(work, group_work, strict=True)):
                group.append(point)
                break
        else:
            groups.append((work, [point]))
    return [group for _, group in groups]


def _key(point: Point, *, with_encoder: bool) -> str:
    """Put the configuration without what may differ along a curve into a text that can be compared."""
    config = {
        section: dict(values) for section, values in point["config"].items() if section not in ("run", "checkpoint")
    }
    for name in (*_AMOUNTS, *_PATHS):
        del config["data"][name]
    if not with_encoder:
        del config["parallel"]["encoder"]
    return json.dumps([config, point["is_synthetic"]], sort_keys=True, default=str)
