"""Encoded images: their sizes, and what they decode to; whatever is damaged gets an error that says why."""

import io

from PIL import Image, UnidentifiedImageError

from megatron_sphinx.errors import DataError

MOST_PIXELS = 89_478_485  # Pillow's own limit, a quarter of a gibibyte of RGB


def size_of(content: bytes) -> tuple[int, int]:
    """Return width and height from the header of an encoded image; nothing is decoded.

    Raises:
        DataError: the content is not an image that Pillow knows.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.size
    except Image.DecompressionBombError as error:
        raise DataError(f"decompression bomb: {error}") from error
    except Exception as error:  # Pillow's plugins raise what they meet in damaged bytes
        raise DataError(f"not an image: {error}") from error


def check_size(width: int, height: int) -> None:
    """Raise DataError where the square that a picture is padded to has too many pixels, or where it shows nothing."""
    if max(width, height) ** 2 > MOST_PIXELS:
        raise DataError(f"decompression bomb: {width}x{height} pixels, on a square at most {MOST_PIXELS} are decoded")
    if min(width, height) < 2:
        raise DataError(f"a side of one pixel: {width}x{height} pixels")


def decode(content: bytes) -> Image.Image:
    """Decode an image to RGB; transparent pixels become white.

    Raises:
        DataError: the image does not decode, is truncated, or has a size that `check_size` refuses.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            check_size(*image.size)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                solid = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid).convert("RGB")
            if image.mode != "RGB":
                return image.convert("RGB")
            image.load()  # convert would copy it
            return image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"not an image: {error}") from error
    except Exception as error:  # Pillow's plugins raise what they meet in damaged bytes
        raise DataError(f"does not decode: {error}") from error
