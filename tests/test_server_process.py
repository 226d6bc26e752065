"""The life of a process that serves: signals, a model that fails, one that cannot be loaded, lines that it prints."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from conftest import train_tokenizer
from fake_answers import until
from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama that knows nothing, with a tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("models") / "little"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=2048, **shape)).save_pretrained(folder)
    train_tokenizer(folder / "tokenizer", ["What is a picture?", "It is made of pixels."] * 20, 320)
    return folder


@pytest.fixture
def serve(llama, tmp_path):
    """`serve(*launcher, ranks)` starts the command and gives its process, its URL and what it writes to."""
    started = []

    def begin(ranks=1):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        errors = tmp_path / "errors"
        with errors.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "megatron_sphinx", "serve", llama, "--port", str(port),
                 "--device", "cpu", "--tensor", str(ranks), "--cache-gib", "0.01"],
                stdout=subprocess.DEVNULL, stderr=file, env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        started.append(process)
        until(lambda: process.poll() is not None or is_ready(port), 120)
        assert process.poll() is None, errors.read_text()
        return process, f"http://127.0.0.1:{port}/v1", errors

    yield begin
    for process in started:
        process.kill()
        process.wait()


def is_ready(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_the_command_serves_a_real_model(serve):
    process, url, errors = serve()
    first, second = (
        ask(url, model="little", max_tokens=9, ignore_eos=True, messages=[{"role": "user", "content": text}]).json()
        for text in ("What is a picture? " * 9, "What is a picture? " * 8 + "A picture")
    )
    assert first["usage"]["completion_tokens"] == 9
    assert first["choices"][0]["finish_reason"] == "length"
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    refused = ask(url, model="little", max_tokens=2048)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert errors.read_text() == ""


@pytest.mark.slow
def test_clients_hear_of_a_lost_rank_and_the_command_names_it(serve):
    process, url, errors = serve(ranks=2)
    (lost,) = [pid for pid in Path("/proc").glob("[0-9]*") if is_second_rank_of(process.pid, pid)]
    with ThreadPoolExecutor(1) as pool:
        long = {"max_tokens": 2000, "ignore_eos": True, "stream": True}
        under_way = pool.submit(ask, url, model="little", **long)
        wait_until_inside(url)
        os.kill(int(lost.name), signal.SIGKILL)
        *_, error, done, _ = under_way.result().text.split("\n\n")
    assert "the model has failed: language rank 1 on host" in error
    assert done == "data: [DONE]"
    assert process.wait(60) != 0
    assert "megatron-sphinx serve: " in errors.read_text()
    assert "language rank 1 on host" in errors.read_text()


def is_second_rank_of(parent, process):
    """Whether a process of /proc is what torchrun has started as rank 1."""
    try:
        is_child = f"PPid:\t{parent}\n" in (process / "status").read_text()
        return is_child and b"\0RANK=1\0" in (process / "environ").read_bytes()
    except OSError:
        return False
