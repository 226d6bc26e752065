"""Tasks of instruction tuning: from annotations of a picture to a conversation about it.

A record is what one conversation is made of: a JSON object whose keys depend on the task (see TASKS), with `image`, the
path of the picture, and where there are boxes its `width` and `height`. Boxes in records are left, top, right, bottom
in pixels; in conversations they are text, in fractions of the padded square (see `boxes.py`).

A conversation is `{"image": path, "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}`,
without `image` where it is of text only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from string import ascii_uppercase
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import relative
from megatron_sphinx.prepare.boxes import clip_box, format_box, format_boxes, format_point, from_coco

PROMPTS = {
    # SPHINX, arXiv:2311.07575, Table 1; the lines of options are as in eval_mm/annotations/MMMU_val_single.json, the
    # place of the line of tokens is ours
    "choice": "{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
    "text_vqa": "{question}\nReference OCR token: {tokens}\nAnswer the question using a single word or phrase.",
    "detect": "Detect all objects shown in the image.",
    "detect_category": "detect all {name} shown in the image.",
    "pose": "Detect all people shown in the image.",
    "pose_person": "Detect the key points of the person in the region {box}.",
    "grounded_caption": "Describe the image concisely. Include the bounding box for each mentioned object.",
    "ocr": "Detect all texts and provide their bounding box coordinated.",  # as the paper writes it
    # LLaMA2-Accessory, accessory/eval_mm/annotations/annotation_config.json
    "vqa": "{question}\nAnswer the question using a single word or phrase.",
    "vqa_unanswerable": "{question} When the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    "locate": "Please provide the bounding box coordinate of the region this sentence describes: {phrase}.",
    # LLaMA2-Accessory, accessory/demos/multi_turn_mm_box.py
    "caption": "Provide a one-sentence caption for the provided image.",
    # SPHINX-X, arXiv:2402.05935; the answer is "This is a [CLASS]"
    "classify": "Classify the image.",
    # ours, and so are the answers to these
    "describe": "Please provide a short description of the region {box}.",
    "relation": "What is the relation between {subject} and {object}?",
}

# Source: accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory; the order is COCO's
KEY_POINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
_VISIBLE = 2  # of COCO's key points: 0 is not labelled, 1 is hidden

Record = Mapping[str, Any]
Conversation = dict[str, Any]
LeaveOut = Callable[[str], None]


def conversation(image: str | None, turns: Sequence[tuple[str, str]]) -> Conversation:
    """A conversation of questions and their answers, in the form of the released code.

    Source: accessory/data/conversation/dataset.py of LLaMA2-Accessory.
    """
    values = []
    for question, answer in turns:
        values += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": values} if image is None else {"image": image, "conversations": values}


def merge(conversations: Sequence[Conversation], turns: int) -> list[Conversation]:
    """Join conversations about the same picture to dialogs of several turns; those of text only stay as they are.

    Args:
        conversations: of any pictures, in any order; each dialog is where its first one was.
        turns: most questions of a dialog; a conversation that has more by itself is not cut.

    Source: SPHINX-X, arXiv:2402.05935: the data of all tasks are dialogs of several turns.
    """
    dialogs: list[Conversation] = []
    latest: dict[str, Conversation] = {}
    for one in conversations:
        values, dialog = one["conversations"], latest.get(one.get("image", ""))
        if dialog and len(dialog["conversations"]) + len(values) <= 2 * turns:
            dialog["conversations"] += values
            continue
        dialogs.append(one | {"conversations": [*values]})
        if "image" in one:
            latest[one["image"]] = dialogs[-1]
    return dialogs


# one builder a task: Raises DataError where a record lacks a key or holds what cannot be used


def vqa(record: Record, padding: str) -> Conversation:
    """A question with a short answer."""
    question = PROMPTS["vqa"].format(question=_text(record, "question"))
    return conversation(_image(record), [(question, _text(record, "answer"))])


def vqa_unanswerable(record: Record, padding: str) -> Conversation:
    """A question that the picture may not answer: then `answer` is null or unanswerable."""
    question = PROMPTS["vqa_unanswerable"].format(question=_text(record, "question"))
    answer = "Unanswerable" if record.get("answer", "") is None else _text(record, "answer")
    if answer.lower() == "unanswerable":
        answer = "Unanswerable"
    return conversation(_text(record, "image"), [(question, answer)])


def choice(record: Record, padding: str) -> Conversation:
    """A question with options, answered by a letter."""
    question, options, answer = _text(record, "question"), _texts(record, "options"), record.get("answer")
    if len(options) > len(ascii_uppercase):
        raise DataError(f"too many options: there are {len(options)}; give at most {len(ascii_uppercase)}")
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise DataError(f"no such option: answer {answer!r} is none of {len(options)}; count from 0")
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    question = PROMPTS["choice"].format(question=question, options=lines)
    return conversation(_image(record), [(question, ascii_uppercase[answer])])


def text_vqa(record: Record, padding: str) -> Conversation:
    """A question about text in the picture, with what an OCR program read; without that it is as any other."""
    if record.get("tokens") == []:
        return vqa(record, padding)
    tokens = ", ".join(_texts(record, "tokens"))
    question = PROMPTS["text_vqa"].format(question=_text(record, "question"), tokens=tokens)
    return conversation(_text(record, "image"), [(question, _text(record, "answer"))])


def caption(record: Record, padding: str) -> Conversation:
    """A caption of the whole picture."""
    return conversation(_text(record, "image"), [(PROMPTS["caption"], _text(record, "caption"))])


def grounded_caption(record: Record, padding: str) -> Conversation:
    """A caption with boxes behind its phrases, which are given in the order of the caption."""
    answer, end = _text(record, "caption"), 0
    for item in _items(record, "phrases"):
        phrase = _text(item, "phrase")
        start = answer.find(phrase, end)
        if start < 0:
            raise DataError(
                f"phrase not in the caption: {phrase!r} is not in {answer[end:]!r}; give phrases as they are in it"
            )
        boxes, place = format_boxes(_list(item, "boxes"), *_size(record), padding), start + len(phrase)
        answer, end = answer[:place] + boxes + answer[place:], place + len(boxes)
    return conversation(_text(record, "image"), [(PROMPTS["grounded_caption"], answer)])


def locate(record: Record, padding: str) -> Conversation:
    """From a description of a region to its box (REC)."""
    question = PROMPTS["locate"].format(phrase=_text(record, "phrase"))
    return conversation(_text(record, "image"), [(question, _box(record, record, padding))])


def describe(record: Record, padding: str) -> Conversation:
    """From the box of a region to a description (REG)."""
    question = PROMPTS["describe"].format(box=_box(record, record, padding))
    return conversation(_text(record, "image"), [(question, _text(record, "phrase"))])


def detect(record: Record, padding: str) -> Conversation:
    """All objects: each name, in the order in which they come, with its boxes."""
    boxes: dict[str, list[Any]] = {}
    for item in _items(record, "objects"):
        boxes.setdefault(_text(item, "name"), []).append(item.get("box", ()))
    size = _size(record)
    answer = " ".join(name + format_boxes(of_name, *size, padding) for name, of_name in boxes.items())
    return conversation(_text(record, "image"), [(PROMPTS["detect"], answer)])


def detect_category(record: Record, padding: str) -> Conversation:
    """All objects of one name."""
    name = _text(record, "name")
    answer = name + format_boxes(_list(record, "boxes"), *_size(record), padding)
    return conversation(_text(record, "image"), [(PROMPTS["detect_category"].format(name=name), answer)])


def pose(record: Record, padding: str) -> Conversation:
    """All people; then for each who has any the key points that are visible, which are in COCO's order."""
    people, size = _items(record, "people"), _size(record)
    boxes = format_boxes([person.get("box", ()) for person in people], *size, padding)
    turns = [(PROMPTS["pose"], f"person{boxes}")]
    for person in people:
        points = " ".join(name + format_point(point, *size, padding) for name, point in _visible(person))
        if points:
            turns.append((PROMPTS["pose_person"].format(box=_box(person, record, padding)), points))
    return conversation(_text(record, "image"), turns)


