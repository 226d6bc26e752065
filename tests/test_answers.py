"""A loaded model against transformers: greedy and sampled answers, log-probabilities, scores, penalties, batches."""

import random
import shutil

import pytest
import torch
from llamas import model_of
from transformers import LogitsProcessorList
from transformers.generation import RepetitionPenaltyLogitsProcessor

import megatron_sphinx
from megatron_sphinx.generation.requests import Finish, Prompt

NEW, MARGIN = 200, 1e-4  # tokens of an answer; of the two largest logits, below which either may be drawn


def drawn(seed, vocabulary, *, experts=0, is_tied=False, layers=0):
    """A Llama or Mixtral of a shape by chance, every weight drawn."""
    rng = random.Random(seed)
    groups, queries = rng.choice([1, 2, 3]), rng.choice([1, 2])
    shape = {
        "hidden_size": groups * queries * 8, "intermediate_size": rng.choice([24, 40]), "vocab_size": vocabulary,
        "num_hidden_layers": layers or rng.randint(1, 2), "num_attention_heads": groups * queries,
        "num_key_value_heads": groups, "rope_theta": rng.choice([1e4, 1e6]), "tie_word_embeddings": is_tied,
        "max_position_embeddings": 400,
    }  # fmt: skip
    return model_of(shape, experts=experts, seed=seed, std=0.3)


def saved(model, tiny, folder):
    """The folder of a model with its tokenizer."""
    model.save_pretrained(folder)
    shutil.copy(tiny.folder / "tokenizer.model", folder)
    return folder


def prompts_of(seed, vocabulary, lengths):
    rng = random.Random(seed)
    return [Prompt((1, *(rng.randrange(3, vocabulary) for _ in range(length)))) for length in lengths]


def greedy(model, prompts, new):
    """What `generate` gives: tokens [prompts, new], raw logits [new, prompts, vocabulary]."""
    longest = max(len(one.tokens) for one in prompts)
    rows = [[*[0] * (longest - len(one.tokens)), *one.tokens] for one in prompts]
    mask = [[0] * (longest - len(one.tokens)) + [1] * len(one.tokens) for one in prompts]
    found = model.generate(
        torch.tensor(rows), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=new, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return found.sequences[:, longest:], torch.stack(found.logits)


def sure_steps(logits):
    """How many first steps of an answer have a margin; the rest of it may be another one. Logits [new, vocabulary]."""
    first, second = logits.topk(2, -1).values.unbind(-1)
    return next((step for step, margin in enumerate(first - second) if margin < MARGIN), len(logits))


@pytest.mark.parametrize(
    ("experts", "is_tied"), [(0, False), (0, True), (4, False), pytest.param(4, True, marks=pytest.mark.slow)]
)
def test_greedy_answers_are_those_of_transformers(run_ranks, tiny, tmp_path, experts, is_tied):
    vocabulary = tiny.tokenizer.identity.vocabulary
    peer = drawn(experts + is_tied, vocabulary, experts=experts, is_tied=is_tied)
    path, prompts = saved(peer, tiny, tmp_path / "hf"), prompts_of(experts, vocabulary, (1, 33, 70))

    def check():
        tokens, logits = greedy(peer, prompts, NEW)
        with megatron_sphinx.load(path, cache_bytes=2**25) as model:
            answers = model.generate(prompts, max_new_tokens=NEW, ignore_eos=True, top_logprobs=3)
        compared = 0
        for number, answer in enumerate(answers):
            steps = sure_steps(logits[:, number])
            compared += steps
            assert answer.tokens[:steps] == tuple(tokens[number, :steps].tolist())
            assert (answer.finish, len(answer.tokens), len(answer.logprobs)) == (Finish.LENGTH, NEW, NEW)
            wanted = logits[:steps, number].double().log_softmax(-1)
            best = wanted.topk(3)
            for step, one in enumerate(answer.logprobs[:steps]):
                assert one.logprob == pytest.approx(wanted[step, one.token].item(), abs=1e-4)
                assert [value for _, value in one.top] == pytest.approx(best.values[step].tolist(), abs=1e-4)
                assert one.top[0] == (one.token, one.logprob)
        first, second = logits.topk(2, -1).values.unbind(-1)
        assert (first - second < MARGIN).double().mean() < 0.01, "margins are rarely that small"
        assert compared > NEW * len(prompts) / 2

    run_ranks(1, check)


@pytest.fixture
def small(tiny, tmp_path):
    """A Mixtral of transformers, its folder, and prompts of several lengths."""
    vocabulary = tiny.tokenizer.identity.vocabulary
    peer = drawn(7, vocabulary, experts=4)
    return peer, saved(peer, tiny, tmp_path / "hf"), prompts_of(7, vocabulary, (2, 9, 26, 9, 41))


def test_scores_are_those_of_transformers(run_ranks, small):
    peer, path, prompts = small
    rng = random.Random(3)
    texts = [[rng.randrange(3, peer.config.vocab_size) for _ in range(rng.choice([1, 3, 20]))] for _ in range(6)]

    def check():
        with megatron_sphinx.load(path, cache_bytes=2**25) as model:
            for prompt in prompts[:3]:
                found = model.score(prompt, texts)
                for text, scores in zip(texts, found, strict=True):
                    with torch.no_grad():
                        whole = peer(torch.tensor([[*prompt.tokens, *text]])).logits[0].double().log_softmax(-1)
                    rows = whole[len(prompt.tokens) - 1 : -1]
                    wanted = rows.gather(1, torch.tensor(text)[:, None])[:, 0]
                    assert list(scores) == pytest.approx(wanted.tolist(), abs=1e-4)
                    assert sum(scores) == pytest.approx(wanted.sum().item(), abs=1e-3)
            (answer,) = model.generate([prompts[2]], max_new_tokens=8, ignore_eos=True, top_logprobs=0)
            (scores,) = model.score(prompts[2], [answer.tokens])
            assert list(scores) == pytest.approx([one.logprob for one in answer.logprobs], abs=1e-5)

    run_ranks(1, check)


def test_the_penalty_is_that_of_transformers(run_ranks, small):
    peer, path, prompts = small

    def check():
        with megatron_sphinx.load(path, cache_bytes=2**25) as model:
            answers = model.generate(prompts, max_new_tokens=50, ignore_eos=True, repetition_penalty=1.4)
            plain = model.generate(prompts, max_new_tokens=50, ignore_eos=True)
        assert answers != plain
        processor, compared = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4)]), 0
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor([[*prompt.tokens, *answer.tokens]])
            with torch.no_grad():
                logits = peer(tokens).logits[0]
            for step, token in enumerate(answer.tokens):
                end = len(prompt.tokens) + step
                scores = processor(tokens[:, :end], logits[None, end - 1])[0]
                if sure_steps(scores[None]):
                    compared += 1
                    assert token == scores.argmax()
        assert compared > 0.9 * 50 * len(prompts)

    run_ranks(1, check)


