"""Answers `/v1/chat/completions`: reads the request, asks the model, writes the answer whole or as a stream."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from megatron_sphinx.errors import DataError, SphinxError, shortened
from megatron_sphinx.generation.answering import Answers, ChatPrompt
from megatron_sphinx.generation.requests import Picture, Sampling
from megatron_sphinx.serving.exchange import Exchange
from megatron_sphinx.serving.gate import Gate
from megatron_sphinx.serving.limits import Access, Limits
from megatron_sphinx.serving.openai_errors import CLIENT_GONE, RequestError, as_request_error
from megatron_sphinx.serving.openai_requests import ChatRequest, PictureUrl, read_chat
from megatron_sphinx.serving.openai_responses import DONE, Trimmed, Writer, event
from megatron_sphinx.serving.picture_urls import read_picture
from megatron_sphinx.serving.prometheus import Metrics


@dataclass(frozen=True)
class _Ready:
    """A request that has been read, with all that its answer needs."""

    request: ChatRequest
    chat: ChatPrompt
    sampling: Sampling
    writer: Writer

    def headers(self) -> dict[str, str]:
        """Return what the head of the response says: how many of the chat's oldest turns were left out."""
        return {"X-Dropped-Turns": str(self.chat.dropped)} if self.chat.dropped else {}


