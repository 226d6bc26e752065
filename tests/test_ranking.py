"""The ranking of classes: a search in the tree of their tokens finds what scoring each of them whole finds."""

import json
import math
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from answers_double import Double
from conftest import draw
from fake_executor import END, PICTURES, FakeExecutor, FakeText, scores_alone, states_of
from fake_executor import likelihood as fake_likelihood
from test_answers_ranks import leaving

import megatron_sphinx
from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import DataError, DivergedError
from megatron_sphinx.evaluation.benchmarks.registry import named
from megatron_sphinx.evaluation.results import read_results
from megatron_sphinx.evaluation.run import Wanted, agree, answer_benchmark
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.generation.answering import QueueFullError
from megatron_sphinx.generation.engine import Engine, EngineError, Language
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.ranking import Search, TokenTree
from megatron_sphinx.generation.requests import Chunk, Finish, Prompt, Sampling, TokenLogprob
from megatron_sphinx.generation.service import ClosedError
from megatron_sphinx.prepare.classes import image_net_names
from megatron_sphinx.prepare.template import parse

STOP = 0


def likelihood(before: tuple[int, ...], token: int, seed: int, steps: int) -> float:
    """A multiple of 1/4, so that sums are exact and many texts are as likely as each other."""
    return -random.Random(repr((before, token, seed))).randrange(steps) / 4


def learned(texts: list[tuple[int, ...]]):
    """How likely tokens are to a model that has learned the texts, and is unsure which it is."""
    following = defaultdict(set)
    for text in texts:
        for place, token in enumerate(text):
            following[text[:place]].add(token)

    def likelihood(before: tuple[int, ...], token: int, seed: int, steps: int) -> float:
        rng = random.Random(repr((before, seed)))
        logits = {one: rng.gauss(0, steps) for one in sorted(following[before])}
        return logits[token] - math.log(math.fsum(map(math.exp, logits.values())))

    return likelihood


def scored(text: tuple[int, ...], seed: int, steps: int) -> float:
    return sum(likelihood(text[:place], token, seed, steps) for place, token in enumerate(text))


def searched(texts: list[tuple[int, ...]], most: int, seed: int = 0, steps: int = 9, likelihood=likelihood) -> Search:
    """A search that has been answered to its end; no step asks for what is known."""
    search, known = Search(TokenTree(texts), most), set()
    while (step := search.next_step()) is not None:
        assert step.continuation or step.choices
        logprobs, before = [], step.prefix
        for token in step.continuation:
            logprobs.append(likelihood(before, token, seed, steps))
            before = (*before, token)
        assert len(set(step.choices)) == len(step.choices) != 1
        logprobs += [likelihood(before, token, seed, steps) for token in step.choices]
        assert (step.prefix, step.continuation) not in known
        known.add((step.prefix, step.continuation))
        search.take(logprobs)
    return search


@pytest.mark.parametrize("seed", range(60))
def test_a_search_finds_what_scoring_every_text_finds(seed):
    rng = random.Random(seed)
    words, longest = rng.randint(1, 4), rng.randint(1, 7)
    drawn = [
        (*(rng.randint(1, words) for _ in range(rng.randint(0, longest))), STOP) for _ in range(rng.randint(1, 60))
    ]
    texts, most, steps = list(dict.fromkeys(drawn)), rng.randint(1, 8), rng.choice((1, 2, 9))
    search = searched(texts, most, seed, steps)
    whole = sorted(((-scored(text, seed, steps), number) for number, text in enumerate(texts)))
    assert search.found == [(number, -cost) for cost, number in whole[:most]]


def test_of_equal_texts_the_first_is_found_first():
    texts = [(3, STOP), (1, 2, STOP), (1, STOP), (2, 2, STOP)]
    assert searched(texts, 3, steps=1).found == [(0, 0.0), (1, 0.0), (2, 0.0)]


