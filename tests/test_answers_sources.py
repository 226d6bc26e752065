"""What a model that answers is loaded from: runs, their checkpoints, other formats; and what is refused, by a line."""

import re
import shutil
import threading

import pytest
import torch
from PIL import Image
from test_answers import drawn, prompts_of, saved
from test_generation_parity import forward, groups_of

import megatron_sphinx
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.device import current_platform
from megatron_sphinx.errors import CheckpointError, ConfigError, DataError
from megatron_sphinx.generation.answering import Message, QueueFullError, TooLongError
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.pictures import views_of_picture
from megatron_sphinx.generation.requests import Finish, Picture, Prompt, Sampling
from megatron_sphinx.generation.service import ClosedError
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.parallel.layout import ParallelConfig
from megatron_sphinx.serving.ranks import build_model
from megatron_sphinx.serving.source import ModelSource

CORNER = {"vision.padding": "corner", "vision.skip_padding_views": True}
LOOKS = {
    1: {"vision.views": 1},
    5: {"vision.views": 5, "vision.padding": "centre"},
    10: {"vision.views": 10, **CORNER},
}
QUESTION = [Message("system", "blue"), Message("user", "red green?"), Message("assistant", "a circle"),
            Message("user", "What?")]  # fmt: skip


def pictures_of(tiny, count=4):
    return [tiny.folder / "pictures" / f"{number:03d}.png" for number in range(count)]


@pytest.mark.parametrize("views", LOOKS)
def test_a_run_answers_as_it_was_trained(train, tiny, run_ranks, tmp_path, views):
    shape = {"data.sequence_length": 400, "training.steps": 2, "checkpoint.interval": 2, "optimizer.learning_rate": 0.1}
    run = train(1, LOOKS[views] | shape)
    shown = [*pictures_of(tiny, 3), tmp_path / "wide.png"]
    Image.new("RGB", (90, 20), "red").save(shown[3])
    convert(run.folder, tmp_path / "converted", "megatron", WriteOptions(views=views))

    def check():
        texts = ["a red circle.", "green", "blue paint on white ground"]
        with megatron_sphinx.load(run.folder, cache_bytes=2**24) as model:
            assert (model.name, model.positions, model.has_vision) == ("run", 400, True)
            kept = {"template": "sphinx", "precision": "fp32", "tokenizer": model.tokenizer.identity.sha256}
            assert (model.replicas, {**model.identity, **kept}) == (1, model.identity)
            asked = [model.prompt("Describe a red thing", one) for one in [*shown, None]]
            scores = [model.score(prompt, texts) for prompt in asked]
            answers = model.generate(["What is it?"] * 4, shown, max_new_tokens=10)
            chat = model.generate([QUESTION], shown[:1], max_new_tokens=10, temperature=0.9, seed=3)
            skipped = {len(model.picture(one.read_bytes()).encoded) for one in shown}
            assert len(skipped) > 1 or views != 10, "no view of any picture is skipped"
        assert len({tuple(one[0]) for one in scores}) == 5, "pictures make no difference"
        _compare(run.folder, asked, texts, scores)
        steps, converted = next((run.folder / "checkpoints").glob("step_*")), {"config": tmp_path / "run.yaml"}
        for path, more in ((steps, {}), (tmp_path / "converted", converted)):
            with megatron_sphinx.load(path, cache_bytes=2**24, **more) as model:
                again = model.generate(["What is it?"] * 4, shown, max_new_tokens=10)
                again += model.generate([QUESTION], shown[:1], max_new_tokens=10, temperature=0.9, seed=3)
                assert [one.tokens for one in again] == [one.tokens for one in answers + chat]

    run_ranks(1, check)


