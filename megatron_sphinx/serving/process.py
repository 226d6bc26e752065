"""The life of a process that serves: it listens, loads its model, answers, and ends when asked to or when it failed."""

import signal
import socket
import time
from collections.abc import Callable
from threading import Thread
from types import FrameType

import uvicorn

from megatron_sphinx.console import say
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.generation.answering import Answers
from megatron_sphinx.serving.gate import Gate
from megatron_sphinx.serving.limits import LOCAL, Access, Limits
from megatron_sphinx.serving.server import make_app

_POLL_SECONDS = 0.1
_PROBE_SECONDS = 1.0  # after which a model without requests is asked whether it still lives
_LAST_SECONDS = 3.0  # that errors, and answers that were cut off, may take to reach their clients


class HttpServer:
    """A server of HTTP in a thread of its own.

    Args:
        gate: to the model, which may be loaded later.
        limits: of requests.
        access: who may ask, and what pictures may be named.
        host: address to listen at.
        port: of the host; 0 for any that is free.
        is_quiet: whether no line is printed about a request.

    Attributes:
        url: where it listens.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(
        self, gate: Gate, limits: Limits, access: Access, host: str, port: int, *, is_quiet: bool = False
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=2048)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--host={host} --port={port}: cannot be listened at ({reason}); give others") from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._gate = gate
        app = make_app(gate, limits, access, is_local=host in LOCAL, is_quiet=is_quiet)
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
            server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, name="http")
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """Take no more requests, let those under way end, and end.

        Args:
            seconds: that they may take; what runs then is cut off.
        """
        self._gate.close()
        end = time.monotonic() + seconds
        while self._gate.inside and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        self._server.should_exit = True
        self._thread.join()


class _Signals:
    """Notes that the process was asked to end; asked again, it ends at once, as without this."""

    def __init__(self) -> None:
        self.name = ""
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def serve(load: Callable[[], Answers], gate: Gate, server: HttpServer, limits: Limits) -> int:
    """Load a model, and answer until a signal comes; the exit status.

    While the model is loaded, requests are told to come again.

    Args:
        load: loads the model.
        gate: that requests come through.
        server: it listens already.
        limits: of requests.

    Raises:
        SphinxError: the model cannot be loaded, or has failed; requests under way have been told.
    """
    try:
        answers = load()
    except BaseException:
        server.finish(0)
        raise
    signals = _Signals()
    gate.open(answers)
    say(f"{answers.name} answers at {server.url}/v1")
    probed = time.monotonic()
    try:
        while not signals.name and gate.failure is None:
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - probed > _PROBE_SECONDS:
                gate.load()
                probed = time.monotonic()
        if signals.name:
            say(f"{signals.name}: no more requests; {gate.inside} under way may take {limits.grace_seconds:g} s")
        server.finish(limits.grace_seconds if gate.failure is None else _LAST_SECONDS)
    except BaseException:  # asked again to end
        server.finish(0)
        raise
    finally:
        signals.restore()
    answers.close()  # where the model has failed on one of several ranks, this ends them all
    if gate.failure is not None:
        raise gate.failure
    say("served; ends")
    return 0
