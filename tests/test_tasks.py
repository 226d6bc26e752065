"""Boxes as text, the conversation of each task, and the tool that makes them from files of annotations."""

import json
import random
import re

import pytest

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare import tasks
from megatron_sphinx.prepare.boxes import (
    clip_box,
    format_box,
    format_boxes,
    format_point,
    from_coco,
    parse_boxes,
    to_pixels,
)
from megatron_sphinx.prepare.tasks import KEY_POINTS, TASKS, conversation, merge

# boxes


@pytest.mark.parametrize("padding", ["centre", "corner"])
@pytest.mark.parametrize("seed", range(20))
def test_boxes_come_back_to_half_a_hundredth_of_the_square(seed, padding):
    rng = random.Random(seed)
    for _ in range(100):
        side, ratio = rng.randint(20, 4000), 20 ** rng.uniform(-1, 1)
        width, height = (side, max(round(side / ratio), 1)) if ratio > 1 else (max(round(side * ratio), 1), side)
        boxes = []
        for _ in range(rng.randint(1, 4)):  # some reach beyond the picture
            xs = sorted(rng.uniform(-0.2, 1.2) * width for _ in range(2))
            ys = sorted(rng.uniform(-0.2, 1.2) * height for _ in range(2))
            if xs[0] < width and xs[1] > 0 and ys[0] < height and ys[1] > 0:
                boxes.append((xs[0], ys[0], xs[1], ys[1]))
        if not boxes:
            continue
        text = format_boxes(boxes, width, height, padding)
        assert re.fullmatch(r"\[[01]\.\d\d(?:[,;][01]\.\d\d)*\]", text)
        assert text == "[" + ";".join(format_box(box, width, height, padding)[1:-1] for box in boxes) + "]"
        found = [to_pixels(box, width, height, padding) for box in parse_boxes(text)]
        for box, wanted in zip(found, boxes, strict=True):
            assert box == pytest.approx(clip_box(wanted, width, height), abs=0.005 * side + 1e-6)
            assert 0 <= box[0] <= box[2] <= width
            assert 0 <= box[1] <= box[3] <= height


@pytest.mark.parametrize(
    ("size", "padding", "box", "point"),
    [
        ((100, 50), "centre", "[0.10,0.45,0.50,0.75]", "[0.10,0.45]"),
        ((100, 50), "corner", "[0.10,0.20,0.50,0.50]", "[0.10,0.20]"),
        ((50, 100), "centre", "[0.35,0.20,0.75,0.60]", "[0.35,0.20]"),
        ((51, 100), "centre", "[0.34,0.20,0.74,0.60]", "[0.34,0.20]"),  # 24 pixels, as the pixels are padded
        ((100, 100), "centre", "[0.10,0.20,0.50,0.60]", "[0.10,0.20]"),
    ],
)
def test_boxes_are_in_the_frame_of_the_square(size, padding, box, point):
    assert format_box((10, 20, 50, 60), *size, padding) == box
    assert format_point((10, 20), *size, padding) == point


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", []),
        ("no [box], [] or [0.1,0.2]", []),
        ("nose[0.42,0.15] and [0.1,0.2,0.3]", []),
        ("[0.1,0.2,0.3,0.4,0.5] [a,b,c,d] [nan,0,1,1] [0.1;0.2;0.3;0.4]", []),
        ("[0.1,0.2,0.3,0.4;0.5,0.6]", []),
        ("[0.1,0.2,0.3,0.4;]", []),
        ("[0.1,0.2,0.3,0.4", []),
        ("[0.1,0.2,0.3,0.4]", [(0.1, 0.2, 0.3, 0.4)]),
        ("dogs[0.76,0.50,0.84,0.57;0.49,0.55,0.57,0.62].", [(0.76, 0.5, 0.84, 0.57), (0.49, 0.55, 0.57, 0.62)]),
        ("[[ 0, .5,\n1.0, 1. ]] then [-1,0,+2,3]", [(0, 0.5, 1, 1), (-1, 0, 2, 3)]),
        ("<p>a cat</p> [0.1,0.2,0.3,0.4] [x] [0.5,0.6,0.7,0.8]", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
    ],
)
def test_only_whole_brackets_are_boxes(text, boxes):
    assert parse_boxes(text) == boxes


