"""The encoder stage beside colocated encoders: the same configuration on the same ranks, in turn, in one run."""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.training import metrics


class BenchmarkError(SphinxError):
    """A measured run did not end well."""

    exit_status = 1


def compare(
    config: Path, overrides: list[str], *, ranks: int, encoder: int, steps: int, warmup: int, repeats: int
) -> dict[str, Any]:
    """Run both layouts in turn (A, B, A, B, ...) and compare the medians of their steps after the warm-up.

    Args:
        config: the configuration; its `parallel.encoder` is set to `encoder` and to 0 in turn.
        overrides: further key=value overrides of both.
        ranks: of each run, on this machine, by torchrun.
        encoder: encoder ranks of the encoder-stage layout.
        steps: measured steps of each run.
        warmup: steps before them.
        repeats: runs of each layout.

    Returns:
        A row for each layout, and `ratios`: the encoder stage's speed over the colocated one's.
    """
    layouts = {"encoder stage": encoder, "colocated": 0}
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in layouts}
    for repeat in range(repeats):
        for name, size in layouts.items():
            with tempfile.TemporaryDirectory() as folder:
                _run(config, [*overrides, f"parallel.encoder={size}", f"run.folder={folder}",
                              f"training.steps={warmup + steps}"], ranks)  # fmt: skip
                lines[name] += metrics.read(Path(folder) / "metrics.jsonl")[warmup:]
            metrics.say(f"run {repeat + 1}/{repeats} of {name}: {_row(lines[name])['tokens_per_second']:.0f} tokens/s")
    rows = {name: _row(found) | {"parallel.encoder": layouts[name]} for name, found in lines.items()}
    speed = rows["encoder stage"]["tokens_per_second"] / rows["colocated"]["tokens_per_second"]
    return {"ranks": ranks, "steps": steps * repeats, "layouts": rows, "ratios": {"encoder_stage": speed}}


def _run(config: Path, overrides: list[str], ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_sphinx", "train", str(config), "checkpoint.resume=none", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: ended with {done.returncode}: {done.stderr[-2000:]}")


def _row(lines: list[dict[str, Any]]) -> dict[str, float]:
    seconds = median(line["step_seconds"] for line in lines)
    return {
        "tokens_per_second": median(line["tokens_per_second"] for line in lines),
        "step_seconds": seconds,
        "exposed_encoder_share": sum(line["exposed_encoder_seconds"] for line in lines)
        / sum(line["step_seconds"] for line in lines),
        "feature_bytes_per_step": median(line["feature_bytes"] for line in lines),
    }


def table(result: dict[str, Any]) -> str:
    """The comparison, readable."""
    head = f"{'layout':16}{'tokens/s':>10}{'s/step':>9}{'waiting for features':>23}{'feature bytes/step':>20}"
    rows = [
        f"{name:16}{row['tokens_per_second']:10.0f}{row['step_seconds']:9.3f}"
        f"{row['exposed_encoder_share']:23.1%}{row['feature_bytes_per_step']:20,.0f}"
        for name, row in result["layouts"].items()
    ]
    return "\n".join([head, *rows])
