"""Pictures of every mode, depth and orientation: the pixels that come out, and the sizes that an index knows."""

import io
import json

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps
from test_pairs import png, write_tar

from megatron_sphinx import config as configuration
from megatron_sphinx.data import images
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.pairs import index_shards

RAMP = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
WIDE = RAMP.astype(np.uint16) * 257
GREY = Image.fromarray(RAMP)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def big_endian() -> Image.Image:
    return Image.frombytes("I;16B", (256, 16), WIDE.astype(">u2").tobytes())


KINDS = {
    "L png": lambda: saved(GREY, "PNG"),
    "P gif": lambda: saved(GREY, "GIF"),
    "bmp": lambda: saved(GREY.convert("RGB"), "BMP"),
    "LA": lambda: saved(GREY.convert("LA"), "PNG"),
    "RGBA": lambda: saved(GREY.convert("RGBA"), "PNG"),
    "RGBX tiff": lambda: saved(GREY.convert("RGBX"), "TIFF"),
    "PA tiff": lambda: saved(GREY.convert("PA"), "TIFF"),
    "YCbCr tiff": lambda: saved(GREY.convert("YCbCr"), "TIFF"),
    "CMYK tiff": lambda: saved(GREY.convert("RGB").convert("CMYK"), "TIFF"),
    "CMYK jpeg": lambda: saved(GREY.convert("RGB").convert("CMYK"), "JPEG", quality=100),  # Adobe's, inverted
    "webp": lambda: saved(GREY.convert("RGB"), "WEBP", lossless=True),
    "animated webp": lambda: saved(
        GREY.convert("RGB"), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", GREY.size)]
    ),
    "apng": lambda: saved(GREY, "PNG", save_all=True, append_images=[Image.new("L", GREY.size)]),
    "animated gif": lambda: saved(GREY, "GIF", save_all=True, append_images=[Image.new("L", GREY.size, 9)]),
    "pages": lambda: saved(GREY, "TIFF", save_all=True, append_images=[Image.new("L", GREY.size)]),
    "mpo": lambda: saved(GREY, "MPO", quality=100, save_all=True, append_images=[Image.new("L", GREY.size)]),
    "I;16 png": lambda: saved(Image.fromarray(WIDE), "PNG"),
    "I;16 tiff": lambda: saved(Image.fromarray(WIDE), "TIFF"),
    "I;16B tiff": lambda: saved(big_endian(), "TIFF"),
    "float tiff": lambda: saved(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
    "inverse float tiff": lambda: saved(Image.fromarray(1 - RAMP.astype(np.float32) / 255), "TIFF", tiffinfo={262: 0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_ramp_comes_out_as_a_ramp(kind):
    if kind == "YCbCr tiff" and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read what it writes")
    content = KINDS[kind]()
    assert images.shape_of(content) == images.Shape(256, 16)
    found = np.asarray(images.decode(content)).astype(int)
    assert found.shape == (16, 256, 3)
    assert abs(found - RAMP[..., None]).max() <= (4 if "jpeg" in kind or "mpo" in kind else 1)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_scaled_too(bits):
    values = np.arange(2**bits, dtype=np.uint8)
    image = (
        Image.fromarray(np.tile(values, (4, 1)), "P") if bits > 1 else Image.fromarray(values[None].repeat(4, 0) > 0)
    )
    if bits > 1:
        image.putpalette([level * 255 // (2**bits - 1) for level in range(2**bits) for _ in range(3)])
    found = np.asarray(images.decode(saved(image, "PNG", bits=bits)))[0, :, 0]
    assert found.tolist() == [level * 255 // (2**bits - 1) for level in range(2**bits)]


def test_one_value_of_16_bits_can_be_transparent():
    found = np.asarray(images.decode(saved(Image.fromarray(WIDE), "PNG", transparency=257 * 3)))[0, :, 0]
    assert found.tolist() == [255 if level == 3 else level for level in range(256)]


def floats(value: float) -> bytes:
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 1] = value
    return saved(Image.fromarray(values), "TIFF")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            lambda: saved(Image.new("RGB", (9, 9)), "EPS"),
            r"not an image: it begins with b'%!PS-Adobe-3'; taken are JPEG",
        ),
        (lambda: b"8BPS\0\1" + bytes(40), "not an image: it begins with b'8BPS"),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", 'not an image: it begins with b"<svg'),
        (lambda: b"%PDF-1.7", "not an image: it begins with b'%PDF-1.7'"),
        (lambda: saved(Image.new("RGB", (9, 9)), "PPM"), "not an image: it begins with b'P6"),
        (
            lambda: saved(Image.new("LAB", (9, 9)), "TIFF"),
            "pixels of unknown range: TIFF of mode LAB; save it with 8 bits",
        ),
        (lambda: saved(Image.new("I", (9, 9), 70000), "TIFF"), "pixels of unknown range: TIFF of mode I"),
        (lambda: floats(float("nan")), "pixels that are not finite"),
        (lambda: floats(float("inf")), "pixels that are not finite"),
        (lambda: floats(200.0), "pixels of unknown range: floats from 0.5 to 200; scale them to 0 to 1"),
        (lambda: b"", "not an image: the file is empty"),
        (lambda: saved(Image.new("L", (1, 9)), "PNG"), "a side of one pixel"),
        (lambda: saved(Image.new("1", (20000, 2)), "PNG"), "decompression bomb"),
        (lambda: saved(Image.new("L", (2, 2)), "GIF").replace(b"\x02\0\x02\0", b"\0\0\0\0", 1)[:20], ""),
    ],
)
def test_what_has_no_right_pixels_is_refused_before_training(content, reason):
    with pytest.raises(DataError, match=f"^{reason}") as caught:
        images.shape_of(content())
    assert "<_io" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_program_is_started_for_an_image(monkeypatch):
    """Pillow gives EPS to Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_args: pytest.fail("Ghostscript was asked"))
    with pytest.raises(DataError, match="not an image"):
        images.decode(saved(Image.new("RGB", (9, 9)), "EPS"))


def test_a_file_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr(images, "MOST_BYTES", 100)
    with pytest.raises(DataError, match=r"file too large: \d+ bytes, of an image at most 100 are read"):
        images.shape_of(bytes(101))


def photo() -> Image.Image:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :8], pixels[:4, 8:] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def late_exif(orientation: int) -> bytes:
    """A PNG that has its orientation behind its pixels, as some programs write it."""
    whole, bare = saved(photo(), "PNG", exif=exif(orientation)), saved(photo(), "PNG")
    begin = whole.index(b"eXIf") - 4
    chunk = whole[begin : begin + 12 + int.from_bytes(whole[begin : begin + 4])]
    return bare[:-12] + chunk + bare[-12:]


FILES = {
    "JPEG": lambda orientation: saved(photo(), "JPEG", exif=exif(orientation), quality=100, subsampling=0),
    "PNG": lambda orientation: saved(photo(), "PNG", exif=exif(orientation)),
    "late PNG": late_exif,
    "WEBP": lambda orientation: saved(photo(), "WEBP", exif=exif(orientation), lossless=True),
    "TIFF": lambda orientation: saved(photo(), "TIFF", tiffinfo={0x0112: orientation}),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_pictures_are_upright_in_pixels_and_sizes(kind, orientation):
    wanted = photo()
    wanted.getexif()[0x0112] = orientation
    wanted = ImageOps.exif_transpose(wanted)
    content = FILES[kind](orientation)
    found, shape = images.decode(content), images.shape_of(content)
    assert (shape.width, shape.height) == found.size == wanted.size
    assert abs(np.asarray(found).astype(int) - np.asarray(wanted)).max() <= 6
    if kind != "TIFF":
        assert shape.orientation == (orientation if 1 <= orientation <= 8 else 1)
        assert images.decode(content, is_upright=False).size == (32, 16)


def test_damaged_exif_costs_no_picture():
    content = saved(photo(), "JPEG", exif=exif(6))
    damaged = content.replace(b"MM\0*", b"MM\0\xff").replace(b"II*\0", b"II\xff\0")
    assert damaged != content
    assert images.decode(damaged).size == (32, 16)
    assert images.shape_of(damaged) == images.Shape(32, 16)


def test_an_index_has_upright_sizes_and_accessory_the_stored_ones(tiny, tmp_path):
    """Plans and pixels agree, whichever way a run resizes, and for an index that was made before."""
    picture = FILES["JPEG"](6)
    shard = write_tar(tmp_path / "0.tar", {"0.jpg": picture, "0.txt": b"a", "1.png": png(photo()), "1.txt": b"b"})
    index_shards([shard], tmp_path / "pairs", tiny.tokenizer)
    index = SampleIndex([tmp_path / "pairs"])

    def sizes(index: SampleIndex) -> list[tuple[int, int]]:
        columns = index.sizes(0, 2)
        return list(zip(columns.width.tolist(), columns.height.tolist(), strict=True))

    assert sizes(index) == [(16, 32), (32, 16)]
    assert sizes(index.as_stored()) == [(32, 16), (32, 16)]
    seen: dict[str, np.ndarray] = {}
    for resize in ("antialiased", "accessory"):
        changes = {"data.pairs": str(tmp_path / "pairs"), "data.pairs_per_step": 2, "vision.resize": resize}
        config = configuration.load(tiny.write(tmp_path / "run.yaml", changes))
        sources = open_sources(config.data, config.model)
        make_planner(config.data, sources, config.model, config.vision, replicas=1, seed=0)
        loader = PixelLoader(index, config.vision, workers=1, quarantine=tmp_path / "q.jsonl")
        side = max(config.vision.sides)
        seen[resize] = loader.submit([(0, 0)]).result().views[side][0].float().numpy()
    red = {name: (view[0] > 200) & (view[2] < 60) for name, view in seen.items()}
    assert red["antialiased"].any(1).sum() < red["antialiased"].any(0).sum()  # a line at the top
    assert red["accessory"].any(1).sum() > red["accessory"].any(0).sum()  # one at the left


def test_an_older_index_keeps_its_sizes_and_its_pixels(tiny, tmp_path):
    shard = write_tar(tmp_path / "0.tar", {"0.jpg": FILES["JPEG"](6), "0.txt": b"a"})
    index_shards([shard], tmp_path / "pairs", tiny.tokenizer)
    record = SampleIndex([tmp_path / "pairs"]).folders[0].samples.record
    older = np.dtype([field for field in record.descr if field[0] != "orientation"])
    samples = np.fromfile(tmp_path / "pairs" / "samples.bin", record)
    before = np.zeros(len(samples), older)
    for name in older.names:
        before[name] = samples[name]
    before["width"], before["height"] = 32, 16
    before.tofile(tmp_path / "pairs" / "samples.bin")
    content = json.loads((tmp_path / "pairs" / "index.json").read_text())
    del content["sizes"]
    (tmp_path / "pairs" / "index.json").write_text(json.dumps(content))
    index = SampleIndex([tmp_path / "pairs"])
    assert not index.is_upright(0)
    assert (index.sizes(0, 1).width[0], index.sizes(0, 1).height[0]) == (32, 16)
    assert images.decode(ImageReader(index).read(0), is_upright=index.is_upright(0)).size == (32, 16)