def test_what_a_model_wrote_is_cut_to_the_picture():
    assert to_pixels((-1, 0, 2, 3), 100, 50, "centre") == (0, 0, 100, 50)
    assert to_pixels(parse_boxes(f"[0,0,{'9' * 300},1]")[0], 100, 50, "corner") == (0, 0, 100, 50)
    assert format_point((-5, 60), 100, 50, "centre") == "[0.00,0.75]"
    assert from_coco([1, 2, 3, 4]) == (1, 2, 4, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: format_box((5, 5, 5, 9), 10, 10, "centre"), r"empty box: \(5, 5, 5, 9\) has no area; give left < ri"),
        (lambda: format_box((5, 9, 6, 5), 10, 10, "centre"), r"empty box: "),
        (lambda: format_box((10, 0, 20, 9), 10, 10, "centre"), r"box outside the picture: .* is not in 10 x 10 pix"),
        (lambda: format_box((0, 0, float("nan"), 9), 10, 10, "centre"), r"not a box: .* is not 4 finite numbers; give"),
        (lambda: format_box((0, 0, float("inf"), 9), 10, 10, "centre"), r"not a box: "),
        (lambda: format_box((0, 0, 9), 10, 10, "centre"), r"not a box: "),
        (lambda: format_box(None, 10, 10, "centre"), r"not a box: None"),
        (lambda: from_coco(["1", 2, 3, 4]), r"not a box: "),
        (lambda: to_pixels((0, 0, float("nan"), 9), 10, 10, "centre"), r"not a box: "),
        (lambda: format_point((0, float("nan")), 10, 10, "centre"), r"not a point: .* is not 2 finite numbers"),
        (lambda: format_boxes([], 10, 10, "centre"), r"no boxes: there is nothing to write; give one or more"),
        (lambda: format_box((0, 0, 1, 1), 10, 10, "left"), r"padding=left: must be centre or corner; take what"),
    ],
)
def test_what_is_no_box_is_refused(make, message):
    with pytest.raises(DataError, match=f"^{message}"):
        make()


# tasks

PICTURE = {"image": "a.jpg", "width": 100, "height": 50}  # centred: 25 pixels from the top
BOX, OTHER = [10, 20, 50, 45], [0, 0, 100, 50]
TEXT, OTHER_TEXT = "[0.10,0.45,0.50,0.70]", "[0.00,0.25,1.00,0.75]"
SHORT = "Answer the question using a single word or phrase."


def key_points(**places: tuple[int, int, int]) -> list[int]:
    return [number for name in KEY_POINTS for number in places.get(name, (0, 0, 0))]


