"""Variants of one configuration on the same ranks, in turn, in one run; first of all the encoder stage or colocated."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.training import metrics


class BenchmarkError(SphinxError):
    """A measured run did not end well, or cannot be compared with the others."""

    exit_status = 1


def compare(
    config: Path,
    overrides: Sequence[str],
    variants: Mapping[str, Sequence[str]],
    *,
    ranks: int,
    steps: int,
    warmup: int,
    repeats: int,
) -> dict[str, dict[str, float]]:
    """Run variants in turn (A, B, A, B, ...); medians of the steps of each after the warm-up.

    Args:
        config: the configuration.
        overrides: key=value overrides of all variants.
        variants: by name, the overrides of each.
        ranks: of each run, on this machine, by torchrun.
        steps: measured steps of each run.
        warmup: steps before them.
        repeats: runs of each variant.

    Returns:
        A row for each variant. Tokens per second compare only where all have the same positions for the same samples.

    Raises:
        BenchmarkError: a run failed, or did not train on the samples that the others did.
    """
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    samples: list[str] = []
    for repeat in range(repeats):
        for name, own in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                _run(config, [*overrides, *own, f"run.folder={folder}", f"training.steps={warmup + steps}"], ranks)
                found = metrics.read(Path(folder) / "metrics.jsonl")
            trained = [line["sample_ids"] for line in found]
            if trained != (samples := samples or trained):
                raise BenchmarkError(f"{name}: trained on other samples than the runs before it; give it the same data")
            lines[name] += found[warmup:]
            row = _row(lines[name])
            metrics.say(
                f"run {repeat + 1}/{repeats} of {name}: {row['tokens_per_second']:.0f} tokens/s, "
                f"{row['step_seconds']:.3f} s/step"
            )
    return {name: _row(found) for name, found in lines.items()}


def compare_layouts(
    config: Path, overrides: Sequence[str], *, ranks: int, encoder: int, steps: int, warmup: int, repeats: int
) -> dict[str, Any]:
    """The encoder stage beside colocated encoders.

    Args:
        config: the configuration; its `parallel.encoder` is set to `encoder` and to 0 in turn.
        overrides: further key=value overrides of both.
        ranks: of each run.
        encoder: encoder ranks of the encoder-stage layout.
        steps: measured steps of each run.
        warmup: steps before them.
        repeats: runs of each layout.

    Returns:
        A row for each layout, and `ratios`: the encoder stage's speed over the colocated one's.
    """
    layouts = {"encoder stage": encoder, "colocated": 0}
    variants = {name: [f"parallel.encoder={size}"] for name, size in layouts.items()}
    found = compare(config, overrides, variants, ranks=ranks, steps=steps, warmup=warmup, repeats=repeats)
    rows = {name: row | {"parallel.encoder": layouts[name]} for name, row in found.items()}
    speed = rows["encoder stage"]["tokens_per_second"] / rows["colocated"]["tokens_per_second"]
    return {"ranks": ranks, "steps": steps * repeats, "layouts": rows, "ratios": {"encoder_stage": speed}}


def _run(config: Path, overrides: Sequence[str], ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_sphinx", "train", str(config), "checkpoint.resume=none", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: ended with {done.returncode}: {done.stderr[-2000:]}")


def _row(lines: list[dict[str, Any]]) -> dict[str, float]:
    seconds = median(line["step_seconds"] for line in lines)
    return {
        "tokens_per_second": median(line["tokens_per_second"] for line in lines),
        "samples_per_second": lines[0]["pairs"] / seconds,
        "step_seconds": seconds,
        "exposed_encoder_share": sum(line["exposed_encoder_seconds"] for line in lines)
        / sum(line["step_seconds"] for line in lines),
        "feature_bytes_per_step": median(line["feature_bytes"] for line in lines),
    }


def table(result: dict[str, Any]) -> str:
    """The comparison of layouts, readable."""
    head = f"{'layout':16}{'tokens/s':>10}{'s/step':>9}{'waiting for features':>23}{'feature bytes/step':>20}"
    rows = [
        f"{name:16}{row['tokens_per_second']:10.0f}{row['step_seconds']:9.3f}"
        f"{row['exposed_encoder_share']:23.1%}{row['feature_bytes_per_step']:20,.0f}"
        for name, row in result["layouts"].items()
    ]
    return "\n".join([head, *rows])
