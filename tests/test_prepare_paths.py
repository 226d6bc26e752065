"""Paths in indexes, annotations and archives: no tool that prepares data reads or names a file outside."""

import json
import os
import runpy
import tarfile
from pathlib import Path

import pytest
from test_pairs import write_tar
from test_paths import LINK, SECRET, TURNS, Place, attacks, attacks_by_text, make_place

from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.answers import merge_answers
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.documents import find_documents
from megatron_sphinx.prepare.pairs import index_shards, write_shards
from megatron_sphinx.prepare.text import write_text


@pytest.fixture
def place(tmp_path) -> Place:
    return make_place(tmp_path)


def quarantine(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def names_in(folder: Path) -> list[str]:
    """The members of all tars."""
    found = []
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            found += tar.getnames()
    return found


@attacks
def test_a_conversation_about_a_picture_outside_is_left_out(tiny, place, run_tool, attack, reason):
    item = {"id": "bad", "image": place.name(attack), "conversations": TURNS}
    items = [item, {"image": "./a/../good.png", "conversations": TURNS}, {"conversations": TURNS}]
    source = place.secret.parent / "d.json"
    source.write_text(json.dumps(items))
    command = ["prepare_conversations.py", source, place.made, "--images", place.pictures, "--tokenizer",
               tiny.folder / "tokenizer.model"]  # fmt: skip
    status, out, _ = run_tool(*command)
    assert (status, out.splitlines()[1:-1]) == (0, [f"  left out: 1 ({reason})"])
    assert place.keeps_the_secret()
    assert names_in(place.made) == ["good.png"]
    (line,) = quarantine(place.made)
    assert (line["key"], line["reason"].startswith(f"{reason}: ")) == ("bad", True)
    status, out, _ = run_tool(*command, "--follow-links")
    assert status == 0
    if reason == LINK:
        assert names_in(place.made) == [os.path.normpath(attack), "good.png"]
        assert ImageReader(SampleIndex([place.made], "conversations")).read(0) == place.secret.read_bytes()
    else:
        assert names_in(place.made) == ["good.png"]
        assert place.keeps_the_secret()


def test_an_empty_name_of_a_picture_is_left_out(tiny, place):
    source = place.pictures / "d.json"
    source.write_text(json.dumps([{"image": "", "conversations": TURNS}, {"conversations": TURNS}]))
    assert index_conversations([source], place.made, tiny.tokenizer).rejected == {"image is no path": 1}


def test_pictures_are_packed_under_normalised_names(tiny, place):
    """Absolute ones too, where they lie in the folder; a picture of several spellings is kept once."""
    spellings = ["a/b.png", "./a//b.png", "a/../a/b.png", f"{place.pictures}/a/b.png", f"/{place.pictures}/a/b.png"]
    source = place.secret.parent / "d.json"
    source.write_text(json.dumps([{"image": name, "conversations": TURNS} for name in spellings]))
    report = index_conversations([source], place.made, tiny.tokenizer, images=place.pictures)
    assert (report.taken, report.rejected, names_in(place.made)) == (5, {}, ["a/b.png"])


def test_only_links_say_how_to_go_on(tiny, place):
    source = place.pictures / "d.json"
    source.write_text(json.dumps([{"image": "linked/secret.png", "conversations": TURNS}]))
    with pytest.raises(DataError, match=rf"holds no conversation that can be used; 1 left out \({LINK}\)"):
        index_conversations([source], place.made, tiny.tokenizer)


def coco(names: list[str]) -> dict:
    entries = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9]} for n in range(len(names))]
    images = [{"id": n, "file_name": name, "width": 30, "height": 20} for n, name in enumerate(names)]
    return {"images": images, "categories": [{"id": 1, "name": "dog"}], "annotations": entries}


@attacks
def test_marks_are_drawn_on_pictures_of_the_folder_only(place, run_tool, attack, reason):
    source = place.secret.parent / "coco.json"
    content = coco([place.name(attack), "./good.png"])
    for image in content["images"]:  # which have other sizes
        del image["width"], image["height"]
    source.write_text(json.dumps(content))
    command = ["prepare_som.py", "mark", source, place.pictures, place.made, "--workers", "1"]
    status, out, _ = run_tool(*command)
    assert (status, out.splitlines()[1:-1]) == (0, [f"  left out: 1 ({reason})"])
    assert place.keeps_the_secret()
    (line,) = quarantine(place.made)
    assert (line["image"], line["reason"].startswith(f"{reason}: ")) == (place.name(attack), True)
    prompts = (place.made / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(prompt)["image"] for prompt in prompts] == ["good.png"]
    assert run_tool(*command, "--follow-links")[0] == 0
    assert place.keeps_the_secret() == (reason != LINK)


