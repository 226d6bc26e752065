"""Tokenizers: sentencepiece models and tokenizer.json, control tokens, spans of characters, what is refused."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.data.sources import open_sources
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.template import Conversation

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The capital of France is Paris. Don't ask 1234 times, naïve 日本 🙂 é!",
    "a photo of a red circle\n\tred  circle",
]
LETTERS = "ab \n\t12é日本🙂́'.<|>imstarend_"


def make_bytes(path: Path, control: list[str] = CONTROL, normalizer=None) -> Path:
    """Byte-level BPE as SmolLM2 has it, learned from a few words; it trims, cuts and pads if it is let."""
    made = tokenizers.Tokenizer(models.BPE())
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([digits, level]), decoders.ByteLevel()
    made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.enable_truncation(5)
    made.enable_padding(length=64)
    made.save(str(path))
    return path


def make_fallback(path: Path) -> Path:
    """As transformers writes LLaMA's: words begin with a sign for the space, unknown characters are bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), *"▁abimstrend12.", "▁a"]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": tiny.tokenizer,
        "bytes": Tokenizer(make_bytes(folder / "bytes.json")),
        "fallback": Tokenizer(make_fallback(folder / "fallback.json")),
        "composed": Tokenizer(make_bytes(folder / "composed.json", normalizer=normalizers.NFC())),
    }


def drawn(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, 60)))


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_any_text_comes_back(kinds, kind):
    rng, tokenizer = random.Random(3), kinds[kind]
    for text in [*TEXTS, *(drawn(rng) for _ in range(200))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text
        assert all(0 <= number < tokenizer.identity.vocabulary for number in ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "fallback", "composed"])
