"""A step of ours beside a bare one of megatron-core and DeepSpeed, and beside transformers', in turn, in one run.

    tools/compare/step.py [--ranks 2] [--rounds 9] [--precision bf16] [--layers 4] [--hidden 512] [--only NAME ...]

Ours is a step of the training loop: plan, loader, training, metrics. All sides train the same weights on the same
samples of each step by the same AdamW under DeepSpeed ZeRO-2, and what comes of the frozen encoders lies ready for all
of them. That their first losses agree, before and after an update, is checked.

* `bare`: the same model by a loop of a few lines around deepspeed.initialize, on batches that lie ready in memory:
  pairs and text in one step, as stage 1 has them.
* `transformers_captions`: LlamaForCausalLM, image-text pairs only. The peer's samples come in the plan's order, dealt
  to its ranks in turn, padded to the longest of a batch; its batches lie ready in memory.
* `transformers_captions_small_vocabulary`: the same with 512 tokens instead of 32,000. That gives the output layer 2 %
  of the matrix products, as in LLaMA2-7B. With the larger one it is more than half of them here, and we compute logits
  only where there is a target, which is more than padding and overhead in a model as small as this.
* `transformers_text`: text only, in full rows: nobody pads.

The peer has the micro-batch, and then the type of DeepSpeed's communication, that are fastest on the first steps,
scaled dot-product attention without a mask (padding stands behind), and no activation checkpointing. Captions have the
lengths of megatron_sphinx/gpu_check/real_lengths.json; tokens and features are random.

Prints a table of medians over the rounds (CPU: of all ranks) and, as the last line, one JSON object. `ratios` are our
speed over the peer's in target tokens per second, medians over steps taken in turn; `cpu_ratio` of a row is the same
for the processors' time, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from step_sides import SMALL_VOCABULARY, Side, WithDeepSpeed, bare, configure, transformers

from megatron_sphinx.console import say
from megatron_sphinx.device import use_platform
from megatron_sphinx.gpu_check.workload import OurSteps, make_data, open_job, targets_of

NAMES = ("bare", "transformers_captions", "transformers_captions_small_vocabulary", "transformers_text")
AGREEMENT = 1e-3  # of the first two losses, relative


@dataclass(frozen=True)
class Turn:
    """How long one step took: by the clock, and by the processors of all ranks."""

    seconds: float
    cpu_seconds: float


def turn(side: Side, step: int) -> Turn:
    """Train a step, timed; all ranks begin and end together."""
    dist.barrier()
    begin, busy = time.perf_counter(), time.process_time()
    side(step)
    used = torch.tensor(time.process_time() - busy, dtype=torch.float64)
    dist.barrier()
    seconds = time.perf_counter() - begin
    dist.all_reduce(used)
    return Turn(seconds, float(used))


def fastest(make: Callable[[Any], WithDeepSpeed], options: Sequence[Any]) -> Any:
    """Choose the option with the fastest step; the first rank's clock decides for all."""
    taken = []
    for option in options:
        side = make(option)
        taken.append(min(turn(side, step).seconds for step in range(len(side.batches))))
    chosen = [int(np.argmin(taken))]
    dist.broadcast_object_list(chosen)
    return options[chosen[0]]


def compare(ours: Side, peer: Side, warmup: int, count: int) -> list[tuple[Turn, Turn]]:
    """Take both sides' steps in turn, and keep those after the warm-up.

    Raises:
        SystemExit: their losses differ in the first step, or in the second, after an update.
    """
    turns = []
    for step in range(warmup + count):
        turns.append((turn(ours, step), turn(peer, step)))
        if step < 2:
            losses = ours.loss(), peer.loss()
            if abs(losses[0] - losses[1]) > AGREEMENT * losses[0]:
                raise SystemExit(
                    f"step {step}: losses {losses[0]:.6f} and {losses[1]:.6f}; the sides do not do the same work"
                )
    return turns[warmup:]


