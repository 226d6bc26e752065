"""Accuracy of a demo run on digits that training never saw: the ten captions ranked by their likelihood.

    examples/demo_evaluate.py RUN_FOLDER [RANDOM_RUN_FOLDER]

Prints a table and writes summary.json into RUN_FOLDER. The second run is the control: the same, but for a convolutional
expert with random weights.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from demo_data import CAPTIONS, DIGITS
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.config import Config
from megatron_sphinx.data.canvas import Canvas
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.model.views import GLOBAL
from megatron_sphinx.run import train as run
from megatron_sphinx.training import metrics


def held_out(config: Config) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Pixels of the held-out digits for each input side, and their labels."""
    data = np.load(Path(config.data.tokenizer).parent / "held_out.npz")
    pictures = [Image.fromarray(pixels).convert("RGB") for pixels in data["images"]]
    canvases = [Canvas(picture, config.vision) for picture in pictures]
    pixels = {side: np.stack([canvas.cut(GLOBAL, side) for canvas in canvases]) for side in config.vision.sides}
    return {side: torch.from_numpy(stack) for side, stack in pixels.items()}, torch.from_numpy(data["labels"])


def candidates(tokenizer: Tokenizer, tokens_per_view: int, pictures: int) -> tuple[MicroBatch, torch.Tensor]:
    """Every picture with each of the ten captions as one micro-batch; the captions' number at each of its positions."""
    tokens, targets, lengths, numbers = [], [], [], []
    captions = [tokenizer.encode(CAPTIONS[0].format(word=word)) for word in DIGITS]
    order = sorted(range(10), key=lambda digit: len(captions[digit]))  # rows are packed by length
    for digit in order:
        text = [*captions[digit], tokenizer.eos]
        row = [tokenizer.bos] + [0] * tokens_per_view + text
        target = [-100] * tokens_per_view + text + [-100]
        for picture in range(pictures):
            tokens += row
            targets += target
            lengths.append(len(row))
            numbers += [picture * 10 + digit] * len(row)
    starts = np.cumsum([0, *lengths[:-1]]) + 1
    positions = (starts[:, None] + np.arange(tokens_per_view)).reshape(-1)
    batch = MicroBatch(
        tokens=torch.tensor(tokens),
        targets=torch.tensor(targets),
        target_positions=(torch.tensor(targets) >= 0).nonzero().flatten(),
        lengths=tuple(lengths),
        sample_of_token=torch.zeros(len(tokens), dtype=torch.int64),
        row_of_token=torch.zeros(len(tokens), dtype=torch.int64),
        rows=1,
        view_positions=torch.from_numpy(positions),
        skip_positions=torch.zeros(0, dtype=torch.int64),
        sample_of_view=torch.arange(len(lengths)),
        samples=tuple(range(len(lengths))),
        documents=(),
    )
    return batch, torch.tensor(numbers)


@torch.no_grad()
def accuracy(model: SphinxModel, config: Config, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the pictures whose own caption is the likeliest of the ten."""
    tokenizer, right, size = Tokenizer(config.data.tokenizer), 0, 60
    for first in range(0, len(labels), size):
        chunk = features[first : first + size]
        batch, numbers = candidates(tokenizer, config.vision.tokens_per_view, len(chunk))
        losses = model(batch.to(chunk.device), chunk.repeat(10, 1)).double().cpu()
        totals = torch.zeros(len(chunk) * 10, dtype=torch.float64)
        totals.index_add_(0, numbers[batch.target_positions], losses)
        right += int((totals.view(-1, 10).argmin(1) == labels[first : first + size]).sum())
    return right / len(labels)


def evaluate(folder: Path) -> float:
    """Held-out accuracy of the newest checkpoint of a run."""
    config = configuration.load(folder / "config.yaml", ["parallel={}"])
    job = run.alone(config)
    views, labels = held_out(config)
    model = run.build_model(config, job.groups, job.platform)
    encoders = job.encoders()
    model.load_state_dict(run.newest_weights(job, encoders))
    return accuracy(model.eval(), config, encoders(views), labels)


def summary(folder: Path, control: Path | None) -> dict[str, object]:
    """What a run reached: accuracies, first and last losses (means of 5 steps), seconds of its steps."""
    lines = metrics.read(folder / "metrics.jsonl")

    def ends(name: str) -> dict[str, float]:
        values: Sequence[float] = [line[name] for line in lines]
        return {"first": float(np.mean(values[:5])), "last": float(np.mean(values[-5:]))}

    return {
        "steps": len(lines),
        "seconds": sum(line["step_seconds"] for line in lines),
        "held_out_accuracy": evaluate(folder),
        "held_out_accuracy_random_expert": evaluate(control) if control else None,
        "loss_pairs": ends("loss_pairs"),
        "loss_text": ends("loss_text"),
    }


def main() -> int:
    """Evaluate; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("random_run", type=Path, nargs="?")
    parser.add_argument("--started", type=float, help="when the demo began, in seconds since 1970")
    args = parser.parse_args()
    reached = summary(args.run, args.random_run)
    if args.started:
        reached["seconds"] = round(time.time() - args.started, 1)
    (args.run / "summary.json").write_text(json.dumps(reached, indent=1))
    for name in ("loss_pairs", "loss_text"):
        ends = reached[name]
        print(f"{name:34}{ends['first']:8.3f} -> {ends['last']:.3f}")
    for name in ("held_out_accuracy", "held_out_accuracy_random_expert"):
        if reached[name] is not None:
            print(f"{name:34}{reached[name]:8.1%}")
    print(f"{'seconds':34}{reached['seconds']:8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
