"""Conversations: template, which tokens are learned, the index, truncation, and training on them."""

import json
import random

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import size_of
from PIL import Image
from test_model import CPU, groups, random_shape

from megatron_sphinx import config as configuration
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.pairs import ImageReader, SampleIndex
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.data.template import SYSTEM
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.model.language import build_language, draw_weights
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.model.vision import VisualProjection
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.template import Conversation, parse

TALK = [{"from": "human", "value": "What is a cat?"}, {"from": "gpt", "value": "An animal."}]
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
ODD = ("é", "e\u0301", "日本", "🙂", "👩\u200d👧", "ﬁ", "Ⅷ", "\u200b", "\ufeff", "\xa0", "  ", "\n", "\t", "###",
       "\n###", "Human:", "Assistant:", "a", "cat", "</s>", "<s>", "\U00010348", "\u202e", "ß", "İ", "'s",
       "[0.10,0.25]")  # fmt: skip


# template and labels


def test_the_template_is_the_released_one():
    text, answers = Conversation((("What is it?", "A cat."), ("Sure?", "Yes."))).text()
    assert text == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.\n\n"
        "### Human: What is it?\n### Assistant: A cat.\n### Human: Sure?\n### Assistant: Yes.\n###"
    )
    assert [text[begin:end] for begin, end in answers] == ["A cat.\n###", "Yes.\n###"]
    first = Conversation((("What is it?", "A cat."),))
    assert first.prompt("Sure?") == text[: text.index(" Yes.")]
    assert Conversation(()).prompt("What is it?") == text[: text.index(" A cat.")]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[Tokenizer]:
    """As LLaMA's (nothing normalised, bytes for what is unknown), and one that joins what it likes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [
        SYSTEM,
        "### Human: What is the cat? ### Assistant: A cat. 日本",
        "".join(ODD[::2]),
    ] * 9  # others become bytes
    for name, more in {"llama": {}, "wide": {"split_by_whitespace": False}}.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(folder / name), vocab_size=420, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            hard_vocab_limit=False, minloglevel=2, **more,
        )  # fmt: skip
    return [Tokenizer(folder / f"{name}.model") for name in ("llama", "wide")]


def random_conversation(rng: random.Random) -> Conversation:
    def words() -> str:
        text = "".join(rng.choice(ODD) + rng.choice(["", " "]) for _ in range(rng.randint(1, 12))).strip()
        return text or "x"

    system = SYSTEM if rng.random() < 0.7 else words()
    return Conversation(tuple((words(), words()) for _ in range(rng.randint(1, 4))), None, system)


def labels_by_character(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Walk through the bytes of the pieces; a token is learned where one is of an answer or of the space before it."""
    text, answers = conversation.text()
    of_answer = [any(begin - 1 <= at < end for begin, end in answers) for at in range(len(text))]
    learned = [flag for flag, letter in zip(of_answer, text, strict=True) for _ in letter.encode()]
    model, ids, at = tokenizer._encoding._model, tokenizer.encode(text), -1  # a space is put before the text
    is_learned = []
    for token in ids:
        piece = model.id_to_piece(token)
        size = 1 if model.is_byte(token) else len(piece.replace("\u2581", " ").encode())
        is_learned.append(any(learned[max(at, 0) : at + size]))
        at += size
    assert at == len(learned)
    return ids, is_learned


@pytest.mark.parametrize("seed", range(40))
def test_labels_are_those_of_a_reference_on_characters(tokenizers, seed):
    rng = random.Random(seed)
    for tokenizer in tokenizers:
        conversation = random_conversation(rng)
        ids, is_answer = conversation.encode(tokenizer)
        assert (ids, is_answer.tolist()) == labels_by_character(tokenizer, conversation)


