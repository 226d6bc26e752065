"""Pictures that are asked about: seen as in training, and refused where they cannot be."""

import hashlib
import io

import pytest
import torch
from conftest import draw
from PIL import Image
from test_pairs import write_tar
from test_views import vision_of

from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.errors import DataError
from megatron_sphinx.generation import pictures
from megatron_sphinx.generation.grounding import ground_upright
from megatron_sphinx.generation.pictures import picture_of, views_of_picture
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.views import encoded_views, image_positions
from megatron_sphinx.prepare.pairs import index_shards


def saved(image: Image.Image, kind: str, orientation: int = 1) -> bytes:
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(content, kind, exif=exif)
    return content.getvalue()


@pytest.fixture(scope="module")
def index(tiny, tmp_path_factory):
    """Pictures of several sizes and kinds, two of which lie on their side."""
    folder = tmp_path_factory.mktemp("asked")
    contents = [
        saved(draw(number)[0].resize(size), kind, orientation)
        for number, (size, kind, orientation) in enumerate(
            [((90, 30), "PNG", 1), ((31, 200), "JPEG", 1), ((120, 40), "JPEG", 6), ((64, 64), "WEBP", 8)]
        )
    ]
    members = {f"{number}.{kind}": part for number, content in enumerate(contents)
               for kind, part in (("jpg", content), ("txt", b"a"))}  # fmt: skip
    index_shards([write_tar(folder / "0.tar", members)], folder / "pairs", tiny.tokenizer)
    return SampleIndex([folder / "pairs"]), contents


@pytest.mark.parametrize("resize", ["antialiased", "accessory"])
@pytest.mark.parametrize(
    ("views", "padding", "has_skip"), [(1, "centre", False), (5, "corner", True), (10, "corner", True)]
)
def test_views_are_those_that_training_reads(index, tmp_path, resize, views, padding, has_skip):
    samples, contents = index
    vision = vision_of(
        "clip_convnext_small", "dinov2_small", grid=4, resize=resize, views=views, padding=padding,
        skip_padding_views=has_skip,
    )  # fmt: skip
    loader = PixelLoader(samples, vision, workers=1, quarantine=tmp_path / "quarantine.jsonl")
    for number, content in enumerate(contents):
        picture = picture_of(content, vision)
        size = (picture.width, picture.height)
        planned = (samples.as_stored() if resize == "accessory" else samples).sizes(number, number + 1)
        assert size == (planned.width[0], planned.height[0])
        assert picture.encoded == encoded_views(*size, vision)
        assert picture.positions == image_positions(len(picture.encoded), vision)
        found = views_of_picture(picture, vision)
        wanted = loader.submit([(number, view) for view in picture.encoded]).result()
        assert not wanted.bad
        assert found.keys() == wanted.views.keys()
        for side, pixels in found.items():
            assert pixels.dtype == wanted.views[side].dtype
            assert torch.equal(pixels, wanted.views[side])
    assert (views == 1) == (len(picture.encoded) == 1)


def test_a_picture_is_known_by_its_content_and_upright(index):
    _, contents = index
    vision = vision_of("dinov2_small", grid=4)
    turned = picture_of(contents[2], vision)
    assert (turned.width, turned.height) == (40, 120)
    assert turned.key == hashlib.sha256(contents[2]).hexdigest()
    encoders = FrozenEncoders(vision, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    assert encoders(views_of_picture(turned, vision)).shape == (1, vision.feature_values)


@pytest.mark.parametrize("resize", ["antialiased", "accessory"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_upright_picture(orientation, resize):
    upright = Image.new("RGB", (120, 40))
    upright.paste((255, 255, 255), (12, 4, 60, 16))
    way_back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers
    stored = upright.transpose(Image.Transpose(way_back[orientation])) if orientation > 1 else upright
    picture = picture_of(saved(stored, "PNG", orientation), vision_of("dinov2_small", grid=4, resize=resize))
    seen = stored if resize == "accessory" else upright
    assert seen.size == (picture.width, picture.height)
    left, top, right, bottom = (number / 120 for number in seen.getbbox())
    text = f"[{left},{top},{right},{bottom}] [{left},{top}]"
    whole, point = ground_upright(text, picture, "corner")
    assert whole.boxes[0] == pytest.approx((12, 4, 60, 16))
    assert point.points[0] in [pytest.approx(corner) for corner in ((12, 4), (60, 4), (12, 16), (60, 16))]


def test_pictures_that_cannot_be_seen_are_refused(monkeypatch):
    vision = vision_of("dinov2_small", grid=4)
    whole = saved(draw(1)[0].resize((200, 200)), "PNG")
    large = io.BytesIO()
    Image.new("1", (14_000, 13_000)).save(large, "PNG")
    for content, message in {
        b"": "not an image: the file is empty",
        b"text": "not an image: it begins with b'text'",
        whole[: len(whole) // 2]: "does not decode: ",
        large.getvalue(): "decompression bomb: ",
    }.items():
        with pytest.raises(DataError, match=f"^{message}"):
            picture_of(content, vision)
    monkeypatch.setattr(pictures, "MOST_BYTES", 100)
    with pytest.raises(DataError, match=r"^picture of \d+ bytes: at most 100 are taken; make it smaller"):
        picture_of(whole, vision)
