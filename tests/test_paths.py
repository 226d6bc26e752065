"""Paths in somebody else's files: nothing is read, copied or named outside of the folder that the user named."""

import json
import os
import random
import re
import runpy
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import draw
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file
from test_convert import drawn_model, refused, save
from test_data import write_tar
from torch import save as torch_save

from megatron_sphinx.checkpoint.convert import convert, open_checkpoint
from megatron_sphinx.checkpoint.formats.base import Wanted
from megatron_sphinx.checkpoint.interpolate import interpolate
from megatron_sphinx.checkpoint.manifest import MANIFEST, read_manifest
from megatron_sphinx.data.images import size_of
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.errors import CheckpointError, DataError
from megatron_sphinx.paths import files_in, inside, is_plain, relative
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.documents import find_documents
from megatron_sphinx.prepare.marks import merge_answers
from megatron_sphinx.prepare.pairs import index_shards, write_shards
from megatron_sphinx.prepare.text import write_text

SECRET = b"nobody else's business"
TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A red circle."}]
OUT, LINK, NO_PATH = "path out of the folder", "link out of the folder, which --follow-links takes", "no path"


@dataclass(frozen=True)
class Place:
    """A folder of pictures that a user names, what lies beside it, and what a tool writes.

    Attributes:
        pictures: has `good.png`, `a/b.png`, a link `link.png` and a linked folder `linked`, which lead out.
        secret: a picture outside, which carries SECRET.
        made: where to write.
    """

    pictures: Path
    secret: Path
    made: Path

    def name(self, attack: str) -> str:
        """The name that an attack puts into a file."""
        return attack.replace("{secret}", str(self.secret))

    def keeps_the_secret(self) -> bool:
        """Whether it is in no file that was written, neither its bytes nor its pixels."""
        contents = [path.read_bytes() for path in self.made.rglob("*") if path.is_file()]
        sizes = [size_of(path.read_bytes()) for path in (self.secret, *self.made.rglob("*.png"))]
        return bool(contents) and sizes[0] not in sizes[1:] and not any(SECRET in content for content in contents)


@pytest.fixture
def place(tmp_path) -> Place:
    pictures, outside = tmp_path / "user" / "pictures", tmp_path / "user" / "outside"
    outside.mkdir(parents=True)
    (pictures / "a").mkdir(parents=True)
    for name in ("good.png", "a/b.png"):
        draw(1)[0].save(pictures / name)
    text = PngImagePlugin.PngInfo()
    text.add_text("about", SECRET.decode())
    Image.new("RGB", (123, 45), "red").save(outside / "secret.png", pnginfo=text)
    (outside / "secret.txt").write_bytes(SECRET)
    (pictures / "link.png").symlink_to(outside / "secret.png")
    (pictures / "linked").symlink_to("../outside")
    made = tmp_path / "made"
    made.mkdir()
    return Place(pictures, outside / "secret.png", made)


BY_TEXT = {
    **dict.fromkeys(["../outside/secret.png", "../../../../../../../../{secret}", "{secret}", "/{secret}", ".."], OUT),
    **dict.fromkeys(["a/../../outside/secret.png", "./a/.././../outside/secret.png"], OUT),
    **dict.fromkeys(["nowhere/../../outside/secret.png", "linked/../../outside/secret.png"], OUT),
    **dict.fromkeys([".", "a/..", "good.png\0", "\0", "\ud800.png"], NO_PATH),
}
BY_LINK = {"link.png": LINK, "linked/secret.png": LINK, "a/../linked/./secret.png": LINK}
attacks = pytest.mark.parametrize(("attack", "reason"), (BY_TEXT | BY_LINK).items(), ids=repr)
attacks_by_text = pytest.mark.parametrize(("attack", "reason"), BY_TEXT.items(), ids=repr)


# the one function


@attacks
def test_what_leads_out_is_refused(place, attack, reason):
    with pytest.raises(DataError, match=f"^{reason}: ") as caught:
        inside(place.pictures, place.name(attack))
    assert "\n" not in str(caught.value)
    if reason == LINK:
        assert str(caught.value).endswith(f" leads to {place.secret}")
        assert inside(place.pictures, attack, follow_links=True) == os.path.normpath(attack)
    else:
        with pytest.raises(DataError, match=f"^{reason}: "):
            inside(place.pictures, place.name(attack), follow_links=True)
        with pytest.raises(DataError, match=f"^{reason}: "):
            relative(place.name(attack))


