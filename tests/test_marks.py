"""Set-of-Mark data: marks on objects, in words, and the answers of an annotator model."""

import json

import numpy as np
import pytest
from conftest import draw
from PIL import Image

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.answers import mentioned, merge_answers
from megatron_sphinx.prepare.drawing import COLOURS, INTRODUCTION, MOST_MARKS, Mark, describe, draw_marks, place_of
from megatron_sphinx.prepare.marks import write_marks


def test_a_mark_is_on_its_object():
    half = [[(0.0, 0.0), (90.0, 0.0), (90.0, 10.0), (10.0, 10.0), (10.0, 90.0), (0.0, 90.0)]]  # hollow like an L
    x, y = place_of((0, 0, 91, 91), half, (100, 100))
    assert min(x, y) <= 10 < max(x, y) < 60
    assert place_of((10, 20, 30, 60), [], (100, 100)) == (20, 40)
    marks = [Mark(n, "x", (10.0, 10.0, 90.0, 90.0), [], (11.0 * n, 50.0)) for n in range(1, MOST_MARKS + 1)]
    assert len({(mark.colour, mark.shape) for mark in marks}) == MOST_MARKS
    image = Image.new("RGB", (300, 200), "white")
    for mark in marks:
        drawn = np.asarray(draw_marks(image, [mark]))
        x, y = (int(place) for place in mark.place)
        near = drawn[y - 10 : y + 11, max(x - 10, 0) : x + 11]
        assert (near == COLOURS[mark.colour]).all(2).sum() > 60
        assert (drawn[10, 20:80] == COLOURS[mark.colour]).all()
        assert (drawn[100:] == 255).all()
    assert np.asarray(image).min() == 255


def test_marks_are_told_in_words():
    marks = [
        Mark(1, "dog", (0.0, 0.0, 50.0, 100.0), [], (25.0, 50.0)),
        Mark(10, "red cup", (100.0, 50.0, 200.0, 100.0), [], (150.0, 75.0)),
    ]
    assert describe(marks).splitlines() == [
        INTRODUCTION, "Mark 1: a red circle on the dog.", "Mark 10: a green square on the red cup."
    ]  # fmt: skip
    centre, corner = (describe(marks, (200, 100), padding) for padding in ("centre", "corner"))
    assert "Mark 1: a red circle at [0.12,0.50] on the dog [0.00,0.25,0.25,0.75]." in centre
    assert "Mark 10: a green square at [0.75,0.38] on the red cup [0.50,0.25,1.00,0.50]." in corner
    assert mentioned("Mark 1 is left of mark #12; marks 3, 4 and 5 of 8 remark 9 times. MARKS 6 & 7.") == {
        1,
        12,
        3,
        4,
        5,
        6,
        7,
    }


@pytest.fixture
def annotated(tmp_path) -> dict:
    """Three images, one of them damaged, and what COCO would say of the objects on them."""
    (tmp_path / "pictures").mkdir()
    for number in (0, 1):
        draw(number)[0].resize((120, 80)).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "2.png").write_bytes(b"broken")

    def entry(key: int, image: int, category: int, box: list, **more: object) -> dict:
        return {"id": key, "image_id": image, "category_id": category, "bbox": box, **more}

    return {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(4)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}],
        "annotations": [
            entry(1, 0, 7, [10, 10, 40, 40], segmentation=[[10, 10, 50, 10, 50, 50, 10, 50]]),
            entry(2, 0, 8, [60, 10, 40, 60]),
            entry(3, 0, 8, [0, 0, 5, 5]),
            entry(4, 1, 7, [0, 0, 50, 50], segmentation={"counts": [1], "size": [1, 1]}, iscrowd=1),
            entry(5, 1, 7, [0, 0, 0, 50]),
            entry(6, 1, 9, [0, 0, 50, 50]),
            entry(7, 1, 7, [0, 0, 50, 50], segmentation=[[1, 2, 3]]),
            entry(8, 1, 7, [0, 0, 50, 50], segmentation=[[1, 2, 3, 4]]),
            entry(9, 5, 7, [0, 0, 50, 50]),
        ],
    }


