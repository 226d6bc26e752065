"""Views: which there are, which are skipped, how they are resized, and what skipping leaves as it was."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image
from test_model import groups, llama_of, random_shape
from torch.nn import functional as F

from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.canvas import Canvas, pixel_type, to_square
from megatron_sphinx.data.config import DataConfig, DataSource
from megatron_sphinx.data.packing import Segment, views_in
from megatron_sphinx.data.sources import Sources
from megatron_sphinx.data.tokenizer import TokenizerIdentity
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import CLIP_MEAN, CLIP_STD, VisionConfig, VisualExpertConfig
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.language import build_language, draw_weights
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.model.views import GLOBAL, View, encoded_views, image_positions, is_shown, place, views_of
from megatron_sphinx.model.vision import VisualProjection

CPU = torch.device("cpu")


def vision_of(*names: str, **more) -> VisionConfig:
    return VisionConfig(experts=tuple(VisualExpertConfig(name=name, weights="random") for name in names), **more)


def sphinx_x(views: int, **more) -> VisionConfig:
    names = ("clip_convnext_xxl", "dinov2_vitg14")
    return vision_of(*names, views=views, padding="corner", skip_padding_views=True, **more)


def small(**more) -> VisionConfig:
    return vision_of("clip_convnext_small", "dinov2_small", grid=4, **more)


# geometry


def test_views_come_in_the_released_order():
    assert views_of(1) == (GLOBAL,)
    assert views_of(2) == (GLOBAL, View(0, 0, 2), View(1, 0, 2), View(0, 1, 2), View(1, 1, 2))  # TL, TR, BL, BR
    assert views_of(3)[1:5] == (View(0, 0, 3), View(1, 0, 3), View(2, 0, 3), View(0, 1, 3))
    assert len(views_of(3)) == 10


def sizes(seed: int) -> list[tuple[int, int]]:
    """Pictures from 1:20 to 20:1, small and large, also with sides that just do or do not reach into a part."""
    rng = random.Random(seed)
    found = [(round(side), max(2, round(side / ratio))) for _ in range(60)
             for side, ratio in [(rng.uniform(30, 2000), 20 ** rng.random())]]  # fmt: skip
    for parts in (2, 3):
        side = parts * rng.randint(10, 300)
        found += [(side, side // parts + more) for more in (-1, 0, 1)]
        found += [(side + 1, (side + 1) // parts + more) for more in (-1, 0, 1)]
    return found + [(height, width) for width, height in found]


@pytest.mark.parametrize("padding", ["centre", "corner"])
@pytest.mark.parametrize("seed", range(5))
def test_a_view_is_shown_where_a_pixel_of_the_picture_lies_in_it(padding, seed):
    """At 448 pixels 2 x 2 parts, at 672 3 x 3; by the area that picture and part share, in fractions."""
    for width, height in sizes(seed):
        left, top = place(width, height, padding)
        side = max(width, height)
        for parts in (2, 3):
            for view in views_of(parts):
                x, y, part = Fraction(view.column * side, view.parts), Fraction(view.row * side, view.parts), \
                    Fraction(side, view.parts)  # fmt: skip
                wide = min(left + width, x + part) - max(left, x)
                high = min(top + height, y + part) - max(top, y)
                assert is_shown(view, width, height, padding) == (wide > 0 and high > 0), (width, height, view)
            assert is_shown(GLOBAL, width, height, padding)


@pytest.mark.parametrize("padding", ["centre", "corner"])
def test_what_is_skipped_is_one_colour(padding):
    """The other way round: every pixel of a skipped part is padding, and some pixel of a shown one is not."""
    rng = random.Random(3)
    for _ in range(40):
        parts = rng.choice([2, 3])
        side = parts * rng.randint(5, 40)
        other = max(2, round(side / 20 ** rng.random()))
        width, height = rng.choice([(side, other), (other, side)])
        square = np.asarray(to_square(Image.new("RGB", (width, height), "red"), padding))
        for view in views_of(parts)[1:]:
            size = side // parts
            cut = square[view.row * size : (view.row + 1) * size, view.column * size : (view.column + 1) * size]
            assert is_shown(view, width, height, padding) == bool((cut == (255, 0, 0)).all(-1).any())


@pytest.mark.parametrize(
    ("views", "padding", "width", "height", "shown"),
    [
        (5, "corner", 200, 100, (0, 1, 2)),  # 2:1, as in SPHINX-X
        (5, "corner", 200, 101, (0, 1, 2, 3, 4)),
        (5, "corner", 100, 2000, (0, 1, 3)),
        (5, "centre", 2000, 100, (0, 1, 2, 3, 4)),  # at the centre a 2 x 2 part is never empty
        (10, "corner", 300, 200, (0, 1, 2, 3, 4, 5, 6)),
        (10, "corner", 300, 100, (0, 1, 2, 3)),
        (10, "centre", 300, 100, (0, 4, 5, 6)),
        (1, "corner", 300, 100, (0,)),
    ],
)
def test_which_views_are_encoded(views, padding, width, height, shown):
    vision = vision_of("dinov2_vitg14", views=views, padding=padding, skip_padding_views=True)
    assert encoded_views(width, height, vision) == shown
    every = vision_of("dinov2_vitg14", views=views, padding=padding)
    assert encoded_views(width, height, every) == tuple(range(views))


def test_positions_of_an_image_are_the_papers():
    counts = {1: 289, 5: 1445, 10: 2890}
    names = ("blip2_qformer", "clip_vit_l14", "clip_convnext_xxl", "dinov2_vitg14")
    for views, tokens in counts.items():
        assert vision_of(*names, views=views).visual_tokens_per_image == tokens
    assert (sphinx_x(5).visual_tokens_per_image, sphinx_x(10).visual_tokens_per_image) == (1285, 2570)
    assert image_positions(len(encoded_views(448, 224, sphinx_x(5))), sphinx_x(5)) == 3 * 259 + 2
    assert image_positions(len(encoded_views(672, 224, sphinx_x(10))), sphinx_x(10)) == 4 * 259 + 6


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"views": 4}, "vision.views=4: must be 1, 5 or 10"),
        ({"resize": "nearest"}, "vision.resize=nearest: must be antialiased or accessory"),
        ({"padding": "left"}, "vision.padding=left: must be centre or corner"),
    ],
)
def test_what_is_refused(key, message):
    with pytest.raises(ConfigError, match=message):
        small(**key)


# pixels


def released(image: Image.Image, views: int, size: int, vit: int, convnext: int) -> dict[int, torch.Tensor]:
    """The released path, on normalised pixels as there, for the inputs of a ViT and of a ConvNeXt: [views, 3, ...].

    accessory/data/transform.py, then encode_image of accessory/model/LLM/llama_ens*.py, written again from what those
    do, in fp32.
    """
    width, height = image.size
    square = Image.new("RGB", (max(width, height),) * 2, (122, 116, 104))
    square.paste(image, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float32) / 255
    x = torch.from_numpy(((pixels - CLIP_MEAN) / CLIP_STD).astype(np.float32)).permute(2, 0, 1)[None]

    def crops(whole: torch.Tensor, side: int) -> list[torch.Tensor]:
        count = whole.shape[-1] // side
        return [whole[..., y * side : (y + 1) * side, x * side : (x + 1) * side]
                for y in range(count) for x in range(count)]  # fmt: skip

    def smaller(side: int) -> torch.Tensor:
        return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="bicubic")

    parts = {1: 0, 5: 2, 10: 3}[views]
    locals_ = crops(smaller(parts * vit), vit) if parts else []
    of_vit = torch.cat([smaller(vit), *locals_])
    if convnext in (256, 64):  # SPHINX: nearest, from what the ViTs see
        return {vit: of_vit, convnext: F.interpolate(of_vit, (convnext, convnext))}
    wide = crops(smaller(parts * convnext), convnext) if parts else []
    return {vit: of_vit, convnext: torch.cat([smaller(convnext), *wide])}


@pytest.mark.parametrize("views", [1, 5, 10])
@pytest.mark.parametrize("convnext", ["clip_convnext_xxl", "clip_convnext_xxl_512"])
def test_accessory_resizes_as_the_released_code(views, convnext):
    vision = vision_of(convnext, "dinov2_vitg14", views=views, resize="accessory")
    side = vision.experts[0].expert.pixels
    size = {1: 1, 5: 2, 10: 3}[views] * (224 if side == 256 else 512)
    image = Image.fromarray(np.random.default_rng(views).integers(0, 256, (90, 61, 3), np.uint8))
    wanted = released(image, views, size, 224, side)
    canvas = Canvas(image, vision)
    mean, std = (torch.tensor(value).view(3, 1, 1) * 255 for value in (CLIP_MEAN, CLIP_STD))
    for number, view in enumerate(views_of(vision.parts)):
        for pixels in (224, side):
            found = (torch.from_numpy(canvas.cut(view, pixels)) - mean) / std
            torch.testing.assert_close(found, wanted[pixels][number], rtol=1e-4, atol=1e-4)
            assert canvas.cut(view, pixels).dtype == pixel_type(vision)


def test_antialiased_parts_lie_in_the_whole():
    image, _ = draw(5)
    canvas = Canvas(image, small(views=5))
    whole = canvas.cut(GLOBAL, 64).astype(float)
    rows = [np.concatenate([canvas.cut(View(x, y, 2), 64) for x in range(2)], 2) for y in range(2)]
    halved = np.concatenate(rows, 1).reshape(3, 64, 2, 64, 2).mean((2, 4))
    assert abs(whole - halved).mean() < 3
    assert canvas.cut(GLOBAL, 64).dtype == np.uint8


# skipping


class Captions:
    """Pairs of any sizes whose captions are numbers."""

    def caption(self, pair, most=None):
        return np.arange(pair + 3, pair + 3 + most)

    def is_target(self, pair, kept):
        return np.ones(kept + 1, np.bool_)


class Tokens:
    bos, eos = 1, 2
    identity = TokenizerIdentity(vocabulary=300, sha256="none")


def check_skipping_equals_encoding_and_dropping(seed: int, views: int):
    """Against Hugging Face's LLaMA on all views, encoded and projected, those that are skipped then taken out."""
    config, rng, here = random_shape(seed), random.Random(seed), groups()
    vision = small(views=views, padding=rng.choice(["corner", "centre"]), skip_padding_views=True)
    model = SphinxModel(
        build_language(config, here, dtype=torch.float32, sequence_length=300),
        VisualProjection(vision, config.hidden, dtype=torch.float32, device=CPU),
        here,
    )
    draw_weights(model, config, here, seed=4)
    pictures = [(rng.randint(20, 400), rng.randint(20, 400)) for _ in range(3)] + [(300, 90), (80, 300)]
    encoders = FrozenEncoders(vision, device=CPU, dtype=torch.float32, seed=1)
    noise = np.random.default_rng(seed)
    canvases = [Canvas(Image.fromarray(noise.integers(0, 256, (high, wide, 3), np.uint8)), vision)
                for wide, high in pictures]  # fmt: skip
    data = DataConfig(tokenizer="", pairs_per_step=0, text_tokens_per_step=0, conversations_per_step=1,
                      conversations=(DataSource(path="x"),), sequence_length=2000)  # fmt: skip
    pieces = []
    for number, (width, height) in enumerate(pictures):
        shown, tokens = encoded_views(width, height, vision), rng.randint(1, 9)
        length = 2 + image_positions(len(shown), vision) + tokens
        pieces.append(Segment(True, number, 0, length, tokens, tokens + 1, shown))
    builder = BatchBuilder(data, Sources(Tokens(), Captions(), None), vision, multiple=7)
    batch = builder.build([tuple(pieces)])
    asked = views_in([tuple(pieces)])
    assert len(asked) == len(batch.sample_of_view) == sum(len(piece.views) for piece in pieces)
    assert len(batch.skip_positions) == views * len(pieces) - len(asked)

    def encoded(wanted):
        cuts = {side: [canvases[pair].cut(views_of(vision.parts)[view], side) for pair, view in wanted]
                for side in vision.sides}  # fmt: skip
        return encoders({side: torch.from_numpy(np.stack(stack)) for side, stack in cuts.items()})

    losses = model(batch, encoded(asked))
    losses.sum().backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    theirs, total = llama_of(config, model), 0.0
    blocks = model.vision(encoded([(pair, view) for pair in range(len(pieces)) for view in range(views)]))
    for number, piece in enumerate(pieces):
        every = blocks[number * views : (number + 1) * views]
        image = [every[view] if view in piece.views else model.vision.skip_token[None] for view in range(views)]
        text = torch.cat([torch.from_numpy(Captions().caption(number, piece.tokens)), torch.tensor([Tokens.eos])])
        embed = theirs.model.embed_tokens
        row = torch.cat([embed(torch.tensor([Tokens.bos])), *image, embed(text)])
        logits = theirs(inputs_embeds=row[None]).logits[0, -1 - len(text) : -1]
        total = total + F.cross_entropy(logits, text, reduction="sum")
    total.backward()
    torch.testing.assert_close(losses.sum(), total, rtol=1e-5, atol=1e-5)
    for name in ("visual_proj.0.weight", "visual_proj.1.bias", "start_tag", "end_tag", "skip_token"):
        weight = model.vision.get_parameter(name)
        wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad  # where nothing was skipped
        torch.testing.assert_close(found[f"vision.{name}"], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    wanted = theirs.model.norm.weight.grad
    torch.testing.assert_close(found["language.decoder.final_layernorm.weight"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("views", [5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_skipping_is_encoding_and_dropping(run_ranks, seed, views):
    run_ranks(1, lambda: check_skipping_equals_encoding_and_dropping(seed, views))
