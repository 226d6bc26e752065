"""YAML and JSON: what is read, and what is refused at once, in one line, in little memory."""

import os
import random
import re
import resource
import time
from pathlib import Path

import pytest
from mutations import mutated

from megatron_sphinx import config as configuration
from megatron_sphinx.errors import ConfigError, SphinxError, shortened
from megatron_sphinx.parsing import ParseError, parse_json, parse_yaml, read_json, read_yaml

DEMO = Path(__file__).parents[1] / "examples" / "demo.yaml"
SECONDS = 2.0  # one, and as much again for a machine that is busy


def bomb(kind: str) -> str:
    """Nine aliases of nine aliases of nine ..., in lists or by merging."""
    first, inner = ("[x, x, x, x]", "[{}]") if kind == "list" else ("{{k: 1}}", "{{<<: [{}]}}")
    lines = [f"a0: &a0 {first}".replace("{{", "{").replace("}}", "}")]
    for level in range(1, 12):
        aliases = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {inner.replace('{{', '{').replace('}}', '}').replace('{}', aliases)}")
    return "\n".join(lines)


REFUSED = {
    "bomb": (bomb("list"), r"line \d+: with its aliases it has more than 20,000 values; write out what is needed"),
    "merges": (bomb("merge"), r"line \d+: with its aliases it has more than 20,000 values"),
    "in a known key": (f"{bomb('list')}\nrun: {{folder: *a11}}", r"with its aliases it has more than"),
    "itself": ("run: &a {folder: *a}", r"line 1: the alias in run\.folder leads to what it is part of"),
    "twice": (
        "run:\n  seed: 1\n  folder: x\n  seed: 2\n",
        r"line 4: run\.seed is given twice, first in line 2; remove",
    ),
    "sections twice": ("run: {}\ndata: {}\nrun: {}", r"line 3: run is given twice, first in line 1"),
    "deep lists": ("[" * 200_000, "nesting depth"),
    "deep mappings": ("{a: " * 50_000, "nest"),
    "deep dashes": ("- " * 3000, "line 1: is nested deeper than 40 levels"),
    "deep keys": ("? " * 3000, "line 1: is nested deeper than 40 levels"),
    "tab": ("run:\n\tseed: 1", "line 2: not YAML: it is indented by a tab; use spaces"),
    "control": ("run:\n  seed: \x07", r"line 2: holds the character U\+0007, which is not of YAML; remove it"),
    "long": ("- a\n" * 200_000, "it has more than 20,000 values"),
    "digits": (f"run: {{seed: {'9' * 5000}}}", r"line 1: the number of run\.seed has more than 400 digits"),
    "kind": ("run: !!python/object:os.system {}", r"of run is no kind of value here; leave it out"),
    "set": ("run: !!set {a, b}", r"of run is no kind of value here"),
    "not that kind": ("run: {seed: !!int many}", "line 1: many is no int"),
    "key": ("run: {}\non: 3", "line 2: the key on is no text; write it in quotes"),
    "number": ("run: {3: 4}", "line 1: the key 3 in run is no text; write it in quotes"),
    "list as key": ("? [a]\n: b", "line 1: the key .* is no text"),
    "documents": ("run: {}\n---\nrun: {}", "line 2: not YAML: .*another document"),
    "alias": ("run: *nothing", "line 1: not YAML: found undefined alias"),
    "merge": ("run: {<<: 3}", "line 1: << in run must name mappings"),
    "quotes": ("run: 'x", "line 1: not YAML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_yaml_is_refused_in_one_line_at_once(case, tmp_path):
    text, message = REFUSED[case]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=message) as raised:
        configuration.load(file)
    assert time.monotonic() - begin < SECONDS
    assert str(raised.value).startswith(f"{file}: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: {folder: caf\u00e9}\n".encode("latin-1"), r"line 1: byte 17 \(0xe9\) is not UTF-8; save it as UTF-8"),
        ("a: 1\nb: \u00e9\n".encode("cp1252"), r"line 2: byte 8 \(0xe9\) is not UTF-8"),
        ("run: {}".encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        ("run: {}".encode("utf-16-be"), "is in UTF-16; save it as UTF-8"),
        ("run: {}".encode("utf-16-le"), "is in UTF-16; save it as UTF-8"),
        (b"#" * (2**20 + 1), r"has more than 1,048,576 bytes, more than such a file can need"),
    ],
    ids=["latin-1", "cp1252", "utf-16", "utf-16-be", "utf-16-le", "huge"],
)
def test_files_in_another_encoding_or_too_large_are_refused(content, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        configuration.load(file)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"is no regular file, and could be waited for without end"):
        configuration.load(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"Is a directory; give the path of a YAML file"):
        configuration.load(tmp_path)
    with pytest.raises(ConfigError, match=r"no file can have this name"):
        configuration.load(Path("a\0b"))
    with pytest.raises(ConfigError, match=r"has more than 1,048,576 bytes"):
        configuration.load(Path("/dev/zero"))


