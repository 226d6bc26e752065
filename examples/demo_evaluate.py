"""Accuracy of a demo run on digits that training never saw: ten captions ranked by likelihood, and captions generated.

    examples/demo_evaluate.py RUN_FOLDER [RANDOM_RUN_FOLDER]

Prints a table and writes summary.json into RUN_FOLDER. The second run is the control: the same, but for a convolutional
expert with random weights.
"""

import argparse
import io
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from demo_data import CAPTIONS, DIGITS
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.generation.requests import Prompt
from megatron_sphinx.serving.model import Model, load
from megatron_sphinx.training import metrics


def held_out(model: Model, folder: Path) -> tuple[list[Prompt], Sequence[int]]:
    """Make a prompt of each held-out digit, of which nothing but the picture is told; and return their labels."""
    data, prompts = np.load(folder / "held_out.npz"), []
    for pixels in data["images"]:
        file = io.BytesIO()
        Image.fromarray(pixels).convert("RGB").save(file, "png")
        prompts.append(model.prompt("", file.getvalue()))
    return prompts, data["labels"].tolist()


def likeliest_digits(model: Model, prompts: Sequence[Prompt]) -> list[int]:
    """Rank the ten captions of each picture: which digit's is the likeliest."""
    captions = [[*model.tokenizer.encode(CAPTIONS[0].format(word=word)), model.tokenizer.eos] for word in DIGITS]
    scores = np.array([[sum(one) for one in model.score(prompt, captions)] for prompt in prompts])
    return scores.argmax(1).tolist()


def said_digits(model: Model, prompts: Sequence[Prompt]) -> list[int | None]:
    """Let the model caption each picture: which digit its caption names; None where it names none, or several."""
    texts = [answer.text for answer in model.generate(prompts, max_new_tokens=32)]
    named = [[digit for digit, word in enumerate(DIGITS) if word in re.findall(r"\w+", text)] for text in texts]
    return [digits[0] if len(digits) == 1 else None for digits in named]


def evaluate(folder: Path) -> dict[str, float]:
    """Measure the held-out accuracy of the newest checkpoint of a run, by ranking and by generation."""
    with load(folder) as model:
        data = configuration.load(folder / "config.yaml").data
        prompts, labels = held_out(model, Path(data.tokenizer).parent)
        found = {"ranked": likeliest_digits(model, prompts), "generated": said_digits(model, prompts)}
    return {
        name: float(np.mean([digit == label for digit, label in zip(digits, labels, strict=True)]))
        for name, digits in found.items()
    }


def summary(folder: Path, control: Path | None) -> dict[str, object]:
    """Sum up what a run reached: accuracies, first and last losses (means of 5 steps), seconds of its steps."""
    lines = metrics.read(folder / "metrics.jsonl")

    def ends(name: str) -> dict[str, float]:
        """Average a number over the first steps and over the last ones."""
        values: Sequence[float] = [line[name] for line in lines]
        return {"first": float(np.mean(values[:5])), "last": float(np.mean(values[-5:]))}

    own, of_control = evaluate(folder), evaluate(control) if control else {}
    return {
        "steps": len(lines),
        "seconds": sum(line["step_seconds"] for line in lines),
        "held_out_accuracy": own["ranked"],
        "held_out_accuracy_generated": own["generated"],
        "held_out_accuracy_random_expert": of_control.get("ranked"),
        "loss_pairs": ends("loss_pairs"),
        "loss_text": ends("loss_text"),
    }


def main() -> int:
    """Evaluate the run; the exit status of the program."""
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
    for name in ("held_out_accuracy", "held_out_accuracy_generated", "held_out_accuracy_random_expert"):
        if reached[name] is not None:
            print(f"{name:34}{reached[name]:8.1%}")
    print(f"{'seconds':34}{reached['seconds']:8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
