"""Checkpoints behind URLs: read by ranges and written from front to back, to the bits of those on this machine."""

import json
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from conftest import TOOLS
from counted import Counted
from fsspec.implementations.memory import MemoryFileSystem
from llamas import drawn_model, save, shape_of
from mixes import make

from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint import streams
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mix import interpolate
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.remote import BLOCK, RemoteFile, RemoteSink, copy_file, is_remote, place_of, remove_files

FORMS = ["hf", "meta", "accessory", "megatron", "torch_dist"]
SHAPE = LanguageConfig(layers=3, hidden=64, ffn=96, heads=4, groups=2, vocabulary=256)
LARGE = LanguageConfig(layers=1, hidden=512, ffn=1536, heads=4, groups=2, vocabulary=4096)
OPTIONS = WriteOptions(shard_bytes=100_000)


@pytest.fixture
def store():
    """A folder behind a URL, empty at first and gone at last."""
    fsspec.register_implementation("memory", Counted, clobber=True)
    Counted.read.clear()
    folder = place_of(f"memory://{uuid4().hex}")
    yield folder
    Counted.fail_behind = None
    if folder.exists():
        remove_files(folder)
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


def files_of(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path).removeprefix(f"{folder}/"): path.read_bytes() for path in found}


def created(path: Path) -> object:
    return path.fs.info(path.path)["created"]


def uploaded(folder: Path, target: Path) -> Path:
    for name in files_of(folder):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / name, target / name)
    return target


def made(folder: Path, form: str, seed: int) -> Path:
    """A checkpoint of a format, of random weights."""
    source = make(folder.with_name(f"{folder.name}_hf"), seed, SHAPE)
    convert(source, folder, form, WriteOptions())
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("experts", [0, 2])
def test_behind_urls_every_format_has_the_bits_of_this_machine(tmp_path, store, form, experts):
    model = drawn_model(random.Random(f"{form} {experts}"), experts=experts)
    source, shape = save(model, tmp_path / "source", "3KB"), shape_of(model)
    for options in (WriteOptions(), WriteOptions(shard_bytes=3000)):
        name = f"{form}{options.shard_bytes}"
        convert(source, tmp_path / name, form, options)
        convert(uploaded(source, store / f"in{name}"), store / name, form, options, verify=True, shape=shape)
        assert files_of(store / name) == files_of(tmp_path / name)
        convert(tmp_path / name, tmp_path / f"back{name}", "hf", options, shape=shape)
        convert(store / name, store / f"back{name}", "hf", options, shape=shape)
        assert files_of(store / f"back{name}") == files_of(tmp_path / f"back{name}")


@pytest.mark.parametrize("form", FORMS)
def test_mixes_behind_urls_have_the_bits_of_this_machine(tmp_path, store, form):
    shape = None if form != "torch_dist" else SHAPE
    for seed, name in enumerate("ab"):
        made(tmp_path / name, form, seed)
        uploaded(tmp_path / name, store / name)
    shares = {"half": (0.25, 0.75), "first": (1.0, 0.0)}
    for place in (tmp_path, store):
        interpolate([place / "a", place / "b"], {place / name: each for name, each in shares.items()}, shape=shape)
    for name in shares:
        here, there = files_of(tmp_path / name), files_of(store / name)
        origins = [json.loads(files.pop("interpolation.json", b"{}")) for files in (here, there)]
        if form == "megatron":
            origins = [json.loads(files.pop("checkpoint.json"))["interpolation"] for files in (here, there)]
        assert here == there
        assert [one["share"] for one in origins[1]["inputs"]] == list(shares[name])
        assert origins[1]["inputs"][0]["path"] == str(store / "a")
        assert origins[1]["inputs"][0]["versions" if form != "megatron" else "digests"]


@pytest.mark.parametrize("form", ["megatron", "meta"])
def test_what_is_behind_a_url_is_read_once(tmp_path, store, form):
    source = uploaded(make(tmp_path / "source", 1, LARGE), store / "source")
    weights = "/" + str(source / "model.safetensors").partition("://")[2]
    Counted.read.clear()
    convert(source, tmp_path / "made", form, OPTIONS)
    size = len(files_of(source)["model.safetensors"])
    ranges = Counted.read[weights]
    assert max(end - start for start, end in ranges) <= BLOCK < size
    assert size <= sum(end - start for start, end in ranges) < size + 2**16  # the header is looked at before
    assert Counted.most_read(weights) <= 2