def sides(args: argparse.Namespace, name: str, folder: Path) -> tuple[Side, Side, dict[str, Any]]:
    """Make both sides of a comparison, and the facts that its row begins with."""
    job = open_job(configure(args, name, folder), folder)
    plans = [job.planner.step(step) for step in range(args.warmup + args.rounds)]
    facts = {"targets": targets_of(plans[-1]), "positions": plans[-1].positions, "positions_peer": plans[-1].positions}
    if name == "bare":
        return OurSteps(job), bare(job, plans), facts
    ours, samples = OurSteps(job), (job.config.data.pairs_per_step or args.rows) // args.ranks
    sizes, first = sorted({max(samples // parts, 1) for parts in (1, 2, 4)}), plans[:3]
    size = fastest(lambda size: transformers(job, first, size, None), sizes)
    communication = fastest(lambda communication: transformers(job, first, size, communication), [None, "fp32"])
    peer = transformers(job, plans, size, communication)
    facts |= {"peer_micro_batch": size, "peer_communication": communication or "default"}
    padded = torch.tensor([sum(tokens.numel() for tokens, _, _ in peer.batches[-1])])
    dist.all_reduce(padded)
    return ours, peer, facts | {"positions_peer": int(padded)}


def row(turns: Sequence[tuple[Turn, Turn]], facts: dict[str, Any]) -> dict[str, Any]:
    """Join facts of a comparison with medians, and medians of the ratios of steps that were taken in turn."""
    row = dict(facts)
    for number, side in enumerate(("ours", "peer")):
        seconds = median(pair[number].seconds for pair in turns)
        row[side] = {
            "step_seconds": seconds,
            "cpu_seconds": median(pair[number].cpu_seconds for pair in turns),
            "target_tokens_per_second": facts["targets"] / seconds,
        }
    row["ratio"] = median(peer.seconds / ours.seconds for ours, peer in turns)
    row["cpu_ratio"] = median(peer.cpu_seconds / ours.cpu_seconds for ours, peer in turns)
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Lay out the comparisons as text."""
    lines = [f"{'':46}{'s/step':>9}{'CPU s/step':>12}{'targets/s':>11}{'positions':>11}{'ratio':>8}{'of CPU':>8}"]
    for name, row in rows.items():
        for side, suffix in (("ours", ""), ("peer", "_peer")):
            values = row[side]
            lines.append(
                f"{name if side == 'ours' else '':40}{side:>6}{values['step_seconds']:9.3f}"
                f"{values['cpu_seconds']:12.3f}{values['target_tokens_per_second']:11,.0f}"
                f"{row['positions' + suffix]:11,}"
                + (f"{row['ratio']:8.3f}{row['cpu_ratio']:8.3f}" if side == "ours" else "")
            )
    return "\n".join(lines)


def work(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Run all comparisons on this rank; every rank does the same, together."""
    dist.init_process_group(use_platform(None).backend)
    if dist.get_rank() == 0:
        make_data(folder, min(args.vocabulary, SMALL_VOCABULARY))
    dist.barrier()
    rows = {}
    for name in args.only:
        ours, peer, facts = sides(args, name, folder)
        rows[name] = row(compare(ours, peer, args.warmup, args.rounds), facts)
        if dist.get_rank() == 0:
            say(f"{name}: {rows[name]['ratio']:.3f}, of CPU {rows[name]['cpu_ratio']:.3f}")
    return rows


def main() -> int:
    """Run the comparisons; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "ranks": 2, "rounds": 9, "warmup": 2, "layers": 4, "hidden": 512, "ffn": 1376, "vocabulary": 32000, "grid": 16,
        "sequence_length": 1024, "micro_batch_rows": 4, "pairs": 16, "rows": 4,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--expert", default="clip_vit_l14")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks)]
            command += [__file__, *sys.argv[1:], "--folder", folder]
            return subprocess.run(command, check=False, env={"PYTHONWARNINGS": "ignore"} | os.environ).returncode
    rows = work(args, args.folder)
    if dist.get_rank() == 0:
        print(table(rows))
        print(json.dumps({"ratios": {name: row["ratio"] for name, row in rows.items()}, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