def test_a_name_that_begins_another_is_told_from_it_by_its_end():
    crane, fly = (7, 8, STOP), (7, 8, 9, STOP)
    for bird in (-0.1, -3.0):
        search = Search(TokenTree([fly, crane]), 2)
        step = search.next_step()
        assert (step.prefix, step.continuation, set(step.choices)) == ((), (7, 8), {STOP, 9})
        search.take([-1.0, -1.0, *({STOP: bird, 9: -1.0}[token] for token in step.choices)])
        following = search.next_step()
        if bird > -1:
            assert search.found == [(1, -2.1)]
        assert (following.prefix, following.continuation, following.choices) == ((7, 8, 9), (STOP,), ())
        search.take([-0.5])
        assert search.next_step() is None
        assert [number for number, _ in search.found] == ([1, 0] if bird > -1 else [0, 1])


def test_a_search_through_a_thousand_classes_looks_at_few():
    texts = [(*name.encode("ascii", "replace"), STOP) for name in image_net_names().values()]
    steps = [searched(texts, 5, seed, 2, learned(texts)).steps for seed in range(8)]
    assert max(steps) < len(texts) / 20, steps


def test_texts_that_cannot_be_told_apart_are_refused():
    with pytest.raises(DataError, match="choices 2 and 0: the tokens of one begin the other's; give texts that end"):
        TokenTree([(1, 2, 3), (4,), (1, 2)])
    with pytest.raises(DataError, match="choices 0 and 1: the tokens of one begin the other's"):
        TokenTree([(1, 2), (1, 2)])
    for texts in ([], [(1,), ()]):
        with pytest.raises(DataError, match="choices: a text without tokens, or none at all; give texts of one token"):
            TokenTree(texts)


def test_a_model_that_computes_nan_ends_the_search():
    search = Search(TokenTree([(1,), (2,)]), 1)
    search.next_step()
    with pytest.raises(DivergedError, match="log-probabilities that are no numbers: the model computes NaN; check its"):
        search.take([-1.0, float("nan")])


@pytest.mark.parametrize("new_tokens", [1, 3, 64])
def test_the_engine_scores_what_may_come_next(new_tokens):
    rng, picture = random.Random(new_tokens), PICTURES[5]
    engine = Engine(FakeExecutor(), Language({END}, FakeText), Limits(new_tokens=new_tokens))
    heard = []
    for _ in range(12):
        prompt = Prompt((2, *(0,) * 5, *rng.choices(range(1, 24), k=rng.randint(1, 6))), picture)
        continuation, choices = (
            rng.choices(range(1, 24), k=rng.randint(0, 5)),
            rng.sample(range(1, 24), rng.randint(1, 9)),
        )
        chunks: list[Chunk] = []
        engine.add(engine.score(prompt, tuple(continuation), chunks.append, tuple(choices)))
        heard.append((prompt, continuation, choices, chunks))
    while not engine.is_idle:
        engine.step()
    for prompt, continuation, choices, chunks in heard:
        (chunk,) = chunks
        states = states_of(prompt, (*prompt.tokens, *continuation))
        wanted = [*scores_alone(prompt, continuation), *(fake_likelihood(states, token) for token in choices)]
        assert [one.logprob for one in chunk.logprobs] == wanted
        assert [one.token for one in chunk.logprobs] == [*continuation, *choices]
    with pytest.raises(DataError, match="continuation='': there is nothing to score; give a text of one token or more"):
        engine.score(prompt, (), print)


# through a model