def test_texts_of_tokens_make_up_the_text(kinds, kind):
    tokenizer = kinds[kind]
    for text in ("a photo of a red circle", "red circle, a photo"):
        ids = tokenizer.encode(text)
        assert len(ids) > 3
        assert "".join(map(tokenizer.text_of, ids)).removeprefix(" ") == text
    assert tokenizer.text_of(tokenizer.eos) == ""


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "fallback", "composed"])
def test_spans_are_characters_side_by_side(kinds, kind):
    rng, tokenizer = random.Random(4), kinds[kind]
    for text in (drawn(rng).strip() for _ in range(200)):
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == tokenizer.encode(text)
        assert len(ids) == len(spans)
        assert [begin for begin, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
        assert not spans or spans[-1][1] == len(text)
        assert all(begin <= end for begin, end in spans)


def test_a_character_of_several_tokens_belongs_to_the_last(kinds):
    for kind in ("bytes", "fallback", "sentencepiece"):
        ids, spans = kinds[kind].encode_with_spans("a\U0001f40b")
        whole = [span for span in spans if span == (1, 2)]
        assert spans[-1] == (1, 2)
        assert len(whole) == 1
        if kind != "sentencepiece":  # the small model has the whole character as unknown
            assert spans.count((1, 1)) == len(ids) - len(spans[: spans.index((1, 1))]) - 1 >= 2


def test_spans_are_those_of_the_right_words(kinds):
    _, spans = kinds["bytes"].encode_with_spans("a photo of  naïve 日本\n12")
    words = ["a photo of  naïve 日本\n12"[begin:end] for begin, end in spans]
    assert words[:3] == ["a", " photo", " of"]  # the space is not trimmed
    assert words[-2:] == ["1", "2"]


def test_what_a_user_types_stays_text(kinds):
    tokenizer, text = kinds["bytes"], "<|im_start|>user\nhi<|im_end|>"
    start, end = 1, 2
    typed = tokenizer.encode(text)
    assert not {start, end} & set(typed)
    assert tokenizer.decode(typed) == text
    asked = tokenizer.encode(text, has_special=True)
    assert (asked[0], asked[-1]) == (start, end)
    assert asked[1:-1] == tokenizer.encode("user\nhi")
    assert tokenizer.decode(asked) == "user\nhi"
    assert tokenizer.encode(text) == typed
    assert not {start, end} & set(tokenizer.encode_with_spans(text)[0])
    for word in ("<s>", "</s>"):
        other = kinds["fallback"]
        assert other.decode(other.encode(word)) == word
        assert len(other.encode(word, has_special=True)) < len(other.encode(word))
        assert kinds["sentencepiece"].encode(word, has_special=True) == kinds["sentencepiece"].encode(word)


def test_nothing_is_cut_or_padded(kinds):
    assert len(kinds["bytes"].encode("1" * 500)) == 500
    assert len(kinds["bytes"].encode("1")) == 1


def test_rows_of_padding_have_no_text(kinds):
    for tokenizer in kinds.values():
        ids = tokenizer.encode("a")
        assert tokenizer.decode([*ids, tokenizer.identity.vocabulary, 10**6]) == tokenizer.decode(ids)


def test_encoding_starts_no_threads(tmp_path):
    """Workers are forked of a process that has encoded."""
    tokenizer = Tokenizer(make_bytes(tmp_path / "tokenizer.json"))
    before = len(os.listdir("/proc/self/task"))
    tokenizer.encode(TEXTS[0] * 2000)
    assert len(os.listdir("/proc/self/task")) == before


def special(tmp_path: Path, **files: object) -> tuple[int, int]:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = Tokenizer(tmp_path)
    return found.bos, found.eos


def test_bos_and_eos_are_those_of_the_files_beside_it(tmp_path):
    make_bytes(tmp_path / "tokenizer.json")
    assert special(tmp_path) == (0, 0)  # by their names
    assert special(tmp_path, config={"bos_token_id": 1, "eos_token_id": [2, 0]}) == (1, 2)
    assert special(tmp_path, generation_config={"bos_token_id": None, "eos_token_id": 0}) == (1, 0)
    assert special(tmp_path, special_tokens_map={"eos_token": {"content": "<|im_end|>"}}) == (1, 2)
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|im_start|>"}
    assert special(tmp_path, tokenizer_config=named) == (0, 1)
    assert special(tmp_path, tokenizer_config={"bos_token": None, "eos_token": "<|endoftext|>"}) == (1, 0)


def test_without_bos_a_sequence_begins_with_what_stands_between_documents(tmp_path):
    make_bytes(tmp_path / "tokenizer.json")
    assert special(tmp_path, tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>"}) == (0, 2)
    make_bytes(tmp_path / "tokenizer.json", ["<|im_end|>"])
    assert special(tmp_path) == (0, 0)


def test_words_that_are_named_become_control_tokens(tmp_path):
    vocabulary = {"[unk]": 0, "end": 1, "a": 2}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "end"}')
    found = Tokenizer(tmp_path)
    assert (found.eos, found.bos, found.identity.vocabulary) == (1, 1, 3)
    assert found.decode([2, 1]) == "a"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("tokenizer.json", "{}", "not a tokenizer.json that can be read"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 1', "not a tokenizer.json that can be read"),
        ("tokenizer.json", "\0\1\2", "not a tokenizer.json that can be read"),
        ("tokenizer_config.json", "{", r"tokenizer_config.json beside it cannot be read \(not JSON"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config.json beside it holds no keys: \[1\]; fetch it again"),
        ("config.json", '{"eos_token_id": 9999}', "beside it has eos_token_id=9999, which is no token of it"),
        ("config.json", '{"bos_token_id": -1}', "config.json beside it has bos_token_id=-1, which is no token of it"),
        ("special_tokens_map.json", '{"bos_token": "<x>"}', "has bos_token=<x>, which is no token of it; give files"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_in_a_line(tmp_path, name, content, fault):
    make_bytes(tmp_path / "tokenizer.json")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"data\.tokenizer=\S+tokenizer\.json: .*{fault}") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer\.model and no tokenizer\.json; give a folder with one"):
        Tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"No such file or directory; give a sentencepiece \.model file, a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
    make_bytes(tmp_path / "tokenizer.json", ["<pad>"])
    with pytest.raises(DataError, match=r"nothing tells which token is EOS; put its tokenizer_config\.json with eos"):
        Tokenizer(tmp_path)
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="has no tokens; fetch it again"):
        Tokenizer(tmp_path)


def test_cut_and_changed_files_are_refused_or_read(tmp_path):
    """A changed byte may leave a tokenizer: whatever it is, it is read or refused in a line."""
    rng, path = random.Random(5), make_bytes(tmp_path / "tokenizer.json")
    whole, faults = path.read_bytes(), []
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            Tokenizer(path).encode(TEXTS[0])
        except DataError as error:
            faults.append(str(error))
    assert len(faults) > 30
    assert all(len(fault.splitlines()) == 1 for fault in faults)


def test_half_a_surrogate_pair_is_refused(kinds):
    for tokenizer in kinds.values():
        for encode in (tokenizer.encode, tokenizer.encode_with_spans):
            with pytest.raises(DataError, match=r"text: holds half a surrogate pair, .ud800; leave it out"):
                encode("a \ud800 b")


def test_a_folder_may_hold_both(tmp_path, tiny):
    path = make_bytes(tmp_path / "tokenizer.json")
    assert Tokenizer(tmp_path).identity == Tokenizer(path).identity
    shutil.copy(tiny.folder / "tokenizer.model", tmp_path)
    assert Tokenizer(tmp_path).identity == tiny.tokenizer.identity


def test_a_model_may_have_rows_of_padding(tmp_path):
    tokenizer = Tokenizer(make_bytes(tmp_path / "tokenizer.json"))
    own = tokenizer.identity.vocabulary
    for rows in (own, own + 1, own + 127):
        tokenizer.check_vocabulary("x", rows)
    for rows in (own - 1, own + 128, 10 * own):
        with pytest.raises(DataError, match=rf"data\.tokenizer=x: has {own} pieces, but model\.vocabulary={rows}; set"):
            tokenizer.check_vocabulary("x", rows)


def test_answers_of_a_conversation_are_found(kinds):
    said = Conversation((("What is 日本?", "naïve 🙂"), ("red?", "a circle")))
    for kind in ("bytes", "fallback"):
        ids, is_answer = said.encode(kinds[kind])
        learned = kinds[kind].decode([number for number, mine in zip(ids, is_answer, strict=True) if mine])
        assert re.sub(r"\s", "", learned) == "naïve🙂###acircle###"


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """Pairs and text made by several processes, with the tokenizer in the same folder."""
    folder = tmp_path_factory.mktemp("prepared")
    make_bytes(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}')
    (folder / "a.txt").write_text(" ".join(TEXTS * 50))
    given, shards = ["--tokenizer", folder, "--workers", 2], [*tiny.folder.glob("**/*.tar")]
    assert not main([*map(str, ["prepare", "text", folder / "a.txt", folder / "text", *given])])
    assert not main([*map(str, ["prepare", "pairs", *shards, folder / "pairs", *given])])
    own = {f"data.{name}": str(folder / name) for name in ("pairs", "text")}
    return folder, own | {"data.tokenizer": str(folder), "model.vocabulary": 448}


def test_data_is_prepared_and_opened_with_a_tokenizer_json(tiny, tmp_path, prepared):
    folder, values = prepared
    config = configuration.load(tiny.write(tmp_path / "run.yaml", values))
    sources = open_sources(config.data, config.model)
    sources.check()
    tokenizer = sources.tokenizer
    ids = sources.text.read(0, 0, 10).tolist()
    assert ids[0] == tokenizer.bos == 1
    assert TEXTS[0].startswith(tokenizer.decode(ids))
    shutil.copytree(folder, tmp_path / "other")
    with (tmp_path / "other" / "tokenizer.json").open("a") as file:
        file.write(" ")
    changed = configuration.load(
        tiny.write(tmp_path / "run.yaml", values | {"data.tokenizer": str(tmp_path / "other")})
    )
    with pytest.raises(DataError, match=r"was made with a tokenizer of \d\d\d pieces"):
        open_sources(changed.data, changed.model).check()


def test_it_goes_along_with_what_was_trained_and_is_known_again(train, tiny, tmp_path, prepared):
    folder, values = prepared
    run = train(1, values | {"training.steps": 1}, "first")
    done = convert(run.folder, tmp_path / "hf", "hf", WriteOptions())
    assert not [note for note in done.notes if "token" in note]
    names = ("tokenizer.json", "tokenizer_config.json")
    assert all((tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["vocab_size"]) == (1, 2, 448)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode(TEXTS[0], add_special_tokens=False) == Tokenizer(folder).encode(TEXTS[0])
    shutil.copy(tiny.folder / "tokenizer.model", tmp_path / "hf")  # as transformers writes both
    convert(tmp_path / "hf", tmp_path / "ours", "megatron", WriteOptions())
    for source in ("hf", "ours"):
        train(1, values | {"training.steps": 1, "model.weights": str(tmp_path / source)}, f"from {source}")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    ended = train(1, values | {"model.weights": str(tmp_path / "hf")}, "refused", status=2)
    assert re.search(
        r"hf: was made with tokenizer=[0-9a-f]{64}, this run has [0-9a-f]{64}; configure the same", ended.ranks.text()
    )
