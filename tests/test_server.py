"""The server, asked by OpenAI's own client: chats whole and streamed, pictures, log-probabilities, many at once."""

import base64
import io
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from fake_answers import PICTURE_POSITIONS, STOP, FakeAnswers, echo, served, until
from PIL import Image

from megatron_sphinx.errors import DivergedError
from megatron_sphinx.generation.requests import Generation
from megatron_sphinx.serving.limits import Access, Limits
from megatron_sphinx.serving.openai_responses import LEAST_LOGPROB, Trimmed


def data_url(width=40, height=20, seed=0, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def about(url, text="Where is it?"):
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


def user(content):
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def fake():
    return FakeAnswers()


@pytest.fixture(scope="module")
def client(fake):
    with served(fake) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_chat_is_answered(client, fake):
    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "system", "content": "Be brief."}, *user("Hello")], seed=7, stop=["nobody"]
    )
    (choice,) = answer.choices
    assert (answer.object, answer.model, choice.finish_reason) == ("chat.completion", "fake", "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "You said: Hello (7)")
    prompt = "system:Be brief.\0user:Hello\0"
    new = len(echo("Hello", 7)) + 1  # and the end
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1 + len(prompt), new)
    assert answer.usage.total_tokens == 1 + len(prompt) + new
    taken = fake.samplings[-1]
    assert (taken.temperature, taken.top_p, taken.max_new_tokens) == (0.1, 0.75, 512)
    assert (taken.stop, taken.seed, taken.top_logprobs) == (("nobody", STOP), 7, None)
    assert not hasattr(choice.message, "boxes"), "there was no picture"


def test_what_is_asked_of_sampling_arrives(client, fake):
    client.chat.completions.create(
        model="fake", messages=user("x"), temperature=0, top_p=0.5, max_completion_tokens=3, seed=-1, stop="z",
        extra_body={"top_k": 5, "repetition_penalty": 1.25, "ignore_eos": True},
    )  # fmt: skip
    taken = fake.samplings[-1]
    assert (taken.temperature, taken.top_p, taken.top_k, taken.repetition_penalty) == (0, 0.5, 5, 1.25)
    assert (taken.max_new_tokens, taken.seed, taken.stop, taken.ignore_eos) == (3, 2**63 - 1, ("z", STOP), True)
    client.chat.completions.create(model="fake", messages=user("x"), extra_body={"top_k": -1, "user": "me"})
    client.chat.completions.create(model="fake", messages=user("x"), extra_body={"presence_penalty": 0, "stop": None})
    first, second = fake.samplings[-2:]
    assert first.top_k == 0
    assert first.seed != second.seed, "without a seed each answer has one of its own"


def test_a_stream_says_what_the_whole_answer_says(client, fake):
    ask = {"model": "fake", "messages": user("a  b \n c"), "seed": 3, "n": 3, "max_tokens": 20}
    whole = client.chat.completions.create(**ask)
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    texts, ends = [""] * 3, [None] * 3
    for part in parts[:-1]:
        (choice,) = part.choices
        assert part.usage is None
        assert ends[choice.index] is None, "nothing follows the end of an answer"
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices] == ["length"] * 3
    assert len(set(texts)) == 1, "the seed is behind the twentieth character"
    assert [one.seed for one in fake.samplings[-3:]] == [3, 4, 5]
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert {part.id for part in parts} == {parts[0].id} != {whole.id}


@pytest.mark.parametrize("seed", range(20))
def test_white_space_at_the_ends_is_cut_in_parts_as_in_the_whole(seed):
    draw = random.Random(seed)
    chunks = ["".join(draw.choices(" \n\tab é", k=draw.randrange(4))) for _ in range(draw.randrange(12))]
    trimmed = Trimmed()
    shown = [trimmed.feed(chunk) for chunk in chunks]
    assert "".join(shown) == "".join(chunks).strip()
    assert all(part == "" or part == part.rstrip() for part in shown)


