"""From the messages of a chat, and the picture that it is about, to the tokens that an answer goes on from."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Protocol

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.generation.answering import ChatPrompt, Message, TooLongError
from megatron_sphinx.generation.requests import Picture, Prompt
from megatron_sphinx.generation.templates import BOS, EOS, ChatTemplate
from megatron_sphinx.prepare.texts import check_text

_ROLES = ("system", "user", "assistant")
_MOST_TOKEN = 128  # characters of a token; the longest ones of common vocabularies are runs of spaces
_Part = tuple[str, bool]  # text, and whether it is the template's own


class Encoder(Protocol):
    """What a tokenizer is used for here.

    Attributes:
        bos: the id that begins a sequence.
        eos: the id that ends one.
    """

    bos: int
    eos: int

    def encode(self, text: str, *, has_special: bool = False) -> list[int]:
        """Return the ids of a text; names of control tokens in it become those tokens where `has_special` says so."""


def make_chat(
    messages: Sequence[Message],
    picture: Picture | None,
    template: ChatTemplate,
    tokenizer: Encoder,
    *,
    positions: int,
    max_new_tokens: int,
    answer_prefix: str = "",
) -> ChatPrompt:
    """Make the prompt of a chat. Where it is too long its oldest questions go, each with its answer.

    What has more than 128 characters for each position that there is room for is too long, without being encoded.

    Args:
        messages: a system prompt or none, then questions and answers in turn, a question last.
        picture: what they are about; it stands between BOS and the text, as in training.
        template: what stands around them.
        tokenizer: of the model.
        positions: tokens of prompt and answer together, at most.
        max_new_tokens: tokens of the answer, at most.
        answer_prefix: what the answer is made to begin with; it is encoded with what the template puts before it.

    Raises:
        DataError: the roles are out of order, or a text cannot become tokens.
        TooLongError: what must stay does not fit: BOS, the picture, the system prompt and the last question.
    """
    system, turns, question = _sort(messages, template)
    head = [tokenizer.bos] + [0] * (picture.positions if picture else 0)
    if picture is None and not template.has_bos:
        head = []
    room = positions - max_new_tokens - len(head)

    def written(dropped: int) -> list[_Part]:
        return [*_write(system, turns[dropped:], question, template), (answer_prefix, False)]

    def encoded(dropped: int) -> list[int]:
        return list(_encode(written(dropped), template, tokenizer))

    def characters(dropped: int) -> int:
        return sum(len(text) for text, _ in written(dropped))

    def too_long(size: str) -> TooLongError:
        shown = f"a picture of {picture.positions} and " if picture else ""
        return TooLongError(
            f"chat too long: {shown}a system prompt and a last question of {size} leave no room for "
            f"max_new_tokens={max_new_tokens} among the {positions} positions of the model; shorten one of them"
        )

    counts, most = range(len(turns)), _MOST_TOKEN * max(room, 1)  # the fewest that must go are found by halves
    dropped = bisect_left(counts, True, key=lambda count: characters(count) <= most)
    if (size := characters(dropped)) > most:
        raise too_long(f"{size} characters")
    ids = encoded(dropped)
    if len(ids) > room:
        dropped = bisect_left(counts, True, lo=dropped, key=lambda count: len(encoded(count)) <= room)
        ids = encoded(dropped)
    if len(ids) > room:
        raise too_long(f"{len(ids)} tokens")
    return ChatPrompt(Prompt(tuple(head + ids), picture), dropped, template.stop)


def ends_of(template: ChatTemplate, tokenizer: Encoder) -> tuple[int, ...]:
    """Return the ids that end an answer: EOS, and those control tokens that do in the template, which have no text."""
    names = [name for name in template.stop if name in template.control]
    return tuple({tokenizer.eos, *_control(names, tokenizer).values()})


def _sort(messages: Sequence[Message], template: ChatTemplate) -> tuple[str | None, list[tuple[str, str]], str]:
    """Return system prompt, earlier questions with their answers, and the last question; see `make_chat`."""
    for number, message in enumerate(messages):
        if message.role not in _ROLES:
            raise DataError(
                f"messages[{number}].role={shortened(message.role, 40)}: unknown; give system, user or assistant"
            )
        check_text(message.text, f"messages[{number}]")
    has_system = bool(messages) and messages[0].role == "system"
    said = messages[has_system:]
    for number, message in enumerate(said):
        if message.role != ("user", "assistant")[number % 2]:
            raise DataError(
                f"messages[{number + has_system}].role={message.role}: out of order; give a system prompt first or "
                f"none, then user and assistant in turn"
            )
    if len(said) % 2 == 0:
        raise DataError("messages: no question is last, which could be answered; end with the role user")
    texts = [message.text.strip() if template.is_stripped else message.text for message in messages]
    system, texts = (texts[0], texts[1:]) if has_system else (template.default_system, texts)
    return system, list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


def _write(
    system: str | None, turns: Sequence[tuple[str, str]], question: str, template: ChatTemplate
) -> Iterator[_Part]:
    """Yield the parts of a chat, those of the template and the messages."""
    parts = [] if system is None else [(template.before_system, True), (system, False), (template.after_system, True)]
    inside = parts if template.is_system_in_question else []
    if not inside:
        yield from parts
    for asked, answer in turns:
        yield template.before_question, True
        yield from inside
        yield from ((asked, False), (template.after_question + template.before_answer, True))
        yield from ((answer, False), (template.after_answer, True))
        inside = []
    yield template.before_question, True
    yield from inside
    yield from ((question, False), (template.after_question, True))


def _encode(parts: Iterable[_Part], template: ChatTemplate, tokenizer: Encoder) -> Iterator[int]:
    """Yield the ids of a chat.

    What stands between two control tokens is encoded at once, whoever wrote it: tokens may reach from a template into a
    message, as they did in training. No control token is ever made of a message.
    """
    special = {BOS: tokenizer.bos, EOS: tokenizer.eos} | _control(template.control, tokenizer)
    names = re.compile(f"({'|'.join(map(re.escape, special))})")
    cut = (
        (piece, is_own and piece in special)
        for text, is_own in parts
        for piece in (names.split(text) if is_own else [text])
    )
    for is_special, run in groupby(cut, key=lambda one: one[1]):
        if is_special:
            yield from (special[name] for name, _ in run)
        else:
            yield from tokenizer.encode("".join(text for text, _ in run))


def _control(names: Iterable[str], tokenizer: Encoder) -> dict[str, int]:
    """Return the ids of those names that are control tokens of a tokenizer; elsewhere they are text."""
    encoded = {name: tokenizer.encode(name, has_special=True) for name in names}
    return {name: ids[0] for name, ids in encoded.items() if len(ids) == 1}
