"""What the small family has learned: theta_mix between two kinds of captions, and tasks on pictures never seen.

    examples/family.py mix REAL SYN TARGET --plot PLOT.png    the caption losses along beta, each mix kept in TARGET
    examples/family.py test RUN...                            accuracy of each run's newest checkpoint on held-out tasks

Both print a table; `test` also writes summary.json into each run's folder.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_sphinx import config as configuration
from megatron_sphinx.checkpoint.mix import interpolate, sweep
from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.config import Config
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.config import DataSource
from megatron_sphinx.data.packing import views_in
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.run.assembly import build_model
from megatron_sphinx.run.evaluation import open_alone
from megatron_sphinx.run.job import RankContext

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def losses(config: Config, weights: dict[str, torch.Tensor], folder: Path, key: str) -> tuple[torch.Tensor, ...]:
    """Compute the loss of each sample of an index, summed over its targets, and count those: two of [samples], in nats.

    Args:
        config: of the model.
        weights: whole ones.
        folder: the index.
        key: what the index holds, pairs or conversations.
    """
    count = len(SampleIndex([folder], key))
    amounts = {"pairs_per_step": 0, "conversations_per_step": 0, "text_tokens_per_step": 0, f"{key}_per_step": count}
    data = replace(config.data, **amounts, **{key: (DataSource(path=str(folder)),)})
    context = open_alone(replace(config, data=data))
    model = build_model(config, context.groups, context.platform)
    model.load_state_dict(weights)
    index, builder = context.sources.samples, BatchBuilder(data, context.sources, config.vision)
    known = dict(features(context, index))
    total, targets = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    for (rows,) in context.planner.step(0).micro_batches:  # every sample is in the one step
        batch = builder.build(rows)
        seen = torch.stack([known[index.location(pair), view] for pair, view in views_in(rows)])
        out = batch.spread(model.eval()(batch.to(seen.device), seen).double().cpu())
        for number, pair in enumerate(batch.samples):
            is_own = batch.sample_of_token == number
            total[pair], targets[pair] = out[is_own].sum(), (batch.targets[is_own] >= 0).sum()
    return total, targets


def features(context: RankContext, index: SampleIndex) -> Iterator[tuple[tuple, torch.Tensor]]:
    """Encode each view of each image of an index, once where several samples share it."""
    asked = {}
    for (rows,) in context.planner.step(0).micro_batches:
        for pair, view in views_in(rows):
            asked.setdefault((index.location(pair), view), (pair, view))
    loader = PixelLoader(index, context.config.vision, workers=2, quarantine=context.folder / "quarantine.jsonl")
    pixels = loader.submit(list(asked.values())).result()
    yield from zip(asked, context.encoders()(pixels.views), strict=True)


def mix(args: argparse.Namespace) -> None:
    """Mix two checkpoints at each beta, and print the loss of both kinds of captions on held-out pictures."""
    from matplotlib import pyplot

    config = configuration.load(args.real / "config.yaml", ["parallel={}"])
    losses_by_beta = []
    targets = sweep(args.target, BETAS)
    interpolate([args.real, args.syn], targets)
    for beta, target in zip(BETAS, targets, strict=True):
        weights, ends = load_weights(target), []
        for kind in ("real", "syn"):
            total, targets = losses(config, weights, args.data / kind / "held_out", "pairs")
            ends.append(float(total.sum() / targets.sum()))
        losses_by_beta.append(ends)
        print(f"beta {beta:4.2f}   real captions {ends[0]:6.3f}   synthetic captions {ends[1]:6.3f}", flush=True)
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for kind, values in zip(
        ("captions as people write them", "synthetic captions"), zip(*losses_by_beta, strict=True), strict=True
    ):
        axes.plot(BETAS, values, marker="o", label=kind)
    axes.set(xlabel="beta: share of the weights trained on real captions", ylabel="held-out loss, nats a token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.plot, dpi=120)
    print(
        json.dumps(
            {
                "beta": BETAS,
                "loss_real": [real for real, _ in losses_by_beta],
                "loss_syn": [syn for _, syn in losses_by_beta],
            }
        )
    )


def test(args: argparse.Namespace) -> None:
    """Print how often the right answer is the likeliest of those that are possible."""
    for folder in args.runs:
        config = configuration.load(folder / "config.yaml", ["parallel={}"])
        exam = Path(config.data.conversations[0].path) / "tests"
        total, _ = losses(config, load_weights(folder), exam, "conversations")
        right: dict[str, list[bool]] = {}
        chance: dict[str, list[float]] = {}
        first = 0
        for question in json.loads((exam / "questions.json").read_text()):
            task, choices = question["task"], question["choices"]
            right.setdefault(task, []).append(int(total[first : first + choices].argmin()) == 0)
            chance.setdefault(task, []).append(1 / choices)
            first += choices
        summary = {
            task: {"questions": len(answers), "accuracy": sum(answers) / len(answers),
                   "chance": sum(chance[task]) / len(answers)} for task, answers in right.items()
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        print(f"{folder}: {config.vision.views} views, {'Mixtral' if config.model.experts else 'LLaMA'}")
        for task, of_task in summary.items():
            accuracy, by_chance = f"{of_task['accuracy']:.1%}", f"chance {of_task['chance']:.1%}"
            print(f"  {task:10}{of_task['questions']:4} questions {accuracy:>8}   {by_chance}")


def main() -> int:
    """Run the chosen command; the exit status of the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("mix")
    for name in ("real", "syn", "target"):
        command.add_argument(name, type=Path)
    command.add_argument("--plot", type=Path, required=True)
    command.add_argument("--data", type=Path, default=Path("data/family"))
    command.set_defaults(work=mix)
    command = commands.add_parser("test")
    command.add_argument("runs", type=Path, nargs="+")
    command.set_defaults(work=test)
    args = parser.parse_args()
    args.work(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
