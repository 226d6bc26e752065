"""What the server refuses: each with status, OpenAI's form, the part of the request that is wrong, and a way out."""

import io
import json
import random
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from fake_answers import FakeAnswers, served, until
from PIL import Image
from test_server import about, data_url, user

from megatron_sphinx.cli import serve as command
from megatron_sphinx.cli.main import main
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.generation.answering import QueueFullError
from megatron_sphinx.generation.pictures import MOST_BYTES
from megatron_sphinx.serving.gate import Gate
from megatron_sphinx.serving.limits import Access, Limits
from megatron_sphinx.serving.openai_errors import RequestError
from megatron_sphinx.serving.picture_urls import read_picture
from megatron_sphinx.serving.process import HttpServer

GOOD = {"model": "fake", "messages": user("Hello")}
PICTURE = data_url()


@pytest.fixture(scope="module")
def url():
    with served(FakeAnswers(positions=2000), Limits(body_mebibytes=1, picture_mebibytes=1)) as (url, _):
        yield url


def ask(url, body, **more):
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30, **more)


def refused(response, status, parameter, code, message):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"], error["code"]) == (status, parameter, code), error
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")


def role(name, content="x"):
    return {"role": name, "content": content}


LONG = "x" * 5000
CASES = [
    ({"frequency": 1}, "frequency", "unknown_parameter", "frequency: unknown field; known: model, n,"),
    ({"max_token": 1}, "max_token", "unknown_parameter", "unknown field; did you mean max_tokens?"),
    ({"a\nb": 1}, "a b", "unknown_parameter", "a b: unknown field"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter", "=0.5: is not supported here; leave it"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "json_object"),
    ({"tools": [{}]}, "tools", "unsupported_parameter", "tools=[{}]: is not supported here; leave it out"),
    ({"logit_bias": {"1": 5}}, "logit_bias", "unsupported_parameter", "is not supported here"),
    ({"model": None}, "model", "invalid_value", "model: is missing; give the name that /v1/models tells"),
    ({"model": 7}, "model", "invalid_value", "model=7: must be text"),
    ({"n": 0}, "n", "invalid_value", "n=0: must be at least 1"),
    ({"n": 17}, "n", "invalid_value", "n=17: is more than --choices=16; ask for fewer answers"),
    ({"n": 2.5}, "n", "invalid_value", "n=2.5: must be a whole number"),
    ({"temperature": -1}, "temperature", "invalid_value", "temperature=-1.0: must be at least 0"),
    ({"model": "x\udc80"}, "model", "invalid_value", "model: holds half a character (a lone surrogate)"),
    ({"x\udc80": 1}, "x\\udc80", "unknown_parameter", "x\\udc80: unknown field"),
    ({"temperature": "1"}, "temperature", "invalid_value", "temperature=1: must be a number; leave out its quotes"),
    ({"temperature": "hot"}, "temperature", "invalid_value", "temperature=hot: must be a number"),
    ({"temperature": True}, "temperature", "invalid_value", "temperature=True: must be a number"),
    ({"top_p": 1.5}, "top_p", "invalid_value", "top_p=1.5: must be between 0 and 1"),
    ({"top_k": -2}, "top_k", "invalid_value", "top_k=-2: must be at least -1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value", "must be above 0"),
    ({"seed": 2**63}, "seed", "invalid_value", "must be at most"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value", "max_tokens=0: must be at least 1"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value", "differs from max_completion_token"),
    ({"logprobs": 1}, "logprobs", "invalid_value", "logprobs=1: must be true or false"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value", "top_logprobs: needs logprobs=true; give both, or none"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "must be at most 20"),
    ({"stop": 1}, "stop", "invalid_value", "stop=1: must be a text, or a list of at most 16"),
    ({"stop": ["x"] * 17}, "stop", "invalid_value", "must be a text, or a list of at most 16"),
    ({"stop": ""}, "stop", "invalid_value", "stop: a text of 0 characters; give 1 to 1000, or leave it out"),
    ({"stop": "x" * 1001}, "stop", "invalid_value", "stop: a text of 1001 characters"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "needs stream=true; give both"),
    ({"stream": True, "stream_options": []}, "stream_options", "invalid_value", 'must be like {"include_usage": true}'),
    ({"stream": True, "stream_options": {"x": True}}, "stream_options.x", "invalid_value", "is not supported here"),
    ({"messages": None}, "messages", "invalid_value", "messages: must be a list like"),
    ({"messages": []}, "messages", "invalid_value", "messages: must be a list like"),
    ({"messages": ["x"]}, "messages[0]", "invalid_value", 'messages[0]: must be like {"role": "user"'),
    ({"messages": [role("me")]}, "messages[0].role", "invalid_value", "role=me: must be system, user or assistant"),
    ({"messages": [role("tool")]}, "messages[0].role", "invalid_value", "role=tool: must be system, user or assist"),
    ({"messages": [role("assistant"), role("user")]}, "messages[0].role", "invalid_value", "it is the turn of user;"),
    ({"messages": [role("user"), role("user")]}, "messages[1].role", "invalid_value", "it is the turn of assistant;"),
    ({"messages": [role("user"), role("system")]}, "messages[1].role", "invalid_value", "the system only first"),
    ({"messages": [role("system")]}, "messages[0].role", "invalid_value", "the last message must be the user's; add a"),
    ({"messages": [role("user"), role("assistant")]}, "messages[1].role", "invalid_value", "the last message must be"),
    ({"messages": [role("user", " ")]}, "messages[0].content", "invalid_value", "content: is empty; ask something"),
    ({"messages": [role("user", 5)]}, "messages[0].content", "invalid_value", "=5: must be text, or a list of parts"),
    ({"messages": [role("user") | {"name": "x"}]}, "messages[0].name", "unsupported_parameter", "is not supported"),
    ({"messages": [role("user", [5])]}, "messages[0].content[0]", "unsupported_content", 'must be {"type": "text"'),
    ({"messages": [role("user", [{"type": "audio"}])]}, "messages[0].content[0]", "unsupported_content", "must be"),
    ({"messages": [role("user", "\ud83d")]}, "messages[0].content", "invalid_value", "half a character (a lone surrog"),
    (
        {"messages": user([*about(PICTURE), *about(PICTURE)])}, "messages[0].content[2].image_url", "too_many_images",
        "is a second picture; a chat is about one, so begin another chat",
    ),
    (
        {"messages": [*user(about(PICTURE)), role("assistant"), *user(about(PICTURE))]},
        "messages[2].content[0].image_url", "too_many_images", "is a second picture",
    ),
    (
        {"messages": [role("system", about(PICTURE)), role("user")]}, "messages[0].content[0].image_url",
        "invalid_value", "a picture of the system; only the user gives one",
    ),
    (
        {"messages": user([{"type": "image_url", "image_url": {"url": PICTURE, "detail": "sharp"}}, *about(PICTURE)])},
        "messages[0].content[0].image_url", "invalid_value", "with detail auto, low or high",
    ),
    ({"messages": user(LONG)}, "messages", "context_length_exceeded", "do not fit into 2000; ask for less"),
    ({"max_tokens": 2000}, "messages", "context_length_exceeded", "2000 new ones do not fit into 2000"),
]  # fmt: skip
PICTURES = [
    ("data:image/png,abc", "must be data:image/…;base64,…"),
    ("data:image/png;base64,a=b", "is no base64"),
    ("data:image/png;base64,é", "is no base64"),
    ("data:image/png;base64,", "not an image: the file is empty"),
    ("data:image/png;base64,aGVsbG8gd29ybGQ=", "not an image: it begins with b'hello world'"),
    (data_url(300, 200)[:2000], "does not decode|is no base64|not an image"),
    ("http://127.0.0.1/x.png", "must begin with data:, or with file: or https: where the server allows it"),
    ("ftp://host/x.png", "must begin with data:"),
    ("x.png", "must begin with data:"),
    ("https://[x", "is no URL"),
    ("https://host:99999999/x", "is no URL"),
    ("file:///etc/passwd", "is in no folder of --allow-files; give data:"),
    ("https://example.org/x.png", "is of no host of --allow-urls; give data:"),
]


@pytest.mark.parametrize(("change", "parameter", "code", "message"), CASES, ids=[str(case[0])[:40] for case in CASES])
def test_a_wrong_request_is_refused_by_name(url, change, parameter, code, message):
    refused(httpx.post(f"{url}/v1/chat/completions", content=json.dumps(GOOD | change),
                       headers={"Content-Type": "application/json"}), 400, parameter, code, message)  # fmt: skip


@pytest.mark.parametrize(("picture", "message"), PICTURES, ids=[picture[:40] for picture, _ in PICTURES])
def test_a_wrong_picture_is_refused(url, picture, message):
    response = ask(url, GOOD | {"messages": user(about(picture))})
    fits = [part for part in message.split("|") if part in response.text]
    refused(response, 400, "messages[0].content[0].image_url", "invalid_image", fits[0] if fits else message)


def test_a_huge_picture_is_refused(url):
    Image.new("1", (60_000, 2)).save(buffer := io.BytesIO(), "PNG")
    from base64 import b64encode

    huge = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
    refused(ask(url, GOOD | {"messages": user(about(huge))}), 400, "messages[0].content[0].image_url",
            "invalid_image", "decompression bomb: 60000x2 pixels")  # fmt: skip


def test_a_text_model_has_no_eyes():
    with served(FakeAnswers(has_vision=False)) as (url, _):
        refused(ask(url, GOOD | {"messages": user(about(PICTURE))}), 400, "messages[0].content[0].image_url",
                "vision_not_supported", "fake reads text only; leave the picture out, or ask another")  # fmt: skip
        assert ask(url, GOOD).status_code == 200


def test_other_models_and_pages(url):
    refused(ask(url, GOOD | {"model": "gpt-4"}), 404, "model", "model_not_found",
            "model=gpt-4: is not served here; ask for fake")  # fmt: skip
    response = ask(url, GOOD | {"model": "x" * 9999})
    refused(response, 404, "model", "model_not_found", f"model={'x' * 57}...: is not served here")
    refused(httpx.get(f"{url}/v2/x"), 404, None, "not_found", "GET /v2/x: Not Found; known: /v1/chat/completions,")
    refused(httpx.get(f"{url}/v1/chat/completions"), 405, None, "method_not_allowed", "Method Not Allowed")
    refused(httpx.post(f"{url}/v1/completions", json={}), 404, None, "not_found", "ask /v1/chat/completions")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is not JSON"),
        (b"[]", "the body is no JSON object; send {"),
        (b'{"model": "fake", "model": "fake"}', "the key model is given twice"),
        (b"\xff\xfe", "the body is not UTF-8 (byte 0); send JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"[" + b"0," * 500_001, "the body is not JSON"),
        (b"[" * 1_000_001, "the body has more than 1,000,000 values; send a shorter chat"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
    ],
)
def test_a_body_that_is_no_json(url, content, message):
    response = httpx.post(
        f"{url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    refused(response, 400, None, "invalid_json", message)


def test_bodies_that_are_too_large_too_slow_or_of_another_type(url):
    head = {"Content-Type": "application/json"}
    where, large = f"{url}/v1/chat/completions", b" " * (2**20 + 1)
    said = "the body has more than --body-mebibytes=1; send a smaller picture"
    refused(httpx.post(where, content=large, headers=head), 413, None, "body_too_large", said)
    refused(httpx.post(where, content=iter([large]), headers=head), 413, None, "body_too_large", said)
    refused(httpx.post(where, content=b"{}"), 415, None, "unsupported_media_type",
            "Content-Type: must be application/json; send this header")  # fmt: skip
    with served(FakeAnswers(), Limits(upload_seconds=0.2)) as (url, gate):

        def slow():
            yield b"{"
            time.sleep(0.6)
            yield b"}"

        response = httpx.post(f"{url}/v1/chat/completions", content=slow(), headers=head)
        refused(response, 408, None, "timeout", "the body takes longer than --upload-seconds=0.2; send it faster")
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as half:  # gone with half a body
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 9\r\n\r\n{")  # fmt: skip
            until(lambda: gate.inside == 1)
        until(lambda: gate.inside == 0)


def test_full_queues():
    fake = FakeAnswers(tick_seconds=0.05, queue=3)
    with served(fake, Limits(requests=2)) as (url, gate), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, url, GOOD | {"n": 2})
        until(lambda: len(fake.held) == 2)
        response = ask(url, GOOD | {"n": 2})
        refused(response, 503, None, "queue_full", "3 requests wait already; ask again later")
        assert response.headers["Retry-After"] == "1"
        until(lambda: len(fake.held) == 2)  # the one of two that there was room for is not held
        second = pool.submit(ask, url, GOOD)
        until(lambda: gate.inside == 2)
        refused(ask(url, GOOD), 503, None, "queue_full", "2 requests are being answered or wait, as many as --requests")
        assert (first.result().status_code, second.result().status_code) == (200, 200)
        assert not gate.inside
    assert issubclass(QueueFullError, Exception)


def test_a_bug_is_told_as_one_and_the_server_goes_on(capsys):
    fake = FakeAnswers()
    with served(fake) as (url, gate):
        fake.chat, chat = lambda *_: 1 / 0, fake.chat
        refused(ask(url, GOOD), 500, None, "internal_error", "an error of the server, see its log")
        fake.chat = chat
        assert ask(url, GOOD).status_code == 200
        assert gate.inside == 0
        assert 'sphinx_requests_total{status="500"} 1.0' in httpx.get(f"{url}/metrics").text
        fake.token_text = lambda _: 1 / 0
        with suppress(httpx.RemoteProtocolError):
            ask(url, GOOD | {"stream": True, "logprobs": True})
        until(lambda: 'sphinx_requests_total{status="500"} 2.0' in httpx.get(f"{url}/metrics").text)
        assert gate.inside == 0
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_answers_that_the_model_ends_itself():
    fake = FakeAnswers(tick_seconds=0.05)
    with served(fake) as (url, _), ThreadPoolExecutor(2) as pool:
        whole, stream = pool.submit(ask, url, GOOD), pool.submit(ask, url, GOOD | {"stream": True})
        until(lambda: len(fake.held) == 2)
        for ticket in list(fake.held.values()):
            ticket.cancel()
        refused(whole.result(), 503, None, "closing", "the answer was ended, for the server is closing")
        *_, error, done, _ = stream.result().text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "closing"
        assert done == "data: [DONE]"


def test_files_only_where_they_are_allowed(tmp_path):
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for folder in (allowed / "below", other):
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 6), "red").save(folder / "a picture.png")
    (allowed / "link.png").symlink_to(other / "a picture.png")
    (allowed / "large.png").write_bytes(b"x" * (2**20 + 1))
    with served(FakeAnswers(), Limits(picture_mebibytes=1), Access(folders=(allowed,))) as (url, _):

        def look(name):
            return ask(url, GOOD | {"messages": user(about(name))})

        assert look(f"file://{allowed}/below/a%20picture.png").status_code == 200
        assert look(f"file://localhost{allowed}/below/a%20picture.png").status_code == 200
        for name, message in [
            (f"{other}/a%20picture.png", "is in no folder of --allow-files"),
            (f"{allowed}/../other/a%20picture.png", "is in no folder of --allow-files"),
            (f"{allowed}/%2e%2e/other/a%20picture.png", "is in no folder of --allow-files"),
            (f"{allowed}/link.png", "is in no folder of --allow-files"),
            (f"{allowed}/x%00.png", "is in no folder of --allow-files"),
            (f"elsewhere{allowed}/below/a%20picture.png", "must be file:///folder/picture.jpg, of this machine"),
            (f"{allowed}/below", "is no regular file|cannot be read (Is a directory); name a picture"),
            (f"{allowed}/none.png", "cannot be read (No such file or directory); name a picture"),
            (f"{allowed}/large.png", "has more than --picture-mebibytes=1; give a smaller picture, or allow more"),
        ]:
            response = look(f"file://{name}")
            fits = [part for part in message.split("|") if part in response.text]
            refused(response, 400, "messages[0].content[0].image_url", "invalid_image", fits[0] if fits else message)
        large = "data:image/png;base64," + "A" * (2**20 * 4 // 3 + 8)
        refused(look(large), 400, "messages[0].content[0].image_url", "invalid_image", "the data: URL: has more than")


class Host(BaseHTTPRequestHandler):
    """A host of pictures; it counts what it is asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        picture = io.BytesIO()
        Image.new("RGB", (4, 6)).save(picture, "PNG")
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture%20one.png?a=b")
            self.end_headers()
            return
        with suppress(OSError):  # a client that has heard enough
            self.send(picture.getvalue())

    def send(self, picture):
        self.send_response(200 if self.path in ("/picture%20one.png?a=b", "/large", "/slow") else 404)
        self.end_headers()
        for _ in range(40 if self.path == "/slow" else 1):
            self.wfile.write(b"x" * 2**21 if self.path == "/large" else picture)
            time.sleep(0.05 if self.path == "/slow" else 0)

    def log_message(self, *_):
        pass


@pytest.fixture
def host(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    Host.asked.clear()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_hosts_only_where_they_are_allowed(host):
    limits = Limits(picture_mebibytes=1, fetch_seconds=0.4)
    with served(FakeAnswers(), limits, Access(hosts=(f"LocalHost:{host}",))) as (url, _):

        def look(name):
            return ask(url, GOOD | {"messages": user(about(name))})

        base = f"https://localhost:{host}"
        assert look(f"{base}/picture one.png?a=b#c").status_code == 200
        refused_ones = [
            (f"https://127.0.0.1:{host}/picture", "is of no host of --allow-urls"),
            (f"https://localhost.:{host + 1}/picture", "is of no host of --allow-urls"),
            (f"https://me@localhost:{host}/picture", "is of no host of --allow-urls"),
            (f"https://localhost:{host}@example.org/picture", "is of no host of --allow-urls"),
            (f"http://localhost:{host}/picture", "must begin with data:"),
        ]
        for name, message in refused_ones:
            refused(look(name), 400, "messages[0].content[0].image_url", "invalid_image", message)
        assert Host.asked == ["/picture%20one.png?a=b"]
        for name, message in [
            ("/moved", "the host answered 302, and redirects are not followed; give the picture's own URL"),
            ("/none?secret", "/none: the host answered 404"),
            ("/large", "has more than --picture-mebibytes=1"),
            ("/slow", "takes longer than --fetch-seconds=0.4"),
            ("/x?a b", "cannot be had"),
        ]:
            response = look(base + name)
            refused(response, 400, "messages[0].content[0].image_url", "invalid_image", message)
            assert "secret" not in response.text


WORDS = ["", "x", "user", "\ud800", "é" * 50, "data:image/png;base64,AAAA", PICTURE, "\0", "NaN", "9" * 30]


def anything(draw, depth=0):
    """A random value of JSON, some of them as nobody would write them."""
    kind = draw.randrange(10 if depth < 4 else 7)
    if kind < 3:
        return draw.choice([None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 10**400])
    if kind < 5:
        return draw.choice([0.5, 1e308, -1e-300, float("nan"), float("inf"), -float("inf")])
    if kind < 7:
        return draw.choice(WORDS)
    if kind == 7:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    keys = ["role", "content", "type", "text", "image_url", "url", "detail", "x", "include_usage", "name"]
    return {draw.choice(keys): anything(draw, depth + 1) for _ in range(draw.randrange(4))}


def mutated(draw, value):
    """A body with one thing in it exchanged, left out, or put in."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        return value | {key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        return [
            *value[:place],
            *draw.choice([[], [mutated(draw, value[place])], [value[place]] * 2]),
            *value[place + 1 :],
        ]
    return anything(draw)


FULL = {
    "model": "fake", "messages": [role("system"), *user(about(PICTURE)), role("assistant"), *user("y")], "n": 1,
    "temperature": 0.5, "top_p": 0.5, "top_k": 5, "repetition_penalty": 1.0, "seed": 5, "max_tokens": 5, "stop": ["x"],
    "logprobs": True, "top_logprobs": 2, "stream": False, "user": "me", "tools": [], "stream_options": None,
}  # fmt: skip


def fuzzed(draw):
    """The bytes of a body that may be anything, most of them nearly right."""
    kind = draw.random()
    if kind < 0.1:
        return draw.randbytes(draw.randrange(200))
    if kind < 0.25:
        return json.dumps(anything(draw)).encode()
    body = FULL | ({"stream": True} if draw.random() < 0.2 else {})
    for _ in range(draw.randrange(3)):
        body = mutated(draw, body)
    if isinstance(body, dict) and draw.random() < 0.3:
        body[draw.choice([*FULL, "x", "audio"])] = anything(draw)
    content = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass"))
    if draw.random() < 0.15 and content:
        place = draw.randrange(len(content))
        content[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    return bytes(content)


def test_no_body_makes_the_server_fail():
    def one(seed):
        content = fuzzed(random.Random(seed))
        response = client.post(
            f"{url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code in (200, 400, 404), (seed, content[:300], response.text)
        assert response.status_code == 200 or response.json()["error"]["message"], seed
        assert '"server_error"' not in response.text
        return response.status_code

    with served(FakeAnswers()) as (url, gate), httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(one, range(600)))
        assert min(statuses[200], statuses[400]) > 50, statuses
        assert gate.inside == 0
        assert gate.failure is None


def test_errors_of_any_characters_are_written():
    body = RequestError("x\udc80é", parameter="\ud800").body()["error"]
    assert (body["message"], body["param"]) == ("x\\udc80é", "\\ud800")


def test_a_server_of_this_machine_without_keys_answers_to_its_own_names_only(url):
    port = url.rpartition(":")[2]
    for name in ("127.0.0.1", "LOCALHOST", "[::1]", f"[::1]:{port}", f"localhost:{port}"):
        assert ask(url, GOOD, headers={"Host": name}).status_code == 200, name
    for name in ("example.org", f"localhost.example.org:{port}", "[::1", ""):
        assert ask(url, GOOD, headers={"Host": name}).status_code == 400, name
    with served(FakeAnswers(), access=Access(keys=("k",))) as (url, _):
        assert ask(url, GOOD, headers={"Host": "example.org", "Authorization": "Bearer k"}).status_code == 200


def test_the_largest_pictures_are_those_that_models_take():
    with pytest.raises(ConfigError, match="--picture-mebibytes=65: must be at most 64"):
        Limits(picture_mebibytes=65)
    assert Limits(picture_mebibytes=64).picture_mebibytes * 2**20 == MOST_BYTES


@pytest.mark.parametrize("allowed", ["LocalHost:443", "localhost"])
def test_the_usual_port_of_a_host_may_be_named(allowed):
    for url in ("https://localhost/x", "https://localhost:443/x"):
        with pytest.raises(DataError, match="cannot be had"):  # so it is allowed
            read_picture(url, Access(hosts=(allowed,)), Limits(fetch_seconds=1))
    with pytest.raises(DataError, match=r"allow the host x+[.]{3}$"):
        read_picture(f"https://{'x' * 999}/x", Access(hosts=(allowed,)), Limits())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port=70000: must be at most 65,535"),
        (["--requests", "0"], "--requests=0: must be at least 1"),
        (["--grace-seconds", "nan"], "--grace-seconds=nan: must be a finite number"),
        (["--top-p", "2"], "--top-p=2.0: must be between 0 and 1"),
        (["--max-tokens", "0"], "--max-tokens=0: must be at least 1"),
        (["--api-key", "é"], "--api-key or MEGATRON_SPHINX_API_KEY: must be printable ASCII without spaces"),
        (["--api-key", ""], "--api-key or MEGATRON_SPHINX_API_KEY: must be printable ASCII"),
        (["--allow-files", "/nowhere"], "--allow-files=/nowhere: is no folder; give one with pictures"),
        (["--allow-urls", "https://x"], "--allow-urls=https://x: must be the name of a host, like images"),
        (["--host", "no.such.host.invalid", "--port", "0"], "--host=no.such.host.invalid --port=0: cannot be"),
    ],
)  # fmt: skip
def test_the_command_refuses_wrong_arguments(words, message, checkpoint, capsys):
    assert main(["serve", checkpoint, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_told():
    with served(FakeAnswers()) as (url, _):
        port = int(url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"--host=127.0.0.1 --port={port}: cannot be listened at \(Address alre"):
            HttpServer(Gate(None, 1), Limits(), Access(), "127.0.0.1", port)


def test_who_may_be_reached_from_elsewhere_is_warned_of_having_no_key(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("MEGATRON_SPHINX_API_KEY", "secret")
    assert main(["serve", checkpoint, "--host", "no.such.host.invalid"]) == 2
    assert "whoever reaches" not in capsys.readouterr().err
    monkeypatch.delenv("MEGATRON_SPHINX_API_KEY")
    assert main(["serve", checkpoint, "--host", "no.such.host.invalid"]) == 2
    said = capsys.readouterr().err
    assert "--host=no.such.host.invalid: whoever reaches this machine may ask; give --api-key to change that" in said
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["serve", checkpoint]) == 2
    assert "fastapi is not installed; pip install 'megatron-sphinx[serve]'" in capsys.readouterr().err
