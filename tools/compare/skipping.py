"""Training on wide pictures with the views that show none of them skipped, beside all views encoded, in turn.

    tools/compare/skipping.py [key=value …] [--views 5] [--ranks 3] [--steps 8] [--warmup 2] [--repeats 2]

The pictures are 3:1: rows of three of scikit-learn's handwritten digits, with a caption that names them. The model, its
tokenizer and the text are the demo's (examples/demo_data.py makes data/demo). With several ranks one of them holds the
encoders; one rank alone does all. Both variants take the same samples in every step, which is checked; with skipping
these have fewer positions, so the speeds are compared in samples per second, never in tokens.

Prints a table of medians over all measured steps, with the views that are encoded and the positions of a step (text
included), and as the last line one JSON object; `ratios` is the speed with skipping over that without.
"""

import argparse
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.benchmark import sweep
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.prepare.pairs import index_shards, write_shards

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES, DIGITS_IN_A_ROW = 480, 3
VIEWS_PER_STEP = 200  # of all pairs, without skipping: enough to outweigh what a step costs anyway
VARIANTS = {
    "skipping": ["vision.skip_padding_views=true"],
    "all views": ["vision.skip_padding_views=false"],
}


def make_pairs(folder: Path, tokenizer: Tokenizer) -> Path:
    """Write the pictures and their captions, as shards with an index; the folder of the index."""
    demo = runpy.run_path(str(EXAMPLES / "demo_data.py"))
    pixels, labels = demo["digits"]()
    rng, pictures = np.random.default_rng(0), folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        chosen = rng.choice(len(pixels), DIGITS_IN_A_ROW, replace=False)
        words = [demo["DIGITS"][label] for label in labels[chosen]]
        Image.fromarray(np.concatenate(pixels[chosen], 1)).save(pictures / f"{number:04d}.png")
        (pictures / f"{number:04d}.txt").write_text(f"The digits {', '.join(words)}.")
    index_shards(write_shards(pictures, folder / "shards"), folder / "pairs", tokenizer)
    return folder / "pairs"


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the data in a folder and run both variants."""
    data = configuration.load(args.config, args.overrides).data
    overrides = [
        f"vision.views={args.views}",
        "vision.padding=corner",
        f"parallel.encoder={int(args.ranks > 1)}",
        "data.sequence_length=1024",  # no text of a step is longer, so none is cut, wherever a variant's rows are full
        f"data.pairs_per_step={VIEWS_PER_STEP // args.views}",
        f"data.pairs={make_pairs(folder, Tokenizer(data.tokenizer))}",
        *args.overrides,
    ]
    measurement = sweep.Measurement(
        config=args.config, overrides=tuple(overrides), ranks=args.ranks, steps=args.steps, warmup=args.warmup,
        repeats=args.repeats, folder=folder / "benchmark",
    )  # fmt: skip
    speeds = ("samples_per_second", "step_seconds", "exposed_encoder_share")
    rows = {
        name: {speed: point[speed] for speed in speeds}
        | {f"{amount}_per_step": point["work"][amount] for amount in ("views", "positions")}
        for name, point in sweep.compare(measurement, VARIANTS).items()
    }
    ratio = rows["skipping"]["samples_per_second"] / rows["all views"]["samples_per_second"]
    return {
        "views": args.views,
        "ranks": args.ranks,
        "steps": args.steps * args.repeats,
        "variants": rows,
        "ratios": {"skipping": ratio},
    }


def table(result: dict[str, Any]) -> str:
    """Lay out the comparison as text."""
    head = f"{'':12}{'samples/s':>11}{'s/step':>9}{'views/step':>12}{'positions/step':>16}{'waiting for features':>22}"
    rows = [
        f"{name:12}{row['samples_per_second']:11.1f}{row['step_seconds']:9.3f}{row['views_per_step']:12,.0f}"
        f"{row['positions_per_step']:16,.0f}{row['exposed_encoder_share']:22.1%}"
        for name, row in result["variants"].items()
    ]
    return "\n".join([head, *rows])


def main() -> int:
    """Run the comparison; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config", type=Path, default=EXAMPLES / "demo.yaml")
    parser.add_argument("--folder", type=Path, help="for the pictures; default: a temporary one")
    parser.add_argument("--views", type=int, choices=(5, 10), default=5)
    for name, (value, text) in {
        "ranks": (3, "of each run; 1: encoders and language model on one"),
        "steps": (8, "measured steps of each run"),
        "warmup": (2, "steps before them"),
        "repeats": (2, "runs of each variant"),
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text}; default: {value}")
    args = parser.parse_intermixed_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            result = compare(args, args.folder or Path(temporary))
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
