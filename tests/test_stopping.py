"""Answers as text: whole characters only, whatever the tokens are, and nothing of a stop string."""

import random
import time

import pytest
import sentencepiece
from conftest import train_tokenizer
from test_tokenizers import make_bytes, make_fallback

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.generation.stopping import Detokenizer

SIGNS = "abc  \n#é世界中文😀🏳️‍🌈ß\u200dपदी́ﷺ\t.,[]<>0123"
TEXTS = ["the cat sits on the mat", "a dog, two dogs and three", "### Human: what is this?", "été à la plage 世界"]


class Bytes:
    """Byte-level tokens of one to four bytes, decoded as the `tokenizers` library decodes them."""

    def __init__(self, seed: int) -> None:
        self.rng, self.pieces = random.Random(seed), [bytes([number]) for number in range(256)]

    def encode(self, text: str) -> list[int]:
        content, ids = text.encode(), []
        while content:
            size = self.rng.randint(1, 4)
            self.pieces.append(content[:size])
            ids.append(len(self.pieces) - 1)
            content = content[size:]
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[number] for number in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    return Tokenizer(train_tokenizer(folder / "plain", TEXTS * 20, 330))


@pytest.fixture(scope="module")
def json_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    fallback = Tokenizer(make_fallback(folder / "fallback.json"))
    return {"byte level": Tokenizer(make_bytes(folder / "bytes.json")), "byte fallback": fallback}


@pytest.fixture(scope="module")
def exact_pieces(tmp_path_factory):
    """A sentencepiece model that keeps every space, as LLaMA's does."""
    prefix = tmp_path_factory.mktemp("stopping") / "exact"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_prefix=str(prefix), vocab_size=330, model_type="bpe", minloglevel=2,
        byte_fallback=True, hard_vocab_limit=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    return Tokenizer(prefix.with_suffix(".model"))


def text_of(rng: random.Random) -> str:
    return "".join(rng.choice(SIGNS) for _ in range(rng.randint(0, 40)))


def shown(detokenizer: Detokenizer, ids: list[int]) -> tuple[str, bool]:
    """All that is shown, and whether a stop string came; every part is a text that UTF-8 can carry."""
    text = ""
    for token in ids:
        part, is_stopped = detokenizer.feed(token)
        text += part
        if is_stopped:
            return text, True
    return text + detokenizer.rest(), False


def expected(text: str, stop: tuple[str, ...]) -> str:
    """The text before the stop string that is complete first."""
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(one) for one in stop)]
    if not ends:
        return text
    return text[: min(ends[0] - len(one) for one in stop if text[: ends[0]].endswith(one))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["sentencepiece", "exact", "bytes", "byte level", "byte fallback"])
def test_what_is_shown_is_the_text_up_to_the_stop_string(request, kind, seed):
    rng = random.Random(f"{kind} {seed}")
    tokenizer = {
        "sentencepiece": lambda: request.getfixturevalue("pieces"),
        "exact": lambda: request.getfixturevalue("exact_pieces"),
        "bytes": lambda: Bytes(seed),
    }.get(kind, lambda: request.getfixturevalue("json_kinds")[kind])()
    stopped = 0
    for _ in range(250):
        ids = tokenizer.encode(text_of(rng))
        whole = tokenizer.decode(ids)
        at = rng.randint(0, 30)
        stop = tuple(one for one in (whole[at : at + rng.randint(1, 4)], "\n###", "aab") if one)
        text, is_stopped = shown(Detokenizer(tokenizer, stop), ids)
        assert text == expected(whole, stop)
        assert is_stopped or not any(one in whole for one in stop) or whole.endswith(stop)
        stopped += is_stopped
        assert shown(Detokenizer(tokenizer, ()), ids) == (whole, False)
    assert 20 < stopped < 250


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_are_shown_as_they_decode_as_a_whole(exact_pieces, seed):
    rng, exact, byte = random.Random(seed), exact_pieces, 3  # the id of byte 0, behind three control tokens
    assert exact.decode([byte + one for one in "世".encode()]) == "世"
    for _ in range(200):
        ids = [byte + rng.choice([rng.randrange(256), *"世😀".encode()]) for _ in range(rng.randint(0, 30))]
        ids = [one if rng.random() < 0.8 else rng.randrange(3, 320) for one in ids]
        assert shown(Detokenizer(exact, ()), ids)[0] == exact.decode(ids)
        plain = Bytes(0)
        raw = [rng.choice([rng.randrange(256), *"世😀".encode()]) for _ in range(rng.randint(0, 30))]
        assert shown(Detokenizer(plain, ()), raw)[0] == plain.decode(raw)


def test_each_part_comes_as_soon_as_it_can(exact_pieces):
    tokens = Bytes(0)
    watch = Detokenizer(tokens, ("\n###", "#!"))
    parts = [watch.feed(byte) for byte in "a é\n##b\n###c".encode()]
    assert [text for text, _ in parts] == ["a", " ", "", "é", "", "", "", "\n##b", "", "", "", "", ""]
    assert [is_stopped for _, is_stopped in parts] == [False] * 11 + [True] * 2
    assert watch.rest() == ""
    watch = Detokenizer(tokens, ("\n###",))
    assert [watch.feed(byte) for byte in b"a\n##"] == [("a", False), *[("", False)] * 3]
    assert (watch.rest(), watch.rest()) == ("\n##", "")
    watch = Detokenizer(tokens, ("b",))
    tokens.pieces.append(b"abc\xe4")  # the stop string and the beginning of a character in one token
    assert watch.feed(len(tokens.pieces) - 1) == ("", False)
    assert watch.rest() == "a"


@pytest.mark.parametrize("text", ["a \n" * 20_000, "\n" * 20_000, "世😀" * 10_000, "#" * 20_000])
def test_a_long_answer_costs_no_more_for_each_token(text):
    tokens = Bytes(1)
    ids, decoded = list(text.encode())[:40_000], 0

    class Counted:
        def decode(self, ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return tokens.decode(ids)

    start = time.perf_counter()
    shown(Detokenizer(Counted(), ("\n###", "###?")), ids)
    assert decoded < 40 * len(ids)
    assert time.perf_counter() - start < 5
    decoded = 0
    shown(Detokenizer(Counted(), ()), [0xE4] * 5000)  # never a character
    assert decoded < 100 * 5000


def test_an_empty_stop_string_is_refused():
    with pytest.raises(DataError, match="stop='': an empty text would end every answer before it begins; leave it out"):
        Detokenizer(Bytes(0), ("a", ""))
