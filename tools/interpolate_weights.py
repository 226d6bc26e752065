"""Mix the weights of two checkpoints: beta * REAL + (1 - beta) * SYN, tensor by tensor, in fp32.

    tools/interpolate_weights.py REAL SYN TARGET --beta 0.6

REAL and SYN are checkpoints (step_... folders) of the same model, encoders and tokenizer, saved in any layout, or run
folders, of which the newest checkpoint is taken. Begin a run with the result: model.weights=TARGET. It holds weights
only, no optimizer state, so no run resumes from it; what it says of itself is REAL's. Needs memory for a few tensors.

Source: SPHINX, arXiv:2311.07575, equation 1.
"""

import argparse
import sys
from pathlib import Path

from megatron_sphinx.checkpoint.blend import SCOPES, blend
from megatron_sphinx.errors import SphinxError


def main() -> int:
    """Run the tool; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", type=Path, metavar="REAL")
    parser.add_argument("syn", type=Path, metavar="SYN")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to make")
    parser.add_argument("--beta", type=float, required=True, help="share of REAL, from 0 to 1")
    parser.add_argument(
        "--scope",
        choices=SCOPES,
        default="all",
        help="all: mix every tensor; language: those of the language model only, and take the others "
        "(projections, tags) from REAL; both must have them all; default: all",
    )
    args = parser.parse_args()
    try:
        done = blend(args.real, args.syn, args.target, args.beta, scope=args.scope, show=True)
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{args.target}: {done.mixed} tensors mixed, {done.copied} copied, {done.parameters:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
