"""Paths in somebody else's files: nothing is read, copied or named outside of the folder that the user named."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import draw
from PIL import Image, PngImagePlugin

from megatron_sphinx.data.images import shape_of
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import files_in, inside, is_plain, relative

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
        sizes = [shape_of(path.read_bytes()) for path in (self.secret, *self.made.rglob("*.png"))]
        return bool(contents) and sizes[0] not in sizes[1:] and not any(SECRET in content for content in contents)


def make_place(tmp_path: Path) -> Place:
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


@pytest.fixture
def place(tmp_path) -> Place:
    return make_place(tmp_path)


BY_TEXT = {
    **dict.fromkeys(["../outside/secret.png", "../../../../../../../../{secret}", "{secret}", "/{secret}", ".."], OUT),
    **dict.fromkeys(["a/../../outside/secret.png", "./a/.././../outside/secret.png"], OUT),
    **dict.fromkeys(["nowhere/../../outside/secret.png", "linked/../../outside/secret.png"], OUT),
    **dict.fromkeys([".", "a/..", "good.png\0", "\0", "\ud800.png"], NO_PATH),
}
BY_LINK = {"link.png": LINK, "linked/secret.png": LINK, "a/../linked/./secret.png": LINK}
attacks = pytest.mark.parametrize(("attack", "reason"), (BY_TEXT | BY_LINK).items(), ids=repr)
attacks_by_text = pytest.mark.parametrize(("attack", "reason"), BY_TEXT.items(), ids=repr)


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


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"a\.png: is a link to nowhere; mend it or remove it"):
        files_in(tmp_path, ("png",))
