"""The life of a process that serves: signals, a model that fails, one that cannot be loaded, lines that it prints."""

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fake_answers import until

ROOT = Path(__file__).parents[1]
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "seed": 1}
PROGRAM = """
import sys, threading, time
from argparse import ArgumentParser, Namespace
from fake_answers import FakeAnswers
from megatron_sphinx.cli.command import execute
from megatron_sphinx.errors import CheckpointError, DivergedError
from megatron_sphinx.serving.gate import Gate
from megatron_sphinx.serving.limits import Access, Limits
from megatron_sphinx.serving.process import HttpServer, serve

kind, limits = sys.argv[1], Limits(grace_seconds=float(sys.argv[2]))

def load():
    if kind == "missing":
        raise CheckpointError("runs/x: no checkpoint; train one")
    fake = FakeAnswers(tick_seconds=0.08)
    if kind == "idle":
        threading.Timer(0.3, fake.fail, [DivergedError("rank 3 was lost; start again")]).start()
    if kind == "busy":
        submit = fake.submit
        def failing(*args):
            threading.Timer(0.3, fake.fail, [DivergedError("rank 3 was lost; start again")]).start()
            return submit(*args)
        fake.submit = failing
    return fake

def run(args):
    gate = Gate(None, limits.requests)
    return serve(load, gate, HttpServer(gate, limits, Access(keys=("secret",)), "127.0.0.1", 0), limits)

sys.exit(execute(Namespace(run=run, parser=ArgumentParser(prog="sphinx serve"))))
"""


@pytest.fixture
def start():
    """`start(kind, grace)` starts a process that serves a model of a kind; its URL comes from what it prints."""
    started = []

    def begin(kind, grace="60"):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, kind, grace], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        started.append(process)
        if kind == "missing":
            return process, ""
        line = process.stdout.readline()
        return process, re.fullmatch(r"fake answers at (http://127\.0\.0\.1:\d+/v1)\n", line)[1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_until_inside(url):
    """Wait until a request is under way."""
    until(lambda: "sphinx_requests_inside 1.0" in httpx.get(f"{url.removesuffix('/v1')}/metrics", timeout=30).text)


def ask(url, **more):
    return httpx.post(
        f"{url}/chat/completions", json=BODY | more, headers={"Authorization": "Bearer secret"}, timeout=30
    )


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_signal_lets_what_runs_finish(start, is_stream):
    process, url = start("well")
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(ask, url, stream=is_stream)
        wait_until_inside(url)
        process.send_signal(signal.SIGTERM)
        said = "".join(iter(process.stdout.readline, "SIGTERM: no more requests; 1 under way may take 60 s\n"))
        assert ask(url).status_code == 503
        response = under_way.result()
    assert response.status_code == 200
    whole = "".join(re.findall(r'"content":"(.*?)"', response.text))
    assert whole == "You said: hello (1)"
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    out = said + out
    assert "served; ends" in out
    assert re.search(r"^POST /v1/chat/completions 200 \d+\.\d{3} s, 12\+21 tokens$", out, re.MULTILINE)
    assert re.search(r"^POST /v1/chat/completions 503 ", out, re.MULTILINE)
    assert "secret" not in out
    assert "hello" not in out


def test_what_does_not_finish_in_time_is_cut_off(start):
    process, url = start("well", "0.1")
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(ask, url, stream=True, messages=[{"role": "user", "content": "x" * 1000}])
        wait_until_inside(url)
        process.send_signal(signal.SIGINT)
        with pytest.raises(httpx.RemoteProtocolError):
            under_way.result()
    process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.mark.parametrize("kind", ["busy", "idle"])
def test_a_lost_rank_ends_the_process_with_its_line(start, kind):
    process, url = start(kind)
    if kind == "busy":
        response = ask(url)
        assert response.status_code == 500
        assert "the model has failed: rank 3 was lost; start again" in response.text
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err == "sphinx serve: rank 3 was lost; start again\n"


def test_a_model_that_cannot_be_loaded_is_told(start):
    process, _ = start("missing")
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (2, "sphinx serve: runs/x: no checkpoint; train one\n")