def ocr(record: Record, padding: str) -> Conversation:
    """All texts, or all parts of a page: what each reads, or is, with its box."""
    answer = " ".join(_text(item, "text") + _box(item, record, padding) for item in _items(record, "texts"))
    return conversation(_text(record, "image"), [(PROMPTS["ocr"], answer)])


def relation(record: Record, padding: str) -> Conversation:
    """How an object is related to another."""
    subject, other = _object(record, "subject", padding), _object(record, "object", padding)
    question = PROMPTS["relation"].format(subject=subject, object=other)
    return conversation(_text(record, "image"), [(question, _text(record, "relation"))])


def classify(record: Record, padding: str) -> Conversation:
    """The class of the picture."""
    return conversation(_text(record, "image"), [(PROMPTS["classify"], f"This is a {_text(record, 'class')}")])


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"no {key}: {value!r} is no text; give every annotation its {key}")
    return value.strip()


def _image(record: Record) -> str | None:
    return _text(record, "image") if "image" in record else None


def _list(record: Record, key: str) -> list[Any]:
    values = record.get(key)
    if not isinstance(values, list) or not values:
        raise DataError(f"no {key}: {values!r} is no list of any; give every annotation its {key}")
    return values


def _texts(record: Record, key: str) -> list[str]:
    return [_text({key: value}, key) for value in _list(record, key)]


