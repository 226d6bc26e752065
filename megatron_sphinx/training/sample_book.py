"""samples.md: what a model answers to the same few questions, validation after validation; for TensorBoard as well."""

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from megatron_sphinx.errors import writing
from megatron_sphinx.training.lines import cut_back, read_lines

_AS_TEXT = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]~"} | {"|": "&#124;"})
_SIDE = 224  # pixels of the longer side of a picture that is shown


class Board(Protocol):
    """The part of TensorBoard's SummaryWriter that is written to."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int, *, dataformats: str) -> None:
        """Show a picture beside the others of its tag."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        """Show a text, which is Markdown."""


@dataclass(frozen=True)
class Shown:
    """A sample as it is shown to a reader.

    Attributes:
        name: of the sample, by its index and its number in that.
        picture: upright, RGB; None where there is none or it cannot be read.
        question: what is asked; empty where a caption is.
        truth: what the data has for an answer.
    """

    name: str
    picture: Image.Image | None
    question: str
    truth: str


class SampleBook:
    """Keeps the answers to the same questions, and writes them out anew after each validation.

    Args:
        folder: the run folder; samples.jsonl in it is cut back to the steps before `start`.
        start: first step of this process.
        samples: what is asked.
    """

    def __init__(self, folder: Path, start: int, samples: Sequence[Shown]) -> None:
        self._folder, self._samples = folder, samples
        self._lines = folder / "samples.jsonl"
        self._pictures = [self._thumbnail(sample.picture) for sample in samples]
        with writing(folder):
            cut_back(self._lines, start)
            (folder / "samples").mkdir(exist_ok=True)
            for number, picture in enumerate(self._pictures):
                if picture is not None:
                    picture.save(self._path(number))

    def write(self, step: int, answers: Sequence[str], board: Board) -> None:
        """Record the answers after a step.

        Args:
            step: number of the step that was done last.
            answers: in the order of the samples.
            board: where they are shown as well.

        Raises:
            FolderError: the disk is full.
        """
        with writing(self._folder):
            with self._lines.open("a") as file:
                file.write(json.dumps({"step": step, "answers": list(answers)}) + "\n")
            partial = self._folder / ".samples.md.partial"
            partial.write_text(self._page(), encoding="utf-8")
            os.replace(partial, self._folder / "samples.md")
            for number, (sample, picture, answer) in enumerate(
                zip(self._samples, self._pictures, answers, strict=True)
            ):
                if picture is not None:
                    board.add_image(f"sample {number}", np.asarray(picture), step, dataformats="HWC")
                parts = [f"**{word}** {_inline(text)}" for word, text in _words(sample, answer)]
                board.add_text(f"sample {number}", "\n\n".join(parts), step)

    def _page(self) -> str:
        """Lay out samples.md: each sample with its picture, and below it the answers so far, the newest first."""
        answers = {
            line["step"]: line["answers"] for line in read_lines(self._lines)
        }  # of one that is made again, the last
        page = ["# Answers to held-out samples", ""]
        for number, sample in enumerate(self._samples):
            page += [f"## {number}: {_inline(sample.name)}", ""]
            if self._pictures[number] is not None:
                page += [f"![]({self._path(number).relative_to(self._folder)})", ""]
            page += ["| | |", "|---|---|"]
            page += [f"| {word} | {_inline(text)} |" for word, text in _words(sample, None)]
            for step in sorted(answers, reverse=True):
                if number < len(answers[step]):
                    page.append(f"| step {step + 1} | {_inline(answers[step][number])} |")
            page.append("")
        return "\n".join(page)

    def _path(self, number: int) -> Path:
        """The file of a sample's picture."""
        return self._folder / "samples" / f"{number:03d}.png"

    @staticmethod
    def _thumbnail(picture: Image.Image | None) -> Image.Image | None:
        """Make a copy of a picture that is no larger than what is shown."""
        if picture is not None:
            picture = picture.copy()
            picture.thumbnail((_SIDE, _SIDE))
        return picture


def _words(sample: Shown, answer: str | None) -> list[tuple[str, str]]:
    """List what is shown of a sample, each text behind the word for it; nothing of what is not there."""
    words = [("question", sample.question), ("truth", sample.truth)]
    return [(word, text) for word, text in words if text] + ([("answer", answer)] if answer is not None else [])


def _inline(text: str) -> str:
    """Write any text as one line of a Markdown table, in which nothing of it is markup."""
    return "<br>".join(html.escape(line, quote=False).translate(_AS_TEXT) for line in text.splitlines())