def test_log_probabilities(client):
    ask = {"model": "fake", "messages": user("é"), "logprobs": True, "top_logprobs": 3, "max_tokens": 12}
    whole = client.chat.completions.create(**ask).choices[0]
    tokens = whole.logprobs.content
    assert "".join(one.token for one in tokens) == " You said: é"
    assert tokens[-1].bytes == list("é".encode())
    assert {one.logprob for one in tokens} == {-0.5}
    assert [top.logprob for top in tokens[0].top_logprobs] == [-0.5, -1.5, LEAST_LOGPROB]
    streamed = [
        token
        for part in client.chat.completions.create(**ask, stream=True)
        if part.choices[0].logprobs
        for token in part.choices[0].logprobs.content
    ]
    assert streamed == tokens
    alone = client.chat.completions.create(**ask | {"top_logprobs": None}).choices[0].logprobs.content
    assert not any(one.top_logprobs for one in alone)
    assert client.chat.completions.create(model="fake", messages=user("é")).choices[0].logprobs is None


def test_a_picture_is_seen_once_and_boxes_are_in_its_own_pixels():
    fake = FakeAnswers(script=lambda question, seed: f" It[0.25,0.25,0.75,0.75] and [0.5,0.5] not [2,0]: {question}")
    with served(fake) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        answers = [
            client.chat.completions.create(model="fake", messages=user(about(data_url(40, 20), text)))
            for text in ("a", "b")
        ]
        parts = list(client.chat.completions.create(model="fake", messages=user(about(data_url(40, 20))), stream=True))
    for answer in answers:
        # of the square of 40 pixels the picture's 20 rows are the middle ones
        assert answer.choices[0].message.boxes == [
            {"box": [10, 0, 30, 20], "phrase": "It", "begin": 2, "end": 23},
            {"point": [20, 10], "phrase": "and", "begin": 28, "end": 37},
        ]
    assert parts[-1].choices[0].delta.boxes == answers[0].choices[0].message.boxes
    assert [answer.usage.prompt_tokens_details.cached_tokens for answer in answers] == [0, 1 + PICTURE_POSITIONS]
    assert fake.prompts[0].picture.content == base64.b64decode(data_url(40, 20).partition(",")[2])
    assert (fake.prompts[0].picture.width, fake.prompts[0].picture.height) == (40, 20)


def test_texts_of_parts_are_lines(client):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert client.chat.completions.create(
        model="fake", messages=user(parts), seed=1
    ).choices[0].message.content == "You said: one\ntwo (1)"  # fmt: skip


def test_an_answer_can_be_sent_back(client):
    first = client.chat.completions.create(model="fake", messages=user(about(data_url(), "a")))
    back = first.choices[0].message.model_dump()
    chat = [*user(about(data_url(), "a")), back, *user("b")]
    second = client.chat.completions.create(model="fake", messages=chat, seed=5)
    assert second.choices[0].message.content == "You said: b (5)"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_chat_that_lost_its_oldest_turns_says_so(is_stream):
    with served(FakeAnswers(positions=200)) as (url, _):
        turns = [*user("x" * 60), {"role": "assistant", "content": "y" * 60}, *user("z")]
        body = {"model": "fake", "messages": turns, "stream": is_stream, "max_tokens": 100}
        response = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert response.status_code == 200
        assert response.headers["X-Dropped-Turns"] == "1"
        assert '"dropped_turns":1' in response.text
        whole = httpx.post(f"{url}/v1/chat/completions", json=body | {"messages": turns[2:]})
        assert "X-Dropped-Turns" not in whole.headers
        assert "dropped_turns" not in whole.text


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("fake", "model", "megatron-sphinx")
    assert client.models.retrieve("fake") == model
    with pytest.raises(openai.NotFoundError, match="model=fa/ke: is not served here; ask for fake"):
        client.models.retrieve("fa/ke")


def test_none_lost_none_mixed_up_nothing_held():
    """200 requests from 32 clients, a fifth of them cut off at any time: each gets its own answer, and all is free."""
    fake = FakeAnswers(tick_seconds=0.0005, slots=16)
    pictures = [data_url(seed=n) for n in range(3)]
    cut_off = []

    def one(number):
        draw = random.Random(number)
        text = f"question {number} " + "x" * draw.randrange(30)
        content = about(draw.choice(pictures), text) if draw.random() < 0.3 else text
        body = {"model": "fake", "messages": user(content), "seed": number, "stream": draw.random() < 0.5}
        if number % 5 == 0:  # cut off while it waits, or after some parts
            cut_off.append(number)
            try:
                with httpx.stream("POST", f"{url}/v1/chat/completions", json=body,
                                  timeout=draw.uniform(0.001, 0.02)) as response:  # fmt: skip
                    for _, _ in zip(response.iter_raw(), range(draw.randrange(5)), strict=False):
                        pass
            except httpx.TimeoutException:
                pass
            return True
        chat = client.chat.completions.create(**body)
        said = "".join(part.choices[0].delta.content or "" for part in chat) if body["stream"] else (
            chat.choices[0].message.content)  # fmt: skip
        return said == Generation.of(fake_chunks(echo(text, number)), 0).text

    with served(fake) as (url, gate), openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        with ThreadPoolExecutor(32) as pool:
            assert all(pool.map(one, range(200)))
        assert len(cut_off) == 40
        until(lambda: not fake.held and not gate.inside)
        assert fake.finished == len(fake.prompts) >= 160
        page = httpx.get(f"{url}/metrics").text
    assert 'sphinx_requests_total{status="200"}' in page
    assert "sphinx_requests_inside 0.0" in page