EXAMPLES = [
    ("vqa", {"image": "a.jpg", "question": "What is it? ", "answer": "dog"}, [f"What is it?\n{SHORT}", "dog"]),
    ("vqa", {"question": "2 + {x}?", "answer": "4"}, [f"2 + {{x}}?\n{SHORT}", "4"]),
    (
        "vqa_unanswerable",
        {"image": "a.jpg", "question": "What is it?", "answer": None},
        [
            f"What is it? When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}",
            "Unanswerable",
        ],
    ),
    (
        "vqa_unanswerable",
        {"image": "a.jpg", "question": "?", "answer": "unanswerable"},
        [f"? When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}", "Unanswerable"],
    ),
    (
        "choice",
        {"question": "Which?", "options": ["cat", "dog"], "answer": 1},
        ["Which?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.", "B"],
    ),
    (
        "text_vqa",
        {"image": "a.jpg", "question": "What sign?", "answer": "stop", "tokens": ["STOP", "ave"]},
        [f"What sign?\nReference OCR token: STOP, ave\n{SHORT}", "stop"],
    ),
    (
        "text_vqa",
        {"image": "a.jpg", "question": "What sign?", "answer": "stop", "tokens": []},
        [f"What sign?\n{SHORT}", "stop"],
    ),
    (
        "caption",
        {"image": "a.jpg", "caption": "A dog."},
        ["Provide a one-sentence caption for the provided image.", "A dog."],
    ),
    (
        "grounded_caption",
        {
            **PICTURE,
            "caption": "A dog and a dog.",
            "phrases": [{"phrase": "dog", "boxes": [BOX]}, {"phrase": "a dog", "boxes": [BOX, OTHER]}],
        },
        [
            "Describe the image concisely. Include the bounding box for each mentioned object.",
            f"A dog{TEXT} and a dog{TEXT[:-1]};{OTHER_TEXT[1:]}.",
        ],
    ),
    (
        "locate",
        {**PICTURE, "phrase": "left dog", "box": BOX},
        ["Please provide the bounding box coordinate of the region this sentence describes: left dog.", TEXT],
    ),
    (
        "describe",
        {**PICTURE, "phrase": "left dog", "box": BOX},
        [f"Please provide a short description of the region {TEXT}.", "left dog"],
    ),
    (
        "detect",
        {
            **PICTURE,
            "objects": [{"name": name, "box": box} for name, box in zip("dcd", [BOX, BOX, OTHER], strict=True)],
        },
        ["Detect all objects shown in the image.", f"d{TEXT[:-1]};{OTHER_TEXT[1:]} c{TEXT}"],
    ),
    (
        "detect_category",
        {**PICTURE, "name": "dog", "boxes": [OTHER, BOX]},
        ["detect all dog shown in the image.", f"dog{OTHER_TEXT[:-1]};{TEXT[1:]}"],
    ),
    (
        "pose",
        {
            **PICTURE,
            "people": [
                {"box": BOX, "keypoints": key_points(nose=(20, 25, 2), left_eye=(9, 9, 1), right_ankle=(40, 40, 2))},
                {"box": OTHER, "keypoints": key_points()},
                {"box": OTHER, "keypoints": key_points(left_ear=(0, 0, 2))},
            ],
        },
        [
            "Detect all people shown in the image.",
            f"person{TEXT[:-1]};{OTHER_TEXT[1:-1]};{OTHER_TEXT[1:]}",
            f"Detect the key points of the person in the region {TEXT}.",
            "nose[0.20,0.50] right_ankle[0.40,0.65]",
            f"Detect the key points of the person in the region {OTHER_TEXT}.",
            "left_ear[0.00,0.25]",
        ],
    ),
    (
        "ocr",
        {**PICTURE, "texts": [{"text": "STOP", "box": BOX}, {"text": "Main St", "box": OTHER}]},
        ["Detect all texts and provide their bounding box coordinated.", f"STOP{TEXT} Main St{OTHER_TEXT}"],
    ),
    (
        "relation",
        {
            **PICTURE,
            "subject": {"name": "boy", "box": BOX},
            "object": {"name": "horse", "box": OTHER},
            "relation": "on",
        },
        [f"What is the relation between boy{TEXT} and horse{OTHER_TEXT}?", "on"],
    ),
    ("classify", {"image": "a.jpg", "class": "daisy"}, ["Classify the image.", "This is a daisy"]),
]


def test_every_task_has_an_example():
    assert {task for task, _, _ in EXAMPLES} == set(TASKS)


@pytest.mark.parametrize(("task", "record", "values"), EXAMPLES)
def test_the_words_of_each_task(task, record, values):
    made = TASKS[task].build(record, "centre")
    assert [turn["value"] for turn in made.pop("conversations")] == values
    assert made == ({"image": "a.jpg"} if "image" in record else {})


