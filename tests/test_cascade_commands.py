"""The commands of `megatron-sphinx cascade`, from a picture to the files that they write."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_cascades import SIZE, overlap, sam, scene  # noqa: F401  (a fixture)
from test_cli import ROOT
from test_demo import run_example  # noqa: F401  (a fixture)

from megatron_sphinx.__main__ import main
from megatron_sphinx.prepare.boxes import format_box
from megatron_sphinx.serving import model

LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: the blob."


@pytest.fixture
def cascade(tmp_path, capsys):
    """`cascade(kind, *words)` asks the script about the scene; the exit status, and both streams."""
    picture, _, box = scene(0)
    picture.save(tmp_path / "p.png")
    where = format_box(box, *SIZE, "centre")
    answers = {
        LOCATE: where,
        "Detect all objects shown in the image.": f"blob{where} ghost[0.1,0.1,1.1,0.2]",
        "detect all hole shown in the image.": "none",
        "Provide a one-sentence caption for the provided image.": ["a scene", "a blob"],
        "Generate a detailed description about the image.": "a blob of one colour",
        f"Please provide a short description for this region : {where}": "the only blob",
        "What happens?": f"A blob{where} grows.",
    }
    (tmp_path / "a.json").write_text(json.dumps(answers))

    def run(kind, *words, given=()):
        asked = given or ("--answers", str(tmp_path / "a.json"))
        shown = () if kind == "video" else ("--picture", str(tmp_path / "p.png"))
        status = main(["cascade", kind, *shown, *asked, "--output", str(tmp_path / "out"), *map(str, words)])
        return status, *capsys.readouterr()

    return run


def opened(path):
    return np.asarray(Image.open(path))


def test_a_referred_region_is_segmented(cascade, tmp_path):
    status, out, error = cascade("segment", "--expression", "the blob", "--segmenter", "random-walker")
    folder = tmp_path / "out"
    assert (status, error) == (0, "")
    assert out == f"{folder}: 1 regions, by the script a.json, not a model, random walker (scikit-image)\n"
    mask = opened(folder / "masks" / "1.png")
    assert overlap(mask, scene(0)[1]) >= 0.9
    told = json.loads((folder / "segment.json").read_text())
    assert told["regions"][0] | {"box": 0} == {
        "number": 1, "phrase": "the blob", "box": 0, "mask_pixels": int(mask.sum())
    }  # fmt: skip
    assert told["regions"][0]["box"] == pytest.approx(scene(0)[2], abs=0.01 * SIZE[0])
    assert (told["prompt"], told["width"], told["height"]) == (LOCATE, *SIZE)
    assert {path.name for path in folder.iterdir()} == {
        "masks", "masks.png", "highlighted.png", "boxes.png", "segment.json"
    }  # fmt: skip


def test_a_region_is_taken_out_and_all_else_stays(cascade, tmp_path):
    status, out, error = cascade("inpaint", "--expression", "the blob", "--grow", "3", "--inpainter", "biharmonic")
    folder, (picture, truth, _) = tmp_path / "out", scene(0)
    assert (status, error) == (0, "")
    assert "GrabCut (OpenCV), biharmonic functions (scikit-image)\n" in out
    hole, filled = opened(folder / "mask.png"), opened(folder / "inpainted.png").astype(int)
    before = np.asarray(picture).astype(int)
    assert (truth & ~hole).sum() < 0.01 * truth.sum()
    assert (filled[~hole] == before[~hole]).all()
    background = before[~truth].mean(0)
    assert abs(filled[truth] - background).mean() < 20 < abs(before[truth] - background).mean()
    told = json.loads((folder / "inpaint.json").read_text())
    assert (told["grow"], told["hole_pixels"]) == (3, hole.sum())


def test_all_objects_are_described_and_what_is_no_region_is_said(cascade, tmp_path):
    status, out, error = cascade("describe")
    folder = tmp_path / "out"
    assert (status, error) == (0, "")
    assert out.splitlines() == [
        "not a region: [0.1,0.1,1.1,0.2]: outside of 0 to 1",
        f"{folder}: 1 regions described, by the script a.json, not a model",
    ]
    told = json.loads((folder / "describe.json").read_text())
    (region,) = told["regions"]
    assert told["caption"] == "a scene"
    assert [region[key] for key in ("phrase", "description", "caption", "details")] == [
        "blob", "the only blob", "a blob", "a blob of one colour"
    ]  # fmt: skip
    assert opened(folder / "crops" / "1.png").shape[0] == round(region["box"][3]) - round(region["box"][1])
    assert "Answers of the script a.json, not a model." in (folder / "index.html").read_text()


@pytest.mark.parametrize(("frames", "size", "reds"), [(1, SIZE, [120]), (3, (240, 180), [0, 40, 120, 200])])
def test_a_video_is_asked_about_by_its_frames(cascade, tmp_path, frames, size, reds):
    film = tmp_path / "film"
    film.mkdir()
    for number in range(6):
        Image.new("RGB", SIZE, (40 * number, 0, 0)).save(film / f"{number}.png")
    status, out, error = cascade("video", "--video", film, "--frames", frames, "--question", "What happens?")
    assert (status, error) == (0, "")
    assert out.startswith("A blob[")
    assert out.endswith(f"out: {frames} frames, by the script a.json, not a model\n")
    made = Image.open(tmp_path / "out" / "frames.png")
    assert made.size == size
    assert sorted(colour[0] for _, colour in made.getcolors()) == reds
    told = json.loads((tmp_path / "out" / "video.json").read_text())
    assert (told["frames"], told["regions"][0]["phrase"]) == (frames, "A blob")
    assert (tmp_path / "out" / "boxes.png").exists()


def test_masks_by_sam(cascade, sam, tmp_path):  # noqa: F811
    status, out, error = cascade("segment", "--expression", "the blob", "--sam", sam)
    assert (status, error) == (0, "")
    assert out.endswith("SAM (transformers)\n")
    assert opened(tmp_path / "out" / "masks" / "1.png").shape == SIZE[::-1]


class LoadedModel:
    """What a loaded model has that a cascade uses; it sees how large pictures are, and tells."""

    name, padding, positions = "m", "corner", 400

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.is_closed = True

    def generate(self, prompts, pictures, **sampling):
        self.sampling = sampling
        sizes = [Image.open(io.BytesIO(content)).size for content in pictures]
        where = "blob[0.1,0.1,0.5,0.5]"
        return [SimpleNamespace(text=f"{where} {size} {prompt}") for prompt, size in zip(prompts, sizes, strict=True)]


def test_a_model_is_asked_as_a_script_is(cascade, checkpoint, tmp_path, monkeypatch):
    loaded = LoadedModel()
    monkeypatch.setattr(model, "load", lambda path, **options: loaded)
    given = ("--model", checkpoint, "--max-new-tokens", "9")
    status, out, error = cascade("describe", given=given)
    assert (status, error) == (0, "")
    assert out.endswith("1 regions described, by the model m\n")
    told = json.loads((tmp_path / "out" / "describe.json").read_text())
    assert told["regions"][0]["box"] == [12.0, 12.0, 60.0, 60.0], "the model's padding is at the corner"
    assert told["regions"][0]["caption"].startswith("blob[0.1,0.1,0.5,0.5] (48, 48) Provide")
    assert loaded.is_closed
    assert loaded.sampling["max_new_tokens"] == 9


REFUSED = [
    ("segment", ["--expression", "a", "--category", "b"], "--expression and --category: each says which regions"),
    ("segment", ["--expression", " "], "--expression=' ': says nothing; give words, or leave it out"),
    ("inpaint", ["--category", ""], "--category='': says nothing; give words, or leave it out"),
    ("segment", ["--category", "hole"], "answers 'none' to 'detect all hole shown in the image.', which names no box"),
    ("segment", ["--expression", "x"], "has no answer to 'Please provide"),
    ("segment", ["--sam", "none-such"], "sam=none-such: has no config.json that can be read"),
    ("segment", ["--model", "."], "--answers={answers}: one of them is asked; give a model, or a file of answers"),
    ("inpaint", ["--grow", "-1"], "--grow=-1: must be at least 0"),
    ("describe", ["--most-regions", "0"], "--most-regions=0: must be at least 1"),
    ("describe", ["--temperature", "-1"], "sampling.temperature=-1.0: must be at least 0"),
    ("describe", ["--picture", "none.png"], "picture=none.png: No such file or directory; give a picture that can be"),
    ("describe", ["--picture", "{answers}"], "picture={answers}: not an image: it begins with"),
    ("video", ["--video", "none.mp4", "--question", "q"], "--video=none.mp4: no such file or folder; give a video"),
    ("video", ["--video", ".", "--question", " "], "--question=' ': says nothing; give words"),
    ("video", ["--video", ".", "--question", "q", "--frames", "0"], "--frames=0: must be at least 1"),
]


@pytest.mark.parametrize(("kind", "words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_and_nothing_is_written(cascade, tmp_path, kind, words, message):
    answers = str(tmp_path / "a.json")
    status, out, error = cascade(kind, *(word.replace("{answers}", answers) for word in words))
    assert (status, out) == (2, "")
    assert error.startswith(f"megatron-sphinx cascade {kind}: ")
    assert message.replace("{answers}", answers) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_model_and_answers_one_line_says_so(tmp_path, capsys):
    words = ["cascade", "describe", "--picture", str(tmp_path / "p.png"), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "--model=None --answers=None: one of them is asked" in capsys.readouterr().err


def test_results_of_before_are_not_overwritten(cascade, tmp_path):
    assert cascade("describe")[0] == 0
    before = (tmp_path / "out" / "describe.json").read_bytes()
    status, _, error = cascade("segment", "--expression", "the blob")
    assert status == 2
    assert "out: is not empty, and nothing is overwritten; give a new folder" in error
    assert (tmp_path / "out" / "describe.json").read_bytes() == before


@pytest.mark.slow
def test_the_pictures_of_the_docs_are_made_by_the_example(run_example, tmp_path):  # noqa: F811
    run_example("cascades.py", tmp_path, "--plot", tmp_path / "plot.png")
    made, shown = (Image.open(path).convert("RGB") for path in (tmp_path / "plot.png", ROOT / "docs" / "cascades.png"))
    assert made.size == shown.size
    assert abs(np.asarray(made).astype(int) - np.asarray(shown)).mean() < 2
    assert (ROOT / "docs" / "cascades.png").stat().st_size <= 150_000


@pytest.mark.slow
def test_a_run_that_was_trained_is_asked_in_a_cascade(train, tiny, run_ranks, tmp_path):
    """The whole way with a real model, which has learnt nothing: of boxes it writes none, and that is told."""
    run = train(1, {"data.sequence_length": 400, "training.steps": 2, "checkpoint.interval": 2})
    picture = str(tiny.folder / "pictures" / "000.png")
    asked = ["--model", str(run.folder), "--cache-gib", "0.02", "--max-new-tokens", "8"]

    def work():
        film = ["cascade", "video", "--video", str(tiny.folder / "pictures"), "--frames", "4", "--question", "What?"]
        segment = ["cascade", "segment", "--picture", picture, "--expression", "the cup"]
        asked_for = [[*words, *asked, "--output", str(tmp_path / words[1])] for words in (film, segment)]
        assert [main(words) for words in asked_for] == [0, 2]

    assert "which names no box in the picture" in run_ranks(1, work).text()
    told = json.loads((tmp_path / "video" / "video.json").read_text())
    assert (told["answerer"], told["frames"]) == ("the model run", 4)
    assert not (tmp_path / "segment").exists()
