"""Make real image-text pairs and real text from Debian packages, which are downloaded and unpacked, never installed.

    examples/debian_data.py FOLDER

Writes into FOLDER: shards/ (WebDataset tars of 1,000 pairs in a fixed random order: tuxpaint's stamps with the first
lines of their descriptions, the pictures of gimp's manual with their alternative texts, openclipart's pictures with
title and description of their drawings; JPEG, at most 384 pixels a side) and text.jsonl (a page of the Anarchist FAQ
or of git's manual a line). Does nothing where that is all there. Needs apt-get and dpkg-deb, 400 MB of downloads and,
for the time being, 1.2 GB in the temporary folder; needs no root, and touches nothing of the system.
"""

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from PIL import Image
from webdataset import ShardWriter

from megatron_sphinx.data import images
from megatron_sphinx.errors import DataError, SphinxError
from megatron_sphinx.paths import inside

PICTURES = ("tuxpaint-stamps-default", "gimp-help-en", "openclipart-png", "openclipart-svg")
TEXTS = ("anarchism", "git-doc")
LONGEST_SIDE = 384
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
BLOCKS = {"p", "div", "br", "hr", "li", "dt", "dd", "tr", "pre", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6"}
HIDDEN = {"script", "style", "title"}


class Page(HTMLParser):
    """A page's pictures as (source, alternative text), and its text, a line for each block."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pictures: list[tuple[str, str]] = []
        self._words: list[str] = []
        self._hidden = 0
        self.feed(path.read_text(encoding="utf-8", errors="replace"))
        lines = (" ".join(line.split()) for line in "".join(self._words).split("\0"))
        self.text = "\n".join(line for line in lines if line)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a picture, or where a block begins."""
        source, caption = (dict(attrs).get(name) for name in ("src", "alt"))
        if tag == "img" and source and caption:
            self.pictures.append((source, caption))
        self._hidden += tag in HIDDEN
        self._words.append("\0" if tag in BLOCKS else "")

    def handle_endtag(self, tag: str) -> None:
        """Note where a block ends."""
        self._hidden -= tag in HIDDEN
        self._words.append("\0" if tag in BLOCKS else "")

    def handle_data(self, data: str) -> None:
        """Keep words that a reader of the page would see."""
        if not self._hidden:
            self._words.append(data)


def unpack(packages: tuple[str, ...], folder: Path) -> None:
    """Download packages and unpack them into `folder`, by lists and caches of our own; no link leads out of it then.

    Raises:
        DataError: apt-get or dpkg-deb is missing, or fails.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(
                f"{tool}: not found; run this on Debian, or give your own shards to megatron-sphinx prepare pairs"
            )
    state = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True)
    apt = ["apt-get", "-qq"]
    for option in (f"Dir::State::Lists={state}/lists", f"Dir::Cache={state}/cache", "APT::Sandbox::User="):
        apt += ["-o", option]

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=state, capture_output=True, text=True)
        if done.returncode:
            raise DataError(f"{command[0]} ended with {done.returncode}: {' '.join(done.stderr.split())}")

    run(*apt, "update")
    run(*apt, "download", *packages)
    for package in sorted(state.glob("*.deb")):
        run("dpkg-deb", "-x", str(package), str(folder))
    shutil.rmtree(state)
    drop_links(folder)


def drop_links(folder: Path) -> None:
    """Remove the links in a folder that lead out of it: what is there is not of the packages."""
    whole = os.path.realpath(folder)
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    for path in [path for path in links if not Path(os.path.realpath(path)).is_relative_to(whole)]:
        path.unlink()


def pairs(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield pictures and captions of the unpacked packages."""
    for picture in sorted((root / "usr/share/tuxpaint/stamps").rglob("*.png")):
        if (text := picture.with_suffix(".txt")).is_file():
            yield picture, text.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    manual = "usr/share/gimp/2.0/help/en"
    shown = {picture for page in sorted((root / manual).glob("*.html")) for picture in Page(page).pictures}
    for source, caption in sorted(shown):
        with suppress(DataError):  # a source may lead out of the packages
            yield root / inside(root, f"{manual}/{unquote(source)}"), caption
    art = root / "usr/share/openclipart"
    for picture in sorted((art / "png").rglob("*.png")):
        yield picture, described((art / "svg" / picture.relative_to(art / "png")).with_suffix(".svg"))


def described(drawing: Path) -> str:
    """Return title and description in a drawing's RDF; nothing where there is neither."""
    try:
        for _, element in ElementTree.iterparse(drawing):
            if element.tag.endswith("}Work"):
                said = (element.findtext(DUBLIN_CORE + name, "") for name in ("title", "description"))
                return ": ".join(dict.fromkeys(" ".join(text.split()) for text in said if text.strip()))
    except (OSError, ElementTree.ParseError):
        pass
    return ""


def encoded(pair: tuple[Path, str]) -> dict[str, bytes] | None:
    """Return the files of a pair; None where there is no caption, or the image does not decode."""
    warnings.simplefilter("ignore")  # of Pillow, about sizes that images.decode refuses
    path, caption = pair
    if not caption.strip() or not path.is_file():
        return None
    try:
        image = images.decode(path.read_bytes())
    except DataError:
        return None
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, "jpeg", quality=90)
    return {"jpg": content.getvalue(), "txt": " ".join(caption.split()).encode()}


def write(root: Path, folder: Path) -> str:
    """Write shards and texts; return one line that says what was made."""
    pictures, count = list(pairs(root)), 0
    random.Random(0).shuffle(pictures)  # so that each shard has its share of every source
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    with (
        ProcessPoolExecutor(os.cpu_count()) as pool,
        ShardWriter(f"{folder}/shards/%06d.tar", maxcount=1000, verbose=0, encoder=False, mtime=0) as shards,
    ):
        for count, sample in enumerate(filter(None, pool.map(encoded, pictures, chunksize=32)), 1):
            shards.write({"__key__": f"{count - 1:09d}", **sample})
    pages = sorted((root / "usr/share/doc").rglob("*.html"))
    texts = [text for page in pages if (text := Page(page).text)]
    lines = [json.dumps({"content": text}, ensure_ascii=False) + "\n" for text in texts]
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    return (
        f"{count} pairs, {len(pictures) - count} pictures left out; "
        f"{len(texts)} texts, {sum(map(len, texts))} characters"
    )


def main() -> int:
    """Make the data; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    done = folder / "prepared.txt"
    if not done.is_file():
        try:
            with tempfile.TemporaryDirectory() as name:
                unpack(PICTURES + TEXTS, Path(name))
                made = write(Path(name), folder)
        except SphinxError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return error.exit_status
        done.write_text(made + "\n")
    print(f"{folder}: {done.read_text()}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