def test_builders_pad_as_they_are_told():
    made = TASKS["locate"].build({**PICTURE, "phrase": "dog", "box": BOX}, "corner")
    assert made["conversations"][1] == {"from": "gpt", "value": "[0.10,0.20,0.50,0.45]"}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("vqa", {"answer": 3}, "no answer: 3 is no text; give every annotation its answer"),
        ("vqa", {"image": None}, "no image: None"),
        ("caption", {"caption": " "}, "no caption: ' '"),
        ("vqa_unanswerable", {"answer": ""}, "no answer: ''"),
        ("choice", {"answer": 2}, "no such option: answer 2 is none of 2; count from 0"),
        ("choice", {"answer": "B"}, "no such option: "),
        ("choice", {"options": ["x"] * 27}, "too many options: there are 27; give at most 26"),
        ("choice", {"options": ["x", 1]}, "no options: 1 is no text"),
        ("text_vqa", {"tokens": "STOP"}, "no tokens: 'STOP' is no list of any; give every annotation its tokens"),
        (
            "grounded_caption",
            {"caption": "A cat."},
            "phrase not in the caption: 'dog' is not in 'A cat.'; give phrases",
        ),
        ("grounded_caption", {"phrases": ["dog"]}, r"no phrases: \['dog'\] holds what is no JSON object; give each of"),
        ("locate", {"box": [5, 5, 5, 9]}, "empty box: "),
        ("locate", {"box": None}, "not a box: None"),
        ("locate", {"width": "100"}, "no size of the picture: '100' x 50 is none; give width and height in pixels"),
        ("locate", {"height": 0}, "no size of the picture: 100 x 0"),
        ("locate", {"width": -100, "height": -50}, "no size of the picture: -100 x -50"),
        ("detect", {"objects": []}, r"no objects: \[\] is no list of any"),
        ("detect", {"objects": [{"name": "dog"}]}, r"not a box: \(\)"),
        ("pose", {"people": [{"box": BOX, "keypoints": [1, 2, 2]}]}, r"no keypoints: .* is not 17 times x, y, visib"),
        ("pose", {"people": [{"box": BOX, "keypoints": ["1"] * 51}]}, "keypoints that are no numbers: .* give finite"),
        ("relation", {"subject": None}, r"no subject: \[None\] holds what is no JSON object"),
    ],
)
def test_records_that_cannot_be_used_are_refused(task, change, message):
    record = next(record for name, record, _ in EXAMPLES if name == task)
    with pytest.raises(DataError, match=f"^{message}"):
        TASKS[task].build(record | change, "centre")


def test_dialogs_join_what_is_about_the_same_picture():
    made = [conversation(image, [(f"q{n}", f"a{n}")]) for n, image in enumerate(["a", "b", None, "a", "a", None, "b"])]
    made.append(conversation("b", [("x", "y")] * 3))  # longer than a dialog: not cut
    joined = merge(made, 2)
    said = [(one.get("image"), [turn["value"] for turn in one["conversations"]]) for one in joined]
    assert said == [
        ("a", ["q0", "a0", "q3", "a3"]),
        ("b", ["q1", "a1", "q6", "a6"]),
        (None, ["q2", "a2"]),
        ("a", ["q4", "a4"]),
        (None, ["q5", "a5"]),
        ("b", ["x", "y"] * 3),
    ]
    assert merge(made, 1) == made
    assert len(made[0]["conversations"]) == 2  # what was given is as it was


# the tool

COCO = {
    "images": [
        {"id": 1, "file_name": "one.jpg", "width": 100, "height": 50},
        {"id": 2, "file_name": "two.jpg", "width": 50, "height": 100},
        {"id": 3, "width": 50, "height": 100},
        {"id": 4, "file_name": "four.jpg"},
        {"file_name": "five.jpg", "width": 50, "height": 100},
    ],
    "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "traffic light"}],
}
ONE = [10, 20, 40, 25]  # BOX, as COCO has it
INSTANCES = [
    {"image_id": 2, "category_id": 7, "bbox": [0, 0, 50, 50], "phrases": ["dark dog", "dog above"]},
    {"image_id": 1, "category_id": 9, "bbox": ONE, "phrases": ["a light"], "iscrowd": 0},
    {"image_id": 1, "category_id": 7, "bbox": ONE},
    {"image_id": 1, "category_id": 9, "bbox": [0, 0, 100, 50]},
    {"image_id": 1, "category_id": 7, "bbox": ONE, "iscrowd": 1},
    {"image_id": 1, "category_id": 7, "bbox": [5, 5, 0, 9]},
    {"image_id": 1, "category_id": 7, "bbox": [200, 5, 5, 9]},
    {"image_id": 1, "category_id": 7},
    {"image_id": 5, "category_id": 7, "bbox": ONE},
    {"image_id": [1], "category_id": 7, "bbox": ONE},
    {"category_id": 7, "bbox": ONE},
    {"image_id": 3, "category_id": 7, "bbox": ONE},
    {"image_id": 4, "category_id": 7, "bbox": ONE},
]
UNUSABLE = {
    "crowd": 1,
    "empty box": 1,
    "box outside the picture": 1,
    "not a box": 1,
    "unknown image id": 3,
    "image without file_name": 1,
    "no size of the picture": 1,
}
TWO = "[0.25,0.00,0.75,0.50]"  # of the first instance