def test_messages_say_what_to_do(place):
    with pytest.raises(DataError, match=r": '\.\./x' is not in .*pictures; give paths inside, or a folder that holds"):
        inside(place.pictures, "../x")
    with pytest.raises(DataError, match=r": '/x' is absolute or leads out by \.\.; give paths inside, or a folder"):
        relative("/x")
    with pytest.raises(DataError, match=r"^no path: '' names no file$"):
        relative("")
    with pytest.raises(DataError) as caught:
        relative("../" * 10**5)
    assert len(str(caught.value)) < 400


def test_what_stays_inside_is_taken(place, tmp_path, monkeypatch):
    root = place.pictures
    (tmp_path / "alias").symlink_to(root)
    (root / "a" / "near.png").symlink_to("../good.png")
    (root / "far.png").symlink_to(root / "a" / "b.png")
    for name, found in {
        "good.png": "good.png", "./a//b.png": "a/b.png", "nowhere/../a/../good.png": "good.png", "no.png": "no.png",
        "a/near.png": "a/near.png", "far.png": "far.png", "..png": "..png", ".../x": ".../x", "a b\n.png": "a b\n.png",
        f"{root}/good.png": "good.png", f"{tmp_path}/alias/a/b.png": "a/b.png", f"/{root}/a/b.png": "a/b.png",
    }.items():  # fmt: skip
        assert inside(root, name) == inside(tmp_path / "alias", name) == found
    monkeypatch.chdir(root.parent)
    assert inside(Path("pictures"), f"{root}/good.png") == inside(Path("."), "pictures/good.png")[9:] == "good.png"
    assert inside(Path("/"), "/etc/x") == "etc/x"