def test_a_trained_model_ranks_as_it_scores(train, tiny, run_ranks, tmp_path):
    run = train(1, {"training.steps": 2, "optimizer.learning_rate": 0.1, "data.sequence_length": 400})
    classes = ["red", "red light", "green", "blue", "bluish green", "blue paint", "a red"]
    for number, name in enumerate(classes):
        (tmp_path / "data" / "classes" / name).mkdir(parents=True)
        draw(number)[0].save(tmp_path / "data" / "classes" / name / "0.png")
    words = ["evaluate", "classes", "--by-ranking", "--data", str(tmp_path / "data"), "--model", str(run.folder)]

    def check():
        with megatron_sphinx.load(run.folder, cache_bytes=2**23) as model:
            ids = [model.answer_tokens(f"This is a {name}") for name in sorted(classes)]
            for name, tokens in zip(sorted(classes), ids, strict=True):
                turns = [
                    {"from": "human", "value": "Classify the image."},
                    {"from": "gpt", "value": f"This is a {name}"},
                ]
                trained, is_answer = parse({"conversations": turns}).encode(model.tokenizer)
                learned = [token for token, is_learned in zip(trained, is_answer, strict=True) if is_learned]
                assert tokens[len(tokens) - len(learned) :] == learned
                assert not model.tokenizer.decode(tokens[: len(tokens) - len(learned)]).strip()
            found = {}
            for name in classes:
                picture = tmp_path / "data" / "classes" / name / "0.png"
                scores = [sum(one) for one in model.score("Classify the image.", ids, picture)]
                best = sorted(range(len(classes)), key=lambda number: -scores[number])[:5]
                found[f"{name}/0.png"] = [[sorted(classes)[number], scores[number]] for number in best]
        (tmp_path / "scores.json").write_text(json.dumps(found))

    run_ranks(1, check)
    ranks = run_ranks(1, leaving(lambda: main([*words, "--cache-gib", "0.01", "--output", str(tmp_path / "out")])))
    assert "requests and" in ranks.text(0)
    run_ranks(2, leaving(lambda: main([*words, "--cache-gib", "0.01", "--output", str(tmp_path / "two")])))
    wanted = json.loads((tmp_path / "scores.json").read_text())
    for folder in ("out", "two"):
        answers = tmp_path / folder / "classes/answers.jsonl"
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
        assert len(lines) == len(classes)
        for line in lines:
            assert [name for name, _ in line["ranked"]] == [name for name, _ in wanted[line["id"]]]
            assert [score for _, score in line["ranked"]] == pytest.approx(
                [score for _, score in wanted[line["id"]]], abs=1e-5
            )
            assert line["answer"] == f"This is a {line['ranked'][0][0]}"
    assert (tmp_path / "two/report.md").read_bytes() == (tmp_path / "out/report.md").read_bytes()


@pytest.mark.parametrize(
    ("name", "ends"), [("chatml", "<|im_end|>"), ("alpaca", None), ("plain", None), ("sphinx", "\n###")]
)
def test_an_answer_ends_as_its_template_ends_it(tiny, name, ends):
    from megatron_sphinx.generation.templates import template_of
    from megatron_sphinx.serving.model import Model

    class Tokenizer:
        eos = 2

        def encode(self, text, *, has_special=False):
            return [5000] if has_special and text == "<|im_end|>" else list(map(ord, text))

    asked = SimpleNamespace(template=template_of(name), tokenizer=Tokenizer())
    asked._encode_answer = lambda text: Model._encode_answer(asked, text)
    end = {"<|im_end|>": [5000], None: [2]}.get(ends) or list(map(ord, ends))
    assert Model.answer_tokens(asked, "ab")[-len(end) - 2 :] == [97, 98, *end]


# a benchmark, through a model that knows


class Knows(Double):
    """Says how likely letters are: those of the right class nearly sure, unless the picture is of a class it mistakes.

    Attributes:
        scored: how many requests there were.
        faults: what is raised or heard instead, by the number of a request.
    """

    def __init__(self, mistakes: dict[str, str] | None = None, faults: dict | None = None) -> None:
        super().__init__(lambda messages, picture: "nothing")
        self._mistakes, self.faults, self.scored = mistakes or {}, faults or {}, 0
        self.tickets: list[SimpleNamespace] = []
        self._pictures: dict[str, str] = {}

    def know(self, content: bytes, name: str) -> None:
        self._pictures[self.picture(content).key] = f"This is a {self._mistakes.get(name, name)}"

    def answer_tokens(self, text):
        return [*map(ord, text), STOP]

    def submit_score(self, prompt, continuation, listen, choices=()):
        self.scored += 1
        ticket = SimpleNamespace(cached_tokens=1, is_cancelled=False)
        ticket.cancel = lambda: setattr(ticket, "is_cancelled", True)
        self.tickets.append(ticket)
        fault = self.faults.get(self.scored)
        if isinstance(fault, QueueFullError):
            raise fault
        if fault is not None:
            listen(fault)
            return ticket
        right = (*map(ord, self._pictures[prompt.picture.key]), STOP)
        before, logprobs = prompt.tokens[2:], []
        for place, token in enumerate((*continuation, *choices)):
            told = (*before, *continuation[: min(place, len(continuation))])
            is_right = right[: len(told) + 1] == (*told, token)
            logprobs.append(TokenLogprob(token, -0.01 if is_right else -5.0 - token / 1000))
        listen(Chunk("", (*continuation, *choices), tuple(logprobs), Finish.LENGTH))
        return ticket