@pytest.mark.parametrize(("answer", "is_alone"), [("A cat.", False), ("{0.25}", True)])
def test_an_answer_is_what_would_be_generated(tokenizers, answer, is_alone):
    """The tokens behind the prompt's, up to the stop string, and no token of a question.

    The first is the space before the answer, also where it is a token by itself.
    """
    conversation = Conversation((("What is it?", answer),))
    ids, is_answer = conversation.encode(tokenizers[0])
    prompt = tokenizers[0].encode(Conversation(()).prompt("What is it?"))
    assert ids[: len(prompt)] == prompt
    assert not is_answer[: len(prompt)].any()
    assert is_answer[len(prompt) :].all()
    assert (tokenizers[0].decode([ids[len(prompt)]]) == "") == is_alone
    assert tokenizers[0].decode(ids[len(prompt) :]) == f"{answer}\n###"


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (None, "no conversations: must be an object with a list of that name"),
        ({"conversations": {}}, "no conversations"),
        ({"conversations": []}, "turns out of order: $"),
        ({"conversations": TURNS[:1]}, "turns out of order: human"),
        ({"conversations": TURNS[::-1]}, "turns out of order: gpt human"),
        ({"conversations": [TURNS[0], TURNS[0]]}, "turns out of order: human human"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role: bot"),
        ({"conversations": [{"from": "human"}]}, "a turn without text: {'from': 'human'}"),
        ({"conversations": ["hello"]}, "a turn without text: hello"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "empty text: turn 2"),
        (
            {"conversations": [TURNS[0], {"from": "gpt", "value": "\ud800"}]},
            "text is not Unicode: half a surrogate pair at character 0",
        ),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "a\0b"}]}, "text with a NUL character"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "It:\n### Cat"}]}, "the stop string is in an answer"),
        ({"image": ["a", "b"], "conversations": TURNS}, "several images: 2 are given; a conversation"),
        ({"image": "a", "images": ["b"], "conversations": TURNS}, "several images: 2 are given"),
        ({"image": "a", "conversations": [*TURNS, *TURNS]}, "several images: <image> is there 2 times, but one image"),
        ({"image": {"bytes": ""}, "conversations": TURNS}, r"image is no path: \{'bytes': ''\}"),
        ({"image": [None], "conversations": TURNS}, "image is no path: None"),
        ({"image": "https://a.b/c.jpg", "conversations": TURNS}, "image is a URL: https://a.b/c.jpg; download it"),
        ({"image": "data:image/png;base64,AA", "conversations": TURNS}, "image is a URL: data:image/png"),
        ({"video": "a.mp4", "conversations": TURNS}, "video instead of an image: a.mp4"),
        ({"conversations": [TALK[0], {"from": "gpt", "value": "<video> It."}]}, "<video> instead of an image"),
        ({"conversations": TURNS}, "no image: the text has <image>, but no image is given"),
        ({"image": "", "conversations": TURNS}, "image is no path: ''"),
        ({"image": None, "images": [], "conversations": TURNS}, "no image: the text has <image>"),
        ({"conversations": [{"from": [], "value": "x"}]}, r"unknown role: \[\]"),
        ({"conversations": [{"from": {"a": 1}, "value": "x"}]}, "unknown role: {'a': 1}"),
    ],
)
def test_what_cannot_be_used_says_why(item, reason):
    with pytest.raises(DataError, match=reason):
        parse(item)


def test_what_can_be_used():
    found = parse({"image": "a.jpg", "conversations": TURNS})
    assert found == Conversation((("What is it?", "A cat."),), "a.jpg")
    system = [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "Hi"}]
    assert parse({"conversations": [*system, {"from": "assistant", "value": "Ho"}]}).text()[0] == (
        "Be brief.\n\n### Human: Hi\n### Assistant: Ho\n###"
    )


# the index


def test_an_index_holds_what_went_in(tiny, dialogs):
    index = SampleIndex([dialogs], "conversations")
    index.check(tiny.tokenizer)
    items = json.loads((tiny.folder / "dialogs.json").read_text())
    assert len(index) == len(items) == 40
    reader, sizes = ImageReader(index), index.sizes(0, 40)
    for number, item in enumerate(items):
        ids, is_answer = parse(item).encode(tiny.tokenizer)
        assert index.caption(number).tolist() == ids
        assert index.is_target(number, len(ids)).tolist() == [*is_answer.tolist(), True]
        assert sizes.targets[number] == is_answer.sum() + 1
        if image := item.get("image"):
            content = (tiny.folder / "pictures" / image).read_bytes()
            assert reader.read(number) == content
            assert size_of(index, number) == Image.open(tiny.folder / "pictures" / image).size
            assert reader.name(number)[1] == image.removesuffix(".png")
        else:
            assert size_of(index, number) == (0, 0)
    assert len(list((dialogs / "shards").glob("*.tar"))) == 3
    assert (dialogs / "quarantine.jsonl").read_text() == ""


def test_json_and_jsonl_make_the_same_index_whatever_the_workers(tiny, dialogs, tmp_path):
    items = json.loads((tiny.folder / "dialogs.json").read_text())
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for workers in (1, 2):
        index_conversations([tmp_path / "d.jsonl"], tmp_path / "c", tiny.tokenizer, images=tiny.folder / "pictures",
                            samples_per_shard=15, workers=workers)  # fmt: skip
        for name in ("samples.bin", "captions.bin", "answers.bin", "shards/000002.tar"):
            assert (tmp_path / "c" / name).read_bytes() == (dialogs / name).read_bytes()


