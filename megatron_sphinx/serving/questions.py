"""Questions of files: what is asked in a row, about which picture, and what of the row is written beside the answer."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_sphinx.data.files import is_url, open_file
from megatron_sphinx.data.images import MOST_BYTES
from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.generation.answering import Message
from megatron_sphinx.paths import inside
from megatron_sphinx.prepare.shards import file_content
from megatron_sphinx.prepare.template import IMAGE_TOKEN
from megatron_sphinx.serving.rows import Row, Source

IMAGE_KEYS = ("image", "images", "image_path", "url")
TEXT_KEYS = ("question", "prompt", "text")
PLACE = "{question}"  # in a prompt: where the question of a row goes
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w=.+-]+)*;base64,")


@dataclass(frozen=True)
class Asking:
    """How rows become questions.

    Attributes:
        prompt: what is asked about a row without a question; with `{question}` in it, what stands around each.
        system: what stands before the first question; empty for what the model has there.
        images: the folder that paths of pictures are relative to; None for that of the input.
        follow_links: whether links in that folder may lead out of it.
        has_urls: whether pictures may be read from URLs.
    """

    prompt: str = ""
    system: str = ""
    images: Path | None = None
    follow_links: bool = False
    has_urls: bool = False


@dataclass(frozen=True)
class Question:
    """A row ready to be asked.

    Attributes:
        columns: of the row, those that JSON can hold.
        messages: the chat so far; the last one is the question.
        image: path or URL of the picture, or the content of its file; None without a picture.
        root: what the path is relative to.
        fault: why it cannot be asked; empty where it can.
        answer_prefix: what the answer is made to begin with; it is no part of what is generated.
        remedy: what to do about a picture that cannot be read.
    """

    columns: Mapping[str, Any]
    messages: tuple[Message, ...] = ()
    image: str | bytes | None = None
    root: Path = Path()
    fault: str = ""
    answer_prefix: str = ""
    remedy: str = "give its folder by --images"

    def content(self, asking: Asking) -> bytes | None:
        """Read the file of the picture; None without a picture.

        Raises:
            DataError: it cannot be read, or may not be; or the row has a fault.
        """
        if self.fault:
            raise DataError(self.fault)
        if self.image is None or isinstance(self.image, bytes):
            return self.image
        if match := _DATA_URL.match(self.image):
            try:
                return base64.b64decode(self.image[match.end() :], validate=True)
            except ValueError as error:
                raise DataError(f"image: {shortened(self.image, 40)} is not base64 ({error})") from error
        if is_url(self.image):
            return _fetched(self.image, asking)
        root = asking.images or self.root
        path = root / inside(root, self.image, follow_links=asking.follow_links)
        content, fault = file_content(path)
        if fault:
            raise DataError(f"image: {path} cannot be read ({fault}); {self.remedy}")
        return content


def questions_of(sources: Sequence[Source], asking: Asking) -> Iterator[Question]:
    """Yield the questions of all inputs, in their order."""
    for source in sources:
        yield from map(partial(_question, asking), source.rows())


def _question(asking: Asking, row: Row) -> Question:
    """Make a question of a row."""
    columns, fault = {}, row.fault
    for name, value in row.columns.items():
        try:
            columns[name] = _plain(value)
        except RecursionError:
            fault = fault or "the row is nested too deep; make it flatter"
    if fault:
        return Question(columns, fault=fault)
    try:
        messages, inner = _messages(row.columns, asking)
        image = row.content if row.content is not None else _image(row.columns, inner)
        if asking.system:
            messages = [Message("system", asking.system), *(one for one in messages if one.role != "system")]
        return Question(columns, tuple(messages), image, row.root)
    except DataError as error:
        return Question(columns, fault=str(error))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, contents of pictures left out."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, str):
        return shortened(value, 60) if _DATA_URL.match(value) else value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _messages(columns: Mapping[str, Any], asking: Asking) -> tuple[list[Message], list[Any]]:
    """Return the chat of a row up to its last question, and the pictures that stand in its messages.

    Raises:
        DataError: there is none, or it is not in a known form.
    """
    turns = columns.get("messages") or columns.get("conversations")
    if turns is None:
        given = next((columns[key] for key in TEXT_KEYS if columns.get(key)), None)
        if given is None and not asking.prompt:
            raise DataError(f"no question: the row has none of {', '.join(TEXT_KEYS)}; give --prompt")
        if given is None or isinstance(given, str):
            return [Message("user", _around(given, asking))], []
        raise DataError(f"no question: {shortened(given, 80)} is no text; write it in quotes")
    if not isinstance(turns, list):
        raise DataError(f"no messages: {shortened(turns, 80)} is no list; give one of role and content")
    images: list[Any] = []
    messages = [_message(turn, images) for turn in turns]
    while messages and messages[-1].role == "assistant":  # what is to be generated
        messages.pop()
    if not messages or messages[-1].role != "user":
        raise DataError("no question: no message is from a user; end with one that is")
    messages[-1] = Message("user", _around(messages[-1].text, asking) if PLACE in asking.prompt else messages[-1].text)
    return messages, images


def _around(question: str | None, asking: Asking) -> str:
    """Return what is asked, by the prompt and by the question of a row."""
    if question is None:
        if PLACE in asking.prompt:
            raise DataError(f"no question: the row has none to put into --prompt, which has {PLACE}")
        return asking.prompt
    text = question.replace(IMAGE_TOKEN, "").strip()
    return asking.prompt.replace(PLACE, text) if PLACE in asking.prompt else text


def _message(turn: Any, images: list[Any]) -> Message:
    """Return a message in OpenAI's form, or a turn in LLaVA's; its pictures are put to the others."""
    if not isinstance(turn, Mapping):
        raise DataError(f"no message: {shortened(turn, 80)} is no object; give role and content")
    role = _ROLES.get(str(turn.get("role", turn.get("from"))))
    content = turn.get("content", turn.get("value"))
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image_url":
            address = part.get("image_url")
            images.append(address.get("url") if isinstance(address, Mapping) else address)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].replace(IMAGE_TOKEN, "").strip())
        else:
            raise DataError(f"no message: {shortened(part, 80)} is neither text nor image_url; write it as one of them")
    if role is None:
        raise DataError(
            f"unknown role: {shortened(turn.get('role', turn.get('from')), 80)}; known: {', '.join(_ROLES)}"
        )
    return Message(role, "\n".join(texts))


def _image(columns: Mapping[str, Any], inner: Sequence[Any]) -> str | bytes | None:
    """Return the picture of a row: a path, a URL, or its file's content; None without one.

    Raises:
        DataError: there are several, or it is none of these.
    """
    given = [columns[key] for key in IMAGE_KEYS if columns.get(key)]
    images = list(inner)
    for value in given[:1]:
        images += value if isinstance(value, list) else [value]
    if len(images) > 1:
        raise DataError(f"several images: {len(images)} are given; a question is about one, or about none")
    for image in images:
        if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):  # as the library datasets has it
            image = image.get("bytes") or image["path"]
        if not isinstance(image, str | bytes):
            raise DataError(f"image: {shortened(image, 80)} is neither a path nor a file's content; give one of them")
        return image
    return None


def _fetched(url: str, asking: Asking) -> bytes:
    """Return what a URL leads to; raise DataError where it may not be read, or cannot."""
    if not asking.has_urls:
        raise DataError(f"image: {shortened(url, 80)} is a URL; download it, or give --allow-urls")
    try:
        with open_file(url) as file:
            return file.read(MOST_BYTES + 1)
    except Exception as error:  # whatever the file system behind the URL raises
        raise DataError(
            f"image: {shortened(url, 80)} cannot be read ({shortened(error, 80)}); check the URL"
        ) from error
