"""Tasks of instruction tuning: from annotations of a picture to a conversation about it.

A record is what one conversation is made of: a JSON object whose keys depend on the task (see TASKS and `records.py`).
Boxes in records are left, top, right, bottom in pixels; in conversations they are text, in fractions of the padded
square (see `boxes.py`).

A conversation is `{"image": path, "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}`,
without `image` where it is of text only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import relative
from megatron_sphinx.prepare import coco
from megatron_sphinx.prepare.boxes import format_boxes, format_point
from megatron_sphinx.prepare.coco import Coco, LeaveOut
from megatron_sphinx.prepare.json_files import Item
from megatron_sphinx.prepare.records import (
    Record,
    box_text,
    image_of,
    items_of,
    list_of,
    object_of,
    picture_size,
    text_of,
    texts_of,
    visible_points,
)

PROMPTS = {
    # SPHINX, arXiv:2311.07575, Table 1, or the section named; the lines of options are as in
    # eval_mm/annotations/MMMU_val_single.json, the place of the line of tokens is ours
    "choice": "{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
    "text_vqa": "{question}\nReference OCR token: {tokens}\nAnswer the question using a single word or phrase.",
    "detect": "Detect all objects shown in the image.",
    "detect_category": "detect all {name} shown in the image.",
    "pose": "Detect all people shown in the image.",
    "pose_person": "Detect the key points of the person in the region {box}.",
    "grounded_caption": "Describe the image concisely. Include the bounding box for each mentioned object.",
    "ocr": "Detect all texts and provide their bounding box coordinated.",  # as the paper writes it
    "relation": "What is the relationship between the object in {subject} and the object in {object}?",
    "describe": "Please provide a short description for this region : {box}",  # section 4.3; spaces are the paper's
    "classify": "Classify the image.",  # section 3.3.2
    # LLaMA2-Accessory, accessory/eval_mm/annotations/annotation_config.json
    "vqa": "{question}\nAnswer the question using a single word or phrase.",
    "vqa_unanswerable": "{question} When the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    "locate": "Please provide the bounding box coordinate of the region this sentence describes: {phrase}.",
    # LLaMA2-Accessory, accessory/demos/multi_turn_mm_box.py
    "caption": "Provide a one-sentence caption for the provided image.",
    "detailed_caption": "Generate a detailed description about the image.",
}

CLASS_SENTENCE = "This is a {choice}"  # the answer to `classify`, in the same section

ConversationJson = dict[str, Any]


def conversation(image: str | None, turns: Sequence[tuple[str, str]]) -> ConversationJson:
    """Return a conversation of questions and their answers, in the form of the released code.

    Args:
        image: path of the picture that it is about; None where it is of text only.
        turns: (question, answer).

    Source: accessory/data/conversation/dataset.py of LLaMA2-Accessory.
    """
    values = []
    for question, answer in turns:
        values += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": values} if image is None else {"image": image, "conversations": values}


def merge(conversations: Sequence[ConversationJson], turns: int) -> list[ConversationJson]:
    """Join conversations about one picture to dialogs of several turns; those of text only stay as they are.

    Args:
        conversations: of any pictures, in any order; each dialog is where its first one was.
        turns: most questions of a dialog; a conversation that has more by itself is not cut.

    Source: SPHINX-X, arXiv:2402.05935: the data of all tasks are dialogs of several turns.
    """
    dialogs: list[ConversationJson] = []
    latest: dict[str, ConversationJson] = {}
    for each in conversations:
        values, dialog = each["conversations"], latest.get(each.get("image", ""))
        if dialog and len(dialog["conversations"]) + len(values) <= 2 * turns:
            dialog["conversations"] += values
            continue
        dialogs.append(each | {"conversations": [*values]})
        if "image" in each:
            latest[each["image"]] = dialogs[-1]
    return dialogs


# One builder for each task: it makes the conversation of a record, for pictures that are padded at `centre` or
# `corner`, and raises DataError where the record lacks a key or holds what cannot be used.


def vqa(record: Record, padding: str) -> ConversationJson:
    """Ask a question with a short answer."""
    question = PROMPTS["vqa"].format(question=text_of(record, "question"))
    return conversation(image_of(record), [(question, text_of(record, "answer"))])


def vqa_unanswerable(record: Record, padding: str) -> ConversationJson:
    """Ask a question that the picture may not answer; `answer` is then null or unanswerable."""
    question = PROMPTS["vqa_unanswerable"].format(question=text_of(record, "question"))
    answer = "Unanswerable" if record.get("answer", "") is None else text_of(record, "answer")
    if answer.lower() == "unanswerable":
        answer = "Unanswerable"
    return conversation(text_of(record, "image"), [(question, answer)])


def choice(record: Record, padding: str) -> ConversationJson:
    """Ask a question with options, which is answered by a letter."""
    question, options, answer = text_of(record, "question"), texts_of(record, "options"), record.get("answer")
    if len(options) > len(ascii_uppercase):
        raise DataError(f"too many options: there are {len(options)}; give at most {len(ascii_uppercase)}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise DataError(f"no such option: answer {answer!r} is none of {len(options)}; count from 0")
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    question = PROMPTS["choice"].format(question=question, options=lines)
    return conversation(image_of(record), [(question, ascii_uppercase[answer])])


def text_vqa(record: Record, padding: str) -> ConversationJson:
    """Ask about text in the picture, and give what an OCR program has read; where that is nothing, ask like `vqa`."""
    if record.get("tokens") == []:
        return vqa(record, padding)
    tokens = ", ".join(texts_of(record, "tokens"))
    question = PROMPTS["text_vqa"].format(question=text_of(record, "question"), tokens=tokens)
    return conversation(text_of(record, "image"), [(question, text_of(record, "answer"))])


def caption(record: Record, padding: str) -> ConversationJson:
    """Ask for a caption of the whole picture."""
    return conversation(text_of(record, "image"), [(PROMPTS["caption"], text_of(record, "caption"))])


def grounded_caption(record: Record, padding: str) -> ConversationJson:
    """Ask for a caption with boxes behind its phrases, which the record has in the order of the caption."""
    answer, end = text_of(record, "caption"), 0
    for item in items_of(record, "phrases"):
        phrase = text_of(item, "phrase")
        start = answer.find(phrase, end)
        if start < 0:
            raise DataError(
                f"phrase not in the caption: {phrase!r} is not in {answer[end:]!r}; give phrases as they are in it"
            )
        boxes, place = format_boxes(list_of(item, "boxes"), *picture_size(record), padding), start + len(phrase)
        answer, end = answer[:place] + boxes + answer[place:], place + len(boxes)
    return conversation(text_of(record, "image"), [(PROMPTS["grounded_caption"], answer)])


def locate(record: Record, padding: str) -> ConversationJson:
    """Ask for the box of a region that is described (referring expression comprehension)."""
    question = PROMPTS["locate"].format(phrase=text_of(record, "phrase"))
    return conversation(text_of(record, "image"), [(question, box_text(record, record, padding))])


def describe(record: Record, padding: str) -> ConversationJson:
    """Ask for a description of the region in a box (referring expression generation)."""
    question = PROMPTS["describe"].format(box=box_text(record, record, padding))
    return conversation(text_of(record, "image"), [(question, text_of(record, "phrase"))])


def detect(record: Record, padding: str) -> ConversationJson:
    """Ask for all objects; the answer has each name, in the order in which they come, with its boxes behind it."""
    boxes: dict[str, list[Any]] = {}
    for item in items_of(record, "objects"):
        boxes.setdefault(text_of(item, "name"), []).append(item.get("box", ()))
    size = picture_size(record)
    answer = " ".join(name + format_boxes(named, *size, padding) for name, named in boxes.items())
    return conversation(text_of(record, "image"), [(PROMPTS["detect"], answer)])


def detect_category(record: Record, padding: str) -> ConversationJson:
    """Ask for all objects of one name."""
    name = text_of(record, "name")
    answer = name + format_boxes(list_of(record, "boxes"), *picture_size(record), padding)
    return conversation(text_of(record, "image"), [(PROMPTS["detect_category"].format(name=name), answer)])


def pose(record: Record, padding: str) -> ConversationJson:
    """Ask for all people, then for the visible key points of each person who has any, in COCO's order."""
    people, size = items_of(record, "people"), picture_size(record)
    boxes = format_boxes([person.get("box", ()) for person in people], *size, padding)
    turns = [(PROMPTS["pose"], f"person{boxes}")]
    for person in people:
        points = " ".join(name + format_point(point, *size, padding) for name, point in visible_points(person))
        if points:
            turns.append((PROMPTS["pose_person"].format(box=box_text(person, record, padding)), points))
    return conversation(text_of(record, "image"), turns)