@attacks_by_text
def test_merged_answers_name_no_picture_outside(place, attack, reason):
    prompts, answers = place.made / "p.jsonl", place.made / "a.jsonl"
    about = {"marks": 1, "description": "d", "question": "q"}
    lines = [about | {"id": str(n), "image": name} for n, name in enumerate([place.name(attack), "a//b.png"])]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    answers.write_text("\n".join(json.dumps({"id": str(n), "answer": "Mark 1."}) for n in range(2)))
    report = merge_answers(prompts, answers, place.made / "t.jsonl")
    assert (report.taken, report.rejected) == (1, {reason: 1})
    assert json.loads((place.made / "t.jsonl").read_text())["image"] == "a/b.png"
    prompts.write_text(json.dumps(lines[0] | {"image": 3}))
    with pytest.raises(DataError, match="not all lines are prompts"):
        merge_answers(prompts, answers, place.made / "t.jsonl")


@pytest.mark.parametrize("prefix", ["", "coco/train", "../coco", "/data/coco"])
@pytest.mark.parametrize("task", ["detect", "vqa"])
@attacks_by_text
def test_conversations_are_built_about_pictures_inside(place, run_tool, task, prefix, attack, reason):
    names = [place.name(attack), "./a/b.png"]
    record = {"question": "?", "answer": "x"}
    content = coco(names) if task == "detect" else [record | {"image": name} for name in names]
    source, target = place.made / "x.json", place.made / "x.jsonl"
    source.write_text(json.dumps(content))
    status, out, _ = run_tool("build_conversations.py", task, source, target, "--images", prefix)
    assert (status, out.splitlines()[1:-1]) == (0, [f"  left out: 1 ({reason})"])
    (line,) = map(json.loads, target.read_text().splitlines())
    assert line["image"] == (f"{prefix}/a/b.png" if prefix else "a/b.png")  # the prefix is the user's own


@pytest.mark.parametrize("attack", ["link.png", "good.txt", "linked"])
def test_a_folder_is_packed_without_what_links_lead_out_to(tiny, place, run_tool, attack):
    (place.pictures / "a" / "b.txt").write_text("a picture")
    kept = {"link.png": ["link.png", "link.txt"], "good.txt": ["good.png", "good.txt"], "linked": ["linked"]}[attack]
    for name in {"link.png", "link.txt", "good.png", "good.txt", "linked"} - set(kept):
        (place.pictures / name).unlink(missing_ok=True)
    if attack == "good.txt":
        (place.pictures / "good.txt").symlink_to(place.secret.with_suffix(".txt"))
    elif attack == "link.png":
        (place.pictures / "link.txt").write_text("a picture")
    with pytest.raises(DataError, match=f"^{LINK}: .*/{attack} leads to {place.secret.parent}"):
        write_shards(place.pictures, place.made)
    command = ["prepare_pairs.py", place.pictures, place.made, "--tokenizer", tiny.folder / "tokenizer.model"]
    status, _, error = run_tool(*command)
    assert (status, error.startswith(f"prepare_pairs.py: {LINK}: "), error.count("\n")) == (2, True, 1)
    assert not list(place.made.rglob("*.tar"))
    status, out, _ = run_tool(*command, "--follow-links")
    assert (status, f"{place.made}: 2 pairs in 1 shards" in out) == (0, True)
    assert not place.keeps_the_secret()
    assert names_in(place.made) == [f"{n:09d}.{kind}" for n in range(2) for kind in ("png", "txt")]


def test_a_shard_that_a_link_leads_out_to_is_taken_only_if_asked_for(tiny, place, run_tool):
    tars = place.pictures / "tars"
    tars.mkdir()
    write_shards(tiny.folder / "pictures", place.secret.parent)
    (tars / "0.tar").symlink_to(place.secret.parent / "000000.tar")
    command = ["prepare_pairs.py", tars, place.made, "--tokenizer", tiny.folder / "tokenizer.model"]
    status, _, error = run_tool(*command)
    assert (status, error.startswith(f"prepare_pairs.py: {LINK}: {tars}/0.tar leads to ")) == (2, True)
    assert run_tool(*command, "--follow-links")[0] == 0
    assert run_tool("prepare_pairs.py", tars / "0.tar", *command[2:])[0] == 0  # what the user names is his own


