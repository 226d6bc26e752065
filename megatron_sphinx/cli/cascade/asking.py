"""What all cascades share: who is asked, about which picture, and where results go."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sphinx.cli.command import add_model, add_sampling, check_model, model_options, sampling_of
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.ranges import Range, check_range

if TYPE_CHECKING:
    from PIL import Image

    from megatron_sphinx.cascades.answerer import Answerer, Question
    from megatron_sphinx.cascades.regions import Located, Region
    from megatron_sphinx.cascades.segmentation import Mask, Segmenter
    from megatron_sphinx.serving.model import Model

_SIDE = Range(least=0, most=1000)


def add_asking(parser: argparse.ArgumentParser) -> None:
    """Let a parser take who is asked, and where the results go."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the results")
    text = "in place of a model: JSON of prompts, each with its answer or a list of answers in turn"
    parser.add_argument("--answers", type=Path, metavar="FILE", help=text)
    add_model(parser, is_option=True)
    add_sampling(parser)


def add_picture(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the picture that is asked about."""
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE", help="such as a JPEG or a PNG")


def add_segmenting(parser: argparse.ArgumentParser) -> None:
    """Let a parser take which regions are meant, and what makes masks of their boxes."""
    group = parser.add_argument_group("the regions; default: those of all objects")
    group.add_argument("--expression", metavar="TEXT", help="the one that it describes, such as 'the red cup'")
    group.add_argument("--category", metavar="NAME", help="those of all objects of this name")
    group = parser.add_argument_group("the masks")
    group.add_argument(
        "--segmenter", choices=("grabcut", "random-walker"), default="grabcut", help="without weights; default: grabcut"
    )
    group.add_argument(
        "--sam", type=Path, metavar="FOLDER", help="weights of SAM as transformers keeps them; used then"
    )


def check_asking(args: argparse.Namespace) -> None:
    """Refuse what can be told to be wrong before anything that takes long is imported.

    Raises:
        ConfigError: both a model and answers are given, or none, or the sampling is wrong.
        DataError: the output is not new.
        SphinxError: the model is none; see `check_model`.
    """
    from megatron_sphinx.cascades.output import check_new

    if (args.model is None) == (args.answers is None):
        raise ConfigError(
            f"--model={args.model} --answers={args.answers}: one of them is asked; give a model, or a file of answers"
        )
    sampling_of(args)
    check_new(args.output)
    if args.model is not None:
        check_model(args)


def check_segmenting(args: argparse.Namespace) -> None:
    """Refuse what is wrong with the regions and with the weights of the segmenter.

    Raises:
        CheckpointError: the folder holds no SAM.
        ConfigError: an expression and a category are given, or an empty one.
    """
    if args.expression is not None and args.category is not None:
        raise ConfigError("--expression and --category: each says which regions are meant; give one of them")
    for name in ("expression", "category"):
        if (value := getattr(args, name)) is not None and not value.strip():
            raise ConfigError(f"--{name}={value!r}: says nothing; give words, or leave it out")
    if args.sam is not None:
        from megatron_sphinx.cascades.sam import check_sam

        check_sam(args.sam)


def check_grow(pixels: int) -> None:
    """Refuse a margin of masks that is out of its range.

    Raises:
        ConfigError: it is negative or too large.
    """
    check_range(pixels, _SIDE, "--grow")


def read_picture(path: Path) -> Image.Image:
    """Read a picture, upright and in RGB.

    Raises:
        DataError: it cannot be read, or is none.
    """
    from megatron_sphinx.data.images import decode

    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"picture={path}: {error.strerror}; give a picture that can be read") from error
    except DataError as error:
        raise DataError(f"picture={path}: {error}; give another picture") from error


def segmenter_of(args: argparse.Namespace) -> Segmenter:
    """Make what was chosen to make masks.

    Raises:
        CheckpointError: the weights of SAM do not load.
        ConfigError: a library is missing.
    """
    if args.sam is not None:
        from megatron_sphinx.cascades.sam import SegmentAnything

        return SegmentAnything(args.sam, "cuda" if args.device == "cuda" else "cpu")
    if args.segmenter == "grabcut":
        from megatron_sphinx.cascades.opencv import GrabCut

        return GrabCut()
    from megatron_sphinx.cascades.scikit_image import RandomWalker

    return RandomWalker()


@contextmanager
def answerer_of(args: argparse.Namespace) -> Iterator[Answerer]:
    """Load who is asked; a model is closed at the end.

    Raises:
        SphinxError: the model, or the file of answers, cannot be loaded.
    """
    if args.answers is not None:
        from megatron_sphinx.cascades.answerer import Script

        yield Script(args.answers)
        return
    from megatron_sphinx.serving.model import load

    with load(args.model, **model_options(args)) as model:
        yield _ModelAnswerer(model, vars(sampling_of(args, model.positions)))


class _ModelAnswerer:
    """A loaded model that is asked about decoded pictures."""

    def __init__(self, model: Model, sampling: dict[str, Any]) -> None:
        self.name, self.padding = f"the model {model.name}", model.padding
        self._model, self._sampling = model, sampling

    def ask(self, questions: Sequence[Question]) -> list[str]:
        from megatron_sphinx.cascades.output import png

        contents = {id(question.picture): question.picture for question in questions}
        files = {key: png(picture) for key, picture in contents.items()}  # each picture is encoded once
        pictures = [files[id(question.picture)] for question in questions]
        answers = self._model.generate([question.prompt for question in questions], pictures, **self._sampling)
        return [answer.text for answer in answers]


def regions_with_masks(args: argparse.Namespace, picture: Image.Image) -> tuple[Located, list[Mask], dict[str, Any]]:
    """Ask for regions, and make masks of their boxes; the last is what results say of them.

    Raises:
        SphinxError: see `segmenter_of`, `answerer_of` and `locate`.
    """
    from megatron_sphinx.cascades.regions import detect, locate

    segmenter = segmenter_of(args)
    with answerer_of(args) as answerer:
        located = (
            locate(answerer, picture, args.expression)
            if args.expression is not None
            else detect(answerer, picture, args.category or "")
        )
    masks = segmenter.masks(picture, [region.box for region in located.regions])
    told = about(args, picture, answerer.name) | entries_of(located) | {"segmenter": segmenter.name}
    for entry, mask in zip(told["regions"], masks, strict=True):
        entry["mask_pixels"] = int(mask.sum())
    return located, masks, told


def about(args: argparse.Namespace, picture: Image.Image, answerer: str) -> dict[str, Any]:
    """Return what all results say: who answered about which picture."""
    return {"answerer": answerer, "picture": str(args.picture), "width": picture.width, "height": picture.height}


def entries_of(located: Located) -> dict[str, Any]:
    """Return what an answer says of regions as entries of JSON."""
    return {
        "prompt": located.prompt,
        "answer": located.answer,
        "regions": region_entries(located.regions),
        "faults": list(located.faults),
    }


def region_entries(regions: Sequence[Region]) -> list[dict[str, Any]]:
    """Return regions as entries of JSON, boxes in pixels of the picture."""
    return [
        {"number": region.number, "phrase": region.phrase, "box": [round(side, 2) for side in region.box]}
        for region in regions
    ]


def say_faults(located: Located) -> None:
    """Print what of an answer is no region, a line for each."""
    for fault in located.faults:
        print(f"not a region: {fault}")
