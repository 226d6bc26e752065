"""Dense captions on several levels: the picture, each of its regions in its place, and each region cut out.

Source: SPHINX, arXiv:2311.07575, section 4.3.
"""

from dataclasses import dataclass

from PIL import Image

from megatron_sphinx.cascades.answerer import Answerer, Question
from megatron_sphinx.cascades.regions import Located, Region, detect
from megatron_sphinx.prepare.boxes import format_box
from megatron_sphinx.prepare.tasks import PROMPTS


@dataclass(frozen=True)
class RegionCaptions:
    """What is said of a region.

    Attributes:
        region: its box and its name.
        crop: the region cut out of the picture.
        description: what the region is, asked about the whole picture by its box.
        caption: of the crop, in a sentence.
        details: of the crop, at length.
    """

    region: Region
    crop: Image.Image
    description: str
    caption: str
    details: str


@dataclass(frozen=True)
class DenseCaptions:
    """What is said of a picture and of its regions.

    Attributes:
        caption: of the whole picture, in a sentence.
        detected: the answer that names the regions.
        regions: in the order of that answer.
        left_out: how many further regions it names.
    """

    caption: str
    detected: Located
    regions: tuple[RegionCaptions, ...]
    left_out: int


def describe_densely(answerer: Answerer, picture: Image.Image, most_regions: int) -> DenseCaptions:
    """Detect all objects, describe the region of each, and caption each as a picture of its own.

    Args:
        answerer: who is asked.
        picture: in RGB and upright.
        most_regions: how many regions are asked about, the first ones of the answer.

    Raises:
        DataError: the answer names no box that is in the picture.
        SphinxError: whoever answers fails.
    """
    (caption,) = answerer.ask([Question(picture, PROMPTS["caption"])])
    detected = detect(answerer, picture)
    regions = detected.regions[:most_regions]
    boxes = [format_box(region.box, *picture.size, answerer.padding) for region in regions]
    descriptions = answerer.ask([Question(picture, PROMPTS["describe"].format(box=box)) for box in boxes])
    crops = [_crop(picture, region) for region in regions]
    prompts = (PROMPTS["caption"], PROMPTS["detailed_caption"])
    of_crops = answerer.ask([Question(crop, prompt) for crop in crops for prompt in prompts])
    told = [
        RegionCaptions(region, crop, description, *captions)
        for region, crop, description, captions in zip(
            regions, crops, descriptions, zip(of_crops[::2], of_crops[1::2], strict=True), strict=True
        )
    ]
    return DenseCaptions(caption, detected, tuple(told), len(detected.regions) - len(regions))


def _crop(picture: Image.Image, region: Region) -> Image.Image:
    """Cut a region out, at least two pixels wide and high, since no smaller picture can be looked at."""
    left, top, right, bottom = (round(side) for side in region.box)
    left, top = min(left, picture.width - 2), min(top, picture.height - 2)
    return picture.crop((left, top, max(right, left + 2), max(bottom, top + 2)))