def _items(record: Record, key: str) -> list[Record]:
    values = _list(record, key)
    if not all(isinstance(value, Mapping) for value in values):
        raise DataError(f"no {key}: {values!r} holds what is no JSON object; give each of {key} its keys")
    return values


def _size(record: Record) -> tuple[int, int]:
    """Width and height of a record's picture."""
    width, height = record.get("width"), record.get("height")
    if not all(isinstance(side, int) and side > 0 for side in (width, height)):
        raise DataError(f"no size of the picture: {width!r} x {height!r} is none; give width and height in pixels")
    return width, height  # type: ignore[return-value]


def _box(item: Record, record: Record, padding: str) -> str:
    """The box of a part of a record, as text."""
    return format_box(item.get("box", ()), *_size(record), padding)


def _object(record: Record, key: str, padding: str) -> str:
    """A named object of a record with its box, as text."""
    [item] = _items({key: [record.get(key)]}, key)
    return _text(item, "name") + _box(item, record, padding)


def _visible(person: Record) -> list[tuple[str, list[float]]]:
    """Names and places of a person's key points that are seen."""
    values = person.get("keypoints")
    if not isinstance(values, list) or len(values) != 3 * len(KEY_POINTS):
        raise DataError(f"no keypoints: {values!r} is not {len(KEY_POINTS)} times x, y, visibility; give them as COCO")
    if not all(isinstance(value, int | float) and isfinite(value) for value in values):
        raise DataError(f"keypoints that are no numbers: {values!r} holds something else; give finite numbers")
    return [(name, values[3 * n : 3 * n + 2]) for n, name in enumerate(KEY_POINTS) if values[3 * n + 2] == _VISIBLE]


# records from COCO's files


@dataclass(frozen=True)
class Coco:
    """What a file of COCO's form has.

    Attributes:
        pictures: `image`, `width` and `height` of each, by id.
        names: of the categories, by id.
        annotations: in the order of the file.
    """

    pictures: Mapping[Any, Record]
    names: Mapping[Any, Any]
    annotations: Sequence[Record]


def _read_coco(content: Record) -> Coco:
    lists = {key: content.get(key, []) for key in ("images", "annotations", "categories")}
    for key, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
            raise DataError(f"{key}: no list of JSON objects; give a file of COCO's form")
    pictures = {
        _id(entry, "id"): {"image": entry.get("file_name"), "width": entry.get("width"), "height": entry.get("height")}
        for entry in lists["images"]
        if "id" in entry
    }
    return Coco(pictures, {_id(entry, "id"): entry.get("name") for entry in lists["categories"]}, lists["annotations"])


def _id(entry: Record, key: str) -> int | str | None:
    value = entry.get(key)
    return value if isinstance(value, int | str) else None


def _with_pictures(coco: Coco, leave_out: LeaveOut) -> Iterator[tuple[Record, Record]]:
    """Each annotation with its picture."""
    for annotation in coco.annotations:
        picture = coco.pictures.get(_id(annotation, "image_id"))
        if picture is None:
            leave_out("unknown image id")
        elif not isinstance(picture["image"], str):
            leave_out("image without file_name")
        elif annotation.get("iscrowd"):
            leave_out("crowd")
        else:
            yield picture, annotation