def test_bad_conversations_are_left_out_and_listed(tiny, tmp_path):
    good = {"image": "000.png", "conversations": TURNS}
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "000.png").write_bytes((tiny.folder / "pictures" / "000.png").read_bytes())
    items = [good, good | {"image": "no.png", "id": "lost"}, good | {"image": "broken.png"},
             {"conversations": TURNS[:1]}, good]  # fmt: skip
    lines = [json.dumps(item) for item in items]
    (tmp_path / "d.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    report = index_conversations([tmp_path / "d.jsonl"], tmp_path / "c", tiny.tokenizer)
    assert report.taken == 2
    assert report.rejected == {"not JSON": 1, "image cannot be read": 1, "not an image": 1,
                               "turns out of order": 1}  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "c" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["1", "lost", "3", "4"]
    index = SampleIndex([tmp_path / "c"], "conversations")
    assert index.location(0) == index.location(1)  # an image of two conversations is kept once


def test_text_alone_needs_no_shard(tiny, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": TALK}] * 3))
    index_conversations([tmp_path / "d.json"], tmp_path / "c", tiny.tokenizer)
    index = SampleIndex([tmp_path / "c"], "conversations")
    index.check(tiny.tokenizer)
    assert [size_of(index, number) for number in range(3)] == [(0, 0)] * 3


def test_an_image_is_held_out_with_all_its_conversations(tiny, tmp_path):
    items = [{"image": f"{n % 30:03d}.png", "conversations": TURNS} for n in range(90)]
    (tmp_path / "d.json").write_text(json.dumps(items))
    report = index_conversations([tmp_path / "d.json"], tmp_path / "c", tiny.tokenizer, held_out=0.3,
                                 images=tiny.folder / "pictures")  # fmt: skip
    assert report.taken + report.held_out == 90
    names = []
    for folder in ("c", "c/held_out"):
        index = SampleIndex([tmp_path / folder], "conversations")
        names.append({ImageReader(index).name(number)[1] for number in range(len(index))})
    assert names[1]
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", "[", r"d\.json: not JSON: .*; give a list of objects, or \.jsonl"),
        ("d.json", "{}", r"d\.json: must hold a list of objects"),
        ("d.json", "[1]", r"d\.json: holds no conversation that can be used; 1 left out \(no conversations\)"),
        ("d.json", None, r"d\.json: cannot be read \(No such file or directory\)"),
        ("d.jsonl", "", r"d\.jsonl: holds no conversation that can be used"),
    ],
)
def test_sources_that_cannot_be_used(tiny, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        index_conversations([tmp_path / name], tmp_path / "c", tiny.tokenizer)


def test_an_index_of_something_else_is_refused(tiny, dialogs):
    with pytest.raises(
        DataError, match=r"data\.pairs=.*: is an index of conversations; give it as data\.conversations"
    ):
        SampleIndex([dialogs])
    with pytest.raises(DataError, match=r"data\.conversations=.*: is an index of pairs; give it as data\.pairs"):
        SampleIndex([tiny.folder / "pairs"], "conversations")
    with pytest.raises(DataError, match=r"nowhere.*make the index by megatron-sphinx prepare conversations"):
        SampleIndex([tiny.folder / "nowhere"], "conversations")


def test_the_tool(tiny, tmp_path, run_tool):
    name, model = "prepare_conversations.py", ["--tokenizer", tiny.folder / "tokenizer.model"]
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": TALK}, {}]))
    status, out, _ = run_tool(name, tmp_path / "d.json", tmp_path / "c", *model)
    assert (status, out.splitlines()[1]) == (0, "  left out: 1 (no conversations)")
    assert out.splitlines()[-1] == "input 2 = 1 conversations + 1 in quarantine.jsonl"
    assert "c: 1 conversations, " in out
    status, _, error = run_tool(name, tmp_path / "no.json", tmp_path / "c", *model)
    assert status == 2
    assert error.endswith("no.json: cannot be read (No such file or directory); check its path\n")


# truncation


@pytest.mark.parametrize("seed", range(10))
def test_a_long_conversation_loses_whole_turns_from_its_end(tiny, tmp_path, seed):
    rng = random.Random(seed)
    items = [{"conversations": [{"from": role, "value": "red " * rng.randint(1, 9)} for _ in range(rng.randint(1, 4))
                                for role in ("human", "gpt")]} for _ in range(12)]  # fmt: skip
    (tmp_path / "d.json").write_text(json.dumps(items))
    index_conversations([tmp_path / "d.json"], tmp_path / "c", tiny.tokenizer)
    index = SampleIndex([tmp_path / "c"], "conversations")
    for number, item in enumerate(items):
        ids, is_answer = parse(item).encode(tiny.tokenizer)
        most = rng.randint(1, len(ids) - 1)
        turns = parse(item).turns
        whole = [len(Conversation(turns[:n]).encode(tiny.tokenizer)[0]) for n in range(1, len(turns) + 1)]
        fitting = [size for size in whole if size <= most]
        kept, targets = index.cut(number, most)
        assert kept == (fitting[-1] if fitting else most)
        learned = [*is_answer[:kept].tolist(), bool(fitting)]  # EOS only behind a whole answer
        assert index.is_target(number, kept).tolist() == learned
        assert targets == sum(learned)


# micro-batches


def conversations_of(tiny, dialogs, tmp_path, **more):
    overrides = {"data.pairs_per_step": 0, "data.conversations": str(dialogs), "data.conversations_per_step": 9,
                 "data.text_tokens_per_step": 0, "data.sequence_length": 512, "vision.views": 5,
                 "vision.padding": "corner", "vision.skip_padding_views": True} | more  # fmt: skip
    return configuration.load(tiny.write(tmp_path / "c.yaml", overrides))


def check_alone_and_packed(config):
    """The loss of each sample, alone in a row and beside others, in any number of rows."""
    here, shape = groups(), random_shape(3)
    shape = type(shape)(**{**vars(shape), "vocabulary": 300})
    sources = open_sources(config.data, shape)
    planner = make_planner(config.data, sources, shape, config.vision, replicas=1, seed=1)
    model = SphinxModel(
        build_language(shape, here, dtype=torch.float32, sequence_length=512),
        VisualProjection(config.vision, shape.hidden, dtype=torch.float32, device=CPU),
        here,
    )
    draw_weights(model, shape, here, seed=2)
    builder = BatchBuilder(config.data, sources, config.vision)

    def losses(rows) -> dict[int, float]:
        batch = builder.build(rows)
        views = sorted((piece.item, n) for row in rows for piece in row for n in piece.views)
        drawn = [torch.randn(config.vision.feature_values, generator=torch.Generator().manual_seed(97 * pair + n))
                 for pair, n in views]  # fmt: skip
        features = torch.stack(drawn) if drawn else torch.empty(0, config.vision.feature_values)
        out = batch.spread(model(batch, features).detach())
        return {pair: float(out[batch.sample_of_token == number].sum()) for number, pair in enumerate(batch.samples)}

    pieces = [piece for row in planner.step(0).rows for piece in row]
    assert {bool(piece.views) for piece in pieces} == {True, False}  # with images and without
    alone = {pair: loss for piece in pieces for pair, loss in losses([(piece,)]).items()}
    assert all(alone.values())
    rng = random.Random(1)
    for _ in range(4):
        rng.shuffle(pieces)
        cut = rng.randint(0, len(pieces))
        packed = losses([tuple(pieces[:cut]), tuple(pieces[cut:])])
        assert packed == pytest.approx(alone, rel=1e-5)
    assert sum(piece.targets for piece in pieces) == int((builder.build([tuple(pieces)]).targets >= 0).sum())


def test_a_samples_loss_is_the_same_alone_and_packed(run_ranks, tiny, dialogs, tmp_path):
    config = conversations_of(tiny, dialogs, tmp_path, **{"data.conversations_per_step": 20})
    run_ranks(1, lambda: check_alone_and_packed(config))


def test_weighted_data_sets_give_their_share(tiny, dialogs, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": TALK}] * 5))
    index_conversations([tmp_path / "d.json"], tmp_path / "c", tiny.tokenizer)
    weighted = [{"path": str(dialogs), "weight": 2}, {"path": str(tmp_path / "c"), "weight": 1}]
    natural = [{"path": str(dialogs)}, {"path": str(tmp_path / "c")}]
    for given, share in ((weighted, 1 / 3), (natural, 5 / 45)):
        config = conversations_of(tiny, dialogs, tmp_path, **{"data.conversations": given})
        planner = make_planner(config.data, open_sources(config.data, config.model), config.model, config.vision,
                               replicas=1, seed=1)  # fmt: skip
        pairs = [pair for step in range(10) for pair in planner.step(step).samples]
        assert len(pairs) == 90
        assert sum(pair >= 40 for pair in pairs) == round(90 * share)


def test_pairs_and_conversations_are_not_taken_together(tiny, dialogs, tmp_path):
    message = r"data\.conversations_per_step=9: data\.pairs_per_step=6 too; a run takes one of them: set the other to 0"
    with pytest.raises(ConfigError, match=message):
        conversations_of(tiny, dialogs, tmp_path, **{"data.pairs_per_step": 6})


def test_training_on_conversations_and_text(train, dialogs):
    overrides = {"data.pairs_per_step": 0, "data.conversations": str(dialogs), "data.conversations_per_step": 8,
                 "data.sequence_length": 256, "vision.views": 10, "vision.skip_padding_views": True}  # fmt: skip
    one = train(1, overrides)
    assert all(line["target_tokens_pairs"] > 8 for line in one.metrics)
    assert np.isfinite([line["loss"] for line in one.metrics]).all()