def _compare(folder, asked, texts, scores):
    """Compare scores with the forward of training."""
    source, platform = ModelSource.open(folder, None, None), current_platform()
    trained = build_model(source, groups_of(ParallelConfig(), 1), platform, torch.float32, 400)
    dtype = platform.encoder_dtype(source.vision.precision)
    encoders = FrozenEncoders(source.vision, device=platform.device, dtype=dtype, seed=source.seed)
    tokenizer = Tokenizer(source.tokenizer)
    for prompt, found in zip(asked, scores, strict=True):
        one = prompt.picture
        features = (
            encoders(views_of_picture(one, source.vision)) if one else torch.zeros(0, source.vision.feature_values)
        )
        for text, values in zip(texts, found, strict=True):
            ids = tokenizer.encode(text)
            wanted = forward(trained, features, [*prompt.tokens, *ids], one)[-len(ids) :]
            assert list(values) == pytest.approx(wanted, abs=1e-4)


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The folder of a small Llama that reads text only."""
    return saved(drawn(1, tiny.tokenizer.identity.vocabulary), tiny, tmp_path_factory.mktemp("plain") / "llama")


def test_what_cannot_be_loaded_is_refused(tiny, plain, run_ranks, tmp_path):
    other = shutil.copytree(plain, tmp_path / "other")
    (other / "tokenizer.model").unlink()
    larger = saved(drawn(1, 400), tiny, tmp_path / "larger")
    refusals = [
        (plain, {"tensr": 2}, r"tensr=2: unknown; did you mean tensor\?"),
        (plain, {"device": "tpu"}, "device=tpu: must be auto, cpu or cuda"),
        (plain, {"precision": "fp8"}, "precision=fp8: must be bf16 or fp32"),
        (plain, {"positions": 1}, "positions=1: "),
        (plain, {"sequence": True, "tensor": 2}, "parallel.sequence=true: a token at a time cannot be divided"),
        (plain, {"encoder": 1}, "parallel.encoder=1.*1"),
        (plain, {"cache_bytes": 5000}, r"cache of 5000 bytes a rank: has room for \d+ tokens, and a sequence may have "
                                       r"400; give more, or a smaller number of positions"),
        (plain, {"template": "sphynx"}, "template=sphynx: unknown; did you mean sphinx"),
        (tmp_path / "none", {}, "none"),
        (other, {}, r"tokenizer\.model is missing; give the model's tokenizer as --tokenizer"),
        (larger, {}, r"has \d+ pieces, but model\.vocabulary=400; set that to \d+, or give the model's tokenizer"),
    ]  # fmt: skip

    def check():
        for path, options, message in refusals:
            with pytest.raises((ConfigError, CheckpointError, DataError)) as caught:
                megatron_sphinx.load(path, **options)
            assert re.search(message, str(caught.value)), caught.value
            assert "\n" not in str(caught.value)
        with megatron_sphinx.load(str(plain), cache_bytes=2**24) as model:  # after all that it can be
            assert model.generate(["red"], max_new_tokens=3)

    run_ranks(1, check)


def test_projections_without_a_configuration_are_refused(train, run_ranks, tmp_path):
    run = train(1, {"training.steps": 1})
    convert(run.folder, tmp_path / "converted", "megatron", WriteOptions())

    def check():
        message = "has projections of pictures, but does not tell of which visual experts; give the configuration"
        with pytest.raises(CheckpointError, match=message):
            megatron_sphinx.load(tmp_path / "converted")

    run_ranks(1, check)


def test_encoder_ranks_need_a_model_that_sees(plain, start_ranks):
    ranks = start_ranks(2, lambda: megatron_sphinx.load(plain, encoder=1))
    assert ranks.wait() == [2, 2]
    line = "megatron-sphinx load: parallel.encoder=1: llama has no projections of pictures, so there is nothing to "
    assert ranks.text().count(line + "encode; use 0\n") == 1


def test_what_cannot_be_asked_is_refused(tiny, plain, run_ranks, tmp_path):
    shown = pictures_of(tiny, 1)

    def check():
        with megatron_sphinx.load(plain, cache_bytes=2**24) as model:
            long = Prompt(tuple([1] * 400))
            for asked, pictures, more, error, message in (
                (["red"], shown, {}, DataError, "llama: reads text only; leave the picture out, or load a model with"),
                (["red"], [tmp_path / "no.png"], {}, DataError, r"picture=.*no\.png: No such file or directory; give"),
                (["red"], [], {}, DataError, "0 pictures for 1 questions; give None where there is no picture"),
                ([long], shown, {}, DataError, "picture: the prompt that it is given with has its own"),
                (["red"], None, {"top": 3}, ConfigError, r"top=3: unknown; did you mean"),
                (["red"], None, {"top_p": 3}, ConfigError, r"sampling.top_p=3: "),
                (["red"], None, {"max_new_tokens": 500}, TooLongError, "max_new_tokens=500 among the 400 positions"),
                ([long], None, {}, TooLongError, "prompt of 400 tokens: the model has room for 400 with its answer"),
                (["red"], None, {"stop": ""}, DataError, "stop='': an empty text would end every answer"),
                ([[Message("assistant", "red")]], None, {}, DataError, "out of order"),
                ([Prompt((1, 10**6))], None, {}, DataError, r"token 1000000: ids of llama are 0 to \d+; give those of"),
                ([Prompt((1, -1))], None, {}, DataError, "token -1: ids of llama are 0 to"),
                ([Prompt((1, 2), Picture("a", b"", 9, 9, (0,), 2))], None, {}, DataError, "its picture alone takes 2"),
            ):
                with pytest.raises(error, match=message):
                    model.generate(asked, pictures, **more)
                assert model.load().waiting == model.load().running == 0
            with pytest.raises(DataError, match="token 1000000: ids of llama"):
                model.score("red", ["blue", [10**6]])
            with pytest.raises(DataError, match="there is nothing to score"):
                model.score("red", ["blue", []])

    run_ranks(1, check)


def test_an_answer_has_room_where_nobody_says_how_much(plain, run_ranks):
    def check():
        with megatron_sphinx.load(plain, cache_bytes=2**24, positions=100) as model:
            prompt = model.prompt("red green blue")
            (answer,) = model.generate([prompt], ignore_eos=True)
            assert (len(answer.tokens), answer.finish) == (25, Finish.LENGTH)
            (told,) = model.generate(["red"], ignore_eos=True, stop=None)
            assert len(told.tokens) == 25
            near = Prompt((1, *[5] * 92))  # less than a quarter is left
            (answer,) = model.generate([near], ignore_eos=True)
            assert (len(answer.tokens), answer.finish) == (7, Finish.LENGTH)
            *_, last = model.stream(near, max_new_tokens=7, ignore_eos=True)
            assert last.finish is Finish.LENGTH
            assert model.chat([Message("user", "red")], None).prompt.tokens
        with megatron_sphinx.load(plain, cache_bytes=2**24) as model, pytest.raises(TooLongError):
            model.generate([Prompt((1, *[5] * 92))], max_new_tokens=400)

    run_ranks(1, check)


def test_more_questions_than_may_wait_are_asked_in_turn(tiny, plain, run_ranks):
    def check():
        prompts = prompts_of(4, 290, [3] * 30)
        with megatron_sphinx.load(plain, cache_bytes=2**24) as model:
            wanted = model.generate(prompts, max_new_tokens=3)
            scores = model.score("red", ["blue", "green"] * 10)
        with megatron_sphinx.load(plain, cache_bytes=2**24, limits=Limits(waiting=2, sequences=2)) as model:
            assert [one.tokens for one in model.generate(prompts, max_new_tokens=3)] == [one.tokens for one in wanted]
            assert [list(one) for one in model.score("red", ["blue", "green"] * 10)] == [
                pytest.approx(list(one), abs=1e-5) for one in scores
            ]
            long, tickets = Sampling(max_new_tokens=300, ignore_eos=True), []

            def submit(count):
                for _ in range(count):
                    tickets.append(model.submit(prompts[0], long, lambda _: None))

            with pytest.raises(QueueFullError, match="waiting=2: as many requests as may are waiting already"):
                submit(5)
            assert 2 <= len(tickets) <= 4
            for ticket in tickets:
                ticket.cancel()

    run_ranks(1, check)


def test_threads_ask_at_once_and_what_they_drop_ends(tiny, plain, run_ranks):
    def check():
        prompts = prompts_of(2, 290, [3, 20, 8, 11])
        with (
            megatron_sphinx.load(plain, cache_bytes=2**24) as model,
            megatron_sphinx.load(plain, cache_bytes=2**24) as other,
        ):
            wanted = [model.generate([one], max_new_tokens=20, temperature=0.7)[0].tokens for one in prompts]
            found = {}

            def ask(number):
                for _ in range(3):
                    (answer,) = model.generate([prompts[number]], max_new_tokens=20, temperature=0.7)
                    found.setdefault(number, set()).add(answer.tokens)

            threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert found == {number: {tokens} for number, tokens in enumerate(wanted)}
            stream = model.stream(prompts[0], max_new_tokens=390, ignore_eos=True)
            next(stream)
            assert model.load().running == 1
            stream.close()
            while model.load().running:
                pass
            assert model.load().finished == 17
            model.close()
            model.close()
            with pytest.raises(ClosedError, match="the model is being closed: it takes no request any more"):
                model.generate(prompts[:1])
            assert other.generate(prompts[1:2], max_new_tokens=20, temperature=0.7)[0].tokens == wanted[1]

    run_ranks(1, check)


def test_many_pictures_stay_within_limits(train, tiny, run_ranks):
    run = train(1, {"training.steps": 1})

    def check():
        limits = Limits(picture_positions=60, sequences=8)
        with megatron_sphinx.load(run.folder, cache_bytes=2**17, positions=320, limits=limits) as model:
            most = []
            pictures = pictures_of(tiny, 50) * 2
            stop = threading.Event()

            def watch():
                while not stop.wait(0.001):
                    most.append(model.load())

            watcher = threading.Thread(target=watch)
            watcher.start()
            answers = model.generate(["red?"] * 100, pictures, max_new_tokens=4)
            stop.set()
            watcher.join()
            after = model.load()
            assert len(answers) == after.finished == 100
            assert after.waiting == after.running == 0
            assert max(one.cached_places for one in most) <= after.places
            assert max(one.running for one in most) <= 8
            assert 50 <= after.pictures <= 100
            kept = model._job.executor._executor._runner._pictures
            assert sum(len(one) for one in kept.values()) <= 60
            (one,) = {answer.tokens for answer in answers[:1] + answers[50:51]}
            assert one

    run_ranks(1, check)
