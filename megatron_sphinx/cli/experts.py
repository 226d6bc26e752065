"""Look at the experts of a mixture: which compute what, how many are needed, and which.

    megatron-sphinx experts runs/moe --data captions=questions.jsonl --data pope=benchmarks --output look
    megatron-sphinx experts runs/moe --data pope=benchmarks --output look --prune random usage --keep 6 4 2 --sweep

MODEL is a checkpoint or a run's folder. --data is a file of questions as `generate --input` takes, or BENCHMARK=DIR,
the folder that holds one for each benchmark. While the model answers, its routers' choices are counted by layer and
kind of token; look/experts.md is the page, look/experts.json has every figure.

--prune chooses experts to keep in each layer: at random (--seeds times), by usage, or by the error of the layer's
output (reconstruction); kept_*.json in the output are for --keep-experts of convert and of all commands that answer.
--sweep evaluates the benchmarks with 1 to all experts active, and with each pruned choice.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sphinx.cli.command import add_model, check_model, model_options
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.ranges import Range, check_range

if TYPE_CHECKING:
    from megatron_sphinx.serving.model import Model

_METHODS = ("random", "usage", "reconstruction")
_COUNT = Range(least=1, most=2**31)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_model(parser)
    add = parser.add_argument
    add(
        "--data",
        action="append",
        required=True,
        metavar="[NAME=]PATH",
        help="what is asked; may be given again",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="the page, figures, and kept experts")
    add("--prompt", default="", metavar="TEXT", help="asked where a row of a file has no question")
    add("--images", type=Path, metavar="FOLDER", help="of the pictures of files; default: that of the file")
    add("--limit", type=int, metavar="N", help="the first N questions of each")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="of each answer while it is looked at; default: 16")
    group = parser.add_argument_group("fewer experts")
    group.add_argument("--prune", nargs="+", choices=_METHODS, default=[], help="choose experts to keep by these")
    group.add_argument("--keep", type=int, nargs="+", default=[], metavar="N", help="experts that each layer keeps")
    group.add_argument("--seeds", type=int, default=3, metavar="N", help="random choices; default: 3")
    group.add_argument("--sweep", action="store_true", help="evaluate the benchmarks with other experts")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    _check(args)
    check_model(args)
    from megatron_sphinx.evaluation.expert_data import DataSet

    data = [DataSet.of(one) for one in args.data]
    from megatron_sphinx.evaluation.expert_look import Looking, look
    from megatron_sphinx.evaluation.expert_page import write_look
    from megatron_sphinx.evaluation.expert_pruning import Pruning
    from megatron_sphinx.evaluation.expert_sweep import check_benchmarks, choose_experts, evaluate_benchmarks, sweep
    from megatron_sphinx.serving.model import load
    from megatron_sphinx.serving.questions import Asking

    if args.sweep:
        check_benchmarks(data)
    asking = Asking(args.prompt, images=args.images, follow_links=True)
    subsets = tuple(dict.fromkeys(args.keep)) if "reconstruction" in args.prune else ()
    with load(args.model, **model_options(args)) as model:
        _check_keep(args, model)
        found = look(model, data, Looking(asking, args.limit, args.max_new_tokens, subsets, show=True))
        methods, keeps = ([*dict.fromkeys(given)] for given in (args.prune, args.keep))
        pruned = choose_experts(model.language, found, [Pruning(method) for method in methods], keeps, args.seeds)
        points = []
        if args.sweep:
            evaluate = evaluate_benchmarks(model, args.model, data, args.output / "sweep", args.limit)
            points = sweep(model, pruned, evaluate)
        page = write_look(args.output, model.name, found, pruned, points, model.language.experts_per_token)
    for one in pruned:
        print(f"{args.output / f'kept_{one.name}.json'}: {one.kept}")
    for point in points:
        print(f"{point.name}: " + ", ".join(f"{task} {value:.2f}" for task, value in point.figures.items()))
    print(page)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together.

    Raises:
        ConfigError: they do not, or a number is out of its range.
    """
    for name in ("limit", "max_new_tokens", "seeds"):
        if (value := getattr(args, name)) is not None:
            check_range(value, _COUNT, f"--{name.replace('_', '-')}")
    for number in args.keep:
        check_range(number, _COUNT, "--keep")
    if bool(args.prune) != bool(args.keep):
        raise ConfigError("--prune and --keep: one is given without the other; give both, or none")
    if args.prune and (args.keep_experts is not None or args.active_experts is not None):
        raise ConfigError("--prune: chooses among all experts; leave out --keep-experts and --active-experts")
    if "reconstruction" in args.prune and max(args.tensor or 1, args.expert or 1) > 1:
        raise ConfigError(
            "--prune reconstruction: each rank must have all experts of its layers whole; divide by --pipeline alone"
        )


def _check_keep(args: argparse.Namespace, model: Model) -> None:
    """Refuse numbers of experts that the model cannot keep."""
    from megatron_sphinx.evaluation.expert_pruning import Pruning, check_keep

    for method in args.prune:
        for keep in args.keep:
            check_keep(keep, model.language.experts, Pruning(method))