def _with_boxes(coco: Coco, leave_out: LeaveOut) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Each annotation with its picture, and its box as records have it."""
    for picture, annotation in _with_pictures(coco, leave_out):
        try:
            box = clip_box(from_coco(annotation.get("bbox", ())), *_size(picture))
        except DataError as error:
            leave_out(str(error))
        else:
            yield picture, {**annotation, "box": box}


def _grouped(found: Iterable[tuple[Record, Record]], key: str) -> Iterator[Record]:
    """Pictures, in the order in which they come, each with a list of all that was found in it."""
    groups: dict[Any, tuple[Record, list[Record]]] = {}
    for picture, item in found:
        groups.setdefault(picture["image"], (picture, []))[1].append(item)
    for picture, items in groups.values():
        yield {**picture, key: items}


def _coco_objects(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    def named() -> Iterator[tuple[Record, Record]]:
        for picture, item in _with_boxes(coco, leave_out):
            name = coco.names.get(_id(item, "category_id"))
            if isinstance(name, str) and name.strip():
                yield picture, {"name": name, "box": item["box"]}
            else:
                leave_out("unknown category id")

    return _grouped(named(), "objects")


def _coco_categories(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    for picture in _coco_objects(coco, leave_out):
        boxes: dict[str, list[Any]] = {}
        for item in picture["objects"]:
            boxes.setdefault(item["name"], []).append(item["box"])
        for name, of_name in boxes.items():
            yield {**picture, "name": name, "boxes": of_name}


def _coco_people(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    def posed() -> Iterator[tuple[Record, Record]]:
        for picture, person in _with_boxes(coco, leave_out):
            try:
                _visible(person)
            except DataError as error:
                leave_out(str(error))
            else:
                yield picture, person

    return _grouped(posed(), "people")


def _coco_phrases(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    for picture, item in _with_boxes(coco, leave_out):
        phrases = item.get("phrases")
        if not isinstance(phrases, list) or not phrases:
            leave_out("no phrases")
            continue
        for phrase in phrases:
            yield {**picture, "phrase": phrase, "box": item["box"]}


def _coco_captions(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    for picture, annotation in _with_pictures(coco, leave_out):
        yield {**picture, "caption": annotation.get("caption")}


# all tasks


@dataclass(frozen=True)
class Task:
    """How conversations of a task are made.

    Attributes:
        build: makes one of a record and the padding of pictures.
        keys: of a record.
        coco: makes records of a file of COCO's form, where the task has one.
    """

    build: Callable[[Record, str], Conversation]
    keys: str
    coco: Callable[[Coco, LeaveOut], Iterator[Record]] | None = None


_BOXED = "image, width, height"
TASKS = {
    "vqa": Task(vqa, "question, answer; image, unless it is of text only"),
    "vqa_unanswerable": Task(vqa_unanswerable, "image, question, answer (null: it cannot be answered)"),
    "choice": Task(choice, "question, options, answer (counted from 0); image, unless it is of text only"),
    "text_vqa": Task(text_vqa, "image, question, answer, tokens (a list of what was read; it may be empty)"),
    "caption": Task(caption, "image, caption", _coco_captions),
    "grounded_caption": Task(grounded_caption, f"{_BOXED}, caption, phrases (in its order, each: phrase, boxes)"),
    "locate": Task(locate, f"{_BOXED}, phrase, box", _coco_phrases),
    "describe": Task(describe, f"{_BOXED}, phrase, box", _coco_phrases),
    "detect": Task(detect, f"{_BOXED}, objects (each: name, box)", _coco_objects),
    "detect_category": Task(detect_category, f"{_BOXED}, name, boxes", _coco_categories),
    "pose": Task(pose, f"{_BOXED}, people (each: box, keypoints as COCO has them)", _coco_people),
    "ocr": Task(ocr, f"{_BOXED}, texts (each: text, box); of a page's layout text is what the part is"),
    "relation": Task(relation, f"{_BOXED}, subject and object (each: name, box), relation"),
    "classify": Task(classify, "image, class"),
}


def build(task: str, content: object, padding: str, leave_out: LeaveOut) -> Iterator[Conversation]:
    """The conversations of a file, in its order; paths of images are normalised, and none leads out of their folder.

    Args:
        task: a name in TASKS.
        content: of the file: a list of records, or an object of COCO's form.
        padding: where pictures are in their squares, `centre` or `corner`.
        leave_out: told the reason for each annotation that cannot be used.

    Raises:
        DataError: the content is of neither form.
    """
    records: Iterable[Any]
    if isinstance(content, list):
        records = content
    elif not isinstance(content, Mapping) or not {"images", "annotations"} <= content.keys():
        raise DataError("annotations: neither a list nor of COCO's form; give images and annotations, or JSON lines")
    elif (coco := TASKS[task].coco) is None:
        raise DataError(f"annotations: COCO's form has nothing for {task}; give a list of objects")
    else:
        records = coco(_read_coco(content), leave_out)
    for record in records:
        if not isinstance(record, Mapping):
            leave_out("no JSON object")
            continue
        try:
            made = TASKS[task].build(record, padding)
            if "image" in made:
                made["image"] = relative(made["image"])
        except DataError as error:
            leave_out(str(error))
        else:
            yield made
