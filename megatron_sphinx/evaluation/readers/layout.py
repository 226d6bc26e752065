"""The usual layout of a benchmark: rows in one file or one a part, each with its picture, question and answers."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from megatron_sphinx.evaluation.readers.rows import Row, checked, first_there, located, rows_of
from megatron_sphinx.evaluation.samples import Sample

Texts = Callable[[Row], tuple[str, ...]]
_OPTION = re.compile(r"\(([a-z])\)\s*(.*?)(?=\s*\([a-z]\)|$)", re.DOTALL)


def nothing(row: Row) -> tuple[str, ...]:
    """Return no answers: only a server or a judge has them."""
    return ()


def one(name: str) -> Texts:
    """Make what reads the one answer in a field."""
    return lambda row: (row.text(name),)


def several(name: str) -> Texts:
    """Make what reads the answers in a field that is a list."""
    return lambda row: row.texts(name)


def where_given(read: Texts, name: str) -> Texts:
    """Make what reads answers as another does where a field is there, else none."""
    return lambda row: read(row) if row.has(name) else ()


def answers_of_ten(name: str) -> Texts:
    """Make what reads the answers of VQA's ten people: a list of objects that have `answer`, or of texts."""
    return lambda row: tuple(row.within(name, each).text("answer" if isinstance(each, Mapping) else name)
                             for each in row.listed(name))  # fmt: skip


def word(name: str, words: Mapping[str, str]) -> Texts:
    """Make what reads a truth that the file has as a number or letter, and the model answers as a word.

    Args:
        name: the field.
        words: what each value stands for, by the value in small letters.
    """

    def read(row: Row) -> tuple[str, ...]:
        value = row.content.get(name)
        key = str(value).strip().lower()
        if key not in words:
            raise row.fault(f"no {name}: {value!r} is none of {', '.join(words)}")
        return (words[key],)

    return read


def cells(names: Sequence[str]) -> Texts:
    """Make what reads options that have a field each, of which those at the end may be empty.

    Args:
        names: of the fields, in their order.
    """

    def read(row: Row) -> tuple[str, ...]:
        found = [row.text(name, "") for name in names]
        while found and not found[-1].strip():
            found.pop()
        if not found or not all(option.strip() for option in found):
            raise row.fault(f"an option is missing: {', '.join(names)} hold {found!r}")
        return tuple(found)

    return read


def in_brackets(name: str) -> Texts:
    """Make what reads options that stand in one text, each behind its letter in brackets: `(a) Open (b) Closed`."""

    def read(row: Row) -> tuple[str, ...]:
        found = _OPTION.findall(row.text(name))
        if [letter for letter, _ in found] != list("abcdefghijklmnopqrstuvwxyz"[: len(found)]) or not found:
            raise row.fault(f"no {name}: {row.text(name)!r} has no options behind (a), (b)")
        return tuple(option.strip() for _, option in found)

    return read


def letter_in(name: str) -> Callable[[Row, tuple[str, ...]], str]:
    """Make what reads the letter of the right option, with or without brackets; none where the field is empty."""

    def read(row: Row, choices: tuple[str, ...]) -> str:
        letter = row.text(name, "").strip("() .").upper()
        if letter and letter not in ascii_uppercase[: len(choices)]:
            raise row.fault(f"no {name}: {letter!r} is the letter of none of {len(choices)} options")
        return letter

    return read


def place_in(name: str) -> Callable[[Row, tuple[str, ...]], str]:
    """Make what reads the number of the right option, counted from 0, and returns its letter."""

    def read(row: Row, choices: tuple[str, ...]) -> str:
        number = row.integer(name)
        if not 0 <= number < len(choices):
            raise row.fault(f"no {name}: {number} is none of {len(choices)} options, counted from 0")
        return ascii_uppercase[number]

    return read


def same_as(name: str) -> Callable[[Row, tuple[str, ...]], str]:
    """Make what reads the right option as it is written among the options, and returns its letter."""

    def read(row: Row, choices: tuple[str, ...]) -> str:
        text = row.text(name)
        if text not in choices:
            raise row.fault(f"no {name}: {text!r} is none of its options {list(choices)!r}")
        return ascii_uppercase[choices.index(text)]

    return read


