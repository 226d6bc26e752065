"""README and docs/: nothing in them is out of date that a program can know.

Links lead somewhere, files and keys exist, commands are taken by the program that they name, and each kind of command
is run by a test or a target of CI, which `RUN_BY` names.
"""

import argparse
import ast
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_sphinx import config_reference
from megatron_sphinx.__main__ import main
from megatron_sphinx.config import Config, presets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = {key.name: key for key in config_reference.keys_of(Config)}
SECTIONS = {name.partition(".")[0] for name in KEYS}
PROGRAMS = (["megatron-sphinx"], ["python", "-m", "megatron_sphinx"])
GROUPS = ("plan", "prepare", "cascade")  # commands that are followed by a kind
# Files whose names look like keys.
NO_KEYS = {"config.yaml", "config.<number>.yaml", "config.py", "loss.png"}

# Where each kind of command in a fenced block is run: words that a file of tests/ or .ci/run holds, and nothing else
# does. A target of make that trains for minutes is run there by its programs, with few steps; the Makefile's own lines
# are parsed below.
RUN_BY = {
    "make demo": r'run_example\("demo_evaluate\.py"',
    "make smol": r'"examples" / "smol\.py"',
    "make classes": r'run_example\("classes_data\.py"',
    "make vqa": r'run_example\("vqa_evaluate\.py"',
    "make evaluate": r'run_example\("evaluate\.py"',
    "make test": r"^(timed )?make test$",
    "megatron-sphinx doctor": r'"doctor"',
    "megatron-sphinx train": r'"train", str\(config\), "--check"',
    "megatron-sphinx prepare pairs": r'"prepare", "pairs"|"prepare_pairs(\.py)?"',
    "megatron-sphinx prepare text": r'"prepare", "text"|"prepare_text(\.py)?"',
    "megatron-sphinx prepare conversations": r'"prepare", "conversations"|"prepare_conversations(\.py)?"',
    "megatron-sphinx prepare tasks": r'"prepare", "tasks"|"build_conversations(\.py)?"',
    "megatron-sphinx prepare ocr": r'"prepare", "ocr"|"prepare_ocr(\.py)?"',
    "megatron-sphinx prepare som": r'"prepare", "som"|"prepare_som(\.py)?"',
    "megatron-sphinx plan sizes": r"def test_commands_that_take_no_time_do_what_they_say",
    "megatron-sphinx plan layouts": r"def test_commands_that_take_no_time_do_what_they_say",
    "megatron-sphinx plan step": r'"plan", (str\(config\)|"step").*"--step"',
    "megatron-sphinx plan dry-run": r'"dry-run"|"--dry-run"',
    "megatron-sphinx plan calibrate": r'"--calibrate"|"calibrate"',
    "megatron-sphinx plan published": r'"--published"|"published"',
    "megatron-sphinx convert": r'"convert"|"convert_checkpoint(\.py)?"',
    "megatron-sphinx export-embeddings": r'"export-embeddings"',
    "megatron-sphinx mix": r'"mix"|"interpolate_weights(\.py)?"',
    "megatron-sphinx inspect": r'"inspect"|"inspect_checkpoint(\.py)?"',
    "megatron-sphinx benchmark": r'"benchmark", str\(config\)',
    "megatron-sphinx gpu-check": r'"gpu-check"',
    "megatron-sphinx chat": r'"chat", checkpoint',
    "megatron-sphinx generate": r'"generate", checkpoint',
    "megatron-sphinx serve": r'"serve", checkpoint',
    "megatron-sphinx demo": r'"megatron_sphinx", "demo"',
    "megatron-sphinx evaluate": r'"evaluate", "pope"',
    "megatron-sphinx experts": r'"experts", str\(run\.folder\)',
    "python examples/demo_experts.py": r'run_example\("demo_experts\.py"',
    "megatron-sphinx judge": r'"judge", str\(folder\)',
    "megatron-sphinx cascade segment": r'cascade\("segment"',
    "megatron-sphinx cascade inpaint": r'cascade\("inpaint"',
    "megatron-sphinx cascade describe": r'cascade\("describe"',
    "megatron-sphinx cascade video": r'cascade\("video"',
    "megatron-sphinx report": r'"report"|"benchmark_report(\.py)?"',
    "python tools/compare/step.py": r'"compare" / "step\.py"',
    "torchrun": r"torch\.distributed\.run|torchrun",
    "slurm/train.sbatch": r'"slurm" / "train\.sbatch"',
    "slurm/chain.sh": r'"slurm" / "chain\.sh"',
    "slurm/evaluate.sbatch": r'"slurm" / "evaluate\.sbatch"',
    "slurm/benchmark.sh": r'"slurm" / "benchmark\.sh"',
}


