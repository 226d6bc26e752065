"""Recognition as text on Fashion-MNIST: the data of `make classes`, made of a package that the test writes."""

import gzip
import json
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.evaluation.benchmarks.registry import named

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch, capsys):
    """`run_example(name, *args)` runs a program of examples/: its status, and what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        return runpy.run_path(str(EXAMPLES / name))["main"](), *capsys.readouterr()

    return run


@pytest.fixture
def package(tmp_path):
    """The files of the package, with 60 pictures in each part; a picture's brightness is its class."""
    place = tmp_path / "package" / "usr/share/datasets/fashion-mnist"
    place.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = np.arange(60, dtype=np.uint8) % 10
        pictures = np.broadcast_to(labels[:, None, None] * 20, (60, 28, 28)).astype(np.uint8)
        for name, head, content in (
            ("images-idx3", struct.pack(">4i", 2051, 60, 28, 28), pictures),
            ("labels-idx1", struct.pack(">2i", 2049, 60), labels),
        ):
            (place / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(head + content.tobytes()))
    return tmp_path / "package"


def test_the_data(run_example, package, tmp_path):
    folder = tmp_path / "classes"
    args = ("classes_data.py", folder, "--package", package, "--train", 50, "--test", 20)
    said = (0, f"{folder}: 50 pictures of 10 classes to train on, 20 held out\n", "")
    assert run_example("classes_data.py", *args[1:]) == said
    assert run_example(*args) == said  # there already
    tokenizer, index = Tokenizer(folder / "tokenizer.model"), SampleIndex([folder / "conversations"], "conversations")
    index.check(tokenizer)
    vocabulary = yaml.safe_load((EXAMPLES / "classes.yaml").read_text())["model"]["vocabulary"]
    assert tokenizer.identity.vocabulary <= vocabulary
    learned = set()
    for sample in range(50):
        tokens = index.caption(sample)
        answer = tokens[index.is_target(sample, len(tokens))[:-1]].tolist()
        learned.add(tokenizer.decode(answer))
    names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    assert {text.strip() for text in learned} == {f"This is a {name}\n###" for name in names}
    samples = list(named("classes").samples(folder / "test"))
    assert len(samples) == 20
    assert set(samples[0].choices) == set(names)
    for sample in samples:
        shade = np.asarray(runpy.run_path(str(EXAMPLES / "classes_data.py"))["Image"].open(sample.picture)).mean()
        assert names[round((255 - shade) / 20)] == sample.categories["class"]
    dialogs = json.loads((folder / "dialogs.json").read_text())
    assert len(dialogs) == 50


def test_without_the_tools_of_debian_it_says_so(run_example, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, error = run_example("classes_data.py", tmp_path / "classes")
    assert status == 2
    assert error.startswith("classes_data.py: apt-get: not found; run this on Debian")
    assert not (tmp_path / "classes" / "prepared.txt").exists()
