"""A server that speaks as much of OpenAI's protocol as the web page needs; what it answers is written beforehand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

END = {"finish_reason": "stop"}


@dataclass
class Stub:
    """What the server answers, and what it was asked.

    Attributes:
        script: parts of the next answers: a text, an Event that is waited for, or a dict, which is a choice.
        status: of HTTP; other than 200 with `error`.
        error: its message.
        asked: bodies of the requests.
        keys: what they had for Authorization.
        cut: set when a client goes away before the end.
        url: of the server.
    """

    script: list = field(default_factory=list)
    status: int = 200
    error: str = ""
    dropped: int = 0
    asked: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    cut: Event = field(default_factory=Event)
    models: tuple[str, ...] = ("tiny-sphinx",)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """Answers as the stub of its server says."""

    def log_message(self, *_):
        """Keep quiet."""

    def _json(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        stub = self.server.stub
        stub.keys.append(self.headers["Authorization"])
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "", "max_model_len": 256} for name in stub.models
        ]
        self._json(200, {"object": "list", "data": models})

    def do_POST(self):
        stub = self.server.stub
        stub.keys.append(self.headers["Authorization"])
        stub.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if stub.status != 200:
            error = {"message": stub.error, "type": "invalid_request_error", "param": None, "code": None}
            return self._json(stub.status, {"error": error})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for part in stub.script:
            if isinstance(part, Event):
                part.wait(20)
            else:
                self._send(stub, part if isinstance(part, dict) else {"delta": {"content": part}})
        return self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, stub, choice):
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "tiny-sphinx"}
        chunk["choices"] = [{"index": 0, "delta": {}, "finish_reason": None, **choice}]
        chunk |= {"dropped_turns": stub.dropped} if stub.dropped else {}
        try:
            self.wfile.write(f"data: {json.dumps(choice if 'error' in choice else chunk)}\n\n".encode())
            self.wfile.flush()
        except OSError:
            stub.cut.set()
            raise


class Server(ThreadingHTTPServer):
    """Serves in threads, and says nothing of clients that went away."""

    daemon_threads = True

    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_):
        """Keep quiet."""


@contextmanager
def stub_server() -> Iterator[Stub]:
    """Run one on a free port of this machine."""
    stub = Stub()
    server = Server(stub)
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
