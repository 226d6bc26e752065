"""What is taken through a layer before the first step, so that no later step is the first to meet a kind of shape."""

from dataclasses import replace

import pytest
import torch
from test_model import groups

from megatron_sphinx.model import attention, language, warm_up
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.kernels import torch_kernels

SHAPE = {"layers": 2, "hidden": 32, "ffn": 24, "heads": 4, "groups": 2, "vocabulary": 100}


def kind(number):
    """What Triton tells apart."""
    return "one" if number == 1 else "sixteens" if number % 16 == 0 else "any"


@pytest.mark.parametrize("processors", [18, 78, 108, 114, 132, 144, 148])
def test_every_kind_of_number_is_met(processors):
    def kinds(counts):
        return {(kind(tokens), kind(-(-tokens // processors))) for tokens in counts}

    assert kinds(warm_up.kinds_of_tokens(processors)) == kinds(range(1, 40 * processors))


def check_warm_up(monkeypatch, name, whole, experts, recompute, expected):
    seen = []

    def rotate(query, key, cos, sin):
        seen.append(len(query))
        return query, key

    kernels = replace(torch_kernels(), name=name, rotate=rotate)
    monkeypatch.setattr(language, "choose", lambda *_: kernels)
    monkeypatch.setattr(warm_up, "attention_path", lambda *_, **__: attention.Path.WHOLE if whole else None)
    config, here = LanguageConfig(**SHAPE, experts=experts), groups()
    model = language.build_language(config, here, dtype=torch.float32, sequence_length=50, recompute=recompute)
    language.draw_weights(model, config, here, seed=1)
    before, state = (
        {key: value.clone() for key, value in model.state_dict().items() if value is not None},
        torch.get_rng_state(),
    )
    warm_up.warm_up(model, longest=50, processors=18)
    assert seen == expected
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "whole", "experts", "recompute", "expected"),
    [
        ("torch", False, 0, "none", []),
        ("torch", True, 0, "none", [50]),
        ("liger", False, 4, "none", [1, 16, 17, 32, 31, 288, 287]),
        ("liger", True, 0, "selective", [1, 16, 17, 32, 31, 288, 287, 50]),
    ],
)
def test_a_layer_is_warm_and_as_it_was(run_ranks, monkeypatch, name, whole, experts, recompute, expected):
    run_ranks(1, lambda: check_warm_up(monkeypatch, name, whole, experts, recompute, expected))
