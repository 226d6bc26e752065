"""Encoded pictures: their sizes, and what they decode to; whatever is damaged gets an error that says why.

Pictures come out upright, as EXIF's orientation says (`is_upright=False` leaves them as they are stored), in RGB with 8
bits, on white where they are transparent. Of an animation it is the first frame, of a file of several pages the first.
Pixels of 12 and 16 bits are scaled by their whole range; those of floats have to be from 0 to 1. Colour profiles (ICC)
are not applied: numbers are taken as sRGB, as the released code takes them.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from megatron_sphinx.errors import DataError

MOST_PIXELS = 89_478_485  # Pillow's own limit, a quarter of a gibibyte of RGB
MOST_BYTES = 2**29  # of a file; no picture of so many pixels takes more
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no other decoder, and no program, ever gets the bytes
ENDINGS = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff")
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height

_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
_LATE_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # which a PNG may have behind its pixels
_PLAIN_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N")

warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of them becomes an error that has a place


@dataclass(frozen=True)
class Shape:
    """What the header of a picture's file says.

    Attributes:
        width: in pixels, of the picture when it is upright.
        height: in pixels.
        orientation: EXIF's number for how the stored pixels have to be turned, 1 to 8. It is 1 for a TIFF, which is
            turned where it is decoded.
    """

    width: int
    height: int
    orientation: int = 1


def shape_of(content: bytes) -> Shape:
    """Return size and orientation of an encoded picture; its pixels are not decoded.

    Raises:
        DataError: the content is not a picture of FORMATS, or has a size or pixels that `decode` refuses.
    """
    with _opened(content) as image:
        orientation = _orientation(image, content)
        (width, height), is_turned = image.size, orientation in SIDEWAYS
        if image.format == "TIFF":  # not every version of Pillow has turned its size by now
            tags = image.tag_v2  # type: ignore[attr-defined]
            width, height, is_turned = tags[256], tags[257], tags.get(ExifTags.Base.Orientation) in SIDEWAYS
        check_size(width, height)
        _check_mode(image)
        if image.mode == "F":  # few are; whether they can be used is known from their pixels alone
            image.load()
            _from_floats(image)
    return Shape(height, width, orientation) if is_turned else Shape(width, height, orientation)


def check_size(width: int, height: int) -> None:
    """Raise DataError where the square that a picture is padded to has too many pixels, or where it shows nothing."""
    if max(width, height) ** 2 > MOST_PIXELS:
        raise DataError(f"decompression bomb: {width}x{height} pixels, on a square at most {MOST_PIXELS} are decoded")
    if min(width, height) < 1:
        raise DataError(f"no pixels: {width}x{height} pixels")
    if min(width, height) < 2:
        raise DataError(f"a side of one pixel: {width}x{height} pixels")


def decode(content: bytes, *, is_upright: bool = True) -> Image.Image:
    """Decode a picture to RGB with 8 bits; transparent pixels become white.

    Args:
        content: of its file.
        is_upright: whether the picture is turned as its orientation says.

    Raises:
        DataError: the picture does not decode, is truncated, has a size that `check_size` refuses, or pixels of which
            nobody knows what is white.
    """
    with _opened(content) as image:
        check_size(*image.size)
        image.load()  # a PNG may have its orientation behind its pixels
        orientation = _orientation(image, content) if is_upright else 1
        rgb = _to_rgb(image)
        return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """Open a picture, and turn whatever is met in its bytes into a DataError with a reason for people."""
    if not content:
        raise DataError("not an image: the file is empty")
    if len(content) > MOST_BYTES:
        raise DataError(f"file too large: {len(content)} bytes, of an image at most {MOST_BYTES} are read")
    image = None
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"not an image: it begins with {content[:12]!r}; taken are {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's plugins raise what they meet in damaged bytes
        fault = "does not decode" if image is not None else "not an image"
        raise DataError(f"{fault}: {_plain(error)}") from error


def _plain(error: Exception) -> str:
    """Return what an error says, as people can read it: in one line, never empty."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _orientation(image: Image.Image, content: bytes) -> int:
    """Return EXIF's orientation of a picture; 1 where there is none, or none that can be read."""
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and "exif" not in image.info and not any(mark in content for mark in _LATE_ORIENTATION):
        return 1  # Pillow would decode the pixels, to look behind them
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF is no reason to lose the picture
        return 1
    return orientation if orientation in _TURNS else 1


def _check_mode(image: Image.Image) -> None:
    """Raise DataError where nobody knows what the numbers of a picture's pixels mean."""
    if image.mode not in (*_PLAIN_MODES, *_ALPHA_MODES, *_WIDE_MODES, "F"):
        if image.mode == "I" and image.format == "PNG":  # 16 bits, as earlier versions of Pillow open them
            return
        raise DataError(f"pixels of unknown range: {image.format} of mode {image.mode}; save it with 8 bits")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the pixels of a picture in RGB with 8 bits, transparent ones white; their mode may be any."""
    _check_mode(image)
    if image.mode in (*_WIDE_MODES, "I"):
        return _from_wide(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        solid = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _from_wide(image: Image.Image) -> Image.Image:
    """Scale grey pixels of 12 or 16 bits to 8; the one value that is transparent, if there is one, is white."""
    bits = int(image.tag_v2.get(258, (16,))[0]) if image.format == "TIFF" else 16  # type: ignore[attr-defined]
    most = 2 ** min(max(bits, 8), 16) - 1
    scaled = np.minimum((np.arange(65536) * 255 + most // 2) // most, 255).astype(np.uint8)
    values = np.asarray(image)
    grey = scaled[np.clip(values, 0, 65535)] if values.dtype != np.uint16 else scaled[values]
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    """Scale grey pixels that are floats from 0 to 1 to 8 bits.

    Raises:
        DataError: a pixel is not finite, or is none of these.
    """
    values = np.asarray(image)
    if image.tag_v2.get(262) == 0:  # type: ignore[attr-defined]  # TIFF's way to say that 0 is white
        values = 1 - values
    low, high = float(values.min()), float(values.max())  # NaN, where one pixel is
    if not np.isfinite([low, high]).all():
        raise DataError("pixels that are not finite: NaN or infinity is among them")
    if low < 0 or high > 1:
        raise DataError(f"pixels of unknown range: floats from {low:g} to {high:g}; scale them to 0 to 1")
    return Image.fromarray((values * 255 + 0.5).astype(np.uint8)).convert("RGB")
