"""Writes a report of measured points: Markdown with plots, and all that is needed to measure them again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sphinx.benchmark import synthetic
from megatron_sphinx.benchmark.point import MeasuredPointFile, PointFile
from megatron_sphinx.benchmark.scaling import Curve, curves
from megatron_sphinx.errors import DataError
from megatron_sphinx.values import read_json

Point = Mapping[str, Any]
_WAITS = {"waiting for features": "exposed_encoder_share", "waiting for data": "data_wait_share"}
_DEFINITIONS = """
* Tokens are all positions of a step that hold something; s/step is the first language rank's, or each rank's own.
* TFLOP/s: of matrix products (and convolutions) that the model needs, forward and backward, divided evenly over the
  language ranks; colocated encoders are counted with them. Nothing that is computed again is counted.
* Peak: a large matrix product in the precision of the run, on all ranks at once before the first step. Utilization is
  TFLOP/s over it.
* Waiting for features: share of the step that a language rank waits for the encoders, or for colocated ones the time
  to encode; of a point, the rank's that waits longest. Waiting for data: for token rows, on an encoder rank for pixels.
* Encoding: share of its time that an encoder rank encodes; else it waits for pixels, or for the language ranks to take
  what it has (features).
* Groups: share of the profiled steps (three behind the measured ones) in which at least one operation of an axis'
  process groups was on its way on the rank, from call to completion, waiting for slower peers counted. Axes may overlap
  each other, and on CUDA computation. `language` are all language ranks (sums of losses, the gradient's norm), and
  `replica` one tensor x pipeline block; of features it is what is waited for.
* GiB: the most memory of the rank with most: of the device, or resident on a CPU.
"""


def read(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the points that `benchmark` wrote into some folders, folder by folder.

    Raises:
        DataError: a folder has no points, or a file there is no point.
    """
    points = []
    for folder in folders:
        paths = sorted((folder / "points").glob("*.json"))
        if not paths:
            raise DataError(f"{folder}: has no points/*.json; give folders that `megatron-sphinx benchmark` wrote")
        for path in paths:
            try:
                point = read_json(path, PointFile)
                points.append(point if "error" in point else read_json(path, MeasuredPointFile))
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: is no point ({error}); measure it again") from error
    return points


def text_table(points: Sequence[Point]) -> str:
    """Format points as a table for a terminal, a line each."""
    width = max(len(point["name"]) for point in points) + 2
    head = (
        f"{'':{width}}{'tokens/s':>10}{'s/step':>9}{'p95':>9}{'utilization':>13}"
        f"{'waiting for features':>22}{'feature bytes/step':>20}"
    )
    rows = [f"{point['name']:{width}}" + ("  failed" if "error" in point else _text_row(point)) for point in points]
    return "\n".join([head, *rows])


def _text_row(point: Point) -> str:
    """Format the numbers of a point for `text_table`."""
    return (
        f"{point['tokens_per_second']:10.0f}{point['step_seconds']:9.3f}{point['step_seconds_p95']:9.3f}"
        f"{point['roles']['language']['utilization']:13.1%}{point['exposed_encoder_share']:22.1%}"
        f"{point['feature_bytes_per_step']:20,.0f}"
    )


def write(folder: Path, points: Sequence[Point], *, ratios: Mapping[str, float] | None = None) -> Path:
    """Write `report.md` and its plots into a folder, and return the report's path.

    Args:
        folder: made where there is none.
        points: the measured points.
        ratios: for other points on the same samples, how many times their tokens/s the first point has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    good = [point for point in points if "error" not in point]
    scaling = curves(good)
    parts = [_head(points)]
    if good:
        parts += [_points(good, ratios or {}), _plot_points(good, folder)]
    parts += [_scaling(scaling, folder)] if scaling else []
    parts += [_failures(points)] if len(good) < len(points) else []
    parts += [_roles(point) for point in good]
    parts += [_definitions(points), _repeat(points)]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Format a Markdown table, whose first `words` columns are words and the others numbers."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(points: Sequence[Point]) -> str:
    """Write the title, and how the points were measured."""
    ranks = sorted({point["ranks"] for point in points})
    steps = sorted({(point["steps"], point["warmup"], point["repeats"]) for point in points})
    how = "; ".join(
        f"{n} steps after {warmup} of warm-up, {repeats} runs a point in turn" for n, warmup, repeats in steps
    )
    return f"# Benchmark on {' and '.join(map(str, ranks))} ranks\n\n{len(points)} points: {how}."


def _points(points: Sequence[Point], ratios: Mapping[str, float]) -> str:
    """Write the table of the points, and how the first one compares with others."""
    head = ["point", "ranks", "s/step, median", "p95", "tokens/s", "of each rank", "pairs/s", "waiting for features",
            "waiting for data", "feature bytes/step"]  # fmt: skip
    rows = [
        [f"`{point['name']}`", str(point["ranks"]), f"{point['step_seconds']:.3f}", f"{point['step_seconds_p95']:.3f}",
         f"{point['tokens_per_second']:,.0f}", f"{point['tokens_per_second_per_rank']:,.0f}",
         f"{point['samples_per_second']:,.1f}", f"{point['exposed_encoder_share']:.1%}",
         f"{point['data_wait_share']:.1%}", f"{point['feature_bytes_per_step']:,.0f}"]
        for point in points
    ]  # fmt: skip
    text = f"## Points\n\n{_markdown(head, rows)}"
    if ratios:
        told = ", ".join(f"{ratio:.2f} times those of `{name}`" for name, ratio in ratios.items())
        text += f"\n\nOn the same samples, the tokens a second of `{points[0]['name']}` are {told}."
    return text


def _scaling(scaling: Sequence[Curve], folder: Path) -> str:
    """Write a table for each curve, and their plot."""
    parts = ["## Scaling"]
    for curve in scaling:
        meaning = "the same step on more ranks" if curve.kind == "strong" else "the same work on each rank"
        rows = [
            [str(point["ranks"]), point["layout"], f"{point['work']['positions']:,.0f}",
             f"{point['work']['positions'] / point['ranks']:,.0f}", f"{point['step_seconds']:.3f}",
             f"{point['tokens_per_second']:,.0f}", f"{efficiency:.1%}"]
            for point, efficiency in zip(curve.points, curve.efficiency, strict=True)
        ]  # fmt: skip
        head = ["ranks", "layout", "positions/step", "of each rank", "s/step", "tokens/s", "efficiency"]
        parts.append(f"### {curve.kind.capitalize()} scaling ({meaning}), {curve.label}\n\n{_markdown(head, rows)}")
    return "\n\n".join([*parts, _plot_scaling(scaling, folder)])


def _failures(points: Sequence[Point]) -> str:
    """Write what went wrong with the points that failed."""
    parts = [
        f"`{point['name']}` on {point['ranks']} ranks:\n\n```\n{point['error']}\n```"
        for point in points
        if "error" in point
    ]
    return "\n\n".join(["## Failed", *parts])


def _share(row: Mapping[str, Any], name: str) -> str:
    """Format a share in percent, empty where the role or rank has none of this name."""
    return f"{row[name]:.1%}" if name in row else ""


def _facts(row: Mapping[str, Any], axes: Sequence[str]) -> list[str]:
    """Format the columns that the tables of roles and of ranks share."""
    return [
        *(f"{row[name]:.3f}" if name in row else "" for name in ("step_seconds", "step_seconds_p95")),
        f"{row['flops_per_second'] / 1e12:,.3f}", f"{row['peak_flops'] / 1e12:,.3f}", f"{row['utilization']:.1%}",
        *(_share(row, name) for name in ("exposed_encoder_share", "data_wait_share", "busy_share")),
        *(_share(row["communication"], axis) for axis in axes), f"{row['peak_memory_bytes'] / 2**30:.2f}",
    ]  # fmt: skip


def _roles(point: Point) -> str:
    """Write the tables of one point's roles and ranks."""
    axes = sorted({axis for rank in point["per_rank"] for axis in rank["communication"]})
    head = ["s/step", "p95", "TFLOP/s", "peak", "utilization", "waiting for features", "waiting for data",
            "encoding", *(f"{axis} groups" for axis in axes), "GiB"]  # fmt: skip
    roles = [[f"{role} ({row['ranks']})", *_facts(row, axes)] for role, row in point["roles"].items()]
    ranks = [[f"{row['rank']}", row["role"], row["host"], *_facts(row, axes)] for row in point["per_rank"]]
    return (
        f"## `{point['name']}`\n\n{point['layout']}: {point['ranks']} ranks.\n\n{_markdown(['role', *head], roles)}\n\n"
        f"{_markdown(['rank', 'role', 'host', *head], ranks, words=3)}"
    )


def _definitions(points: Sequence[Point]) -> str:
    """Write what the columns of the tables mean."""
    text = f"## What the columns are\n{_DEFINITIONS}"
    if any(point["is_synthetic"] for point in points):
        text += f"* Synthetic data: {synthetic.DESCRIPTION}.\n"
    return text.rstrip()


def _repeat(points: Sequence[Point]) -> str:
    """Write what is needed to measure again: commands, versions, machines and configurations, each once."""
    parts = ["## To measure this again"]
    for environment in _distinct([point["environment"] for point in points]):
        lines = [f"{name}: {value}" for name, value in environment["versions"].items()]
        revision = environment["revision"] or "not from a git checkout"
        lines += [f"revision: {revision}", f"system: {environment['system']}"]
        lines += [f"{name}={value}" for name, value in environment["variables"].items()]
        text = "\n".join(lines)
        parts.append(f"```sh\n{environment['command']}\n```\n\n```\n{text}\n```")
    machines = [_machines(point) for point in points if "error" not in point]
    parts.append(
        _markdown(["point", "ranks", "layout", "ranks of each host", "devices", "launcher"], machines, words=6)
    )
    first: dict[str, Any] | None = None
    for point in points:
        if point["config"] is None:
            continue
        config = {name: part for name, part in point["config"].items() if name != "run"} | {
            "run": {"seed": point["config"]["run"]["seed"]}
        }
        if first is None:
            first = config
            text = yaml.safe_dump(config, sort_keys=False)
            parts.append(f"The configuration of `{point['name']}`, resolved:\n\n```yaml\n{text}```")
        elif lines := list(_differences(first, config, "")):
            parts.append(
                f"`{point['name']}` on {point['ranks']} ranks differs from it by "
                + ", ".join(f"`{line}`" for line in lines)
                + "."
            )
    return "\n\n".join(parts)


def _machines(point: Point) -> list[str]:
    """Format a point's row in the table of machines."""
    hosts = ", ".join(f"{host}: {count}" for host, count in point["hosts"].items())
    devices = {f"{rank['device']} ({rank['backend']}, {rank['threads']} threads)" for rank in point["per_rank"]}
    launcher = point["launcher"] or "torchrun"
    return [f"`{point['name']}`", str(point["ranks"]), point["layout"], hosts, ", ".join(sorted(devices)), launcher]


def _distinct(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the items that are equal to an earlier one."""
    return [item for number, item in enumerate(items) if item not in items[:number]]


def _differences(first: Any, other: Any, path: str) -> Iterator[str]:
    """Yield `key=value` for each key of `other` whose value in `first` differs; `path` is the key of both."""
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        for name in other:
            yield from _differences(first.get(name), other[name], f"{path}.{name}" if path else name)
    elif first != other:
        yield f"{path}={json.dumps(other)}"


def _plot_points(points: Sequence[Point], folder: Path) -> str:
    """Plot tokens a second and where the language ranks' time goes, as bars; return the Markdown of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"{point['name']}\n{point['ranks']} ranks" for point in points]
    figure = Figure(figsize=(11, 2 + 0.6 * len(points)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, time = figure.subplots(1, 2, sharey=True)
    speed.barh(names, [point["tokens_per_second"] for point in points], color="C0")
    speed.set(xlabel="tokens/s")
    speed.invert_yaxis()
    left = [0.0] * len(points)
    language = [point["roles"]["language"] for point in points]
    axes = sorted({axis for row in language for axis in row["communication"]} - {"features"})
    shares = {name: [row[share] for row in language] for name, share in _WAITS.items()}
    shares |= {axis: [row["communication"].get(axis, 0.0) for row in language] for axis in axes}
    for name, values in shares.items():
        time.barh(names, values, left=left, label=name if name in _WAITS else f"{name} groups")
        left = [before + value for before, value in zip(left, values, strict=True)]
    time.set(xlabel="share of a step on the language ranks", xlim=(0, None))
    figure.legend(loc="outside lower right", ncols=4, fontsize="small")
    figure.savefig(folder / "points.png", dpi=120)
    return "![tokens a second, and waiting and communication of the language ranks](points.png)"


def _plot_scaling(scaling: Sequence[Curve], folder: Path) -> str:
    """Plot tokens a second and efficiency over ranks beside the ideal; return the Markdown of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    speed, efficiency = figure.subplots(1, 2)
    for number, curve in enumerate(scaling):
        ranks = [point["ranks"] for point in curve.points]
        tokens = [point["tokens_per_second"] for point in curve.points]
        label, colour = f"{curve.kind}, {curve.label}", f"C{number}"
        speed.plot(ranks, tokens, "o-", color=colour, label=label)
        speed.plot(ranks, [tokens[0] * n / ranks[0] for n in ranks], ":", color=colour)
        efficiency.plot(ranks, curve.efficiency, "o-", color=colour, label=label)
    speed.set(xlabel="ranks", ylabel="tokens/s (dotted: ideal)", xscale="log", yscale="log")
    efficiency.set(xlabel="ranks", ylabel="efficiency", xscale="log", ylim=(0, None))
    for axes in (speed, efficiency):
        axes.set_xticks(sorted({point["ranks"] for curve in scaling for point in curve.points}), minor=False)
        axes.get_xaxis().set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    efficiency.legend(fontsize="small")
    figure.savefig(folder / "scaling.png", dpi=120)
    return "![tokens a second and efficiency over ranks](scaling.png)"
