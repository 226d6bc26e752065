"""Asks a server that speaks OpenAI's protocol, such as `megatron-sphinx serve`; the answer comes in parts."""

import base64
import mimetypes
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from megatron_sphinx.errors import SphinxError, shortened
from megatron_sphinx.generation.grounding import Grounding
from megatron_sphinx.serving.box_entries import groundings_of

_HERE = ("127.0.0.1", "localhost", "::1")
_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 600.0
_OWN = ("top_k", "repetition_penalty")  # of sampling, what OpenAI's protocol does not have


class ServerError(SphinxError):
    """What a server says instead of an answer, or that there is none."""


@dataclass(frozen=True)
class Part:
    """A part of an answer.

    Attributes:
        text: what follows what came before.
        groundings: boxes and points of the whole answer; they come with its last part.
        finish: why the answer ends here; empty where it goes on.
        dropped: how many of the oldest turns the server has left out.
    """

    text: str = ""
    groundings: tuple[Grounding, ...] = ()
    finish: str = ""
    dropped: int = 0


@dataclass(frozen=True)
class ServedModel:
    """The model that a server answers with.

    Attributes:
        name: what requests call it.
        positions: tokens of prompt and answer together, at most; None where the server does not say it.
    """

    name: str
    positions: int | None = None


class Server:
    """A server of answers, over HTTP.

    Args:
        url: `http://127.0.0.1:8000`, with or without `/v1` behind it.
        key: what it wants to be shown; None where it wants nothing.
        option: of the command that the address was given by.
    """

    def __init__(self, url: str, key: str | None = None, option: str = "--server") -> None:
        base = url.rstrip("/")
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"{option}={shortened(url, 80)}: is no address; give http://127.0.0.1:8000")
        self.url = base
        self._trusts_environment = parts.hostname not in _HERE  # a proxy does not lead to this machine
        self._options: dict[str, Any] = {
            "base_url": base if base.endswith("/v1") else f"{base}/v1",
            "api_key": key or "none",
            "max_retries": 0,
            "timeout": openai.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
        }

    def model(self) -> ServedModel:
        """Return the model that the server answers with.

        Raises:
            ServerError: the server is not there, refuses to say, or has none.
        """
        try:
            client = openai.DefaultHttpxClient(trust_env=self._trusts_environment)
            with openai.OpenAI(**self._options, http_client=client) as server:
                models = list(server.models.list())
        except openai.OpenAIError as error:
            raise self._refused(error) from error
        if not models:
            raise ServerError(f"{self.url}: has no model; start it by megatron-sphinx serve MODEL")
        positions = (models[0].model_extra or {}).get("max_model_len")  # vLLM says it so, too
        return ServedModel(models[0].id, positions if isinstance(positions, int) and positions > 1 else None)

    def ask(
        self, model: str, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, float], *, retries: int = 3
    ) -> str:
        """Return a whole answer; any thread may call this.

        Args:
            model: its name.
            messages: in OpenAI's form.
            sampling: temperature, max_tokens and the like.
            retries: how often the question is sent again where the server is not there, busy or failing.

        Raises:
            ServerError: the server is not there, or refuses the request.
        """
        sent: Any = messages
        plain: Any = sampling
        try:
            client = openai.DefaultHttpxClient(trust_env=self._trusts_environment)
            with openai.OpenAI(**{**self._options, "max_retries": retries}, http_client=client) as server:
                answer: Any = server.chat.completions.create(model=model, messages=sent, **plain)
        except openai.OpenAIError as error:
            raise self._refused(error) from error
        if not answer.choices:
            raise ServerError(f"{self.url}: sent no answer of {model}; see whether it speaks OpenAI's protocol")
        return answer.choices[0].message.content or ""

    async def stream(
        self, model: str, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, float]
    ) -> AsyncGenerator[Part]:
        """Yield the parts of an answer as they come; the server stops where nobody takes them any more.

        Args:
            model: its name.
            messages: in OpenAI's form.
            sampling: temperature, top_p, top_k, max_tokens and the like.

        Raises:
            ServerError: the server is not there, refuses the request, or could not go on.
        """
        own = {name: value for name, value in sampling.items() if name in _OWN}
        plain: Any = {name: value for name, value in sampling.items() if name not in _OWN}
        sent: Any = messages
        client = openai.DefaultAsyncHttpxClient(trust_env=self._trusts_environment)
        try:
            async with openai.AsyncOpenAI(**self._options, http_client=client) as server:
                stream: Any = await server.chat.completions.create(
                    model=model, messages=sent, stream=True, extra_body=own, **plain
                )
                async with stream:
                    async for chunk in stream:
                        for choice in chunk.choices:
                            extra, whole = choice.delta.model_extra or {}, chunk.model_extra or {}
                            yield Part(
                                choice.delta.content or "",
                                tuple(groundings_of(extra.get("boxes"))),
                                choice.finish_reason or "",
                                int(whole.get("dropped_turns") or 0),
                            )
        except openai.OpenAIError as error:
            raise self._refused(error) from error

    def _refused(self, error: openai.OpenAIError) -> ServerError:
        """Say in one line what went wrong."""
        if isinstance(error, openai.APITimeoutError):
            return ServerError(f"{self.url}: did not answer in time; ask again, or see what it is at")
        if isinstance(error, openai.APIConnectionError):
            return ServerError(f"{self.url}: no server answers there; start one by megatron-sphinx serve MODEL")
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        return ServerError(shortened(said or error, 500))


def picture_part(path: Path) -> dict[str, Any]:
    """Return the part of a message that holds a picture's file.

    Raises:
        ServerError: the file is not there any more.
    """
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    try:
        content = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise ServerError(f"the picture cannot be read ({error.strerror}); give it again") from error
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{content}"}}