@pytest.fixture
def build(tmp_path, run_tool):
    """`build(task, content, *options)` runs the tool on a file; its status, what it printed, and what it wrote."""

    def run(task: str, content: object, *options: str, name: str = "x.json") -> tuple[int, str, list[dict]]:
        source, target = tmp_path / name, tmp_path / "made" / "x.jsonl"
        source.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        status, out, error = run_tool("build_conversations.py", task, source, target, *options)
        made = target.read_text().splitlines() if target.is_file() else []
        assert not list(tmp_path.rglob("*.partial"))
        return status, out + error, [json.loads(line) for line in made]

    return run


def said(conversations: list[dict]) -> list[tuple[str | None, list[str]]]:
    return [(one.get("image"), [turn["value"] for turn in one["conversations"]]) for one in conversations]


def left_out(printed: str) -> dict[str, int]:
    return {reason: int(count) for count, reason in re.findall(r"left out: (\d+) \((.*)\)\n", printed)}


def test_coco_instances(build):
    more = {"image_id": 1, "category_id": 8, "bbox": ONE}
    content = COCO | {"annotations": [*INSTANCES, more]}
    status, printed, made = build("detect", content, "--images", "coco/train")
    lights, dogs = f"traffic light{TEXT[:-1]};{OTHER_TEXT[1:]}", f"dog{TEXT}"
    assert said(made) == [
        ("coco/train/two.jpg", ["Detect all objects shown in the image.", f"dog{TWO}"]),
        ("coco/train/one.jpg", ["Detect all objects shown in the image.", f"{lights} {dogs}"]),
    ]
    assert (status, left_out(printed)) == (0, UNUSABLE | {"unknown category id": 1})
    assert re.match(r".*x\.jsonl: 2 conversations, 2 questions\n", printed)
    _, printed, made = build("detect_category", content, "--padding", "corner", "--turns", "3")
    assert said(made) == [
        ("two.jpg", ["detect all dog shown in the image.", "dog[0.00,0.00,0.50,0.50]"]),
        (
            "one.jpg",
            [
                "detect all traffic light shown in the image.",
                "traffic light[0.10,0.20,0.50,0.45;0.00,0.00,1.00,0.50]",
                "detect all dog shown in the image.",
                "dog[0.10,0.20,0.50,0.45]",
            ],
        ),
    ]
    assert re.match(r".*x\.jsonl: 2 conversations, 3 questions\n", printed)


@pytest.mark.parametrize("task", ["locate", "describe"])
def test_coco_phrases(build, task):
    _, printed, made = build(task, COCO | {"annotations": INSTANCES})
    found = [("two.jpg", "dark dog", TWO), ("two.jpg", "dog above", TWO), ("one.jpg", "a light", TEXT)]
    prompt = tasks.PROMPTS[task]
    for (image, (question, answer)), (wanted, phrase, box) in zip(said(made), found, strict=True):
        assert image == wanted
        assert question == (prompt.format(phrase=phrase) if task == "locate" else prompt.format(box=box))
        assert answer == (box if task == "locate" else phrase)
    assert left_out(printed) == UNUSABLE | {"no phrases": 2}


def test_coco_people(build):
    people = [
        {"image_id": 1, "bbox": ONE, "keypoints": key_points(nose=(20, 25, 2), left_eye=(21, 25, 1))},
        {"image_id": 1, "bbox": ONE, "keypoints": [1, 2]},
        {"image_id": 2, "bbox": [0, 0, 50, 50], "keypoints": key_points(), "num_keypoints": 0},
    ]
    _, printed, made = build("pose", COCO | {"annotations": people})
    asked = f"Detect the key points of the person in the region {TEXT}."
    assert said(made) == [
        ("one.jpg", ["Detect all people shown in the image.", f"person{TEXT}", asked, "nose[0.20,0.50]"]),
        ("two.jpg", ["Detect all people shown in the image.", f"person{TWO}"]),
    ]
    assert left_out(printed) == {"no keypoints": 1}