def option_lines(choices: Sequence[str]) -> str:
    """Write options, a line each, behind their letters; source: eval_mm/annotations/MMMU_val_single.json of SPHINX."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, choices, strict=False))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The usual layout of a benchmark's files.

    Attributes:
        parts: the files, by the name of the part that each is; one whose part has no name is the whole. A path may be
            several with ` or ` between them, as in `OfficialFile`.
        rows: the key under which the rows of a JSON file are; empty where the file is a list or object of them.
        id: what a sample is called, with fields of the row in braces; `key`, `number` and `part` may stand there, too.
        picture: the name of its picture, likewise.
        folders: where pictures may be, of which the first that is there is taken.
        picture_root: a folder that names of pictures may begin with, for which `folders` stand; empty for none.
        is_text_only: says of a row that it has no picture; None where all have.
        fields: places of the prompt, and which field of the row stands there, `?` behind it where it may be missing.
        answers: reads the right answers.
        choices: reads the options; None where questions have none. Their lines are the place `options` of the prompt.
        right: reads the letter of the right option, which is then the answer; empty text where it is not told.
        group: reads what samples that count together have in common; None where there are no groups.
        categories: divisions, and the field that says the part, or what reads it; `part` is the part of the file.
        record: fields that are kept for metrics and submissions.
    """

    parts: Mapping[str, str]
    rows: str = ""
    id: str = "{key}"
    picture: str
    folders: tuple[str, ...] = ("",)
    picture_root: str = ""
    is_text_only: Callable[[Row], bool] | None = None
    fields: Mapping[str, str] = field(default_factory=lambda: {"question": "question"})
    answers: Texts = nothing
    choices: Texts | None = None
    right: Callable[[Row, tuple[str, ...]], str] | None = None
    group: Callable[[Row], str] | None = None
    categories: Mapping[str, str | Callable[[Row], str]] = field(default_factory=dict)
    record: tuple[str, ...] = ()

    def sample(self, row: Row, part: str, folder: Path) -> Sample:
        """Return the sample of a row.

        Args:
            row: of a file.
            part: of the benchmark that the file is.
            folder: where pictures are.
        """
        choices = self.choices(row) if self.choices else ()
        if len(choices) > len(ascii_uppercase):
            raise row.fault(f"too many options: there are {len(choices)}, and {len(ascii_uppercase)} letters")
        letter = self.right(row, choices) if self.right else ""
        is_text_only = self.is_text_only is not None and self.is_text_only(row)
        places = {
            place: row.text(name[:-1], "") if name.endswith("?") else row.filled(name)
            for place, name in self.fields.items()
        }
        name = row.formed(self.id, part=part)
        if not name:
            raise row.fault("no id: it is empty")
        return Sample(
            id=name,
            picture=None if is_text_only else row.path(self.picture, folder, self.picture_root),
            picture_id=f"no picture of {name}" if is_text_only else row.formed(self.picture),
            fields=places | {"options": option_lines(choices)} if choices else places,
            answers=(letter,) if letter else () if self.right else self.answers(row),
            choices=choices,
            group=self.group(row) if self.group else "",
            categories=self._categories(row, part),
            record={name: row.content.get(name) for name in self.record},
        )

    def _categories(self, row: Row, part: str) -> dict[str, str]:
        """Return which part of each division a row is in; divisions that say nothing of it are left out."""
        found = {
            division: read(row) if callable(read) else part if read == "part" else row.text(read, "")
            for division, read in self.categories.items()
        }
        return {division: name for division, name in found.items() if name}


@checked
def read_layout(folder: Path, layout: Layout) -> Iterator[Sample]:
    """Yield the samples of a benchmark of the usual layout.

    Args:
        folder: that of the benchmark.
        layout: of its files.

    Raises:
        DataError: a file is missing, or has another layout.
    """
    pictures = first_there(folder, layout.folders)
    for part, name in layout.parts.items():
        for row in rows_of(located(folder, name), layout.rows):
            yield layout.sample(row, part, pictures)