CLASSES = ("bag", "coat", "dress", "sandal", "shirt", "sneaker", "T-shirt")


@pytest.fixture
def data(tmp_path):
    for number, name in enumerate(CLASSES):
        (tmp_path / "data" / "classes" / name).mkdir(parents=True)
        draw(number)[0].save(tmp_path / "data" / "classes" / name / "0.png")
    return tmp_path / "data"


def rank(model: Knows, data: Path, output: Path, in_flight: int = 3):
    for path in (data / "classes").glob("*/0.png"):
        if path.stat().st_size > 10:
            model.know(path.read_bytes(), path.parent.name)
    wanted = Wanted(data, Protocol.PAPER, Sampling(), by_ranking=True)
    told = agree(output, model, Path("m"), wanted)
    return answer_benchmark(model, told, named("classes"), wanted, output, in_flight=in_flight)


def test_a_benchmark_is_ranked(data, tmp_path):
    model = Knows({"coat": "dress"}, {3: QueueFullError("full")})
    done = rank(model, data, tmp_path / "out")
    assert (done.report.answered, done.report.errors) == (7, 0)
    assert (done.ranking.pictures, done.ranking.classes, done.ranking.requests) == (7, 7, model.scored - 1)
    assert f"{(model.scored - 1) / 7:.1f} requests and {done.ranking.tokens / 7:.0f} tokens a picture to rank 7" in str(
        done
    )
    results = read_results(tmp_path / "out", named("classes"), data)
    by_class = {one.sample.categories["class"]: one for one in results.answered}
    assert {name: one.ranked[0] for name, one in by_class.items()} == {name: name for name in CLASSES} | {
        "coat": "dress"
    }
    assert all(
        len(one.ranked) == 5 and one.text == f"This is a {one.ranked[0]}" and one.width for one in results.answered
    )
    again = rank(Knows(), data, tmp_path / "out")
    assert (again.report.before, again.ranking.requests) == (7, 0)
    assert "requests" not in str(again)


def test_a_ranking_that_ends_goes_on_where_it_was(data, tmp_path):
    rank(Knows(), data, tmp_path / "whole")
    closed = "the model was closed before it had ranked all; load it again"
    for number, fault, error, message in (
        (40, EngineError("the model cannot compute"), EngineError, "the model cannot compute"),
        (11, Chunk("", finish=Finish.CANCELLED), ClosedError, closed),
    ):
        broken = Knows(faults={number: fault})
        with pytest.raises(error, match=message):
            rank(broken, data, tmp_path / "out")
        assert sum(ticket.is_cancelled for ticket in broken.tickets) == 3
    model = Knows()
    done = rank(model, data, tmp_path / "out")
    assert 0 < done.report.before < 7
    answers = [(tmp_path / name / "classes" / "answers.jsonl").read_bytes() for name in ("whole", "out")]
    assert answers[0] == answers[1]


def test_answers_by_ranking_and_by_generation_do_not_mix(data, tmp_path):
    rank(Knows(), data, tmp_path / "out")
    wanted = Wanted(data, Protocol.PAPER, Sampling())
    with pytest.raises(DataError, match="out: was begun with by_ranking=True, not None; give another --output"):
        agree(tmp_path / "out", Knows(), Path("m"), wanted)


def test_a_damaged_picture_costs_itself_alone(data, tmp_path):
    (data / "classes" / "coat" / "0.png").write_bytes(b"no")
    done = rank(Knows(), data, tmp_path / "out")
    assert (done.report.answered, done.report.errors) == (6, 1)
    assert "not an image" in read_results(tmp_path / "out", named("classes"), data).faults["coat/0.png"]


def test_benchmarks_without_classes_are_refused(data, checkpoint, capsys):
    words = ["evaluate", "classes", "gqa", "--by-ranking", "--data", str(data), "--model", checkpoint, "--output", "x"]
    assert main(words) == 2
    message = "--by-ranking: gqa has no classes to rank; give imagenet or classes alone, or leave it out"
    assert message in capsys.readouterr().err
