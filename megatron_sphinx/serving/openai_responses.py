"""Writes answers in the form of OpenAI's chat API, whole or in parts, with our `boxes` beside their text.

Source: https://platform.openai.com/docs/api-reference/chat/object and .../chat/streaming.
"""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sphinx.generation.grounding import ground_upright
from megatron_sphinx.generation.requests import Generation, Picture, TokenLogprob
from megatron_sphinx.serving.box_entries import entries_of

LEAST_LOGPROB = -9999.0  # what JSON is given for the logarithm of 0
_HALF = "\ufffd"


class Trimmed:
    """Takes the white space at both ends of a text away while the text comes in parts."""

    def __init__(self) -> None:
        self._has_begun, self._held = False, ""

    def feed(self, text: str) -> str:
        """Return what of the text so far can be shown now: white space waits for what may follow it."""
        text = self._held + (text if self._has_begun else text.lstrip())
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._has_begun = self._has_begun or bool(shown)
        return shown


@dataclass(frozen=True)
class Tally:
    """How many tokens a request took.

    Attributes:
        prompt: of its prompt, the picture's positions among them.
        cached: those of the prompt that were in the prefix cache.
        new: drawn, of all answers; the ends of answers and stop strings among them.
    """

    prompt: int
    cached: int
    new: int

    def usage(self) -> dict[str, Any]:
        """Return it in OpenAI's form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class Writer:
    """Writes the answers to one request.

    Attributes:
        model: its name.
        token_text: what a token stands for inside of a text.
        picture: what was asked about; None without.
        padding: where a picture is in its square: centre or corner.
        dropped: how many of the chat's oldest turns were left out.
        has_usage: whether a stream ends with how many tokens it took.
        identity: of the request.
        created: seconds since 1970.
    """

    model: str
    token_text: Callable[[int], str]
    picture: Picture | None
    padding: str
    dropped: int
    has_usage: bool
    identity: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Generation], tally: Tally, *, has_logprobs: bool) -> dict[str, Any]:
        """Return the answers as one body."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None, **self._boxes(answer.text)},
                "logprobs": self._logprobs(answer.logprobs) if has_logprobs else None,
                "finish_reason": answer.finish.value,
            }
            for index, answer in enumerate(answers)
        ]
        return self._object("chat.completion", choices) | {"usage": tally.usage()}

    def begin(self, index: int) -> dict[str, Any]:
        """Return the part of a stream that begins an answer."""
        return self._part(index, {"role": "assistant", "content": ""})

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the part of a stream that goes on with an answer."""
        return self._part(index, {"content": text}, logprobs=self._logprobs(logprobs) if logprobs else None)

    def end(self, index: int, text: str, reason: str) -> dict[str, Any]:
        """Return the part of a stream that ends an answer.

        Args:
            index: of the answer.
            text: all of it.
            reason: why it ends.
        """
        return self._part(index, self._boxes(text), finish_reason=reason)

    def usage(self, tally: Tally) -> dict[str, Any]:
        """Return the part of a stream that tells how many tokens it took."""
        return self._object("chat.completion.chunk", []) | {"usage": tally.usage()}

    def _part(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice]) | ({"usage": None} if self.has_usage else {})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        found = {"id": self.identity, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return found | ({"dropped_turns": self.dropped} if self.dropped else {})

    def _boxes(self, text: str) -> dict[str, Any]:
        """Return the boxes of an answer in pixels of the picture as it was given; nothing without a picture."""
        if self.picture is None:
            return {}
        return {"boxes": entries_of(text, ground_upright(text, self.picture, self.padding))}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return log-probabilities in OpenAI's form."""
        return {
            "content": [
                self._token(one.token, one.logprob) | {"top_logprobs": [self._token(*top) for top in one.top]}
                for one in logprobs
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        content = None if _HALF in text else list(text.encode())
        return {"token": text, "bytes": content, "logprob": max(logprob, LEAST_LOGPROB)}


def event(content: dict[str, Any]) -> bytes:
    """Return a server-sent event that holds JSON."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"  # the last event of a stream