def test_a_byte_order_mark_of_utf_8_does_not_matter(tmp_path):
    (tmp_path / "run.yaml").write_bytes("\ufeffa: \u00e9".encode())
    assert read_yaml(tmp_path / "run.yaml") == {"a": "\u00e9"}


def test_anchors_are_copied_and_merges_laid_below(tmp_path):
    values = parse_yaml("a: &a {x: 1, y: 2}\nb: {y: 3, <<: *a}\nc: {<<: [{y: 5}, *a]}\nd: *a")
    assert values == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 5}, "d": {"x": 1, "y": 2}}
    values["d"]["x"] = 9
    assert values["a"]["x"] == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-3", -3), ("0x10", 16), ("1_000", 1000), ("0", 0), ("1.5", 1.5), ("1.0e-5", 1e-5), (".5", 0.5),
        ("010", "010"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("1e3", "1e3"), ("true", True), ("no", False),
        ("~", None), ("null", None), ("", None), ("'1'", "1"), ("-.inf", float("-inf")),
    ],
)  # fmt: skip
def test_single_values(text, value):
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a": 1, "b": 2, "a": 3}', "the key a is given twice"),
        (f'{{"a": {"9" * 5000}}}', "not JSON: .*digits"),
        ("{", "not JSON: "),
        ("", "not JSON: "),
        ("\x00", "not JSON: "),
    ],
    ids=["deep", "twice", "digits", "cut", "empty", "NUL"],
)
def test_json_is_refused_in_one_line(text, message):
    with pytest.raises(ParseError, match=message) as raised:
        parse_json(text)
    assert "\n" not in str(raised.value)


def test_json_too_large_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "index.json"
    with file.open("wb") as large:
        large.truncate(2**40)
    with pytest.raises(ParseError, match=r"has more than 1,000 bytes"):
        read_json(file, 1000)
    with pytest.raises(ParseError, match=r"has more than 67,108,864 bytes"):
        read_json(file)


def test_values_are_shortened_for_messages():
    assert shortened("a\nb\x00c\ud800") == "a b\\u0000c\\ud800"
    assert len(shortened("x" * 10_000)) == 200
    assert shortened(10**5000) == "a number with thousands of digits"


def fuzz_configurations(count: int, folder: Path, seed: int) -> None:
    rng, examples = random.Random(seed), sorted(DEMO.parent.glob("*.yaml"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        file = folder / "mutated.yaml"
        file.write_bytes(mutated(rng.choice(examples).read_bytes(), rng))
        begin, said = time.monotonic(), ""
        try:
            configuration.load(file)
        except SphinxError as error:
            said = str(error)
        assert not re.search(r"[\x00-\x1f]", said)
        assert time.monotonic() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "KiB"


def test_mutated_configurations_are_read_or_refused(tmp_path, seed):
    fuzz_configurations(60, tmp_path, seed)


@pytest.mark.fuzz
def test_many_mutated_configurations_are_read_or_refused(tmp_path, seed):
    fuzz_configurations(2000, tmp_path, seed)
