"""Every layout against one rank: losses, the gradient of every weight, and the weights after three steps, in fp32."""

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch

from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.training.deepspeed_engine import Engine

SEED = int(os.environ.get("PARITY_SEED", "1"))  # of the models' shapes; printed with a failure
EXACT = ("loss", "loss_pairs", "loss_text", "gradient_norm")
# language ranks of one replica block, and its sizes
DENSE = {
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "TP4": (4, {"tensor": 4}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP4": (4, {"pipeline": 4}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2+SPxPP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "DP2xPP2": (4, {"pipeline": 2}),
}
MIXTRAL = {
    "DP2": (2, {}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "TP4+SP": (4, {"tensor": 4, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP4": (4, {"pipeline": 4}),
    "EP2": (2, {"expert": 2}),
    "EP4": (4, {"expert": 4}),
    "EP2xETP2": (4, {"expert": 2, "expert_tensor": 2}),
    "TP2+SPxEP2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
    "TP2+SPxETP2": (2, {"tensor": 2, "sequence": True, "expert_tensor": 2}),
    "TP2+SPxPP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "PP2xEP2": (4, {"pipeline": 2, "expert": 2}),
    "DP2xPP2": (4, {"pipeline": 2}),
    "DP2xEP2": (4, {"expert": 2}),
}
KINDS = {"llama": DENSE, "mixtral": MIXTRAL}
ENCODERS = (0, 1, 3)
Case = tuple[str, str, int]  # model, layout, encoder ranks


def shape(*, has_experts: bool) -> dict:
    """A model that can be divided by 4, with odd sizes: heads, layers and widths drawn from SEED."""
    rng = random.Random(f"{SEED} {has_experts}")
    groups, per_group, head = 4, rng.choice([1, 2, 3]), rng.choice([2, 4, 6])
    values = {
        "layers": rng.choice([5, 6, 7]),
        "hidden": groups * per_group * head,
        "ffn": 4 * rng.choice([3, 5, 9, 13]),
        "heads": groups * per_group,
        "groups": groups,
        "init_std": 0.1,
    }
    if has_experts:
        values |= {"experts": 4 * rng.choice([1, 2]), "experts_per_token": rng.choice([2, 3])}
        values |= {"balance_loss_coefficient": 0.1, "z_loss_coefficient": 0.01}
    return {f"model.{name}": value for name, value in values.items()}


def train_and_keep_gradients(config: Path) -> int:
    """Train, and keep what each rank has of the gradient before each update."""
    update, steps = Engine.update, []

    def keep(self, rate, norm, factor=1.0):
        found = []
        for fragment, values in self.gradients():
            for block, start in fragment.shard.boxes(fragment.start, fragment.count):
                part = values[start - fragment.start :][: torch.Size(block.shape).numel()].clone() * factor
                found.append((fragment.shard.name, fragment.shard.whole, block.offset, block.shape, part))
        torch.save(found, config.with_suffix("") / f"gradient_{len(steps)}_{os.environ['RANK']}.pt")
        steps.append(1)
        return update(self, rate, norm, factor)

    Engine.update = keep
    return main(["train", str(config)])


def whole_gradients(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The gradient of every whole weight, put together from all ranks; copies must agree."""
    whole: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"gradient_{step}_*.pt")):
        for name, size, offset, sizes, values in torch.load(path):
            target = whole.setdefault(name, torch.full(size, float("nan")))
            box = target[tuple(slice(a, a + n) for a, n in zip(offset, sizes, strict=True))]
            known = ~box.isnan()
            torch.testing.assert_close(box[known], values.view(sizes)[known], rtol=1e-4, atol=1e-6)
            box.copy_(values.view(sizes))
    assert not any(values.isnan().any() for values in whole.values()), "ranks have not all parts of a weight"
    return whole


class Result:
    """What a run computed."""

    def __init__(self, folder: Path) -> None:
        self.metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.gradients = [whole_gradients(folder, step) for step in range(3)]
        self.weights = load_weights(folder / "checkpoints")


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference over the largest value of a tensor, and the tensor."""
    assert found.keys() == wanted.keys()
    return max(
        (float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-12)), name)
        for name in wanted
    )


@pytest.fixture(scope="module")
def references():
    """What one rank computes, by model."""
    return {}


@pytest.fixture
def compute(start_ranks, tiny, tmp_path):
    """Train three steps in a layout."""

    def run(world: int, overrides: dict, name: str) -> Result:
        # AdamW divides by the size of the gradient: with a small epsilon, rounding decides where a gradient is nearly 0
        config = tiny.write(tmp_path / f"{name}.yaml", {"optimizer.epsilon": 1e-4} | overrides)
        config.with_suffix("").mkdir()
        ranks = start_ranks(world, lambda: train_and_keep_gradients(config))
        statuses = ranks.wait()
        assert statuses == [0] * world, f"statuses {statuses}\n{ranks.text()}"
        return Result(config.with_suffix(""))

    return run


def compare(compute, references, sizes: dict, language: int, encoder: int, model: dict) -> None:
    sys.stdout.write(f"PARITY_SEED={SEED}: {model}\n")
    key = json.dumps(model)
    if key not in references:
        references[key] = compute(1, model, "one")
    wanted = references[key]
    rows = random.Random(f"{sizes} {encoder}").randint(1, 3)  # the number of micro-batches must not matter
    layout = {f"parallel.{axis}": size for axis, size in sizes.items()} | {"parallel.encoder": encoder}
    found = compute(language + encoder, model | layout | {"data.micro_batch_rows": rows}, "many")
    names = [*EXACT, *(["balance_loss"] if "model.experts" in model else [])]
    for line, reference in zip(found.metrics, wanted.metrics, strict=True):
        assert line["sample_ids"] == reference["sample_ids"]
        for name in names:
            assert line[name] == pytest.approx(reference[name], rel=1e-5), name
        for name in ("expert_load_text", "expert_load_image"):
            assert line.get(name) == reference.get(name)
    for step in range(3):
        difference, name = worst(found.gradients[step], wanted.gradients[step])
        assert difference < 1e-5, f"step {step}: gradient of {name} differs by {difference}"
    difference, name = worst(found.weights, wanted.weights)
    assert difference < 1e-5, f"{name} differs by {difference} after 3 steps"


def axes(case: Case) -> set[tuple[str, object]]:
    """The size of every axis of a case."""
    kind, layout, encoder = case
    language, sizes = KINDS[kind][layout]
    ones = {"tensor": 1, "sequence": False, "pipeline": 1, "expert": 1, "expert_tensor": 1}
    replicas = language // (sizes.get("tensor", 1) * sizes.get("pipeline", 1))
    return {("model", kind), ("encoder", encoder), ("data", replicas), *(ones | sizes).items()}


def pairs(cases: Iterable[Case]) -> set[tuple]:
    """The sizes of any two axes that meet in one of the cases."""
    return {pair for case in cases for pair in combinations(sorted(axes(case), key=str), 2)}


def covering(cases: Sequence[Case]) -> list[Case]:
    """Few of the cases in which all pairs of axes still meet, and every layout is there."""
    chosen: list[Case] = []
    missing = pairs(cases)
    while missing:
        chosen.append(max(cases, key=lambda case: (len(pairs([case]) & missing), str(case))))
        missing -= pairs(chosen)
    for kind, layout in {(kind, layout): None for kind, layout, _ in cases}:
        if not any(case[:2] == (kind, layout) for case in chosen):
            used = Counter(encoder for _, _, encoder in chosen)
            chosen.append((kind, layout, min(ENCODERS, key=lambda encoder: used[encoder])))
    return chosen


ALL = [(kind, layout, encoder) for kind, layouts in KINDS.items() for layout in layouts for encoder in ENCODERS]
EVERY_DAY = covering(ALL)


def marked(cases: Sequence[Case], kind: str) -> list:
    """The cases of a kind as parameters; those that are not for every day are slow."""
    return [
        pytest.param(layout, encoder, marks=() if (kind, layout, encoder) in EVERY_DAY else pytest.mark.slow)
        for found, layout, encoder in cases
        if found == kind
    ]


def test_any_two_axes_meet_every_day():
    assert pairs(EVERY_DAY) == pairs(ALL)
    assert {case[:2] for case in EVERY_DAY} == {case[:2] for case in ALL}
    assert len(EVERY_DAY) < len(ALL) / 2


@pytest.mark.parametrize(("layout", "encoder"), marked(ALL, "llama"))
def test_a_llama_is_the_same_in_every_layout(compute, references, layout, encoder):
    language, sizes = DENSE[layout]
    compare(compute, references, sizes, language, encoder, shape(has_experts=False))


@pytest.mark.parametrize(
    ("layout", "views", "encoder"),
    [
        ("DP2", 10, 0),
        ("TP2+SP", 5, 2),
        ("PP2", 5, 2),
        ("TP2+SPxPP2", 10, 0),
        pytest.param("DP2", 10, 2, marks=pytest.mark.slow),
        pytest.param("TP2+SP", 5, 0, marks=pytest.mark.slow),
        pytest.param("PP2", 5, 0, marks=pytest.mark.slow),
        pytest.param("TP2+SPxPP2", 10, 2, marks=pytest.mark.slow),
    ],
)
def test_conversations_with_skipped_views_are_the_same_in_every_layout(
    compute, references, dialogs, layout, encoder, views
):
    """With images and without in one batch; dealt to encoders by the views that are there."""
    language, sizes = DENSE[layout]
    data = {"data.pairs_per_step": 0, "data.conversations": str(dialogs), "data.conversations_per_step": 7,
            "data.text_tokens_per_step": 150, "data.sequence_length": 400}  # fmt: skip
    vision = {"vision.views": views, "vision.padding": "corner", "vision.skip_padding_views": True}
    compare(compute, references, sizes, language, encoder, shape(has_experts=False) | data | vision)


@pytest.mark.parametrize(("layout", "encoder"), marked(ALL, "mixtral"))
def test_a_mixtral_is_the_same_in_every_layout(compute, references, layout, encoder):
    language, sizes = MIXTRAL[layout]
    compare(compute, references, sizes, language, encoder, shape(has_experts=True))
