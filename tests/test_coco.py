"""Conversations from files of COCO's form and from lists of records, by the tool."""

import json
import re

import pytest
from test_tasks import OTHER_TEXT, SHORT, TEXT, key_points

from megatron_sphinx.prepare import tasks

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
    "images without id": 1,
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
    assert left_out(printed) == {"images without id": 1, "no keypoints": 1}


def test_coco_captions(build):
    captions = [
        {"image_id": image, "caption": text} for image, text in ((4, "A é\ndog. "), (1, ""), (4, "B"), (9, "C"))
    ]
    _, printed, made = build("caption", COCO | {"annotations": captions}, "--turns", "5")
    prompt = tasks.PROMPTS["caption"]
    assert said(made) == [("four.jpg", [prompt, "A é\ndog.", prompt, "B"])]
    assert left_out(printed) == {"images without id": 1, "no caption": 1, "unknown image id": 1}


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
            r"x\.json: not JSON: Expecting .*; give a \.json, or a \.jsonl with one object a line",
        ),
        ("vqa", b"\xff", "x.json", r"x\.json: not UTF-8: invalid start byte at byte 0"),
        (
            "vqa",
            b'{"a": 1}\n[\n',
            "x.jsonl",
            r"vqa; 1 left out \(no question\); 1 left out \(not JSON\); the first: no q",
        ),
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
            {"images": 1, "annotations": []},
            "x.json",
            r"images: no list of JSON objects; give a file of COCO",
        ),
        ("vqa", [], "x.json", r"x\.json: holds no annotation that can be used for vqa\n"),
        (
            "vqa",
            [{}, 1, 2],
            "x.json",
            r"for vqa; 2 left out \(no JSON object\); 1 left out \(no question\); the first: no question: .*\n",
        ),
        (
            "detect",
            COCO | {"annotations": INSTANCES[4:5]},
            "x.json",
            r"for detect; 1 left out \(crowd\); 1 left out .*\n",
        ),
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
    assert "no.json: cannot be read (No such file or directory); check its path\n" in error
