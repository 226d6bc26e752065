"""Take what is described out of a picture, and fill the hole from around it.

    megatron-sphinx cascade inpaint --model runs/x --picture cat.png --expression 'the cat on the left' --output without

A model's box becomes a mask, the mask a hole, and the hole is filled. The output gets inpainted.png, in which no pixel
beside the hole has changed; mask.png, white in the hole; masks.png; and inpaint.json with the answer, its boxes in
pixels and who gave it. Telea's method (OpenCV) is fast; biharmonic functions (scikit-image) are smoother, and slow for
large holes.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_sphinx.cli.cascade.asking import (
    add_asking,
    add_picture,
    add_segmenting,
    check_asking,
    check_grow,
    check_segmenting,
    read_picture,
    regions_with_masks,
    say_faults,
)

if TYPE_CHECKING:
    from megatron_sphinx.cascades.inpainting import Inpainter

_GROW = 7  # as Inpaint Anything: a square of 15 pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_picture(parser)
    add_segmenting(parser)
    group = parser.add_argument_group("the hole")
    group.add_argument(
        "--grow", type=int, default=_GROW, metavar="PIXELS", help=f"by which it is larger; default: {_GROW}"
    )
    group.add_argument("--inpainter", choices=("telea", "biharmonic"), default="telea", help="default: telea")
    add_asking(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    check_segmenting(args)
    check_grow(args.grow)
    check_asking(args)
    picture = read_picture(args.picture)
    import numpy as np
    from PIL import Image

    from megatron_sphinx.cascades.drawing import draw_masks
    from megatron_sphinx.cascades.inpainting import grown, inpaint
    from megatron_sphinx.cascades.output import json_of, png, write_folder

    inpainter = _inpainter(args.inpainter)
    located, masks, told = regions_with_masks(args, picture)
    hole = grown(np.logical_or.reduce(masks), args.grow)
    filled = inpaint(inpainter, picture, hole)
    files = {
        "inpainted.png": png(filled),
        "mask.png": png(Image.fromarray(hole)),
        "masks.png": png(draw_masks(picture, masks)),
        "inpaint.json": json_of(
            told | {"inpainter": inpainter.name, "grow": args.grow, "hole_pixels": int(hole.sum())}
        ),
    }
    write_folder(args.output, files)
    say_faults(located)
    print(f"{args.output}: {hole.sum()} pixels filled, by {told['answerer']}, {told['segmenter']}, {inpainter.name}")
    return 0


def _inpainter(name: str) -> Inpainter:
    """Make what fills holes, by its name on the command line."""
    if name == "telea":
        from megatron_sphinx.cascades.opencv import Telea

        return Telea()
    from megatron_sphinx.cascades.scikit_image import Biharmonic

    return Biharmonic()
