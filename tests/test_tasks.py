"""Tasks of instruction tuning: the words of each, and what records that cannot be used get."""

import pytest

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.records import KEY_POINTS
from megatron_sphinx.prepare.tasks import TASKS, conversation, merge

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
        [f"Please provide a short description for this region : {TEXT}", "left dog"],
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
        [f"What is the relationship between the object in {TEXT} and the object in {OTHER_TEXT}?", "on"],
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
        (
            "locate",
            {"width": "100"},
            "no size of the picture: '100' x 50 is none; give width and height in whole pixels",
        ),
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