def test_members_of_a_tar_are_read_from_the_tar_alone(tiny, place):
    """Links are passed over; a name with `..` is a name in the index, and nothing on the disk."""
    good = (place.pictures / "good.png").read_bytes()
    path = write_tar(
        place.made / "x.tar", {"../evil.png": good, "../evil.txt": b"red", "/abs.png": good, "/abs.txt": b"blue"}
    )
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            for ending in ("png", "txt"):
                member = tarfile.TarInfo(f"link{kind[0]}.{ending}")
                member.type, member.linkname = kind, str(place.secret.with_suffix(f".{ending}"))
                tar.addfile(member)
    before = sorted(place.made.parent.rglob("*"))
    report = index_shards([path], place.made / "index", tiny.tokenizer)
    assert report.taken == 2
    index = SampleIndex([place.made / "index"])
    assert [ImageReader(index).name(n)[1] for n in range(2)] == ["../evil", "abs"]
    assert {one for one in place.made.parent.rglob("*") if "index" not in one.parts} == set(before)
    assert not any(SECRET in one.read_bytes() for one in (place.made / "index").iterdir())


def test_pdfs_are_those_of_the_folder(place, run_tool):
    (place.secret.parent / "x.pdf").write_bytes(b"%PDF")
    (place.pictures / "linked").unlink()
    (place.pictures / "own.pdf").write_bytes(b"%PDF")
    (place.pictures / "a" / "x.pdf").symlink_to(place.secret.parent / "x.pdf")
    with pytest.raises(DataError, match=rf"^{LINK}: .*/a/x\.pdf leads to {place.secret.parent}/x\.pdf"):
        find_documents([place.pictures])
    status, _, error = run_tool("prepare_ocr.py", place.pictures, place.made)
    assert (status, error.startswith(f"prepare_ocr.py: {LINK}: ")) == (2, True)
    assert find_documents([place.pictures], follow_links=True).keys() == {"a/x", "own"}
    assert find_documents([place.pictures / "a" / "x.pdf"]).keys() == {"x"}  # what the user names is his own
    assert "--follow-links" in error


@pytest.mark.parametrize("name", ["..pdf", "...pdf", "a/...pdf"])
def test_no_document_is_called_like_a_folder_above(place, name):
    path = place.made / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"%PDF")
    for source in (place.made, path):
        with pytest.raises(DataError, match=r"pdf: its images would lie in a folder '.*\.'; rename it"):
            find_documents([source])


@pytest.mark.parametrize("name", ["../text/000000", "{text}/000000", "a/../000000", "..", "", "x\0", 3], ids=repr)
def test_token_files_lie_beside_their_index(tiny, tmp_path, name):
    write_text([tiny.folder / "text.jsonl"], tmp_path / "text", tiny.tokenizer)
    index = json.loads((tmp_path / "text" / "index.json").read_text())
    index["files"][0]["name"] = name.format(text=tmp_path / "text") if isinstance(name, str) else name
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        DataError,
        match=r"damaged index\.json \(.*( is no name of a file beside it|holds the character U\+0000; remove it|"
        r"must be text; put it in quotes)\); make it by megatron-",
    ):
        TextIndex([tmp_path / "index"])


def test_the_example_takes_only_what_is_of_its_packages(place, monkeypatch):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "debian_data.py"))
    root = place.pictures
    manual = root / "usr/share/gimp/2.0/help/en"
    manual.mkdir(parents=True)
    (manual / "good.png").write_bytes((root / "good.png").read_bytes())
    names = ["good.png", "../../../../../../good.png", "%2e%2e/" * 7 + "outside/secret.png", str(place.secret), "%00"]
    (manual / "x.html").write_text("".join(f'<img src="{name}" alt="a picture">' for name in names))
    (root / "near").symlink_to("good.png")
    example["drop_links"](root)
    assert sorted(path.name for path in root.rglob("*") if path.is_symlink()) == ["near"]
    taken = [path for path, _ in example["pairs"](root) if path.is_file()]
    assert sorted(taken) == sorted([manual / "good.png", root / "good.png"])
