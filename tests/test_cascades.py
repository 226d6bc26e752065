"""Cascades from Python: regions of answers, masks against truth, holes that are filled, dense captions, drawings."""

import builtins
import json
import sys
from html import escape

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megatron_sphinx.cascades.answerer import Question, Script
from megatron_sphinx.cascades.captioning import describe_densely
from megatron_sphinx.cascades.drawing import draw_masks, draw_regions, highlight, side_by_side
from megatron_sphinx.cascades.inpainting import grown, inpaint
from megatron_sphinx.cascades.opencv import GrabCut, Telea
from megatron_sphinx.cascades.output import check_new, write_folder
from megatron_sphinx.cascades.page import captions_page
from megatron_sphinx.cascades.regions import Region, detect, locate, regions_of
from megatron_sphinx.cascades.sam import SegmentAnything
from megatron_sphinx.cascades.scikit_image import Biharmonic, RandomWalker
from megatron_sphinx.errors import CheckpointError, ConfigError, DataError

SIZE = (120, 90)  # of a scene
SEGMENTERS = [GrabCut, RandomWalker]
INPAINTERS = [Telea, Biharmonic]
NEAR = 5  # pixels between a shape and its box


class Asked:
    """Answers by a rule, and keeps what it was asked."""

    name, padding = "a rule", "centre"

    def __init__(self, rule):
        self.rule, self.questions = rule, []

    def ask(self, questions):
        self.questions += questions
        return [self.rule(question) for question in questions]