def ocr(record: Record, padding: str) -> ConversationJson:
    """Ask for all texts, or all parts of a page; the answer says what each reads or is, with its box behind it."""
    answer = " ".join(text_of(item, "text") + box_text(item, record, padding) for item in items_of(record, "texts"))
    return conversation(text_of(record, "image"), [(PROMPTS["ocr"], answer)])


def relation(record: Record, padding: str) -> ConversationJson:
    """Ask how an object is related to another; the question names their boxes alone."""
    subject, other = (box_text(object_of(record, key), record, padding) for key in ("subject", "object"))
    question = PROMPTS["relation"].format(subject=subject, object=other)
    return conversation(text_of(record, "image"), [(question, text_of(record, "relation"))])


def classify(record: Record, padding: str) -> ConversationJson:
    """Ask for the class of the picture."""
    return conversation(
        text_of(record, "image"), [(PROMPTS["classify"], CLASS_SENTENCE.format(choice=text_of(record, "class")))]
    )


@dataclass(frozen=True)
class Task:
    """How the conversations of a task are made.

    Attributes:
        build: makes a conversation from a record and the padding of pictures.
        keys: of a record, as --help lists them.
        coco: makes records from a file of COCO's form; None where that form has nothing for the task.
    """

    build: Callable[[Record, str], ConversationJson]
    keys: str
    coco: Callable[[Coco, LeaveOut], Iterator[Record]] | None = None


