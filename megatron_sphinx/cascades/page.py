"""Dense captions as a page: the picture with numbered boxes, and what is said of each."""

from PIL import Image

from megatron_sphinx.cascades.captioning import DenseCaptions
from megatron_sphinx.cascades.drawing import draw_regions
from megatron_sphinx.cascades.output import png
from megatron_sphinx.evaluation.pages import Heading, Paragraph, Plot, Table, html


def captions_page(captions: DenseCaptions, picture: Image.Image, title: str, answerer: str) -> str:
    """Write dense captions as HTML that needs no other file.

    Args:
        captions: what is said of the picture.
        picture: in RGB and upright.
        title: of the page.
        answerer: who said it, named on the page.
    """
    drawn = draw_regions(picture, [told.region for told in captions.regions])
    rows = tuple(
        (str(told.region.number), told.region.phrase, told.description, told.caption, told.details)
        for told in captions.regions
    )
    head = ("number", "detected as", "described in its place", "caption of the crop", "details of the crop")
    left_out = f"{captions.left_out} further regions were not asked about. " if captions.left_out else ""
    faults = "".join(f"Not a region: {fault}. " for fault in captions.detected.faults)
    return html(
        (
            Heading(title, 1),
            Paragraph(f"Answers of {answerer}."),
            Plot("regions.png", f"{title} with numbered boxes", png(drawn)),
            Paragraph(captions.caption),
            Table(head, rows, words=len(head)),
            *([Paragraph((left_out + faults).rstrip())] if left_out or faults else []),
        )
    )