class ChatEndpoint:
    """Answers the requests for chats.

    Args:
        gate: to the model.
        limits: of requests.
        access: what pictures may be named.
        metrics: what counts the requests.
    """

    def __init__(self, gate: Gate, limits: Limits, access: Access, metrics: Metrics) -> None:
        self._gate, self._limits, self._access, self._metrics = gate, limits, access, metrics

    async def answer(self, request: Request) -> Response:
        """Answer one request for a chat.

        Raises:
            RequestError: it gets no answer.
        """
        begin = time.monotonic()
        with ExitStack() as stack:
            stack.callback(self._count, request, begin)
            try:
                answers = stack.enter_context(self._gate.entered())
                content = await self._body(request)
                ready = await asyncio.to_thread(self._prepare, content, answers)
                exchange = Exchange(answers, ready.chat.prompt, ready.sampling, ready.request.fields.n)
                exchange.submit()
                if ready.request.fields.stream:
                    return _Stream(self, request, ready, exchange, begin, stack.pop_all())
                return await self._whole(request, ready, exchange, begin)
            except SphinxError as error:
                raise self.refusal(request, error) from error
            except ClientDisconnect:
                request.state.outcome = CLIENT_GONE
                return Response(status_code=CLIENT_GONE)
            except Exception:
                request.state.outcome = 500
                raise

    async def _whole(self, request: Request, ready: _Ready, exchange: Exchange, begin: float) -> Response:
        """Answer when all has come."""
        async with exchange.watching(request.receive):
            generations = await exchange.whole()
        self.note(request, exchange, begin)
        if not exchange.has_client:
            return Response(status_code=CLIENT_GONE)
        given = ready.request.fields
        body = ready.writer.whole(generations, exchange.tally(), has_logprobs=given.logprobs)
        return JSONResponse(body, headers=ready.headers())

    async def events(self, ready: _Ready, exchange: Exchange) -> AsyncIterator[bytes]:
        """Yield the events of a stream, but for the last one.

        Raises:
            SphinxError: the model has failed.
        """
        write, count = ready.writer, ready.request.fields.n
        trimmed, texts = [Trimmed() for _ in range(count)], [""] * count
        for index in range(count):
            yield event(write.begin(index))
        async for index, chunk in exchange.chunks():
            text = trimmed[index].feed(chunk.text)
            texts[index] += text
            if text or chunk.logprobs:
                yield event(write.text(index, text, chunk.logprobs))
            if chunk.finish is not None:
                yield event(write.end(index, texts[index], chunk.finish.value))
        if ready.request.has_usage:
            yield event(write.usage(exchange.tally()))

    def refusal(self, request: Request, error: SphinxError) -> RequestError:
        """Say what a client is told of an error, and note an error that the model does not outlive."""
        found = as_request_error(error)
        if found.code == "model_failed" and not isinstance(error, RequestError):
            self._gate.fail(error)
        request.state.outcome = found.status
        return found

    def note(self, request: Request, exchange: Exchange, begin: float) -> None:
        """Note how a request went, for the log and the metrics."""
        if exchange.first_token is not None:
            self._metrics.first_token_seconds.observe(exchange.first_token - begin)
        tally = exchange.tally()
        request.state.tokens = f"{tally.prompt}+{tally.new} tokens"
        if not exchange.has_client:
            request.state.outcome = CLIENT_GONE

    def _count(self, request: Request, begin: float) -> None:
        self._metrics.requests.labels(str(getattr(request.state, "outcome", 200))).inc()
        self._metrics.request_seconds.observe(time.monotonic() - begin)

    async def _body(self, request: Request) -> bytes:
        """Read the body, no more than is allowed and no longer.

        Raises:
            RequestError: it is no JSON by its type, too large, or too slow.
            ClientDisconnect: the client went away.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page of another site may send unasked is of no such type
            raise RequestError(
                "Content-Type: must be application/json; send this header", status=415, code="unsupported_media_type"
            )
        most, content = self._limits.body_mebibytes * 2**20, bytearray()
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.upload_seconds):
                async for block in request.stream():
                    content += block
                    if len(content) > most:
                        raise self._too_large()
        except TimeoutError as error:
            raise RequestError(
                f"the body takes longer than --upload-seconds={self._limits.upload_seconds:g}; send it faster",
                status=408,
                code="timeout",
            ) from error
        return bytes(content)

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the body has more than --body-mebibytes={self._limits.body_mebibytes}; send a smaller picture",
            status=413,
            code="body_too_large",
        )

    def _prepare(self, content: bytes, answers: Answers) -> _Ready:
        """Read a request, look at its picture and make its prompt, in a thread, for this takes time.

        Raises:
            SphinxError: the request is wrong, its picture cannot be read, or the chat does not fit.
        """
        request = read_chat(content, self._limits)
        if request.fields.model != answers.name:
            raise RequestError(
                f"model={shortened(request.fields.model, 60)}: is not served here; ask for {answers.name}",
                status=404,
                code="model_not_found",
                parameter="model",
            )
        picture = self._picture(request.picture, answers) if request.picture else None
        sampling = request.sampling(self._limits, answers.positions, secrets.randbits(63))
        chat = answers.chat(request.messages, picture, sampling.max_new_tokens)
        stop = tuple(dict.fromkeys((*sampling.stop, *chat.stop)))
        writer = Writer(
            answers.name, answers.token_text, picture, answers.padding, chat.dropped, has_usage=request.has_usage
        )
        return _Ready(request, chat, Sampling(**{**vars(sampling), "stop": stop}), writer)

    def _picture(self, where: PictureUrl, answers: Answers) -> Picture:
        """Read the picture that a request is about.

        Raises:
            RequestError: the model has no eyes, or the picture cannot be read.
        """
        if not answers.has_vision:
            raise RequestError(
                f"{where.parameter}: {answers.name} reads text only; leave the picture out, or ask another model",
                code="vision_not_supported",
                parameter=where.parameter,
            )
        try:
            return answers.picture(read_picture(where.url, self._access, self._limits))
        except DataError as error:
            raise RequestError(
                f"{where.parameter}: {error}", code="invalid_image", parameter=where.parameter
            ) from error


class _Stream(Response):
    """A stream of events, which ends the answers when it ends itself, however that comes."""

    def __init__(
        self,
        endpoint: ChatEndpoint,
        request: Request,
        ready: _Ready,
        exchange: Exchange,
        begin: float,
        leaving: ExitStack,
    ) -> None:
        super().__init__(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"} | ready.headers()
        )
        del self.headers["content-length"]
        self._endpoint, self._request, self._ready, self._exchange = endpoint, request, ready, exchange
        self._begin, self._leaving = begin, leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._leaving:
            async with self._exchange.watching(receive):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                try:
                    async for part in self._endpoint.events(self._ready, self._exchange):
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                except SphinxError as error:
                    body = event(self._endpoint.refusal(self._request, error).body())
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                except Exception:
                    self._request.state.outcome = 500
                    raise
                self._endpoint.note(self._request, self._exchange, self._begin)
                await send({"type": "http.response.body", "body": DONE, "more_body": False})
