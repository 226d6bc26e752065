"""What is asked of a model, and what it answers; plain values that every part of generation shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from megatron_sphinx.ranges import Range

_NEW_TOKENS = 512


def default_new_tokens(positions: int) -> int:
    """Return how many tokens an answer may have where nobody says it: 512, or a quarter of what the model takes.

    Args:
        positions: tokens of prompt and answer that the model takes.
    """
    return min(_NEW_TOKENS, max(1, positions // 4))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn, and where it ends.

    Attributes:
        max_new_tokens: tokens at most; the answer's end is not among them.
        temperature: what logits are divided by; 0 for the likeliest token, and of equal ones that of the lowest id.
        top_k: how many of the likeliest tokens may be drawn; 0 for all.
        top_p: a token may be drawn while the likelier ones have this much probability together, or less.
        repetition_penalty: what positive logits of tokens that were there before are divided by, negative ones
            multiplied by; 1 for nothing.
        stop: texts that end an answer; they are no part of it.
        seed: of this answer's random numbers; token number n is drawn by the seed and n alone.
        top_logprobs: the log-probabilities of how many of the likeliest tokens are told beside that of the drawn one;
            None for neither. They are those of the model, before temperature, penalty, top_k and top_p.
        ignore_eos: whether an answer goes on behind EOS, to measure by.

    Source: top_p as in MetaModel.sample_top_p of the released accessory/model/meta.py.
    """

    max_new_tokens: Annotated[int, Range(least=1, most=2**20)] = _NEW_TOKENS
    temperature: Annotated[float, Range(least=0, most=100)] = 0.0
    top_k: Annotated[int, Range(least=0, most=2**31)] = 0
    top_p: Annotated[float, Range(least=0, most=1)] = 1.0
    repetition_penalty: Annotated[float, Range(above=0, most=100)] = 1.0
    stop: tuple[str, ...] = ()
    seed: Annotated[int, Range(least=0, most=2**63 - 1)] = 0
    top_logprobs: Annotated[int | None, Range(least=0, most=20)] = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture as it was given, not decoded, but known to be readable.

    Attributes:
        key: SHA-256 of the content, in hexadecimal digits: what its views and its cached tokens are found by.
        content: of the file.
        width: of the picture as the model sees it, in pixels.
        height: of the picture as the model sees it, in pixels.
        encoded: numbers of the views that are encoded; the others are skipped.
        positions: how many positions of a sequence it takes.
        orientation: EXIF's number for how what the model sees has to be turned to be upright; 1 where it is.
    """

    key: str
    content: bytes
    width: int
    height: int
    encoded: tuple[int, ...]
    positions: int
    orientation: int = 1


@dataclass(frozen=True)
class Prompt:
    """What an answer goes on from.

    Attributes:
        tokens: ids, BOS first; behind it those of the picture's positions, which are 0, then the text.
        picture: None for a prompt of text alone.
        mark: the number under which the choices of the routers are recorded, while a model does that; None for not.
    """

    tokens: tuple[int, ...]
    picture: Picture | None = None
    mark: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, in nats.

    Attributes:
        token: its id.
        logprob: its logarithm of probability.
        top: ids and log-probabilities of the likeliest tokens there, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Finish(StrEnum):
    """Why an answer ended; the value is OpenAI's word where there is one.

    Attributes:
        STOP: by EOS or a stop string.
        LENGTH: it has as many tokens as it may have, or as fit.
        CANCELLED: whoever asked did not want it any more.
    """

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Chunk:
    """A part of an answer, as soon as it can be shown.

    Attributes:
        text: what follows what was shown before; never half a character, never part of a stop string.
        tokens: ids that were drawn since the last chunk, EOS and those of a stop string among them.
        logprobs: of those tokens, where they were asked for.
        finish: why the answer ends with this chunk; None where it goes on.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Generation:
    """A whole answer, its chunks joined.

    Attributes:
        text: without the stop string, and without the space that the template puts before an answer.
        tokens: ids that were drawn, EOS and those of a stop string among them.
        logprobs: of those tokens, where they were asked for.
        finish: why it ended.
        prompt_tokens: tokens of the prompt, the picture's positions among them.
        cached_tokens: how many of those were in the prefix cache.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, chunks: Sequence[Chunk], prompt_tokens: int, cached_tokens: int = 0) -> "Generation":
        """Join the chunks of an answer, the last of which says why it ended."""
        finish = chunks[-1].finish
        assert finish is not None, "the answer goes on"
        return cls(
            text="".join(chunk.text for chunk in chunks).strip(),
            tokens=tuple(token for chunk in chunks for token in chunk.tokens),
            finish=finish,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            logprobs=tuple(one for chunk in chunks for one in chunk.logprobs),
        )
