"""Decoding, padding and resizing of images, and what damaged ones get."""

import random

import numpy as np
import pytest
from conftest import draw
from PIL import Image
from test_pairs import png

from megatron_sphinx.data import images
from megatron_sphinx.data.canvas import Canvas, to_square
from megatron_sphinx.errors import DataError
from megatron_sphinx.model.architecture import VisionConfig, VisualExpertConfig
from megatron_sphinx.model.views import GLOBAL, View

VISION = VisionConfig(experts=(VisualExpertConfig(name="dinov2_small", weights="random"),), grid=4)


def test_a_picture_is_padded_at_centre_or_corner():
    image = Image.new("RGB", (20, 10), "red")
    for padding, top in (("centre", 5), ("corner", 0)):
        square = np.asarray(to_square(image, padding))
        assert square.shape == (20, 20, 3)
        assert (square[top : top + 10] == (255, 0, 0)).all()
        rest = np.delete(square, range(top, top + 10), axis=0)
        assert (rest == (122, 116, 104)).all()


def test_a_view_is_resized_with_antialiasing():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    view = Canvas(Image.fromarray(stripes), VISION).cut(GLOBAL, 32)
    assert view.shape == (3, 32, 32)
    assert abs(view[:, 4:-4, 4:-4].astype(int) - 127).max() <= 2  # aliasing would keep stripes


@pytest.mark.parametrize("size", [40, 224, 300, 701])
def test_a_view_is_pillows_to_two_levels(size):
    """Pillow's resize is the one that released models were trained with."""
    noise = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    square = Image.fromarray(noise)
    canvas = Canvas(square, VISION)
    for side in (64, 224):
        wanted = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert abs(canvas.cut(GLOBAL, side).astype(int) - wanted).max() <= 2
        whole = np.asarray(square.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        found = canvas.cut(View(1, 0, 2), side)
        assert abs(found.astype(int) - whole[:, :side, side:]).max() <= 2


def test_transparent_pixels_become_white():
    for mode in ("RGBA", "LA"):
        image = Image.new(mode, (4, 4), 0)
        assert np.asarray(images.decode(png(image))).min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert np.asarray(images.decode(png(palette))).min() == 255


def test_images_that_do_not_decode_say_why():
    whole = png(draw(1)[0].resize((200, 200)))
    with pytest.raises(DataError, match="does not decode: "):
        images.decode(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not an image: "):
        images.decode(b"no image at all")


def test_damaged_bytes_never_raise_anything_else():
    """Whatever Pillow's plugins meet in them."""
    rng = random.Random(0)
    whole = [png(draw(1)[0].resize((60, 40)), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]
    refused = []
    for number in range(900):
        content = bytearray(whole[number % len(whole)])
        for _ in range(rng.randint(1, 12)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        for read in (images.shape_of, images.decode):
            try:
                read(bytes(content))
            except DataError as error:
                refused.append(str(error))
    reasons = ("not an image: ", "does not decode: ", "decompression bomb: ", "a side of one pixel: ")
    assert all(reason.startswith(reasons) for reason in refused)
    assert len(refused) > 100


def test_a_decompression_bomb_is_not_decoded(monkeypatch):
    bomb = png(Image.new("1", (20000, 20000)))
    assert len(bomb) < 100_000
    with pytest.raises(DataError, match="decompression bomb"):
        images.decode(bomb)
    small = png(Image.new("1", (10000, 9)))
    with pytest.raises(DataError, match="decompression bomb: 10000x9 pixels, on a square at most 89478485 are decoded"):
        images.decode(small)
    with pytest.raises(DataError, match="a side of one pixel: 1x9 pixels"):
        images.decode(png(Image.new("RGB", (1, 9))))