def test_of_a_matrix_that_is_turned_no_piece_brings_all_of_it(tmp_path, store, monkeypatch):
    monkeypatch.setattr(streams, "_REMOTE_PIECE", 2**9)
    monkeypatch.setattr(streams, "THREADS", 1)
    make(tmp_path / "hf", 1, replace(SHAPE, experts=2))
    convert(tmp_path / "hf", tmp_path / "source", "accessory", WriteOptions(is_sparse=True))
    source = uploaded(tmp_path / "source", store / "source")
    weights = f"/{str(source).partition('://')[2]}/consolidated.00-of-01.model.pth"
    Counted.read.clear()
    convert(source, tmp_path / "made", "hf", WriteOptions())
    assert files_of(tmp_path / "made")["model.safetensors"] == files_of(tmp_path / "hf")["model.safetensors"]
    size = len(files_of(source)["consolidated.00-of-01.model.pth"])
    assert sum(end - start for start, end in Counted.read[weights]) < 2 * size


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_what_was_stopped_is_refused_and_goes_on_file_by_file(tmp_path, store, form):
    source = make(tmp_path / "source", 1, SHAPE)
    convert(source, tmp_path / "made", form, OPTIONS)
    Counted.fail_behind = 3
    with pytest.raises(CheckpointError, match=r"made: could not be written \(the store is gone\); put that right"):
        convert(source, store / "made", form, OPTIONS)
    Counted.fail_behind = None
    with pytest.raises(CheckpointError, match="made: is not finished; run the command that makes it again"):
        open_checkpoint(store / "made")
    before = (store / "made" / ".files").read_text().splitlines()
    kept = {
        name: (store / "made" / name).stat().as_info()["created"] for name in (line.split()[1] for line in before[1:])
    }
    assert kept
    convert(source, store / "made", form, OPTIONS)
    assert files_of(store / "made") == files_of(tmp_path / "made")
    assert kept == {name: created(store / "made" / name) for name in kept}
    with pytest.raises(CheckpointError, match="made: exists; give another TARGET"):
        convert(source, store / "made", form, OPTIONS)


def test_what_was_left_of_another_task_is_removed(tmp_path, store):
    source = make(tmp_path / "source", 1, SHAPE)
    Counted.fail_behind = 2
    with pytest.raises(CheckpointError, match="the store is gone"):
        convert(source, store / "made", "hf", OPTIONS)
    Counted.fail_behind = None
    convert(source, tmp_path / "made", "meta", OPTIONS)
    convert(source, store / "made", "meta", OPTIONS)
    assert files_of(store / "made") == files_of(tmp_path / "made")


def test_a_killed_conversion_goes_on_where_it_was(tmp_path):
    source = make(tmp_path / "source", 1, replace(LARGE, layers=3))
    words = [str(source), f"local://{tmp_path}/made", "--to", "hf", "--shard-size", "0.0005"]
    command = [sys.executable, str(TOOLS / "convert_checkpoint.py"), *words]
    journal = tmp_path / "made" / ".files"
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (journal.is_file() and journal.read_text().count("\n") > 2):
        assert child.poll() is None
    child.kill()
    assert child.wait() == -signal.SIGKILL
    finished = [line.split()[1] for line in journal.read_text().splitlines()[1:]]
    before = {name: (tmp_path / "made" / name).stat().st_mtime_ns for name in finished}
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert before == {name: (tmp_path / "made" / name).stat().st_mtime_ns for name in finished}
    convert(source, tmp_path / "here", "hf", WriteOptions(shard_bytes=500_000))
    assert files_of(tmp_path / "made") == files_of(tmp_path / "here")


class _Ranges(SimpleHTTPRequestHandler):
    """Serves files, and ranges of them."""

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not wanted or not path.is_file():
            super().do_GET()
            return
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        content = path.read_bytes()
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


