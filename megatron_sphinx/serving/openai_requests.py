"""Reads the body of a chat request of OpenAI's API; what cannot be honoured is refused by its name, never passed over.

Source: https://platform.openai.com/docs/api-reference/chat/create, for the names and meanings of fields.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from megatron_sphinx.errors import ConfigError, nearest, shortened
from megatron_sphinx.generation.answering import Message
from megatron_sphinx.generation.requests import Sampling
from megatron_sphinx.parsing import ParseError, parse_json
from megatron_sphinx.ranges import Range
from megatron_sphinx.serving.limits import Limits
from megatron_sphinx.serving.openai_errors import RequestError
from megatron_sphinx.values import build

_MOST_VALUES = 1_000_000  # of a body; each takes a hundred bytes of memory and more, however short it is written
_MOST_STOPS, _MOST_STOP = 16, 1000  # stop strings, and characters of one
_LONE = re.compile("[\ud800-\udfff]")
_ROLES = ("system", "user", "assistant", "developer")
_DETAILS = ("auto", "low", "high")

# Fields that we do not compute, with the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "frequency_penalty": (0,), "function_call": ("auto", "none"), "functions": ([],),
    "length_penalty": (1,), "logit_bias": ({},), "min_p": (0,), "min_tokens": (0,), "modalities": (["text"],),
    "moderation": (), "parallel_tool_calls": (True, False), "prediction": (), "presence_penalty": (0,),
    "prompt_cache_options": (), "prompt_cache_retention": (), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "service_tier": ("auto", "default"), "store": (False,),
    "tool_choice": ("auto", "none"), "tools": ([],), "use_beam_search": (False,), "verbosity": (),
    "web_search_options": (),
}  # fmt: skip
_UNHEARD = ("metadata", "prompt_cache_key", "safety_identifier", "user")  # say who asks, and change no answer
_ELSEWHERE = ("messages", "stop", "stream_options")
_IN_MESSAGES = ("role", "content")
_OF_ANSWERS = ("annotations", "boxes")  # which clients send back with an answer of ours


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The single values in the body of a chat request.

    Attributes:
        model: the name of the model that is asked.
        n: answers wanted.
        stream: whether the answer is wanted in parts, as they come.
        max_tokens: of an answer; None for the server's own limit.
        max_completion_tokens: the newer name of that.
        temperature: see Sampling; None for the server's own.
        top_p: see Sampling; None for the server's own.
        top_k: see Sampling; -1 for all, too.
        repetition_penalty: see Sampling.
        seed: of the first answer, the next ones take the numbers behind it; None for one by chance.
        logprobs: whether log-probabilities are wanted.
        top_logprobs: of how many of the likeliest tokens they are wanted, too.
        ignore_eos: see Sampling.
    """

    model: str = ""
    n: Annotated[int, Range(least=1, most=128)] = 1
    stream: bool = False
    max_tokens: Annotated[int | None, Range(least=1, most=2**20)] = None
    max_completion_tokens: Annotated[int | None, Range(least=1, most=2**20)] = None
    temperature: Annotated[float | None, Range(least=0, most=100)] = None
    top_p: Annotated[float | None, Range(least=0, most=1)] = None
    top_k: Annotated[int, Range(least=-1, most=2**31)] = 0
    repetition_penalty: Annotated[float, Range(above=0, most=100)] = 1.0
    seed: Annotated[int | None, Range(least=-(2**63), most=2**63 - 1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Range(least=0, most=20)] = None
    ignore_eos: bool = False


_SINGLE = tuple(Fields.__dataclass_fields__)
_KNOWN = [*_SINGLE, *_ELSEWHERE, *_UNHEARD, *_NEUTRAL]


@dataclass(frozen=True)
class PictureUrl:
    """Where the picture of a chat is.

    Attributes:
        url: as the request gives it.
        parameter: the part of the request that gives it.
    """

    url: str
    parameter: str


@dataclass(frozen=True)
class ChatRequest:
    """What a client asks.

    Attributes:
        fields: single values of the body.
        messages: what was said, the client's question last.
        picture: the one picture; None without.
        stop: texts that end an answer.
        has_usage: whether a stream is to end with how many tokens it took.
    """

    fields: Fields
    messages: tuple[Message, ...]
    picture: PictureUrl | None
    stop: tuple[str, ...]
    has_usage: bool

    def sampling(self, limits: Limits, positions: int, seed: int) -> Sampling:
        """Return how the first answer is drawn, with the server's values where the request says none.

        Args:
            limits: of the server.
            positions: tokens of prompt and answer that the model takes.
            seed: by chance, for a request that gives none.
        """
        given = self.fields
        tokens = given.max_completion_tokens or given.max_tokens or limits.default_tokens(positions)
        return Sampling(
            max_new_tokens=tokens,
            temperature=limits.temperature if given.temperature is None else given.temperature,
            top_k=max(given.top_k, 0),
            top_p=limits.top_p if given.top_p is None else given.top_p,
            repetition_penalty=given.repetition_penalty,
            stop=self.stop,
            seed=(seed if given.seed is None else given.seed) % 2**63,
            top_logprobs=(given.top_logprobs or 0) if given.logprobs else None,
            ignore_eos=given.ignore_eos,
        )


def read_chat(content: bytes, limits: Limits) -> ChatRequest:
    """Read the body of a chat request.

    Raises:
        RequestError: it is no JSON, has a field that is not known or cannot be honoured, or a wrong value.
    """
    body = {name: value for name, value in _object(content).items() if value is not None}
    for name, value in body.items():
        _check_name(name, value)
    given = _fields(body, limits)
    messages, picture = _messages(body.get("messages"))
    return ChatRequest(given, messages, picture, _stop(body.get("stop", [])), _has_usage(body, given))


def _object(content: bytes) -> dict[str, Any]:
    """Read JSON, which must be an object."""
    if sum(content.count(sign) for sign in (b"{", b"[", b",")) > _MOST_VALUES:
        raise RequestError(f"the body has more than {_MOST_VALUES:,} values; send a shorter chat", code="invalid_json")
    try:
        body = parse_json(content.decode())
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 (byte {error.start}); send JSON", code="invalid_json") from error
    except ParseError as error:
        raise RequestError(f"the body is {error}; send a JSON object", code="invalid_json") from error
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object; send {…}", code="invalid_json")
    return body


def _check_name(name: str, value: Any) -> None:
    """Refuse a field that is not known, or one that is not computed here and asks for something."""
    if name in _SINGLE or name in _ELSEWHERE or name in _UNHEARD:
        return
    shown = shortened(name, 60)
    if name not in _NEUTRAL:
        near = nearest(shown, [*_SINGLE, *_ELSEWHERE])
        raise RequestError(f"{shown}: unknown field; {near}", code="unknown_parameter", parameter=shown)
    if not any(value == neutral for neutral in _NEUTRAL[name]):
        raise RequestError(
            f"{name}={shortened(value, 60)}: is not supported here; leave it out",
            code="unsupported_parameter",
            parameter=name,
        )


def _fields(body: Mapping[str, Any], limits: Limits) -> Fields:
    """Read the single values, each on its own, so that the error names it."""
    given = Fields()
    for name in _SINGLE:
        if name in body:
            try:
                one = build(Fields, {name: body[name]})
            except ConfigError as error:
                raise _wrong(name, str(error)) from error
            if isinstance(body[name], str) and name != "model":  # which configurations may write so
                raise _wrong(name, f"{name}={shortened(body[name], 60)}: must be a number; leave out its quotes")
            given = replace(given, **{name: getattr(one, name)})
    if not _text(given.model, "model"):
        raise _wrong("model", "model: is missing; give the name that /v1/models tells")
    if given.n > limits.choices:
        raise _wrong("n", f"n={given.n}: is more than --choices={limits.choices}; ask for fewer answers")
    if None not in (given.max_tokens, given.max_completion_tokens) and given.max_tokens != given.max_completion_tokens:
        raise _wrong("max_tokens", "max_tokens: differs from max_completion_tokens; give one of them")
    if given.top_logprobs is not None and not given.logprobs:
        raise _wrong("top_logprobs", "top_logprobs: needs logprobs=true; give both, or none")
    return given


def _stop(value: Any) -> tuple[str, ...]:
    """Read the stop strings, a text or a list."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise _wrong("stop", f"stop={shortened(value, 60)}: must be a text, or a list of at most {_MOST_STOPS}")
    for stop in stops:
        if not 1 <= len(_text(stop, "stop")) <= _MOST_STOP:
            raise _wrong("stop", f"stop: a text of {len(stop)} characters; give 1 to {_MOST_STOP}, or leave it out")
    return tuple(stops)


def _has_usage(body: Mapping[str, Any], given: Fields) -> bool:
    """Read the options of a stream: whether it ends with the numbers of tokens."""
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not all(isinstance(value, bool) for value in options.values()):
        raise _wrong("stream_options", 'stream_options: must be like {"include_usage": true}')
    for name, value in options.items():
        if name != "include_usage" and (name, value) != ("include_obfuscation", False):
            raise _wrong(
                f"stream_options.{shortened(name, 60)}",
                f"stream_options.{shortened(name, 60)}: is not supported here; leave it out",
            )
    if options and not given.stream:
        raise _wrong("stream_options", "stream_options: needs stream=true; give both, or none")
    return bool(options.get("include_usage", False))


def _messages(value: Any) -> tuple[tuple[Message, ...], PictureUrl | None]:
    """Read who said what, in an order in which people talk, and the one picture that it may be about."""
    if not isinstance(value, list) or not value:
        raise _wrong("messages", 'messages: must be a list like [{"role": "user", "content": "…"}]')
    read, pictures = [], []
    for number, item in enumerate(value):
        message, found = _message(item, f"messages[{number}]")
        read.append(message)
        pictures += found
        if len(pictures) > 1:
            raise RequestError(
                f"{pictures[1].parameter}: is a second picture; a chat is about one, so begin another chat",
                code="too_many_images",
                parameter=pictures[1].parameter,
            )
    _check_order([message.role for message in read])
    return tuple(read), pictures[0] if pictures else None


def _check_order(roles: Sequence[str]) -> None:
    """Refuse roles in another order than: perhaps the system, then user and assistant in turns, the user last."""
    first = int(roles[0] == "system")
    for number, role in enumerate(roles[first:], first):
        due = ("user", "assistant")[(number - first) % 2]
        if role != due:
            raise _wrong(
                f"messages[{number}].role",
                f"messages[{number}].role={role}: it is the turn of {due}; let user and assistant speak in turns, "
                f"the system only first",
            )
    if roles[-1] != "user":
        raise _wrong(
            f"messages[{len(roles) - 1}].role",
            f"messages[{len(roles) - 1}].role={roles[-1]}: the last message must be the user's; add a question",
        )


def _message(item: Any, path: str) -> tuple[Message, list[PictureUrl]]:
    """Read what one said, and the pictures in it."""
    if not isinstance(item, dict):
        raise _wrong(path, f'{path}: must be like {{"role": "user", "content": "…"}}')
    role = item.get("role")
    if role not in _ROLES:
        raise _wrong(f"{path}.role", f"{path}.role={shortened(role, 60)}: must be system, user or assistant")
    for name, part in item.items():
        is_sent_back = role == "assistant" and name in _OF_ANSWERS
        if name not in _IN_MESSAGES and not is_sent_back and part is not None:
            shown = f"{path}.{shortened(name, 60)}"
            raise RequestError(
                f"{shown}: is not supported here; leave it out", code="unsupported_parameter", parameter=shown
            )
    content = item.get("content")
    texts, pictures = _content(content, f"{path}.content")
    text = "\n".join(texts)
    if role == "user" and not text.strip():
        raise _wrong(f"{path}.content", f"{path}.content: is empty; ask something")
    if pictures and role != "user":
        raise _wrong(
            pictures[0].parameter, f"{pictures[0].parameter}: a picture of the {role}; only the user gives one"
        )
    return Message("system" if role == "developer" else role, text), pictures


def _content(content: Any, path: str) -> tuple[list[str], list[PictureUrl]]:
    """Read a content, a text or a list of parts: its texts and its pictures."""
    if isinstance(content, str):
        return [_text(content, path)], []
    if not isinstance(content, list):
        raise _wrong(path, f"{path}={shortened(content, 60)}: must be text, or a list of parts")
    texts, pictures = [], []
    for number, part in enumerate(content):
        place = f"{path}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
            texts.append(_text(part["text"], f"{place}.text"))
        elif kind == "image_url" and set(part) == {"type", "image_url"}:
            pictures.append(_picture(part["image_url"], f"{place}.image_url"))
        else:
            raise RequestError(
                f'{place}: must be {{"type": "text", "text": "…"}} or '
                f'{{"type": "image_url", "image_url": {{"url": "data:image/…;base64,…"}}}}',
                code="unsupported_content",
                parameter=place,
            )
    return texts, pictures


def _picture(value: Any, path: str) -> PictureUrl:
    """Read where a picture is; `detail` asks for nothing, for views are those that the model was trained with."""
    is_known = isinstance(value, dict) and set(value) <= {"url", "detail"} and isinstance(value.get("url"), str)
    if not is_known or value.get("detail") not in (*_DETAILS, None):
        raise _wrong(path, f'{path}: must be like {{"url": "data:image/…;base64,…"}}, with detail auto, low or high')
    return PictureUrl(_text(value["url"], path), path)


def _text(text: str, path: str) -> str:
    """Refuse a text with half a character, which JSON can write and UTF-8 cannot."""
    if _LONE.search(text):
        raise _wrong(path, f"{path}: holds half a character (a lone surrogate); send whole ones")
    return text


def _wrong(parameter: str, message: str) -> RequestError:
    """Return the error of a part of the request with a wrong value."""
    return RequestError(message, parameter=parameter)
