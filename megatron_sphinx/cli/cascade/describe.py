"""Caption a picture densely: detect all objects, describe each in its place, and caption each as cut out.

    megatron-sphinx cascade describe --model runs/x --picture street.jpg --output described

The output gets index.html, a page with the picture, numbered boxes and a table, which needs no other file;
describe.json with all answers, and the boxes in pixels; regions.png; and crops/N.png.
"""

import argparse

from megatron_sphinx.cli.cascade.asking import (
    about,
    add_asking,
    add_picture,
    answerer_of,
    check_asking,
    entries_of,
    read_picture,
    say_faults,
)
from megatron_sphinx.ranges import Range, check_range

_MOST = 24  # as many marks look different
_REGIONS = Range(least=1, most=1000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_picture(parser)
    text = f"regions that are asked about, the first ones of the answer; default: {_MOST}"
    parser.add_argument("--most-regions", type=int, default=_MOST, metavar="N", help=text)
    add_asking(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    check_range(args.most_regions, _REGIONS, "--most-regions")
    check_asking(args)
    picture = read_picture(args.picture)
    from megatron_sphinx.cascades.captioning import describe_densely
    from megatron_sphinx.cascades.drawing import draw_regions
    from megatron_sphinx.cascades.output import json_of, png, write_folder
    from megatron_sphinx.cascades.page import captions_page

    with answerer_of(args) as answerer:
        captions = describe_densely(answerer, picture, args.most_regions)
    told = entries_of(captions.detected)
    for entry, one in zip(told["regions"], captions.regions, strict=False):
        entry |= {"description": one.description, "caption": one.caption, "details": one.details}
    content = about(args, picture, answerer.name) | {"caption": captions.caption} | told
    files = {f"crops/{one.region.number}.png": png(one.crop) for one in captions.regions}
    files |= {
        "regions.png": png(draw_regions(picture, [one.region for one in captions.regions])),
        "describe.json": json_of(content | {"left_out": captions.left_out}),
        "index.html": captions_page(captions, picture, args.picture.name, answerer.name).encode(),
    }
    write_folder(args.output, files)
    say_faults(captions.detected)
    left_out = f", {captions.left_out} left out" if captions.left_out else ""
    print(f"{args.output}: {len(captions.regions)} regions described{left_out}, by {answerer.name}")
    return 0