def leads_to(root: Path, name: str) -> Path | None:
    """A walk through the parts of a name: where it ends, None where it goes above the root on its way."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == ".." and not parts:
            return None
        parts = parts[:-1] if part == ".." else parts if part in ("", ".") else [*parts, part]
    return root.joinpath(*parts)


@pytest.mark.parametrize("seed", range(20))
def test_random_names_never_lead_out_and_are_refused_only_where_they_do(place, seed):
    rng, root = random.Random(seed), place.pictures
    (root / "a" / "up").symlink_to("..")
    (root / "b").symlink_to("a")
    (root / "loop").symlink_to("loop")
    taken = 0
    for _ in range(500):
        parts = rng.choices(["a", "b", "up", "linked", "link.png", "loop", "good.png", "..", ".", "", "x"], k=4)
        name = rng.choice(["", "", "", "/", f"{root}/"]) + "/".join(parts[: rng.randint(1, 4)])
        end = None if name.startswith("/") and not name.startswith(f"{root}/") else leads_to(root, name)
        end = leads_to(Path("/"), name) if name.startswith(f"{root}/") else end
        is_text_fine = end is not None and end != root and end.is_relative_to(root)
        is_in = is_text_fine and Path(os.path.realpath(end)).is_relative_to(os.path.realpath(root))
        for follow_links, wanted in ((False, is_in), (True, is_text_fine)):
            try:
                found = inside(root, name, follow_links=follow_links)
            except DataError:
                assert not wanted, name
            else:
                assert wanted, name
                assert root / found == end
                assert not found.startswith("/")
                assert ".." not in found.split("/")
                taken += 1
    assert 200 < taken < 900


def test_files_of_a_folder_come_once_whatever_the_links(place):
    root, out = place.pictures, place.secret.parent
    (root / "linked").unlink()
    (root / "link.png").unlink()
    (root / "a" / "again").symlink_to("..")
    (root / "0").symlink_to("a")
    (root / "B.PNG").symlink_to("good.png")
    assert files_in(root, ("png",)) == [root / name for name in ("B.PNG", "a/b.png", "good.png")]
    (out / "back").symlink_to(root)
    (out / "here").symlink_to(".")
    (out / "up").symlink_to("..")
    (root / "more").symlink_to(out)
    (root / "most").symlink_to(out)
    with pytest.raises(DataError, match=rf"^{LINK}: {root}/more leads to {out}$"):
        files_in(root, ("png",))
    found = files_in(root, ("png", "txt"), follow_links=True)
    names = ("B.PNG", "a/b.png", "good.png", "more/secret.png", "more/secret.txt")
    assert found == [root / name for name in names]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/x", "/x", "x/", "x\0", 3, None, ["x"]], ids=repr)
def test_a_plain_name_is_one_of_a_file_alone(name):
    assert not is_plain(name)
    assert is_plain("..x")


# readers of data


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
    assert (status, out.splitlines()[1:]) == (0, [f"  left out: 1 ({reason})"])
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
    with pytest.raises(DataError, match=rf"holds no conversation that can be used; 1 left out \({LINK}\)$"):
        index_conversations([source], place.made, tiny.tokenizer)


def coco(names: list[str]) -> dict:
    entries = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9]} for n in range(len(names))]
    images = [{"id": n, "file_name": name, "width": 30, "height": 20} for n, name in enumerate(names)]
    return {"images": images, "categories": [{"id": 1, "name": "dog"}], "annotations": entries}


@attacks
def test_marks_are_drawn_on_pictures_of_the_folder_only(place, run_tool, attack, reason):
    source = place.secret.parent / "coco.json"
    source.write_text(json.dumps(coco([place.name(attack), "./good.png"])))
    command = ["prepare_som.py", "mark", source, place.pictures, place.made]
    status, out, _ = run_tool(*command)
    assert (status, out.splitlines()[1:]) == (0, [f"  left out: 1 ({reason})"])
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
    assert (status, out.splitlines()[1:]) == (0, [f"  left out: 1 ({reason})"])
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
        DataError, match=r"damaged index\.json \(.* is no name of a file beside it\); make it by megatron-"
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


# checkpoints


def with_index(folder: Path, kind: str) -> tuple[Path, Path, dict]:
    """A checkpoint of Hugging Face's in several files of a kind; its index, and what that holds."""
    save(drawn_model(random.Random(1), experts=0), folder, "3KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if kind == "bin":
        for path in folder.glob("*.safetensors"):
            torch_save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
        index.unlink()
        index = folder / "pytorch_model.bin.index.json"
        places = content["weight_map"]
        content["weight_map"] = {name: file.replace(".safetensors", ".bin") for name, file in places.items()}
        index.write_text(json.dumps(content))
    return folder, index, content


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "lead", ["../outside/{}", "{outside}/{}", "sub/../../outside/{}", "sub/{}", "{}\0", "..", ".", "", 3, None, ["x"]],
    ids=repr,
)  # fmt: skip
def test_an_index_names_files_beside_it_alone(tmp_path, kind, lead):
    folder, index, content = with_index(tmp_path / "model", kind)
    for name in ("outside", "model/sub"):
        (tmp_path / name).mkdir()
    file = max(content["weight_map"].values())
    for name in ("outside", "model/sub"):
        (tmp_path / name / file).write_bytes((folder / file).read_bytes())
    lead = lead.replace("{outside}", str(tmp_path / "outside")).replace("{}", file) if isinstance(lead, str) else lead
    for name in [name for name, of in content["weight_map"].items() if of == file]:
        content["weight_map"][name] = lead
    index.write_text(json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    found = re.escape(f"{lead!r}")
    message = rf"^{index}: .+={found}: is no file beside the index; fetch it from a source you trust$"
    refused(folder, message)
    with pytest.raises(CheckpointError, match=message):
        interpolate([folder, folder], {tmp_path / "mix": (0.5, 0.5)})
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_without_files_is_damaged(tmp_path):
    folder, index, content = with_index(tmp_path / "model", "safetensors")
    index.write_text(json.dumps(content | {"weight_map": ["x"]}))
    refused(folder, "weight_map holds no files by tensor; fetch it again")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_downloads_that_are_full_of_links_are_taken(tmp_path, kind):
    """Hugging Face's cache: every file of a snapshot is a link to ../../blobs."""
    folder, _, _ = with_index(tmp_path / "model", kind)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "1", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "target", "hf", Wanted(), verify=True)


@pytest.mark.parametrize("name", ["../secret", "{tmp}/secret", "a/../../secret", "..", ".", "", "x\0", "a/x"], ids=repr)
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, name):
    (tmp_path / "secret").write_bytes(SECRET)
    save(drawn_model(random.Random(1), experts=0), tmp_path / "hf")
    folder = tmp_path / "step_00000001"
    convert(tmp_path / "hf", folder, "megatron", Wanted())
    manifest = json.loads((folder / MANIFEST).read_text())
    name = name.format(tmp=tmp_path)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": {**manifest["files"], name: "0"}}))
    message = rf"=.*step_00000001: {MANIFEST} names {re.escape(repr(name))}, no file in its folder; give another one"
    with pytest.raises(CheckpointError, match=f"^checkpoint.resume{message}"):
        read_manifest(folder)
    with pytest.raises(CheckpointError, match=f"^SOURCE{message}"):
        open_checkpoint(folder)


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"a\.png: is a link to nowhere; mend it or remove it"):
        files_in(tmp_path, ("png",))
