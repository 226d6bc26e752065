"""Weak and strong scaling among points, recognised from the points themselves. Arithmetic only."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

Point = Mapping[str, Any]
TOLERANCE = 0.05  # how far works may be apart that count as the same
_AMOUNTS = ("pairs_per_step", "conversations_per_step", "text_tokens_per_step", "row_multiple")
_WORK = ("pairs", "text_tokens", "positions")
_PATHS = ("pairs", "conversations", "text", "tokenizer")


@dataclass(frozen=True)
class Curve:
    """Points of one model and layout on growing numbers of ranks.

    Attributes:
        kind: strong, the same step on more ranks; or weak, the same work on each rank.
        label: what the points have in common.
        points: by number of ranks.
    """

    kind: str
    label: str
    points: tuple[Point, ...]

    @property
    def efficiency(self) -> list[float]:
        """Of each point: its tokens a second and rank over those of the fewest ranks."""
        each = [point["tokens_per_second"] / point["ranks"] for point in self.points]
        return [value / each[0] for value in each]


def curves(points: Sequence[Point]) -> list[Curve]:
    """Every curve that some points make.

    Points are of one curve where they have the same configuration but for the amounts of a step and the number of
    encoder ranks, on different numbers of ranks; strong, where a step takes the same samples, text and positions, weak,
    where it does for each rank. Encoder ranks are taken to grow with the ranks, unless a number of ranks was measured
    with several numbers of them.
    """
    found = []
    for group in _by(lambda point: _key(point, with_encoder=False), [p for p in points if "error" not in p]):
        for kind in ("strong", "weak"):
            for same in _alike(group, is_per_rank=kind == "weak"):
                sizes = {(point["ranks"], point["config"]["parallel"]["encoder"]) for point in same}
                is_swept = len(sizes) > len({ranks for ranks, _ in sizes})
                parts = _by(lambda point: _key(point, with_encoder=True), same) if is_swept else [same]
                found += [curve for part in parts if (curve := _curve(kind, part))]
    return found


def _by(key: Callable[[Point], str], points: Sequence[Point]) -> list[list[Point]]:
    """Points in groups of the same key."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return list(groups.values())


def _curve(kind: str, points: Sequence[Point]) -> Curve | None:
    """A curve through points, the last of each number of ranks; none where all have the same."""
    chosen = {point["ranks"]: point for point in points}
    if len(chosen) < 2:
        return None
    ordered = tuple(chosen[ranks] for ranks in sorted(chosen))
    sizes = {
        name: {point["config"]["parallel"][name] for point in ordered} for name in ("tensor", "pipeline", "encoder")
    }
    layout = ", ".join(f"{name} {'/'.join(map(str, sorted(values)))}" for name, values in sizes.items())
    return Curve(kind, f"{ordered[0]['config']['model']['preset'] or 'model'}: {layout}", ordered)


def _alike(points: Sequence[Point], *, is_per_rank: bool) -> list[list[Point]]:
    """Points in groups of the same work."""
    groups: list[tuple[list[float], list[Point]]] = []
    for point in points:
        work = [point["work"][name] / (point["ranks"] if is_per_rank else 1) for name in _WORK]
        for of_group, group in groups:
            if all(isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(work, of_group, strict=True)):
                group.append(point)
                break
        else:
            groups.append((work, [point]))
    return [group for _, group in groups]


def _key(point: Point, *, with_encoder: bool) -> str:
    """The configuration without what may differ along a curve."""
    config = {
        section: dict(values) for section, values in point["config"].items() if section not in ("run", "checkpoint")
    }
    for name in (*_AMOUNTS, *_PATHS):
        del config["data"][name]
    if not with_encoder:
        del config["parallel"]["encoder"]
    return json.dumps([config, point["is_synthetic"]], sort_keys=True, default=str)
