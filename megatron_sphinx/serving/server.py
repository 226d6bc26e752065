"""The HTTP server in OpenAI's form: chats, models, health and metrics."""

import time
import traceback
from hmac import compare_digest
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_sphinx.console import complain, say
from megatron_sphinx.errors import shortened
from megatron_sphinx.generation.answering import Answers
from megatron_sphinx.serving.chat_endpoint import ChatEndpoint
from megatron_sphinx.serving.gate import Gate
from megatron_sphinx.serving.limits import LOCAL, Access, Limits
from megatron_sphinx.serving.openai_errors import RequestError
from megatron_sphinx.serving.prometheus import Metrics


def make_app(gate: Gate, limits: Limits, access: Access, *, is_local: bool = False, is_quiet: bool = False) -> FastAPI:
    """Make the application that a server of ASGI runs.

    Args:
        gate: to the model.
        limits: of requests.
        access: who may ask, and what pictures may be named.
        is_local: whether only this machine is listened to. Without keys a request must be for it by name then, so that
            no page of another site gets at the model by a name of its own that leads here.
        is_quiet: whether no line is printed about a request.
    """
    app = FastAPI(title="megatron-sphinx", docs_url=None, redoc_url=None, openapi_url=None)
    pages = _Pages(gate, limits, access)
    app.add_api_route("/v1/chat/completions", pages.chat, methods=["POST"])
    app.add_api_route("/v1/completions", pages.completion, methods=["POST"])
    app.add_api_route("/v1/models", pages.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", pages.model, methods=["GET"])
    app.add_api_route("/health", pages.health, methods=["GET"])
    app.add_api_route("/metrics", pages.metrics, methods=["GET"])
    app.add_exception_handler(RequestError, _tell_refusal)
    app.add_exception_handler(HTTPException, _tell_fault)
    app.add_exception_handler(Exception, _tell_bug)
    if is_local and not access.keys:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, "[::1]"], www_redirect=False)
    if not is_quiet:
        app.add_middleware(_AccessLog)
    return app


class _Pages:
    """Answers what is asked at each path."""

    def __init__(self, gate: Gate, limits: Limits, access: Access) -> None:
        self._gate, self._access, self._created = gate, access, int(time.time())
        self._metrics = Metrics(gate)
        self._chat = ChatEndpoint(gate, limits, access, self._metrics)

    async def chat(self, request: Request) -> Response:
        try:
            self._check_key(request)
        except RequestError as error:
            self._metrics.requests.labels(str(error.status)).inc()
            raise
        return await self._chat.answer(request)

    async def completion(self, request: Request) -> Response:
        self._check_key(request)
        raise RequestError(
            "/v1/completions: text without a chat is not served; ask /v1/chat/completions", status=404, code="not_found"
        )

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._about(self._gate.answers())]})

    async def model(self, request: Request, name: str) -> Response:
        self._check_key(request)
        if name != (answers := self._gate.answers()).name:
            shown = f"model={shortened(name)}: is not served here; ask for {answers.name}"
            raise RequestError(shown, status=404, code="model_not_found", parameter="model")
        return JSONResponse(self._about(answers))

    async def health(self) -> Response:
        load = self._gate.load()
        self._gate.answers()
        return JSONResponse({"status": "ok"} | ({"waiting": load.waiting, "running": load.running} if load else {}))

    async def metrics(self) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4")

    def _about(self, answers: Answers) -> dict[str, Any]:
        """Return what is told of a model."""
        about = {"max_model_len": answers.positions, "has_vision": answers.has_vision}
        return {"id": answers.name, "object": "model", "created": self._created, "owned_by": "megatron-sphinx"} | about

    def _check_key(self, request: Request) -> None:
        """Refuse a request without one of the keys.

        Raises:
            RequestError: keys are asked for, and the request has none of them.
        """
        if not self._access.keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        found = [compare_digest(given.strip().encode(), key.encode()) for key in self._access.keys]
        if scheme.lower() != "bearer" or not any(found):
            raise RequestError(
                "the API key is wrong or missing; send Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )


def _tell_refusal(_request: Request, error: Exception) -> Response:
    """Tell why a request gets no answer."""
    assert isinstance(error, RequestError), "a handler of another error"
    return JSONResponse(error.body(), error.status, error.headers)


def _tell_fault(request: Request, error: Exception) -> Response:
    """Tell that there is no such page, or that it is asked for otherwise."""
    assert isinstance(error, HTTPException), "a handler of another error"
    path = shortened(request.url.path, 100)
    refusal = RequestError(
        f"{request.method} {path}: {error.detail}; known: /v1/chat/completions, /v1/models, /health, /metrics",
        status=error.status_code,
        code="method_not_allowed" if error.status_code == 405 else "not_found",
    )
    return JSONResponse(refusal.body(), error.status_code, error.headers)


def _tell_bug(_request: Request, error: Exception) -> Response:
    """Tell that the server itself is wrong, and print where."""
    complain("".join(traceback.format_exception(error)).rstrip())
    refusal = RequestError("an error of the server, see its log", status=500, code="internal_error")
    return JSONResponse(refusal.body(), 500)


class _AccessLog:
    """Prints a line about each request when it has ended: nothing of what was asked, and no key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        state = scope.setdefault("state", {})
        try:
            await self._app(scope, receive, note)
        finally:
            more = f", {state['tokens']}" if "tokens" in state else ""
            path = shortened(scope["path"], 100)
            say(f"{scope['method']} {path} {state.get('outcome', status)} {time.monotonic() - begin:.3f} s{more}")