def fake_chunks(text):
    from megatron_sphinx.generation.requests import Chunk, Finish

    return [Chunk(text, finish=Finish.STOP)]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(is_stream):
    """Also before the first token, when nothing is sent by which the server could tell."""
    fake = FakeAnswers(script=lambda question, seed: "x" * 4000, tick_seconds=0.05, slots=1)
    with served(fake) as (url, gate):
        body = {"model": "fake", "messages": user("x"), "stream": is_stream, "n": 2, "max_tokens": 4000}
        if is_stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
        until(lambda: not fake.held and not gate.inside, 2)
        assert fake.finished == 2
        assert 'sphinx_requests_total{status="499"} 1.0' in httpx.get(f"{url}/metrics").text


def test_metrics_and_health(client, fake):
    url = str(client.base_url).removesuffix("/v1/")
    client.chat.completions.create(model="fake", messages=user("x"))
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "waiting": 0, "running": 0}
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if line[0] != "#")
    assert float(lines["sphinx_finished_total"]) == fake.finished
    assert float(lines["sphinx_first_token_seconds_count"]) > 0
    assert float(lines["sphinx_request_seconds_count"]) >= float(lines['sphinx_requests_total{status="200"}'])
    assert float(lines["sphinx_ready"]) == 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_requests_under_way_hear_of_a_lost_rank_and_no_more_are_taken(is_stream):
    fake = FakeAnswers(tick_seconds=0.05)
    with served(fake) as (url, gate), openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        threading.Timer(0.2, fake.fail, [DivergedError("language rank 3 was lost; start again")]).start()
        with pytest.raises(openai.APIError, match="the model has failed: language rank 3 was lost") as raised:
            list(client.chat.completions.create(model="fake", messages=user("x" * 99), stream=is_stream))
        assert raised.value.body["type"] == "server_error"
        assert raised.value.body["code"] == "model_failed"
        assert str(gate.failure) == "language rank 3 was lost; start again"
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "model_failed")
        with pytest.raises(openai.InternalServerError, match="the model has failed: language rank 3"):
            client.chat.completions.create(model="fake", messages=user("x"))
        assert 'sphinx_requests_total{status="500"} 1.0' in httpx.get(f"{url}/metrics").text


def test_a_server_that_loads_or_closes_says_so():
    with served(None, Limits()) as (url, gate):
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "loading")
        assert health.headers["Retry-After"] == "1"
        assert "sphinx_ready 0.0" in httpx.get(f"{url}/metrics").text
        fake = FakeAnswers(tick_seconds=0.02)
        gate.open(fake)
        assert httpx.get(f"{url}/health").status_code == 200
        with ThreadPoolExecutor(1) as pool:
            body = {"model": "fake", "messages": user("still answered"), "seed": 1}
            under_way = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body)
            until(lambda: bool(fake.held))
            gate.close()
            refused = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["message"]) == (
                503, "the server is closing; ask another one"
            )  # fmt: skip
            assert under_way.result().json()["choices"][0]["message"]["content"] == "You said: still answered (1)"
        fake.close()


def test_keys():
    with served(FakeAnswers(), access=Access(keys=("one", "two"))) as (url, _):
        for key, status in [("one", 200), ("two", 200), ("on", 401), ("onee", 401)]:
            response = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == status
        assert response.json()["error"] == {
            "message": "the API key is wrong or missing; send Authorization: Bearer KEY",
            "type": "invalid_request_error", "param": None, "code": "invalid_api_key",
        }  # fmt: skip
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": b"Bearer \xff"}).status_code == 401
        assert httpx.post(f"{url}/v1/chat/completions", json={}).status_code == 401
        assert 'sphinx_requests_total{status="401"} 1.0' in httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/health").status_code == 200