def test_coco_captions(build):
    captions = [
        {"image_id": image, "caption": text} for image, text in ((4, "A é\ndog. "), (1, ""), (4, "B"), (9, "C"))
    ]
    _, printed, made = build("caption", COCO | {"annotations": captions}, "--turns", "5")
    prompt = tasks.PROMPTS["caption"]
    assert said(made) == [("four.jpg", [prompt, "A é\ndog.", prompt, "B"])]
    assert left_out(printed) == {"no caption": 1, "unknown image id": 1}


def test_lists_and_lines_of_records(build):
    records = [
        {"image": "a.jpg", "question": "?", "answer": "x"},
        {"question": "?", "answer": "y"},
        {"question": "?"},
        [1],
    ]
    status, printed, made = build("vqa", records, "--images", "f")
    assert said(made) == [("f/a.jpg", [f"?\n{SHORT}", "x"]), (None, [f"?\n{SHORT}", "y"])]
    assert (status, left_out(printed)) == (0, {"no answer": 1, "no JSON object": 1})
    assert re.match(r".*x\.jsonl: 2 conversations, 2 questions, 1 of text only\n", printed)
    lines = b"\n".join(json.dumps(record).encode() for record in records) + b"\n\n"
    assert build("vqa", lines, "--images", "f", name="y.jsonl")[2] == made


@pytest.mark.parametrize(
    ("task", "content", "name", "message"),
    [
        (
            "vqa",
            b"{",
            "x.json",
            r"x\.json: not JSON \(Expecting .*\); give a \.json, or a \.jsonl with one object a line",
        ),
        ("vqa", b"\xff", "x.json", r"x\.json: not JSON \('utf-8' codec"),
        ("vqa", b'{"a": 1}\n[\n', "x.jsonl", r"x\.jsonl line 2: not JSON \("),
        (
            "vqa",
            3,
            "x.json",
            r"x\.json: annotations: neither a list nor of COCO's form; give images and annotations, or",
        ),
        ("vqa", {"images": []}, "x.json", r"annotations: neither a list"),
        (
            "vqa",
            COCO | {"annotations": []},
            "x.json",
            r"annotations: COCO's form has nothing for vqa; give a list of obj",
        ),
        (
            "detect",
            {"images": [1], "annotations": []},
            "x.json",
            r"images: no list of JSON objects; give a file of COCO",
        ),
        ("vqa", [], "x.json", r"x\.json: holds no annotation that can be used for vqa\n"),
        ("vqa", [{}, 1, 2], "x.json", r"for vqa; 2 left out \(no JSON object\); 1 left out \(no question\)\n"),
        ("detect", COCO | {"annotations": INSTANCES[4:5]}, "x.json", r"for detect; 1 left out \(crowd\)\n"),
    ],
)
def test_wrong_files_are_one_line(build, task, content, name, message):
    status, printed, made = build(task, content, name=name)
    assert (status, made) == (2, [])
    assert re.fullmatch(rf"build_conversations\.py: .*{message}.*", printed, re.DOTALL)
    assert printed.count("\n") == 1


def test_files_that_cannot_be_opened_are_one_line(tmp_path, run_tool, build):
    (tmp_path / "made" / "x.jsonl").mkdir(parents=True)
    status, printed, _ = build("classify", [{"image": "a.jpg", "class": "daisy"}])
    assert (status, printed.count("\n")) == (2, 1)
    assert re.search(r"x\.jsonl: cannot be written \(Is a directory\); give another TARGET", printed)
    status, _, error = run_tool("build_conversations.py", "vqa", tmp_path / "no.json", tmp_path / "t")
    assert status == 2
    assert "no.json: cannot be read (No such file or directory); give a file of annotations\n" in error