def test_a_checkpoint_on_a_web_server_is_read(tmp_path, capsys):
    make(tmp_path / "served" / "source", 1, SHAPE)
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: _Ranges(*given, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/source"
        assert main(["convert", url, str(tmp_path / "made"), "--to", "hf"]) == 0
        assert main(["inspect", url]) == 0
        assert f"{url}: hf" in capsys.readouterr().out
        assert main(["convert", f"{url}/nowhere", str(tmp_path / "other"), "--to", "hf"]) == 2
        assert "nowhere: no such folder" in capsys.readouterr().err
        assert main(["convert", url, f"{url}/new", "--to", "hf"]) == 2
        assert "new: could not be written (NotImplementedError" in capsys.readouterr().err
    finally:
        server.shutdown()
        server.server_close()
    there, here = (files_of(path) for path in (tmp_path / "made", tmp_path / "served" / "source"))
    assert there["model.safetensors"] == here["model.safetensors"]


def test_commands_take_urls(tmp_path, store, capsys):
    make(tmp_path / "a", 1, SHAPE)
    assert main(["convert", f"file://{tmp_path}/a", str(store / "a"), "--to", "megatron"]) == 0
    assert main(["mix", "--checkpoint", f"{store}/a=0.5", "--checkpoint", f"{store / 'a'}=0.5",
                 "--output", f"{store}/m"]) == 0  # fmt: skip
    assert main(["inspect", f"{store}/m", "--diff", f"{store}/a"]) == 0
    assert f"{store}/m: " in capsys.readouterr().out


def test_urls_that_nothing_reads_are_refused(tmp_path, monkeypatch, capsys):
    make(tmp_path / "a", 1, SHAPE)
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "nowhere://x"])
    assert "nowhere://x: nowhere:// is not known to fsspec; give a path, or a URL like s3://" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert main(["convert", str(tmp_path / "a"), "s3://bucket/model", "--to", "hf"]) == 2
    said = capsys.readouterr().err
    assert "s3://bucket/model: needs a package that is not installed; pip install 's3fs'" in said
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "s3://bucket/model"])
    assert "s3://bucket/model: is a URL; pip install 'megatron-sphinx[remote]' to use such" in capsys.readouterr().err


def test_what_cannot_be_reached_is_said(store, monkeypatch, capsys):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(store.fs), "info", broken)
    monkeypatch.setattr(type(store.fs), "isdir", broken)
    assert main(["inspect", str(store)]) == 2
    assert "cannot be reached (RuntimeError: no credentials); check the URL, and fsspec's settings" in (
        capsys.readouterr().err
    )


def test_ranges_come_as_expected_and_otherwise(store):
    content = random.Random(3).randbytes(3 * BLOCK + 11)
    (store / "x").parent.mkdir(parents=True, exist_ok=True)
    (store / "x").write_bytes(content)
    file = RemoteFile(store / "x")
    assert is_remote(store)
    assert file.size == len(content)
    ranges = [(5, BLOCK + 70), (2 * BLOCK, 3 * BLOCK + 11), (7, 7)]
    for is_expected in (True, False):
        file.expect(ranges if is_expected else [])
        for start, end in ranges:
            for place in range(start, end, 777_777):
                buffer = memoryview(bytearray(min(777_777, end - place)))
                file.read_into(buffer, place)
                assert buffer == content[place : place + len(buffer)]
    file.expect([(0, 100)])
    buffer = memoryview(bytearray(10))
    file.read_into(buffer, 50)
    assert buffer == content[50:60]
    with pytest.raises(OSError, match=f"1 bytes came of the 2 from byte {len(content) - 1} on"):
        file.read(len(content) - 1, 2)


def test_bytes_for_places_further_on_wait(store):
    store.mkdir(parents=True, exist_ok=True)
    sink = RemoteSink(store / "x")
    sink.write_at(b"def", 3)
    sink.write_at(b"", 9)
    sink.write_at(b"g", 6)
    sink.write_at(b"abc", 0)
    sink.close()
    assert (store / "x").read_bytes() == b"abcdefg"
