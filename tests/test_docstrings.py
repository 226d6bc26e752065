"""The rules of style that no linter checks, over the package, tools and examples: docstrings, sizes, repetition."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("megatron_sphinx", "tools", "examples") for path in (ROOT / folder).rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES, REPEATED_LINES, FEWEST_WORDS = 400, 60, 6, 4
RIDDLES = ("Of ", "The same", "See ", "As ")  # beginnings that send the reader to the signature, or elsewhere
ENDS = (".", "?", ":")


def room_of(path: Path) -> str:
    """The folder, or the file, of the package that a file belongs to; else `tools` or `examples`."""
    folder, name = path.relative_to(ROOT).parts[:2]
    return name.removesuffix(".py") if folder == "megatron_sphinx" else folder


ROOMS = sorted({room_of(path) for path in FILES})


def files_of(room: str) -> list[Path]:
    """The files of a room."""
    return [path for path in FILES if room_of(path) == room]


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(node: Documented, name: str, is_public: bool) -> Iterator[tuple[str, Documented, bool]]:
    """A module, class or function with all inside it: its dotted name, its node, and whether others may use it."""
    yield name, node, is_public
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Documented):
            inner = f"{name}.{child.name}" if name else child.name
            yield from documented(child, inner, is_public and not child.name.startswith("_") and is_open(node))


def is_open(node: Documented) -> bool:
    """Whether what stands inside is reached from outside: in a module or class, never in a function."""
    return not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def faults_of_docstring(text: str, *, is_public: bool) -> Iterator[str]:
    """What is wrong with a docstring."""
    summary = " ".join(text.split("\n\n")[0].split())
    if not summary.endswith(ENDS):
        yield "its first paragraph does not end with a period"
    if not text.rstrip().endswith((*ENDS, ")", "`", "]", "}", '"')):
        yield "its last line does not end with a period"
    if is_public and len(summary.split()) < FEWEST_WORDS:
        yield f"has fewer than {FEWEST_WORDS} words"
    if summary.startswith(RIDDLES):
        yield f"begins with {next(start for start in RIDDLES if summary.startswith(start)).strip()!r}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Reads the header of a file.", None),
        ("Reads the header of a file", "does not end with a period"),
        ("Reads a header.", "has fewer than 4 words"),
        ("Of a rank with these weights, the largest.", "begins with 'Of'"),
        ("The same from the number of tokens.", "begins with 'The same'"),
        ("See the module above for more.", "begins with 'See'"),
        ("As many as there are ranks.", "begins with 'As'"),
    ],
)
def test_the_rule_finds_what_it_is_for(text, fault):
    faults = list(faults_of_docstring(text, is_public=True))
    assert not faults if fault is None else any(fault in one for one in faults)


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_are_sentences_that_stand_alone(room):
    faults = []
    for path in files_of(room):
        for name, node, is_public in documented(ast.parse(path.read_text()), "", True):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {name}".rstrip()
            text = ast.get_docstring(node)
            if text is None:
                if isinstance(node, ast.Module):
                    faults.append(f"{place}: the module has no docstring")
                continue
            faults += [f"{place}: {fault}: {text.splitlines()[0]!r}" for fault in
                       faults_of_docstring(text, is_public=is_public)]  # fmt: skip
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("room", ROOMS)
def test_files_and_functions_are_small(room):
    faults = []
    for path in files_of(room):
        place, text = path.relative_to(ROOT), path.read_text()
        if (lines := len(text.splitlines())) > MOST_LINES:
            faults.append(f"{place}: {lines} lines, at most {MOST_LINES}")
        for name, node, _ in documented(ast.parse(text), "", True):
            if is_open(node):
                continue
            if (lines := node.end_lineno - node.lineno + 1) > MOST_FUNCTION_LINES:
                faults.append(f"{place}:{node.lineno} {name}: {lines} lines, at most {MOST_FUNCTION_LINES}")
    assert not faults, "\n".join(faults)


def code_lines(text: str) -> list[tuple[int, str]]:
    """The lines of a program that do something, each with its number: no imports, docstrings, comments or brackets."""
    tree = ast.parse(text)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    numbered = ((number, " ".join(line.split())) for number, line in enumerate(lines, 1) if number not in left_out)
    return [(number, line) for number, line in numbered if not re.fullmatch(r"[\s()\[\]{},:]*", line)]


def repetitions(programs: dict[str, str]) -> Iterator[str]:
    """Where a passage stands that stood before, in one program or in two; a longer passage is named once."""
    places: dict[tuple[str, ...], str] = {}
    for name, text in programs.items():
        lines, is_inside = code_lines(text), False
        for first in range(len(lines) - REPEATED_LINES + 1):
            window = lines[first : first + REPEATED_LINES]
            place = f"{name}:{window[0][0]}"
            earlier = places.setdefault(tuple(line for _, line in window), place)
            if earlier != place and not is_inside:
                yield f"{place} repeats {earlier}: {window[0][1]}"
            is_inside = earlier != place


def test_the_search_finds_a_passage_in_other_clothes():
    passage = [f"call({number})" for number in range(REPEATED_LINES)]
    first = "\n".join(["import a", *passage, "end()"])
    second = "\n".join(["begin()", "if x:", *(f"    {line}  # why\n\n    )" for line in passage)]).replace("    )", "")
    assert list(repetitions({"a": first, "b": second})) == ["b:3 repeats a:2: call(0)"]
    assert not list(repetitions({"a": first, "b": "\n".join(passage[1:])}))


def test_no_passage_stands_twice():
    repeated = list(repetitions({str(path.relative_to(ROOT)): path.read_text() for path in FILES}))
    assert not repeated, "\n".join(repeated)
