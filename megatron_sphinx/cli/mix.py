"""Mix the weights of checkpoints, each times its share: theta_mix = beta * REAL + (1 - beta) * SYNTHETIC.

    megatron-sphinx mix --real A --synthetic B --beta 0.6 --output C
    megatron-sphinx mix --real A --synthetic B --beta 0:1:0.1 --output C    C/beta_0, C/beta_0.1, ... C/beta_1
    megatron-sphinx mix --checkpoint A=0.5 --checkpoint B=0.3 --checkpoint D=0.2 --output C

The checkpoints are of one model, in one format: any that `megatron-sphinx convert` knows; the result has it too, and
its files are those of the first one. Of a run folder the newest checkpoint is taken. Begin a run with the result:
model.weights=C; it holds no optimizer state. Computed in fp32, rounded once; a share of 1 copies to the bit. Streams,
and reads the inputs once. The result says what it was made of, with digests of the inputs: interpolation.json, or
`interpolation` in checkpoint.json. They are of XXH3, which finds damage; --sha256 makes them such as nobody can forge.

Source: SPHINX, arXiv:2311.07575, equation 1.
"""

import argparse
from decimal import Decimal, InvalidOperation
from pathlib import Path

from megatron_sphinx.cli.command import add_ignore, add_sha256, place

_MOST_MIXES = 1000  # of a sweep


def betas_of(text: str) -> list[float]:
    """Read the values of --beta: one number, or first:last:step.

    Raises:
        ArgumentTypeError: it is neither, or too many.
    """
    try:
        values = [Decimal(part) for part in text.split(":")]
        if len(values) == 1:
            return [float(values[0])]
        first, last, step = values
        number = int(abs((last - first) / step)) + 1
        if number > _MOST_MIXES:
            raise argparse.ArgumentTypeError(
                f"{text}: are {number} mixes; give a larger step, for {_MOST_MIXES} at most"
            )
        step = abs(step) if last >= first else -abs(step)  # a range may run down
        return [float(first + index * step) for index in range(number)]
    except (InvalidOperation, ValueError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f"{text}: neither a number nor first:last:step") from error


def share_of(text: str) -> tuple[Path, float]:
    """Read the value of --checkpoint, PATH=SHARE.

    Raises:
        ArgumentTypeError: it does not end with a number.
    """
    path, _, share = text.rpartition("=")
    try:
        return place(path), float(share)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: give PATH=SHARE") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("--real", type=place)
    parser.add_argument("--synthetic", type=place)
    parser.add_argument("--beta", type=betas_of, help="share of REAL, from 0 to 1; first:last:step: a mix for each")
    parser.add_argument("--checkpoint", type=share_of, action="append", metavar="PATH=SHARE")
    parser.add_argument("--output", type=place, required=True, help="folder to make")
    parser.add_argument(
        "--scope",
        choices=("all", "language"),
        default="all",
        help="all: mix every tensor; language: those of the language model only, and take the others "
        "(projections, tags) from the first checkpoint; default: all",
    )
    add_ignore(parser)
    add_sha256(parser)
    parser.add_argument("--preset", type=Path, help="of the model, whose shape torch_dist checkpoints do not tell")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    pair = (args.real, args.synthetic, args.beta)
    if (args.checkpoint is None) == (None in pair) or (args.checkpoint and any(pair)):
        raise argparse.ArgumentError(None, "give --real, --synthetic and --beta, or several --checkpoint")
    inputs = [path for path, _ in args.checkpoint] if args.checkpoint else [args.real, args.synthetic]
    from megatron_sphinx.checkpoint.mix import interpolate, shares_of, sweep

    shape = None
    if args.preset:
        from megatron_sphinx import config as configuration

        shape = configuration.load(args.preset).model
    if args.checkpoint:
        targets = {args.output: tuple(share for _, share in args.checkpoint)}
    elif len(args.beta) > 1:
        targets = sweep(args.output, args.beta)
    else:
        targets = {args.output: shares_of(args.beta[0])}
    done = interpolate(
        inputs, targets, scope=args.scope, shape=shape, algorithm=args.algorithm, ignored=args.ignore, show=True
    )
    for note in done.notes:
        print(note)
    for target in targets:
        print(f"{target}: {done.mixed} tensors mixed, {done.copied} copied, {done.parameters:,} parameters")
    for balance in done.balances:
        print(balance)
    return 0
