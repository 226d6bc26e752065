"""Conversations: how they come in, what text they become, and which of its tokens are learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.files import is_url
from megatron_sphinx.data.template import STOP, SYSTEM
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.texts import check_text

IMAGE_TOKEN = "<image>"  # where data says that the image stands
_OTHER_MEDIA = ("video", "videos", "audio", "audios")  # keys
_MOST_SHOWN = 80  # characters of what cannot be used
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn.

    Attributes:
        turns: (question, answer).
        image: path of the picture that they are about; None where there is none.
        system: what stands before the first question.
    """

    turns: tuple[tuple[str, str], ...]
    image: str | None = None
    system: str = SYSTEM

    def text(self) -> tuple[str, list[tuple[int, int]]]:
        """Return the whole as text, and the characters of each answer and the stop string behind it, as (begin, end).

        Source: conv_v1_2 of the released accessory/data/conversation/lib.py.
        """
        text, answers = _head(self.system), []
        for question, answer in self.turns:
            text += _asked(question)
            begin = len(text) + 1
            text += f" {answer}{STOP}"
            answers.append((begin, len(text)))
        return text, answers

    def prompt(self, question: str) -> str:
        """Return the text from which an answer to one more question is generated."""
        return self.text()[0] + _asked(question)

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], NDArray[np.bool_]]:
        """Return the token ids of the whole, without BOS and EOS, and for each whether it belongs to an answer.

        Tokens are found by the characters that they stand for. The space before an answer belongs to it, whether it is
        a token by itself or the beginning of one: a prompt ends before it, so a model has to generate it.
        """
        text, answers = self.text()
        ids, spans = tokenizer.encode_with_spans(text)
        begin, end = np.array(spans, np.int64).reshape(-1, 2).T
        is_answer = np.zeros(len(ids), np.bool_)
        for first, last in answers:
            is_answer |= (begin < last) & (end >= first)
        return ids, is_answer


def _head(system: str) -> str:
    return f"{system}\n{STOP}"


def _asked(question: str) -> str:
    return f" Human: {question}{STOP} Assistant:"


def parse(item: Any) -> Conversation:
    """Return the conversation that a JSON file has in its form.

    Args:
        item: `{"image": path, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}`,
            without `image` where there is none; it may be a list of one, and be called `images`. A first turn may be
            from `system`. `<image>` in a text is left out: the image always stands before the text.

    Raises:
        DataError: the conversation cannot be used; the message says why.
    """
    if not isinstance(item, dict) or not isinstance(item.get("conversations"), list):
        raise DataError("no conversations: must be an object with a list of that name")
    image = _image_of(item)
    said = [_turn(turn) for turn in item["conversations"]]
    system = said.pop(0)[1] if said and said[0][0] == "system" else SYSTEM
    if not said or [role for role, _ in said] != ["human", "gpt"] * (len(said) // 2):
        raise DataError(f"turns out of order: {' '.join(role for role, _ in said)}")
    texts = [text for _, text in said]
    if not all(texts):
        raise DataError(f"empty text: turn {texts.index('') + 1}")
    if any(STOP in answer for answer in texts[1::2]):
        raise DataError("the stop string is in an answer: generation would end there; write its headings otherwise")
    _check_image_tokens([turn["value"] for turn in item["conversations"]], image)
    return Conversation(_pairs(texts), image, system)


def _pairs(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _image_of(item: Mapping[str, Any]) -> str | None:
    """Return the path of the one image that a conversation is about; None where it is about none.

    Raises:
        DataError: it is about several, about something else than images, or what should be a path is none.
    """
    for key in _OTHER_MEDIA:
        if item.get(key):
            raise DataError(f"{key} instead of an image: {_shown(item[key])}")
    values = [item[key] for key in ("image", "images") if item.get(key) not in (None, [])]
    given = [value if isinstance(value, list) else [value] for value in values]
    paths: list[Any] = given[0] if given else []
    if len(given) == 2 and given[0] != given[1]:
        paths = given[0] + given[1]
    if len(paths) > 1:
        raise DataError(f"several images: {len(paths)} are given; a conversation is about one, or about none")
    if not paths:
        return None
    if not (isinstance(paths[0], str) and paths[0]):
        raise DataError(f"image is no path: {paths[0]!r:.{_MOST_SHOWN}}")
    if is_url(paths[0]) or paths[0].startswith("data:"):
        raise DataError(f"image is a URL: {_shown(paths[0])}; download it, and give its path")
    return paths[0]


def _check_image_tokens(texts: Sequence[str], image: str | None) -> None:
    """Raise DataError where texts speak of more images than there are, or of something else."""
    count = sum(text.count(IMAGE_TOKEN) for text in texts)
    if count and image is None:
        raise DataError(f"no image: the text has {IMAGE_TOKEN}, but no image is given")
    if count > 1:
        raise DataError(f"several images: {IMAGE_TOKEN} is there {count} times, but one image is given")
    for token in ("<video>", "<audio>"):
        if any(token in text for text in texts):
            raise DataError(f"{token} instead of an image: it is in the text")


def _turn(turn: Any) -> tuple[str, str]:
    """Return role and text of a turn; raise DataError where it cannot be used."""
    role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if not isinstance(text, str):
        raise DataError(f"a turn without text: {_shown(turn)}")
    if not isinstance(role, str) or (role != "system" and role not in _ROLES):
        raise DataError(f"unknown role: {_shown(role)}")
    check_text(text, "text")
    return _ROLES.get(role, "system"), text.replace(IMAGE_TOKEN, "").strip()


def _shown(value: object) -> str:
    """Return the beginning of what stands where something else should, for a message."""
    return str(value)[:_MOST_SHOWN]
