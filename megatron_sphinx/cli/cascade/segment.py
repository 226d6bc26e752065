"""Ask for regions of a picture, make masks of their boxes, and highlight them.

    megatron-sphinx cascade segment --model runs/x --picture cat.png --expression 'the cat on the left' --output masks
    megatron-sphinx cascade segment --model runs/x --picture cat.png --category eye --sam sam-vit-huge --output masks

The output gets masks/N.png, which are white on the region; masks.png, all of them over the picture in colours;
highlighted.png, on which all else is dark; boxes.png; and segment.json with the answer, its boxes in pixels and who
gave it. Without weights of SAM, GrabCut (OpenCV) or the random walker (scikit-image) separate by colours.
"""

import argparse

from megatron_sphinx.cli.cascade.asking import (
    add_asking,
    add_picture,
    add_segmenting,
    check_asking,
    check_segmenting,
    read_picture,
    regions_with_masks,
    say_faults,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_picture(parser)
    add_segmenting(parser)
    add_asking(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    check_segmenting(args)
    check_asking(args)
    picture = read_picture(args.picture)
    from PIL import Image

    from megatron_sphinx.cascades.drawing import draw_masks, draw_regions, highlight
    from megatron_sphinx.cascades.output import json_of, png, write_folder

    located, masks, told = regions_with_masks(args, picture)
    files = {f"masks/{number}.png": png(Image.fromarray(mask)) for number, mask in enumerate(masks, 1)}
    files |= {
        "masks.png": png(draw_masks(picture, masks)),
        "highlighted.png": png(highlight(picture, masks)),
        "boxes.png": png(draw_regions(picture, located.regions)),
        "segment.json": json_of(told),
    }
    write_folder(args.output, files)
    say_faults(located)
    print(f"{args.output}: {len(masks)} regions, by {told['answerer']}, {told['segmenter']}")
    return 0
