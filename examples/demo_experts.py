"""The experts of the demo's mixture: how many are needed, and which, by its accuracy on digits it never saw.

    examples/demo_experts.py RUN_FOLDER OUTPUT

RUN_FOLDER is what `make demo_moe` trained. The held-out digits are captioned while the routers' choices are counted,
then ranked with 1 to all experts active, and with fewer kept by each method; the page is OUTPUT/experts.md.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from demo_evaluate import held_out, likeliest_digits
from PIL import Image

from megatron_sphinx import config as configuration
from megatron_sphinx.evaluation.expert_data import DataSet
from megatron_sphinx.evaluation.expert_look import Looking, look
from megatron_sphinx.evaluation.expert_page import write_look
from megatron_sphinx.evaluation.expert_pruning import Pruning
from megatron_sphinx.evaluation.expert_sweep import choose_experts, sweep
from megatron_sphinx.serving.model import load
from megatron_sphinx.serving.questions import Asking

TASK = "held-out digits, %"


def pictures_of(data: Path, folder: Path) -> Path:
    """Write the held-out digits as pictures, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(np.load(data / "held_out.npz")["images"]):
        Image.fromarray(pixels).convert("RGB").save(folder / f"{number:03d}.png")
    return folder


def main() -> int:
    """Look at the experts; the exit status of the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--keep", type=int, nargs="+", default=[6, 4, 2, 1], help="experts that each layer keeps")
    parser.add_argument("--limit", type=int, help="digits; default: all")
    args = parser.parse_args()
    folder = Path(configuration.load(args.run / "config.yaml").data.tokenizer).parent
    digits = DataSet("digits", pictures_of(folder, args.output / "digits"))
    with load(args.run) as model:
        prompts, labels = (one[: args.limit] for one in held_out(model, folder))

        def evaluate(_name: str) -> Mapping[str, float]:
            right = np.equal(likeliest_digits(model, prompts), labels)
            return {TASK: 100 * float(right.mean())}

        how = Looking(Asking("Describe the image."), args.limit, keep=tuple(args.keep))
        found = look(model, [digits], how)
        pruned = choose_experts(model.language, found, list(Pruning), args.keep, seeds=3)
        points = sweep(model, pruned, evaluate)
        page = write_look(args.output, model.name, found, pruned, points, model.language.experts_per_token)
    for point in points:
        print(f"{point.name:28}{point.figures[TASK]:6.1f} %")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