def scene(seed, shape="ellipse", size=SIZE):
    """A shape of one colour on a background of another, both noisy: the picture, the shape's truth, its box."""
    rng = np.random.default_rng(seed)
    left, top = (int(rng.integers(NEAR + 5, side // 4)) for side in size)
    right, bottom = (int(side - rng.integers(NEAR + 5, side // 4)) for side in size)
    truth = Image.new("1", size)
    getattr(ImageDraw.Draw(truth), shape)((left, top, right, bottom), fill=1)
    mask = np.asarray(truth)
    dark, light = rng.integers(20, 90, 3), rng.integers(160, 230, 3)
    pixels = np.where(mask[..., None], light, dark) + rng.normal(0, 8, (*mask.shape, 3))
    box = (left - NEAR, top - NEAR, right + NEAR, bottom + NEAR)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask, tuple(map(float, box))


def overlap(mask, truth):
    """Intersection over union."""
    return (mask & truth).sum() / (mask | truth).sum()


# ---------------------------------------------------------------------------------------------------------------------
# who answers, and the regions of an answer


def test_a_script_gives_its_answers_in_turn_and_the_last_one_again(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"who?": "a cat", "what?": ["one", "two"]}))
    script, picture = Script(path), Image.new("RGB", SIZE)
    asked = [Question(picture, prompt) for prompt in ("what?", "who?", "what?", "what?", "who?")]
    assert script.ask(asked) == ["one", "a cat", "two", "two", "a cat"]
    assert script.name == "the script a.json, not a model"
    with pytest.raises(DataError, match=r"a\.json: has no answer to 'where\?'; add one"):
        script.ask([Question(picture, "where?")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"No such file or directory; give a file of answers that can be read"),
        ("{", r"is no JSON \(.*\); give an object of prompts and answers"),
        ("[]", "is no script; give an object with a text or a list of texts per prompt"),
        ("{}", "is no script"),
        ('{"a": 1}', "is no script"),
        ('{"a": ["x", null]}', "is no script"),
    ],
)
def test_what_is_no_script_is_refused(content, message, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"answers=.*a\.json: {message}"):
        Script(path)


def test_a_referred_region_is_in_pixels_of_the_picture():
    asked = Asked(lambda question: "[0.25,0.50,0.75,0.60]")
    located = locate(asked, Image.new("RGB", (200, 100)), "the cup")  # 50 pixels of padding above
    assert located.regions == (Region(1, "the cup", (50.0, 50.0, 150.0, 70.0)),)
    assert [question.prompt for question in asked.questions] == [
        "Please provide the bounding box coordinate of the region this sentence describes: the cup."
    ]


def test_a_box_is_cut_to_the_picture_and_what_is_no_region_is_told():
    answer = (
        "cup[0.10,0.10,0.50,0.50;0.0,0.0,0.5,0.2] pen[0.20,0.40,0.20,0.60] cat[0.1,0.1,1.2,0.9] dog[0.3,0.3,0.9,0.9]"
    )
    regions, faults = regions_of(answer, (200, 100), "centre", "thing")
    assert regions == [Region(1, "cup", (20.0, 0.0, 100.0, 50.0)), Region(2, "dog", (60.0, 10.0, 180.0, 100.0))]
    assert list(faults) == [
        "[0,0,0.5,0.2]: in the padding, outside the picture",
        "[40,30,40,70] in pixels: has no area",
        "[0.1,0.1,1.2,0.9]: outside of 0 to 1",
    ]


@pytest.mark.parametrize(
    ("answer", "why"), [("I see none.", ""), ("[0.1,0.1,1.5,0.2]", r" \(\[0\.1,0\.1,1\.5,0\.2\]: outside of 0 to 1\)")]
)
def test_an_answer_without_a_box_is_told(answer, why):
    with pytest.raises(DataError, match=rf"a rule: answers '.*' to '.*', which names no box in the picture{why}; ask"):
        locate(Asked(lambda question: answer), Image.new("RGB", SIZE), "a cup")


@pytest.mark.parametrize(
    ("category", "prompt"),
    [("", "Detect all objects shown in the image."), ("cup", "detect all cup shown in the image.")],
)
def test_objects_are_detected_by_the_papers_prompts(category, prompt):
    located = detect(Asked(lambda question: "[0.2,0.2,0.8,0.8]"), Image.new("RGB", (100, 100)), category)
    assert (located.prompt, located.regions[0].phrase) == (prompt, category)


# ---------------------------------------------------------------------------------------------------------------------
# masks


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@pytest.mark.parametrize("shape", ["ellipse", "rectangle"])
def test_masks_are_nearly_the_shapes(segmenter, shape):
    for seed in range(3):
        picture, truth, box = scene(seed, shape)
        (mask,) = segmenter().masks(picture, [box])
        assert overlap(mask, truth) >= 0.9
        assert mask.dtype == bool


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_masks_of_large_pictures_are_found_on_smaller_ones(segmenter):
    picture, truth, box = scene(1, size=(800, 600))
    (mask,) = segmenter().masks(picture, [box])
    assert mask.shape == truth.shape
    assert overlap(mask, truth) >= 0.9


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_two_boxes_have_two_masks_and_equal_ones_the_same(segmenter):
    picture, _, box = scene(2)
    first, other, again = segmenter().masks(picture, [box, (0.0, 0.0, 20.0, 15.0), box])
    assert (first == again).all()
    assert not other[15:].any()
    assert not other[:, 20:].any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("segmenter", SEGMENTERS)
@pytest.mark.parametrize(
    "box", [(0.0, 0.0, *map(float, SIZE)), (3.2, 4.0, 4.4, 5.0), (118.5, 88.5, 120.0, 90.0), (0.0, 10.0, 120.0, 12.0)]
)
def test_a_mask_is_never_empty_nor_beside_its_box(segmenter, box):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), np.uint8))
    plain = (Image.new("RGB", SIZE, colour) for colour in ("red", "grey"))  # nothing can be separated
    for picture in (scene(3)[0], noise, *plain):
        (mask,) = segmenter().masks(picture, [box])
        rows, columns = np.nonzero(mask)
        assert box[0] - 1 < columns.min() <= columns.max() < box[2]
        assert box[1] - 1 < rows.min() <= rows.max() < box[3]


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_a_picture_of_few_pixels_has_masks_too(segmenter):
    (mask,) = segmenter().masks(Image.new("RGB", (2, 2)), [(0.0, 0.0, 2.0, 1.0)])
    assert mask.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(
    ("make", "module", "message"),
    [
        (GrabCut, "cv2", "opencv is not installed"),
        (Telea, "cv2", "opencv is not installed"),
        (RandomWalker, "skimage", "scikit-image is not installed"),
        (Biharmonic, "skimage", "scikit-image is not installed"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(make, module, message, monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **words):
        if name.partition(".")[0] == module:
            raise ImportError(name)
        return imported(name, *args, **words)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=rf"{message}; pip install 'megatron-sphinx\[cascades\]'"):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# the Segment Anything Model


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """The folder of a small SAM with random weights."""
    from transformers import SamConfig, SamImageProcessor, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig
    from transformers import SamVisionConfig as Vision

    side, width = 64, 16
    config = SamConfig(
        vision_config=Vision(
            image_size=side, patch_size=8, hidden_size=width, output_channels=width, num_hidden_layers=1,
            num_attention_heads=2, mlp_dim=width, window_size=4, global_attn_indexes=[0], num_pos_feats=width // 2,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=width, image_size=side, patch_size=8, image_embedding_size=side // 8, mask_input_channels=4
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=width, mlp_dim=width, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=width
        ),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sam")
    SamModel(config).save_pretrained(folder)
    pad, size = {"height": side, "width": side}, {"longest_edge": side}
    SamImageProcessor(size=size, pad_size=pad, mask_pad_size=pad).save_pretrained(folder)
    return folder


def test_sam_gives_a_mask_for_each_box_in_pixels_of_the_picture(sam):
    picture, _, box = scene(0)
    masks = SegmentAnything(sam).masks(picture, [box, (0.0, 0.0, 30.0, 30.0)])
    assert [(mask.shape, mask.dtype) for mask in masks] == [(SIZE[::-1], np.dtype(bool))] * 2


def test_a_folder_that_holds_no_sam_is_refused(sam, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"sam=.*: has no config\.json that can be read; give the folder of a SAM"
    ):
        SegmentAnything(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match=r"sam=.*: is a model of type 'clip'; give the folder of one of type"):
        SegmentAnything(tmp_path)
    (tmp_path / "config.json").write_bytes((sam / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"sam=.*: does not load \(.*\); copy the whole folder again"):
        SegmentAnything(tmp_path)


def test_weights_of_sam_that_are_missing_are_named(sam, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in sam.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, mask_decoder\.iou_token\.weight first; copy"):
        SegmentAnything(tmp_path)


def test_without_transformers_sam_names_its_extra(sam, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers is not installed; pip install 'megatron-sphinx\[cascades\]'"):
        SegmentAnything(sam)


# ---------------------------------------------------------------------------------------------------------------------
# holes


@pytest.mark.parametrize("inpainter", INPAINTERS)
def test_only_the_hole_changes_and_what_was_there_is_gone(inpainter):
    ramp = np.broadcast_to(np.linspace(40, 200, 60, dtype=np.float32)[None, :, None], (50, 60, 3)).astype(np.uint8)
    picture, mask = ramp.copy(), np.zeros((50, 60), bool)
    mask[15:30, 20:40] = True
    picture[mask] = (255, 0, 0)
    filled = np.asarray(inpaint(inpainter(), Image.fromarray(picture), mask))
    assert (filled[~mask] == picture[~mask]).all()
    assert abs(filled[mask].astype(int) - ramp[mask]).mean() < 8  # the ramp goes on; red is 110 away on average


@pytest.mark.parametrize(
    ("value", "message"), [(False, "mask: covers no pixel; give"), (True, "mask: covers all of 120 x 90 pixels; give")]
)
def test_a_hole_of_nothing_or_all_is_refused(value, message):
    with pytest.raises(DataError, match=message):
        inpaint(Telea(), Image.new("RGB", SIZE), np.full(SIZE[::-1], value))


def test_a_mask_grows_by_squares():
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    assert (grown(mask, 0) == mask).all()
    expected = np.zeros_like(mask)
    expected[2:7, 2:7] = True
    assert (grown(mask, 2) == expected).all()


# ---------------------------------------------------------------------------------------------------------------------
# dense captions


def dense(question):
    """Answers about a picture of 100 x 100 pixels in which there are two cups."""
    if question.prompt == "Detect all objects shown in the image.":
        return "cup[0.10,0.10,0.40,0.50;0.50,0.50,0.90,0.80] dot[0.99,0.99,1.00,1.00] pen[0.2,0.2,0.2,0.2]"
    return f"{question.prompt}|{question.picture.size}"


def test_dense_captions_ask_for_boxes_then_places_then_crops():
    asked, picture = Asked(dense), Image.new("RGB", (100, 100))
    captions = describe_densely(asked, picture, most_regions=2)
    first, second = captions.regions
    assert captions.caption == "Provide a one-sentence caption for the provided image.|(100, 100)"
    assert first.description == "Please provide a short description for this region : [0.10,0.10,0.40,0.50]|(100, 100)"
    assert second.caption == "Provide a one-sentence caption for the provided image.|(40, 30)"
    assert second.details == "Generate a detailed description about the image.|(40, 30)"
    assert (first.crop.size, captions.left_out, len(captions.detected.faults)) == ((30, 40), 1, 1)
    assert len(asked.questions) == 2 + 2 + 4


def test_a_region_of_a_pixel_is_cut_out_as_a_picture_that_can_be_asked_about():
    captions = describe_densely(Asked(dense), Image.new("RGB", (100, 100)), most_regions=9)
    assert captions.regions[2].crop.size == (2, 2)


def test_the_page_names_who_answered_and_shows_all_that_was_said():
    picture = Image.new("RGB", (100, 100))
    captions = describe_densely(Asked(lambda question: dense(question).replace("|", "<b>")), picture, 2)
    page = captions_page(captions, picture, "a & b.png", "a rule")
    assert "<h1>a &amp; b.png</h1>" in page
    assert "Answers of a rule." in page
    assert "1 further regions were not asked about. Not a region: [20,20,20,20] in pixels: has no area." in page
    said = [text for told in captions.regions for text in (told.caption, told.details, told.description)]
    assert all("<b>" in text and escape(text) in page for text in said)
    assert 'src="data:image/png;base64,' in page


# ---------------------------------------------------------------------------------------------------------------------
# drawings


def test_masks_are_drawn_half_transparent_and_what_is_highlighted_keeps_its_colours():
    picture, mask, _ = scene(0)
    pixels, drawn, lit = (np.asarray(one).astype(int) for one in (
        picture, draw_masks(picture, [mask]), highlight(picture, [mask])
    ))  # fmt: skip
    red = np.array([0xD7, 0x19, 0x1C])  # the first colour
    assert (drawn[~mask] == pixels[~mask]).all()
    assert abs(drawn[mask] - (pixels[mask] + red) / 2).max() <= 1
    assert (lit[mask] == pixels[mask]).all()
    assert np.ptp(lit[~mask], axis=1).max() == 0
    assert lit[~mask].mean() < pixels[~mask].mean() / 2


def test_regions_are_drawn_with_their_numbers():
    picture = Image.new("RGB", (200, 200), "white")
    drawn = np.asarray(draw_regions(picture, [Region(1, "", (10.0, 10.0, 90.0, 90.0))]))
    assert (drawn[10, 20:80] == (220, 20, 40)).all()
    assert (drawn[50, 50] != 255).any(), "the number stands in the middle"
    assert (drawn[100:] == 255).all()


@pytest.mark.parametrize(
    ("count", "size", "sheet"),
    [(1, (40, 30), (40, 30)), (4, (40, 30), (80, 60)), (3, (90, 30), (90, 90)), (5, (20, 20), (60, 40))],
)
def test_frames_stand_side_by_side_nearly_in_a_square(count, size, sheet):
    frames = [Image.new("RGB", size, (10 * number, 0, 0)) for number in range(1, count + 1)]
    made = side_by_side(frames)
    assert made.size == sheet
    columns = sheet[0] // size[0]
    for number in range(count):
        middle = (number % columns * size[0] + size[0] // 2, number // columns * size[1] + size[1] // 2)
        assert made.getpixel(middle) == (10 * (number + 1), 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# what is written


def test_a_folder_appears_whole_and_nothing_is_overwritten(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    write_folder(folder, {"a.txt": b"a", "b/c.txt": b"c"})
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.txt")) == ["new/a.txt", "new/b/c.txt"]
    with pytest.raises(DataError, match=r"output=.*new: is not empty, and nothing is overwritten; give a new folder"):
        write_folder(folder, {"a.txt": b"other"})
    with pytest.raises(DataError, match=r"output=.*a\.txt: is no folder; give a new one"):
        check_new(folder / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"output=.*file/new: cannot be written \(Not a directory\); give a folder whose"
    ):
        write_folder(tmp_path / "file" / "new", {"a": b""})