def test_marks_end_to_end(annotated, tmp_path, run_tool):
    (tmp_path / "coco.json").write_text(json.dumps(annotated))
    target = tmp_path / "out"
    command = ["prepare_som.py", "mark", tmp_path / "coco.json", tmp_path / "pictures", target, "--most-marks", "2"]
    status, out, _ = run_tool(*command)
    assert (status, out.splitlines()[0]) == (0, f"{target}: 1 images marked")
    assert out.splitlines()[-1] == (
        "input 4 images with 9 objects = 1 marked with 2 + 3 with the other 7 in quarantine.jsonl"
    )
    reasons = {
        line["reason"]: (line["image"], line["object"])
        for line in map(json.loads, (target / "quarantine.jsonl").open())
    }
    assert reasons.pop("RLE mask: only boxes and polygons are drawn") == ("1.png", 4)
    assert reasons.pop("unknown category: 9") == ("1.png", 6)
    assert reasons.pop("not a polygon: 2 points, or one that is not finite") == ("1.png", 8)
    assert reasons.pop("too many objects: 1 smaller ones have no mark") == ("0.png", None)
    assert reasons.pop("unknown image: 5") == (None, 9)
    assert reasons.pop("no object to mark") == ("1.png", None)
    assert reasons.pop("cannot be read: No such file or directory") == ("3.png", None)
    rest = sorted(reason.split(":")[0] for reason in reasons)
    assert rest == ["empty box", "not a polygon", "not an image"]
    (prompt,) = map(json.loads, (target / "prompts.jsonl").open())
    assert (prompt["id"], prompt["image"], prompt["marked"], prompt["marks"]) == ("0", "0.png", "images/000000.png", 2)
    raw, marked = (
        np.asarray(Image.open(path)) for path in (tmp_path / "pictures" / "0.png", target / prompt["marked"])
    )
    assert tuple(marked[10, 45]) == COLOURS["red"]
    assert tuple(marked[70, 62]) == COLOURS["green"]
    assert (marked[:, 105:] == raw[:, 105:]).all()
    assert "Mark 2: a green circle on the cat.\n" in prompt["prompt"]
    assert "Mark 2: a green circle at [0.67,0.50] on the cat [0.50,0.25,0.83,0.75]." in prompt["description"]

    texts = [(0, " "), ("0", "Mark 3 and mark 1."), (0, "Mark 2 sits. "), ("0", "Mark 1."), (4, "Mark 1.")]
    answers = [*({"id": key, "answer": text} for key, text in texts), {"id": 0}]
    (tmp_path / "answers.jsonl").write_text("\n".join([*map(json.dumps, answers), "{", ""]))
    merge = ["prepare_som.py", "merge", target / "prompts.jsonl", tmp_path / "answers.jsonl", tmp_path / "som.jsonl"]
    status, out, _ = run_tool(*merge)
    assert status == 0
    assert out.splitlines() == [
        f"{tmp_path / 'som.jsonl'}: 1 conversations", "  left out: 1 (empty answer)", "  left out: 2 (no answer)",
        "  left out: 1 (second answer)", "  left out: 1 (unknown id)", "  left out: 1 (unknown mark)",
        "input 7 = 1 conversations + 6 in som.quarantine.jsonl",
    ]  # fmt: skip
    (line,) = map(json.loads, (tmp_path / "som.jsonl").open())
    question, answer = line["conversations"]
    assert line["image"] == "0.png"
    assert question == {"from": "human", "value": f"{prompt['description']}\n{prompt['question']}"}
    assert answer == {"from": "gpt", "value": "Mark 2 sits."}


def test_annotations_and_answers_that_cannot_be_read_say_why(annotated, tmp_path):
    coco, target = tmp_path / "coco.json", tmp_path / "out"
    for content, why in (
        ("{", r"coco\.json: not JSON: Expecting .*; give a \.json"),
        ("[]", "not as COCO's instances are; give images, annotations, categories"),
        ('{"images": [], "categories": []}', "not as COCO's instances are"),
        (
            json.dumps(annotated | {"annotations": []}),
            r"no object can be marked; .*1 left out \(not an image\); see .*quarantine",
        ),
    ):
        coco.write_text(content)
        with pytest.raises(DataError, match=why):
            write_marks(coco, tmp_path / "pictures", target)
    with pytest.raises(DataError, match=r"nowhere: cannot be read \(No such file or directory\); check its path"):
        write_marks(tmp_path / "nowhere", tmp_path, target)
    with pytest.raises(DataError, match=r"most_marks=25: not so many can be told apart; give 1 to 24"):
        write_marks(coco, tmp_path, target, most_marks=25)
    with pytest.raises(DataError, match=r"nowhere: cannot be read \(No such file or directory\); check its path"):
        merge_answers(tmp_path / "nowhere", tmp_path / "nowhere", target)
    with pytest.raises(
        DataError, match=r"coco.json: not all lines are prompts; make it by megatron-sphinx prepare som"
    ):
        merge_answers(coco, coco, target)
    prompt = {"id": "0", "image": "0.png", "marks": 1, "description": "d", "question": "q"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt))
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(
        DataError, match=r"no answer can be used; 1 left out \(missing answer\); give those to .*prompts.jsonl"
    ):
        merge_answers(tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", target)
