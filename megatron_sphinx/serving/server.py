"""The HTTP server in OpenAI's form: chats, models, health and metrics."""

import time
import traceback
from hmac import compare_digest
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_sphinx.console import complain, say
from megatron_sphinx.errors import shortened
from megatron_sphinx.generation.answering import Answers
from megatron_sphinx.serving.chat_endpoint import ChatEndpoint
from megatron_sphinx.serving.gate import Gate
from megatron_sphinx.serving.limits import Access, Limits
from megatron_sphinx.serving.openai_errors import RequestError
from megatron_sphinx.serving.prometheus import Metrics

_COMPLETIONS = "text without a chat is not served; ask /v1/chat/completions"


def make_app(gate: Gate, limits: Limits, access: Access, *, is_quiet: bool = False) -> FastAPI:
    """Make the application that a server of ASGI runs.

    Args:
        gate: to the model.
        limits: of requests.
        access: who may ask, and what pictures may be named.
        is_quiet: whether no line is printed about a request.
    """
    app = FastAPI(title="megatron-sphinx", docs_url=None, redoc_url=None, openapi_url=None)
    metrics, created = Metrics(gate), int(time.time())
    chat = ChatEndpoint(gate, limits, access, metrics)

    @app.post("/v1/chat/completions")
    async def answer_chat(request: Request) -> Response:
        _check_key(request, access)
        return await chat.answer(request)

    @app.post("/v1/completions")
    async def refuse_completion(request: Request) -> Response:
        _check_key(request, access)
        raise RequestError(_COMPLETIONS, status=404, code="not_found")

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        _check_key(request, access)
        return JSONResponse({"object": "list", "data": [_model(gate.answers(), created)]})

    @app.get("/v1/models/{name:path}")
    async def show_model(request: Request, name: str) -> Response:
        _check_key(request, access)
        if name != (answers := gate.answers()).name:
            shown = f"model={shortened(name)}: is not served here; ask for {answers.name}"
            raise RequestError(shown, status=404, code="model_not_found", parameter="model")
        return JSONResponse(_model(answers, created))

    @app.get("/health")
    async def tell_health() -> Response:
        load = gate.load()
        gate.answers()
        return JSONResponse({"status": "ok"} | ({"waiting": load.waiting, "running": load.running} if load else {}))

    @app.get("/metrics")
    async def tell_metrics() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    _handle_errors(app)
    if not is_quiet:
        app.add_middleware(_AccessLog)
    return app


def _model(answers: Answers, created: int) -> dict[str, Any]:
    """Return what is told of a model."""
    about = {"max_model_len": answers.positions, "has_vision": answers.has_vision}
    return {"id": answers.name, "object": "model", "created": created, "owned_by": "megatron-sphinx"} | about


def _check_key(request: Request, access: Access) -> None:
    """Refuse a request without one of the keys.

    Raises:
        RequestError: keys are asked for, and the request has none of them.
    """
    if not access.keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    found = [compare_digest(given.strip().encode(), key.encode()) for key in access.keys]
    if scheme.lower() != "bearer" or not any(found):
        raise RequestError(
            "the API key is wrong or missing; send Authorization: Bearer KEY", status=401, code="invalid_api_key"
        )


def _handle_errors(app: FastAPI) -> None:
    """Let every error be told in OpenAI's form."""

    @app.exception_handler(RequestError)
    async def tell_refusal(_request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def tell_fault(request: Request, error: HTTPException) -> Response:
        path = shortened(request.url.path, 100)
        known = "known: /v1/chat/completions, /v1/models, /health, /metrics"
        refusal = RequestError(
            f"{request.method} {path}: {error.detail}; {known}",
            status=error.status_code,
            code="method_not_allowed" if error.status_code == 405 else "not_found",
        )
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def tell_bug(_request: Request, error: Exception) -> Response:
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
