"""What a run reports: a line per step and validation, TensorBoard, the progress line, and the plot of the losses."""

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_sphinx.console import say
from megatron_sphinx.errors import writing
from megatron_sphinx.training.lines import cut_back, read_lines

_VALIDATED = "validation_loss"  # what only the line of a validation has


class Reporter:
    """Writes what rank 0 knows after each step.

    Args:
        folder: the run folder; metrics.jsonl and skipped.jsonl in it are cut back to the steps before `start`, what
            they had of later ones goes to metrics.superseded.jsonl and skipped.superseded.jsonl.
        start: first step of this process.
        steps: steps of the whole run.
        interval: steps between two progress lines.
        guard: asked before each step is recorded; raises where the folder is another job's by now.
        validations_left: gives for a number of steps that are done how many validations come behind them.

    Attributes:
        board: writes for TensorBoard.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        steps: int,
        interval: int,
        guard: Callable[[], None] = lambda: None,
        validations_left: Callable[[int], int] = lambda _: 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.steps, self.interval, self.start = folder / "metrics.jsonl", steps, interval, start
        self._skipped, self._guard = folder / "skipped.jsonl", guard
        for path in (self.path, self._skipped):
            cut_back(path, start)
        self._file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self._seconds: deque[float] = deque(maxlen=50)
        self._validations_left, self._validation_seconds = validations_left, 0.0

    def write(self, line: dict[str, Any]) -> None:
        """Record one step in all files, and print the progress now and then.

        Raises:
            FolderError: the disk is full, or the folder is another job's.
        """
        step = line["step"]
        self._record(line)
        self._seconds.append(line["step_seconds"])
        if step % self.interval == 0 or step in (self.start, self.steps - 1):
            say(self._progress(line))

    def write_validation(self, line: dict[str, Any]) -> None:
        """Record a validation in all files, and print its losses.

        Raises:
            FolderError: the disk is full, or the folder is another job's.
        """
        self._record(line)
        self._validation_seconds = line["validation_seconds"]
        losses = [_shown(line[name]) for name in ("validation_loss", "validation_loss_pairs", "validation_loss_text")]
        say(
            f"validation after step {line['step'] + 1}  loss {losses[0]}  pairs {losses[1]}  text {losses[2]}  "
            f"in {line['validation_seconds']:.1f} s"
        )

    def _record(self, line: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl, and its numbers for TensorBoard."""
        self._guard()
        with writing(self.path.parent):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, line["step"])

    def write_skipped(self, line: dict[str, Any]) -> None:
        """Record a step that was skipped: which samples, and why.

        Raises:
            FolderError: the disk is full.
        """
        with writing(self.path.parent), self._skipped.open("a") as file:
            file.write(json.dumps(line) + "\n")
        say(f"step {line['step'] + 1} is skipped: {line['reason']}; its samples are in skipped.jsonl")

    def _progress(self, line: dict[str, Any]) -> str:
        """Make the progress line of a step."""
        done = line["step"] + 1
        left = (self.steps - done) * sum(self._seconds) / len(self._seconds)
        left += self._validations_left(done) * self._validation_seconds
        text = time.strftime("%H:%M:%S", time.gmtime(left))
        return (
            f"step {done}/{self.steps}  loss {_shown(line['loss'])}  pairs {_shown(line['loss_pairs'])}  "
            f"text {_shown(line['loss_text'])}  norm {_shown(line['gradient_norm'], 2)}  "
            f"{line['tokens_per_second']:.0f} tokens/s  waits: encoder {line['exposed_encoder_seconds']:.2f} s, "
            f"data {line['data_wait_seconds']:.2f} s  ETA {text}"
        )

    def close(self) -> None:
        """Finish the files and draw loss.png, as far as there is room."""
        with suppress(OSError):
            self._file.close()
            self.board.close()
            plot(self.path, self.path.with_name("loss.png"))


def _shown(value: float | None, digits: int = 4) -> str:
    """Write a number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def read(path: Path, *, of_validations: bool = False) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl: those of its steps, or else those of its validations."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if (_VALIDATED in line) is of_validations]


def is_validated(path: Path, step: int) -> bool:
    """Whether a metrics.jsonl has the line of the validation behind a step; it may end with half a line."""
    return any(line["step"] == step and _VALIDATED in line for line in read_lines(path))


def plot(metrics: Path, target: Path) -> None:
    """Draw the loss of pairs and of text over the steps, as they were and smoothed, and those of validations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, validations = read(metrics), read(metrics, of_validations=True)
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, label, colour in (("loss_pairs", "image-text pairs", "C0"), ("loss_text", "text", "C1")):
        if points := _points(lines, name):
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, smoothed(losses), color=colour, label=label)
        if points := _points(validations, f"validation_{name}"):
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=":", marker="o", markersize=4,
                      label=f"{label}, held out")  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)", ylim=(0, None))
    axes.margins(0.05)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)  # above the frame: hides no line
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """List steps, counted from 1, and the values that lines have under a name, as far as those are finite."""
    return [(line["step"] + 1, line[name]) for line in lines if line[name] is not None and isfinite(line[name])]


def smoothed(values: Sequence[float]) -> list[float]:
    """Average each value with as many before it as behind it, up to a fortieth of all: so the curve is never late."""
    last, most = len(values) - 1, max(2, len(values) // 40)
    sums = [0.0, *accumulate(values)]
    out = []
    for place in range(len(values)):
        reach = min(most, place, last - place)
        out.append((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))
    return out
