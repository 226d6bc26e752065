"""Ask about a video by its middle frame, or by several frames side by side as one picture.

    megatron-sphinx cascade video --model runs/x --video dance.mp4 --question 'What is the man doing?' --output asked
    megatron-sphinx cascade video --model runs/x --video frames/ --frames 4 --question 'What happens?' --output asked

A video is a file, or a folder of frames that are named in their order. The output gets frames.png, which is what was
asked about; boxes.png, where the answer names boxes; and video.json with question, answer, its boxes in pixels of
frames.png, and who gave it.
"""

import argparse
from pathlib import Path

from megatron_sphinx.cli.cascade.asking import add_asking, answerer_of, check_asking, read_picture, region_entries
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.ranges import Range, check_range

_FRAMES = Range(least=1, most=64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("--video", type=Path, required=True, metavar="PATH", help="a file, or a folder of frames")
    parser.add_argument("--question", required=True, metavar="TEXT", help="what is asked about the frames")
    text = "the middles of so many equal parts; default: 1, the middle frame"
    parser.add_argument("--frames", type=int, default=1, metavar="N", help=text)
    add_asking(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    check_range(args.frames, _FRAMES, "--frames")
    if not args.question.strip():
        raise ConfigError(f"--question={args.question!r}: says nothing; give words")
    if not args.video.exists():
        raise DataError(f"--video={args.video}: no such file or folder; give a video")
    check_asking(args)
    from megatron_sphinx.cascades.answerer import Question
    from megatron_sphinx.cascades.drawing import draw_regions, side_by_side
    from megatron_sphinx.cascades.output import json_of, png, write_folder
    from megatron_sphinx.cascades.regions import regions_of
    from megatron_sphinx.data.images import decode
    from megatron_sphinx.generation.videos import frames_of

    frames = [
        read_picture(frame) if isinstance(frame, Path) else decode(frame)
        for frame in frames_of(args.video, args.frames)
    ]
    picture = side_by_side(frames)
    with answerer_of(args) as answerer:
        (answer,) = answerer.ask([Question(picture, args.question)])
    regions, faults = regions_of(answer, picture.size, answerer.padding)
    told = {
        "answerer": answerer.name, "video": str(args.video), "frames": len(frames),
        "width": picture.width, "height": picture.height, "question": args.question, "answer": answer,
        "regions": region_entries(regions),
        "faults": list(faults),
    }  # fmt: skip
    drawn = {"boxes.png": png(draw_regions(picture, regions))} if regions else {}
    write_folder(args.output, {"frames.png": png(picture), **drawn, "video.json": json_of(told)})
    print(f"{answer}\n{args.output}: {len(frames)} frames, by {answerer.name}")
    return 0
