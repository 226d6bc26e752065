"""What routers choose while a model answers, against transformers and counts by hand, on one rank and on several."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_answers import drawn, prompts_of, saved
from test_answers_ranks import leaving

import megatron_sphinx
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.evaluation.expert_pruning import Pruning, check_keep, least_error, most_used, random_experts
from megatron_sphinx.evaluation.expert_routing import (
    Divergence,
    RoutingCounter,
    Uniform,
    divergence,
    evenness,
    figures_of,
    kinds_of_tokens,
    shares_of,
)
from megatron_sphinx.generation.expert_orders import Choices, Collect, Restrict, Watch
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.requests import Picture, Prompt
from megatron_sphinx.generation.service import BusyError, ClosedError
from megatron_sphinx.model.architecture import VisionConfig, VisualExpertConfig
from megatron_sphinx.model.expert_choice import ExpertChoice, KeptExperts

EXPERTS, LENGTHS, NEW = 4, (2, 9, 26, 9, 41), 7


@pytest.fixture
def small(tiny, tmp_path):
    """A Mixtral of transformers with two layers, its folder, and prompts that are marked."""
    vocabulary = tiny.tokenizer.identity.vocabulary
    peer = drawn(7, vocabulary, experts=EXPERTS, layers=2)
    prompts = prompts_of(7, vocabulary, LENGTHS)
    marked = [Prompt(one.tokens, mark=number) for number, one in enumerate(prompts)]
    return peer, saved(peer, tiny, tmp_path / "hf"), marked


def watched(path, prompts, *, limits=None, keep=(), **options):
    """Answers, and what the ranks have seen; on the first rank."""
    with megatron_sphinx.load(path, limits=limits, **{"cache_bytes": 2**22, **options}) as model:
        model.order_experts(Watch(keep))
        answers = model.generate(prompts, max_new_tokens=NEW, ignore_eos=True)
        return answers, model.order_experts(Collect())


def choices_of(seen, mark):
    parts = [one.prompts[mark] for one in sorted(seen, key=lambda one: one.layers) if mark in one.prompts]
    return Choices.joined(parts, 0)


@pytest.mark.parametrize("limits", [{}, {"new_tokens": 8}, {"sequences": 2}], ids=str)
def test_choices_are_those_of_transformers(run_ranks, small, limits):
    peer, path, prompts = small

    def check():
        answers, seen = watched(path, prompts, limits=Limits(**limits))
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = [*prompt.tokens, *answer.tokens[:-1]]  # nothing is computed of the last one
            with torch.no_grad():
                logits = peer(torch.tensor([tokens]), output_router_logits=True).router_logits
            found = choices_of(seen, prompt.mark)
            assert found.experts.shape == (2, len(tokens), 2)
            for layer, rows in enumerate(logits):
                largest, wanted = rows.topk(2, -1)
                assert np.array_equal(found.experts[layer], wanted.numpy())
                torch.testing.assert_close(torch.tensor(found.first_weight[layer]), largest.softmax(-1)[:, 0])

    run_ranks(1, check)


def test_tokens_that_are_computed_again_count_once(run_ranks, small):
    """In a cache that is too small for all, sequences give way and begin again."""
    _, path, prompts = small

    def check():
        plain = watched(path, prompts)[1]
        with pytest.raises(ConfigError, match="has room for"):
            watched(path, prompts, cache_bytes=2**12)
        answers, seen = watched(path, prompts, cache_bytes=64 * bytes_of(path), positions=64)
        for prompt, answer in zip(prompts, answers, strict=True):
            one, other = choices_of(seen, prompt.mark), choices_of(plain, prompt.mark)
            assert one.experts.shape[1] == len(prompt.tokens) + len(answer.tokens) - 1
            assert np.array_equal(one.experts, other.experts)

    run_ranks(1, check)


def bytes_of(path):
    """What a token takes in the cache."""
    config = json.loads((path / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width * 4


def see(path, prompts, sizes, target: Path):
    """Watch on this rank; the first one writes what is seen, of each prompt."""
    _, seen = watched(path, prompts, **sizes)
    choices = [choices_of(seen, prompt.mark) for prompt in prompts]
    torch.save([torch.tensor(one.experts) for one in choices], target)


@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        (2, {"expert": 2}), (2, {"pipeline": 2}), pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, {"tensor": 2, "expert": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_all_layouts_see_alike(run_ranks, tiny, tmp_path, world, sizes):
    vocabulary = tiny.tokenizer.identity.vocabulary
    peer = drawn(11, vocabulary, experts=EXPERTS, layers=2)
    path = saved(peer, tiny, tmp_path / "hf")
    prompts = [Prompt(one.tokens, mark=n) for n, one in enumerate(prompts_of(3, vocabulary, LENGTHS))]
    run_ranks(1, lambda: see(path, prompts, {}, tmp_path / "alone.pt"))
    run_ranks(world, leaving(lambda: see(path, prompts, sizes, tmp_path / "together.pt")))
    alone, together = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "together"))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def restricted(path, prompts, sizes, target: Path):
    """Scores as loaded and with other experts, ordered while the model is loaded."""
    with megatron_sphinx.load(path, cache_bytes=2**22, **sizes) as model:
        found = []
        for choice in (ExpertChoice(), ExpertChoice(1), ExpertChoice(None, KeptExperts(((0, 3),))), ExpertChoice()):
            model.order_experts(Restrict(choice))
            found.append([model.score(prompt, [[5, 9, 3]])[0] for prompt in prompts])
        torch.save(found, target)


def test_experts_can_be_chosen_anew_on_all_ranks(run_ranks, small, tmp_path):
    _, path, prompts = small
    run_ranks(1, lambda: restricted(path, prompts, {}, tmp_path / "alone.pt"))
    run_ranks(2, leaving(lambda: restricted(path, prompts, {"expert": 2}, tmp_path / "together.pt")))
    alone, together = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "together"))
    assert alone[0] == alone[3] != alone[1] != alone[2]
    for one, other in zip(alone, together, strict=True):
        assert [value for row in one for value in row] == pytest.approx([v for row in other for v in row], abs=1e-4)


def test_orders_are_refused(run_ranks, small):
    _, path, _ = small

    def check():
        with megatron_sphinx.load(path, cache_bytes=2**22) as model:
            with pytest.raises(ConfigError, match="active_experts=5: the model has 4"):
                model.order_experts(Restrict(ExpertChoice(5)))
            answer = model.stream(Prompt((1, 5)), max_new_tokens=300, ignore_eos=True)
            next(answer)
            with pytest.raises(BusyError, match="requests are under way: wait until they are answered, and order"):
                model.order_experts(Restrict(ExpertChoice(1)))
            assert "active_experts" not in model.identity
            answer.close()
        with pytest.raises(ClosedError, match="it obeys no order any more; load it again"):
            model.order_experts(Watch())

    run_ranks(1, check)


# counts and figures


def by_hand(kinds, chosen):
    """Counts of one prompt, [kinds, layers, choices, experts], in plain loops."""
    layers, tokens, choices = chosen.shape
    counts = np.zeros((4, layers, choices, EXPERTS), int)
    for layer in range(layers):
        for token in range(tokens):
            for choice in range(choices):
                counts[kinds[token], layer, choice, chosen[layer, token, choice]] += 1
    return counts


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_counts_are_those_by_hand(choices):
    rng = np.random.default_rng(choices)
    counter, wanted, pairs = RoutingCounter("some", 1), {}, {"text": [0, 0, 0], "image": [0, 0, 0]}
    weights, together = np.zeros(2), np.zeros((EXPERTS, EXPERTS), int)
    for number in range(6):
        kinds = np.array([0, 3, 3, 3, 2, 0, 0, 1, 1])
        chosen = np.array([[rng.permutation(EXPERTS)[:choices] for _ in kinds] for _ in range(2)])
        first = rng.random((2, len(kinds))).astype(np.float32)
        unit = ["a", "a", "b", "", "", "b"][number]
        counter.add(unit, kinds, Choices(chosen.astype(np.int16), first), EXPERTS)
        wanted.setdefault(unit or f"alone {number}", []).append(by_hand(kinds, chosen))
        weights += first.sum(1)
        for token in chosen[1]:
            for one in token:
                for other in token:
                    together[one, other] += 1
        for (kind, one), (next_kind, other) in pairwise(zip(kinds, chosen[1], strict=True)):
            is_text = kind < 2 and next_kind < 2
            if is_text or kind == next_kind == 3:
                row = pairs["text" if is_text else "image"]
                row[0] += 1
                row[1] += one[0] == other[0]
                row[2] += bool({*one} & {*other})
    counts = counter.counts
    assert sorted(map(str, counts.assignments)) == sorted(str(sum(rows)) for rows in wanted.values())
    figures = figures_of(counts)
    assert figures["units"] == 4
    assert figures["tokens"] == {"text": 18, "generated": 12, "skip token": 6, "view 0": 18}
    assert np.array_equal(counts.together[1], together)
    for place, name in enumerate(("text", "image")):
        assert counts.pairs[place, 1].tolist() == pairs[name]
        assert figures["first_repeated"][name][1] == pairs[name][1] / pairs[name][0]
        assert figures["any_repeated"][name][1] == pairs[name][2] / pairs[name][0]
    assert figures["first_weight"] == pytest.approx((weights / 54).tolist())
    of_text = sum(sum(rows)[[0, 1]] for rows in wanted.values()).sum((0, 2))
    assert figures["share"]["text"] == (of_text / of_text.sum(-1, keepdims=True)).tolist()
    first = sum(sum(rows)[3] for rows in wanted.values())[:, 0]
    assert figures["share_by_choice"]["view 0"][0] == (first / first.sum(-1, keepdims=True)).tolist()
    second = sum(sum(rows) for rows in wanted.values()).sum(0)[:, choices - 1]
    assert figures["share_by_choice"]["both"][choices - 1] == (second / second.sum(-1, keepdims=True)).tolist()


def test_a_uniform_router_gives_the_figures_of_mixtrals_paper():
    uniform = Uniform.of(8, 2)
    assert (uniform.share, round(uniform.any_repeated, 3)) == (0.125, 0.464)
    rng = np.random.default_rng(0)
    counter = RoutingCounter("uniform", 0)
    for number in range(20):
        chosen = np.array([[rng.permutation(8)[:2] for _ in range(500)]])
        counter.add(str(number), np.zeros(500, int), Choices(chosen.astype(np.int16), np.full((1, 500), 0.5)), 8)
    figures = figures_of(counter.counts)
    assert figures["first_repeated"]["text"][0] == pytest.approx(uniform.share, abs=0.01)
    assert figures["any_repeated"]["text"][0] == pytest.approx(uniform.any_repeated, abs=0.015)
    assert figures["share"]["text"][0] == pytest.approx([uniform.share] * 8, abs=0.01)
    assert figures["evenness"]["both"][0] == pytest.approx(1, abs=1e-3)
    assert figures["first_repeated"]["image"] == [None]
    assert "image" not in figures["share"]


def test_divergence_and_evenness_are_what_they_are_of_known_shares():
    one, other = np.array([[0.5, 0.5, 0.0, 0.0]]), np.array([[0.0, 0.0, 0.25, 0.75]])
    assert divergence(one, one) == [0]
    assert divergence(one, other) == [1]
    assert evenness(one) == pytest.approx([0.5])
    middle = np.array([[0.25, 0.25, 0.25, 0.25]])
    wanted = (1 * np.log2(0.5 / 0.375) + 0.5 * np.log2(0.25 / 0.375) + 0.5 * np.log2(0.25 / 0.125)) / 2
    assert divergence(one, middle) == pytest.approx([wanted])
    assert np.isnan(shares_of(np.zeros((1, 3), int))).all()


def test_what_differs_by_chance_alone_is_told_from_what_differs():
    rng = np.random.default_rng(1)

    def drawn_units(shares):
        return np.array([[rng.multinomial(40, shares)] for _ in range(30)])

    even, uneven = [0.25] * 4, [0.4, 0.2, 0.2, 0.2]
    alike = [Divergence.between(drawn_units(even), drawn_units(even), seed=n, replicates=100) for n in range(20)]
    assert sum(one.value[0] > one.chance[0] for one in alike) <= 4
    apart = Divergence.between(drawn_units(even), drawn_units(uneven), replicates=200)
    assert apart.value[0] > 2 * apart.chance[0]
    assert apart.low[0] <= apart.value[0] <= apart.high[0]


def test_kinds_follow_the_views_of_a_picture():
    expert = VisualExpertConfig(name="clip_convnext_small", weights="random")
    vision = VisionConfig(grid=2, views=5, padding="corner", skip_padding_views=True, experts=(expert,))
    each = vision.tokens_per_view
    picture = Picture("k", b"", 90, 40, (0, 1, 2), 3 * each + 2)
    kinds = kinds_of_tokens(picture, vision, 1 + picture.positions + 2, 1 + picture.positions + 4)
    assert kinds.tolist() == [0, *[3] * each, *[4] * each, *[5] * each, 2, 2, 0, 0, 1, 1]
    assert kinds_of_tokens(None, None, 3, 4).tolist() == [0, 0, 0, 1]


# pruning


def test_errors_of_subsets_are_those_of_masked_layers(run_ranks, small):
    _, path, prompts = small

    def check():
        with megatron_sphinx.load(path, cache_bytes=2**22) as model:
            model.order_experts(Watch((2, 3)))
            runner = model._job.executor._executor._runner
            layers = runner.experts._layers
            inputs = {}

            def look(layer, hidden):
                inputs.setdefault(layer.layer_number - 1, []).append(hidden.clone())
                runner.experts._see(layer, hidden)

            for layer in layers:
                layer.observer = look
            model.generate(prompts, max_new_tokens=NEW, ignore_eos=True)
            [seen] = model.order_experts(Collect())
            subsets = [one for size in (2, 3) for one in combinations(range(EXPERTS), size)]
            for number, layer in enumerate(layers):
                layer.observer = None
                hidden = torch.cat(inputs[number])
                with torch.inference_mode():
                    whole = layer(hidden)[0].double()
                    assert seen.norms[number] == pytest.approx(whole.square().sum().item(), rel=1e-4)
                    assert list(seen.errors[number]) == subsets
                    for subset in subsets:
                        layer.router.restrict(None, subset)
                        error = (layer(hidden)[0].double() - whole).square().sum().item()
                        layer.router.restrict(None, None)
                        assert seen.errors[number][subset] == pytest.approx(error, rel=1e-4)

    run_ranks(1, check)


def test_experts_are_chosen_by_each_method():
    used = np.array([[5, 9, 9, 1], [1, 2, 3, 4]])
    assert most_used(used, 2) == KeptExperts(((1, 2), (2, 3)))
    assert most_used(used, 3) == KeptExperts(((0, 1, 2), (1, 2, 3)))
    errors = {1: {(0, 1): 3.0, (0, 2): 1.0, (1,): 0.0}, 0: {(0, 1): 1.0, (0, 2): 3.0, (1,): 9.0}}
    assert least_error(errors, 2) == KeptExperts(((0, 1), (0, 2)))
    drawn_ones = [random_experts(3, 8, 4, seed) for seed in range(3)]
    assert len({one.layers for one in drawn_ones}) == 3
    assert random_experts(3, 8, 4, 1) == drawn_ones[1]
    assert all(len(set(row)) == 4 and list(row) == sorted(row) for one in drawn_ones for row in one.layers)


def test_numbers_that_cannot_be_kept_are_refused():
    with pytest.raises(ConfigError, match=r"^--keep=8: the model has 8 experts in each layer; keep fewer$"):
        check_keep(8, 8, Pruning.USAGE)
    message = "^--keep=32: there are .* subsets of 64 experts, at most 10,000 are compared; prune by usage$"
    with pytest.raises(ConfigError, match=message):
        check_keep(32, 64, Pruning.RECONSTRUCTION)
    check_keep(32, 64, Pruning.RANDOM)
