"""What was said on the web page: as the server is sent it, and as the browser shows it, every sign escaped."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sphinx.generation.grounding import Grounding
from megatron_sphinx.serving.client import picture_part

_SIGNS = re.compile(r"[^\w\s]|_|(?<=\n)[ \t]+")  # whatever Markdown, HTML or TeX may take for its own


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: as it was asked.
        answer: as much as has come of it.
        groundings: boxes and points in the answer.
        note: what is to be said beside it: an error, that turns were left out, or that it was cut off.
        is_failed: whether an error came instead of the answer; such a turn is not sent again.
    """

    question: str
    answer: str = ""
    groundings: tuple[Grounding, ...] = ()
    note: str = ""
    is_failed: bool = False


def messages_of(turns: Sequence[Turn], picture: Path | None) -> list[dict[str, Any]]:
    """Return a chat in OpenAI's form, the picture before the first question; the last turn is to be answered.

    Args:
        turns: those before the last that have no answer are left out, as are those that failed.
        picture: its file; None for a chat about none.

    Raises:
        ServerError: the picture's file is not there any more.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns[:-1]:
        if turn.answer.strip() and not turn.is_failed:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    messages.append({"role": "user", "content": turns[-1].question})
    if picture is not None:
        messages[0]["content"] = [picture_part(picture), {"type": "text", "text": messages[0]["content"]}]
    return messages


def shown(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return a chat as the page shows it, the brackets of each answer in the colours of their boxes."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": escaped(turn.question)})
        if turn.answer or turn.note:
            note = f"<br><em>{escaped(turn.note)}</em>" if turn.note else ""
            messages.append({"role": "assistant", "content": _coloured(turn) + note})
    return messages


def escaped(text: str) -> str:
    """Write a text so that it is shown as it is: no sign of it is HTML, Markdown or TeX."""
    return _SIGNS.sub(lambda found: "".join(f"&#{ord(sign)};" for sign in found[0]), text)


def _coloured(turn: Turn) -> str:
    """Return an answer with its brackets in their colours."""
    parts, behind = [], 0
    for found in turn.groundings:
        if found.colour and behind <= found.begin < found.end <= len(turn.answer):
            bracket = escaped(turn.answer[found.begin : found.end])
            parts += [
                escaped(turn.answer[behind : found.begin]),
                f'<span style="color: {found.colour}">{bracket}</span>',
            ]
            behind = found.end
    return "".join([*parts, escaped(turn.answer[behind:])])
