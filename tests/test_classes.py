"""Recognition as text: folders of classes, what their classes are called, and classes read from answers."""

import json
from pathlib import Path

import pytest
from conftest import draw

from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.metrics.classes import CLASS_MATCH, named_class
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Sample
from megatron_sphinx.prepare.classes import image_net_names, read_classes

CLOTHES = ("T-shirt", "shirt", "ankle boot", "bag", "coat", "dress")


def fill(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        draw(number)[0].save(root / path)
    return root


def test_a_folder_of_classes_becomes_conversations(tmp_path, capsys):
    folder = fill(
        tmp_path / "train", "ankle_boot/b.png", "ankle_boot/a.JPG", "hot dog/more/c.webp", ".git/x.png", "y.png"
    )
    (folder / "hot dog" / "notes.txt").touch()
    target = tmp_path / "out" / "conversations.jsonl"
    assert main(["prepare", "tasks", "classify", str(folder), str(target), "--images", "train"]) == 0
    assert capsys.readouterr().out.startswith(f"{target}: 3 conversations, 3 questions\n")
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [one["image"] for one in found] == [
        "train/ankle_boot/a.JPG",
        "train/ankle_boot/b.png",
        "train/hot dog/more/c.webp",
    ]
    said = [[turn["value"] for turn in one["conversations"]] for one in found]
    assert said == [["Classify the image.", f"This is a {name}"] for name in ("ankle boot", "ankle boot", "hot dog")]


def test_synsets_are_called_by_timms_names(tmp_path):
    folder = fill(tmp_path, "n01443537/n01443537_1.JPEG", "n02012849/n02012849_1.JPEG", "n03126707/n03126707_1.JPEG")
    assert [(one.folder, one.name) for one in read_classes(folder)] == [
        ("n01443537", "goldfish"),
        ("n02012849", "crane (large long-necked wading bird of marshes and plains in many parts of the world)"),
        ("n03126707", "crane (lifts and moves heavy objects)"),
    ]


def test_the_thousand_classes_have_as_many_names():
    names = image_net_names()
    assert len(names) == len({name.casefold() for name in names.values()}) == 1000
    assert (names["n02113186"], names["n02963159"]) == ("Cardigan, Cardigan Welsh corgi", "cardigan")
    assert named_class("This is a Cardigan, Cardigan Welsh corgi", tuple(names.values())).endswith("corgi")
    assert (names["n03710637"], names["n03710721"]) == ("maillot", "maillot, tank suit")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), "t: has no folders; give a folder with a folder of pictures for each class"),
        (("cat/a.png", "dog/a.txt"), "t/dog: holds no pictures (jpg, jpeg, "),
        (("hot_dog/a.png", "Hot dog/a.png"), "t/hot_dog: is called hot dog, as Hot dog is; join them, or rename one"),
        (("__/a.png",), "t/__: its name has no letters; call the folder as the class is called"),
        (("n00000001/a.png",), "t/n00000001: is none of the 1,000 classes of ImageNet; call its folder as the"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used_are_refused(tmp_path, capsys, paths, message):
    (tmp_path / "t").mkdir()
    for path in paths:
        (tmp_path / "t" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / path).touch()
    assert main(["prepare", "tasks", "classify", str(tmp_path / "t"), str(tmp_path / "x.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.jsonl").exists()


def test_a_class_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    fill(tmp_path, "cat/a.png", "dog/a.png")
    iterdir = Path.iterdir

    def refuse(path: Path):
        if path.name == locked:
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    locked = "dog"
    with pytest.raises(
        DataError, match=r"dog: cannot be read .Permission denied.; get the right to read it, or remove"
    ):
        list(read_classes(tmp_path))
    locked = tmp_path.name
    with pytest.raises(
        DataError, match=r"cannot be read .Permission denied.; give a folder with a folder for each class"
    ):
        list(read_classes(tmp_path))


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    fill(tmp_path, "out/a.png", "in/cat/b.png")
    (tmp_path / "in" / "cat" / "a.png").symlink_to(tmp_path / "out" / "a.png")
    with pytest.raises(DataError, match="link out of the folder"):
        list(read_classes(tmp_path / "in"))
    assert len(list(read_classes(tmp_path / "in", follow_links=True))) == 2


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("a bag", "bag"), (" this  is a BAG. ", "bag"), ("bag", "bag"), ("This is an ankle boot.", "ankle boot"),
        ("This is a T-shirt", "t-shirt"), ("A shirt, surely", "shirt"), ("bag: a bag", "bag"),
        ("This is a handbag", None), ("a bag or a coat", None), ("This is a", None), ("", None),
    ],
)  # fmt: skip
def test_the_class_that_an_answer_names(answer, named):
    assert named_class(answer, CLOTHES) == named


def judged(answers: list[tuple[str, str, tuple[str, ...]]]) -> list[Judged]:
    answered = [
        Answered(
            sample=Sample(id=f"{number}", picture=None, picture_id=f"{number}", fields={}, choices=CLOTHES,
                          answers=(f"This is a {right}", right)),
            text=text, ranked=ranked,
        )
        for number, (right, text, ranked) in enumerate(answers)
    ]  # fmt: skip
    verdicts = CLASS_MATCH.judge(answered, Protocol.PAPER)
    return [Judged(one, verdict) for one, verdict in zip(answered, verdicts, strict=True)]


def test_answers_that_name_no_class_or_several_are_unparsed_and_wrong():
    found = judged(
        [("bag", "a bag", ()), ("bag", "a coat", ()), ("bag", "a bag, a coat", ()), ("T-shirt", "shirt", ())]
    )
    assert [(one.verdict.value, one.verdict.parsed) for one in found] == [
        (1, "bag"),
        (0, "coat"),
        (0, None),
        (0, "shirt"),
    ]
    assert CLASS_MATCH.figures(found) == {"top-1": 25.0}


def test_ranked_classes_have_a_top_5():
    ranked = ("coat", "bag", "dress", "shirt", "T-shirt")
    found = judged([("bag", "This is a coat", ranked), ("ankle boot", "This is a coat", ranked)])
    assert CLASS_MATCH.figures(found) == {"top-1": 0.0, "top-5": 50.0}
    few = judged([("bag", "This is a coat", ranked[:2])])
    assert CLASS_MATCH.figures(few) == {"top-1": 0.0}