_BOXED = "image, width, height"
TASKS = {
    "vqa": Task(vqa, "question, answer; image, unless it is of text only"),
    "vqa_unanswerable": Task(vqa_unanswerable, "image, question, answer (null: it cannot be answered)"),
    "choice": Task(choice, "question, options, answer (counted from 0); image, unless it is of text only"),
    "text_vqa": Task(text_vqa, "image, question, answer, tokens (a list of what was read; it may be empty)"),
    "caption": Task(caption, "image, caption", coco.captions),
    "grounded_caption": Task(grounded_caption, f"{_BOXED}, caption, phrases (in its order, each: phrase, boxes)"),
    "locate": Task(locate, f"{_BOXED}, phrase, box", coco.phrases),
    "describe": Task(describe, f"{_BOXED}, phrase, box", coco.phrases),
    "detect": Task(detect, f"{_BOXED}, objects (each: name, box)", coco.objects),
    "detect_category": Task(detect_category, f"{_BOXED}, name, boxes", coco.categories),
    "pose": Task(pose, f"{_BOXED}, people (each: box, keypoints as COCO has them)", coco.people),
    "ocr": Task(ocr, f"{_BOXED}, texts (each: text, box); of a page's layout text is what the part is"),
    "relation": Task(relation, f"{_BOXED}, subject and object (each: box), relation"),
    "classify": Task(classify, "image, class"),
}


@dataclass
class Built:
    """What has been made of a file of annotations, as far as `build` has come.

    Attributes:
        inputs: how many annotations the file has.
        taken: how many of them have become conversations.
    """

    inputs: int = 0
    taken: int = 0


def build(
    task: str, content: object, padding: str, leave_out: LeaveOut, built: Built | None = None
) -> Iterator[ConversationJson]:
    """Yield the conversations of a file, in its order; paths of images are normalised, and none leads out of a folder.

    Args:
        task: a name in TASKS.
        content: of the file: a list of records or of Items, or an object of COCO's form.
        padding: where pictures are in their squares, `centre` or `corner`.
        leave_out: told the reason for each annotation that cannot be used, and the annotation.
        built: counts.

    Raises:
        DataError: the content is of neither form.
    """
    built = built or Built()
    records: Iterable[Any]
    if isinstance(content, list):
        records, built.inputs = content, len(content)
    elif not isinstance(content, Mapping) or not {"images", "annotations"} <= content.keys():
        raise DataError("annotations: neither a list nor of COCO's form; give images and annotations, or JSON lines")
    elif (from_coco := TASKS[task].coco) is None:
        raise DataError(f"annotations: COCO's form has nothing for {task}; give a list of objects")
    else:
        read = coco.read_coco(content, leave_out)
        records, built.inputs = from_coco(read, leave_out), coco.inputs_of(read, from_coco)
    for record in records:
        sources = [record] if isinstance(content, list) else record[coco.ITEMS]
        try:
            conversation = _conversation(task, record.checked() if isinstance(record, Item) else record, padding)
        except DataError as error:
            for source in sources:
                leave_out(str(error), source)
        else:
            built.taken += len(sources)
            yield conversation


def _conversation(task: str, record: object, padding: str) -> ConversationJson:
    """Return the conversation of a record; raise DataError where it cannot be used."""
    if not isinstance(record, Mapping):
        raise DataError("no JSON object")
    made = TASKS[task].build(record, padding)
    if "image" in made:
        made["image"] = relative(made["image"])
    return made