def test_sampled_answers_do_not_depend_on_who_else_asks(run_ranks, small):
    _, path, prompts = small
    drawn_by = [
        {"temperature": 0.8, "seed": 5}, {"temperature": 0.8, "top_p": 0.7, "seed": 1},
        {"temperature": 1.3, "top_k": 9, "seed": 2**40}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 0},
    ]  # fmt: skip

    def check():
        with megatron_sphinx.load(path, cache_bytes=2**25) as model:
            for how in drawn_by:
                together = model.generate(prompts, max_new_tokens=24, **how)
                backwards = model.generate(prompts[::-1], max_new_tokens=24, **how)[::-1]
                alone = [model.generate([prompt], max_new_tokens=24, **how)[0] for prompt in prompts]
                for one, *others in zip(together, backwards, alone, strict=True):
                    assert {each.tokens for each in others} == {one.tokens}
                    assert one.text == alone[together.index(one)].text
                assert together[1].tokens != together[3].tokens  # other prompts
            other = model.generate(prompts, max_new_tokens=24, temperature=0.8, seed=6)
            assert [one.tokens for one in other] != [
                one.tokens for one in model.generate(prompts, max_new_tokens=24, **drawn_by[0])
            ]

    run_ranks(1, check)


def test_an_answer_ends_by_eos(run_ranks, small):
    _, path, prompts = small

    def check():
        with megatron_sphinx.load(path, cache_bytes=2**25) as model:
            free = model.generate(prompts, max_new_tokens=120, temperature=1.5, ignore_eos=True)
            ended = model.generate(prompts, max_new_tokens=120, temperature=1.5)
        stops = [answer.tokens.index(2) + 1 if 2 in answer.tokens else 120 for answer in free]
        assert [len(answer.tokens) for answer in ended] == stops
        assert [answer.finish for answer in ended] == [
            Finish.STOP if 2 in answer.tokens else Finish.LENGTH for answer in free
        ]
        assert min(stops) < 120

    run_ranks(1, check)