@dataclass(frozen=True)
class Command:
    """A command that a page shows.

    Attributes:
        page: the name of the page.
        words: the command, without settings of the environment before it.
        is_fenced: whether it stands in a fenced block of shell, to be copied, or inside a sentence.
    """

    page: str
    words: tuple[str, ...]
    is_fenced: bool

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"

    @property
    def kind(self) -> str:
        """What `RUN_BY` calls it: the program, with its subcommands."""
        words = list(self.words)
        if words[0] in ("sbatch", "torchrun"):
            return next((word for word in words if word.startswith("slurm/")), words[0])
        for program in PROGRAMS:
            if words[: len(program)] == program:
                words = ["megatron-sphinx", *words[len(program) :]]
        has_parts = words[:1] == ["megatron-sphinx"] and words[1] in GROUPS
        return words[0] if words[0].startswith("slurm/") else " ".join(words[: 3 if has_parts else 2])


def fenced_blocks(text: str, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in one of these languages."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield block


def commands() -> Iterator[Command]:
    """Every command of every page, in fenced blocks and in sentences."""
    programs = ("make ", "megatron-sphinx ", "python -m megatron_sphinx ", "pip install ")
    for page in PAGES:
        text = page.read_text()
        for block in fenced_blocks(text, "sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield Command(page.name, tuple(words), True)
        for code in inline_code(text):
            if code.startswith(programs):
                yield Command(page.name, tuple(shlex.split(code)), False)


def inline_code(text: str) -> list[str]:
    """What stands between backticks in a page's sentences."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


class Parsed(BaseException):
    """Ends a program as soon as its parser has taken its arguments; no program catches it."""


@pytest.fixture
def parse(monkeypatch, capsys):
    """`parse(program, *words)` lets a program take arguments and do nothing; fails where it refuses them.

    The program is megatron-sphinx, which is called by its `main`, or the path of a file.
    """
    parse_known_args = argparse.ArgumentParser.parse_known_args
    depth = 0

    def parse_only(self, args=None, namespace=None):
        nonlocal depth
        depth += 1
        try:
            taken, rest = parse_known_args(self, args, namespace)
        finally:
            depth -= 1
        if depth:  # a subcommand's parser, which the program's own calls
            return taken, rest
        overrides = getattr(taken, "overrides", None)
        if overrides is None and rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if refused := [word for word in [*(overrides or []), *rest] if word.startswith("-") or "=" not in word]:
            self.error(f"no overrides: {' '.join(refused)}")
        raise Parsed

    def run(program: str, *words: str) -> None:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
        monkeypatch.setattr(sys, "argv", [program, *words])
        try:
            if program == "megatron-sphinx":
                main(list(words))
            else:
                monkeypatch.syspath_prepend(str((ROOT / program).parent))
                runpy.run_path(str(ROOT / program), run_name="__main__")
        except Parsed:
            return
        except SystemExit as end:
            if end.code:  # --help ends with 0
                pytest.fail(capsys.readouterr().err)
            return
        pytest.fail(f"{program} has not parsed its arguments")

    return run


def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z][a-z0-9_]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_words(words: list[str]) -> None:
    """Check that configurations named in a command exist, and that its overrides are known keys."""
    for word in words:
        if re.fullmatch(r"(examples|slurm|tools|tests)/[\w/]+\.\w+", word):
            assert (ROOT / word).exists(), f"{word} does not exist"
        if override := re.match(r"(\w+\.[\w.]+)=", word):
            assert is_key(override.group(1)), f"{override.group(1)} is no key"
        if re.fullmatch(r"sphinx_\w+", word):
            assert word in presets(), f"{word} is no preset"


def is_key(name: str) -> bool:
    """Whether a dotted name is a key, or a section's list of which it names an item."""
    return re.sub(r"\.\d+(?=\.|$)", ".<n>", name) in KEYS


# ---------------------------------------------------------------------------------------------------------------------
# pages


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading; known: {sorted(anchors(target))}"


def test_every_page_is_linked_from_the_readme():
    links = set(re.findall(r"\]\(docs/(\w+\.md)", (ROOT / "README.md").read_text()))
    assert links == {page.name for page in PAGES} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_keys_in_sentences_exist(page):
    text = page.read_text()
    for code in inline_code(text):
        if re.fullmatch(r"(megatron_sphinx|tools|tests|examples|slurm|docs)/[\w./]*", code):
            assert (ROOT / code).exists(), f"{page.name}: {code} does not exist"
        name = re.match(r"(\w+)\.(\w+)[\w.<>]*(?==|$)", code)
        if name and name.group(1) in SECTIONS and name.group(0) not in NO_KEYS:
            assert is_key(name.group(0)) or name.group(0) in KEYS, f"{page.name}: {code} is no key"


def test_every_key_of_the_metrics_is_written_somewhere():
    page = (ROOT / "docs" / "run_folder.md").read_text().partition("## A line of metrics.jsonl")[2]
    keys = {key for line in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for key in re.findall(r"`(\w+)`", line)}
    code = "\n".join(path.read_text() for path in (ROOT / "megatron_sphinx").rglob("*.py"))
    assert len(keys) > 25
    assert {key for key in keys if f'"{key}"' not in code and not key.startswith("expert_load_")} == set()


def test_no_number_of_the_readme_is_said_again():
    """A result that is printed in two places is mended in one."""
    seen: dict[str, str] = {}
    for page in PAGES:
        for block in fenced_blocks(page.read_text(), ""):
            for line in block.splitlines():
                if len(re.findall(r"\d", line)) >= 6:
                    assert seen.setdefault(line.strip(), page.name) == page.name, f"{line} is also in {seen[line]}"


def test_the_package_describes_itself_by_the_readme():
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    description = next(word.value for call in calls for word in call.keywords if word.arg == "long_description")
    assert "README.md" in ast.unparse(description)


# ---------------------------------------------------------------------------------------------------------------------
# commands


@pytest.mark.parametrize("command", list(commands()), ids=str)
def test_commands_are_taken_by_the_programs_that_they_name(command, parse):
    words = list(command.words)
    check_words(words)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    for program in PROGRAMS:
        if words[: len(program)] == program:
            arguments = words[len(program) :]
            return parse("megatron-sphinx", *arguments, *([] if has_arguments(arguments) else ["--help"]))
    if words[0] == "python":
        return parse(*words[1:])
    if words[0] == "make":
        assert set(words[1:2]) <= targets(), f"the Makefile has no {words[1]}"
        return None
    if words[:2] == ["pip", "install"]:
        asked = set(re.findall(r"\[(\w+)\]", words[2]))
        assert asked <= set(re.findall(r'^ {8}"(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE))
        return None
    script = next(word for word in words if word.startswith("slurm/"))
    assert (ROOT / script).exists()
    assert words[0] in ("sbatch", script), f"what is {words[0]}?"
    return None


def has_arguments(words: list[str]) -> bool:
    """Whether something stands behind the names of commands; in a sentence a command may stand alone."""
    return len(words) > (2 if words[0] in GROUPS else 1) or words[-1].startswith("-")


def test_every_kind_of_command_is_run_by_a_test_or_by_ci():
    kinds = {command.kind for command in commands() if command.is_fenced}
    assert kinds == set(RUN_BY)
    files = [*sorted((ROOT / "tests").glob("*.py")), ROOT / ".ci" / "run"]
    lines = "\n".join(line for file in files for line in file.read_text().splitlines() if not is_row_of_table(line))
    assert not [kind for kind, words in RUN_BY.items() if not re.search(words, lines, re.MULTILINE)]


def is_row_of_table(line: str) -> bool:
    """Whether a line is one of `RUN_BY` itself, which proves nothing."""
    return bool(re.match(r' {4}"[^"]+": r[\'"]', line))


@pytest.mark.parametrize(
    "command",
    [command for command in commands() if command.is_fenced
     and command.kind.removeprefix("megatron-sphinx plan ") in ("sizes", "layouts", "published")],
    ids=str,
)  # fmt: skip
def test_commands_that_take_no_time_do_what_they_say(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(list(command.words[1:])) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_the_makefile_calls_programs_with_arguments_that_they_take(parse):
    """The lines of the targets that train for minutes, parsed; what they do is tested with few steps."""
    names = ("demo", "demo_moe", "vqa", "evaluate", "figure7", "family", "benchmark", "skipping", "gpu")
    made = subprocess.run(
        ["make", "--dry-run", "--always-make", "--no-print-directory", *names],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    count = 0
    for line in made.stdout.replace("\\\n", " ").splitlines():
        if not line.startswith(".venv/bin/python"):
            continue
        words = [re.sub(r"\$\(.*\)", "1", word) for word in shlex.split(re.sub(r"\$\(cat [^)]*\)", "1", line))[1:]]
        if words[0] == "examples/launch.py":  # what follows is what it starts on every rank
            words = words[1:]
        check_words(words)
        count += 1
        if words[:2] == ["-m", "megatron_sphinx"]:
            parse("megatron-sphinx", *words[2:])
        elif words[0] != "-m":
            parse(*words)
    assert count > 20


# ---------------------------------------------------------------------------------------------------------------------
# the glossary


def glossary() -> list[tuple[str, str]]:
    """Each word of the glossary, and what it says of it."""
    text = (ROOT / "docs" / "glossary.md").read_text()
    return re.findall(r"^\* \*\*(.+?)\*\*: (.+)$", text, re.MULTILINE)


def test_the_glossary_is_in_order_and_in_sentences():
    words = [word for word, _ in glossary()]
    assert words == sorted(words)
    assert len(set(words)) == len(words) > 40
    assert [word for word, text in glossary() if not text.endswith(".") or len(text.split()) < 4] == []


def test_the_classes_of_the_glossary_exist():
    nodes = [
        node
        for path in (ROOT / "megatron_sphinx").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    text = (ROOT / "docs" / "glossary.md").read_text()
    named = {code for code in inline_code(text) if re.fullmatch(r"[A-Z]\w+", code)}
    assert len(named) >= 20
    assert named - {node.name for node in nodes} == set()


@pytest.mark.parametrize(
    ("target", "tier"),
    [("test", '-m "not slow and not fuzz and not gpu" tests/test_x.py'), ("test_slow", "-m slow "), ("test_all", "")],
)
def test_make_shares_tests_among_processes(target, tier):
    said = subprocess.run(
        ["make", "-n", target, "TESTS=tests/test_x.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = [line for line in said.stdout.splitlines() if " -m pytest " in line]
    assert re.search(r" --numprocesses=[1-9]\d* ", command)
    assert tier in command
    assert command.endswith("tests/test_x.py")
