"""Whole runs on gloo ranks: every layout against one rank, what a run writes, and what its ranks hold."""

import json
import random
import re

import pytest

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.training.optimizer import OptimizerConfig, learning_rate

EXACT = ("loss", "loss_pairs", "loss_text", "gradient_norm")

KEYS = {
    "step", "loss", "loss_pairs", "loss_text", "target_tokens_pairs", "target_tokens_text", "learning_rate",
    "gradient_norm", "step_seconds", "tokens_per_second", "exposed_encoder_seconds", "data_wait_seconds",
    "model_flops_utilization", "peak_memory_bytes",
}  # fmt: skip

# language ranks, tensor, encoder
LAYOUTS = [(2, 1, 0), (1, 1, 2), (2, 2, 1), (4, 2, 2), (3, 1, 2)]  # test_parity.py has the many


def facts_of_ranks(text: str, after: str = "") -> list[str]:
    """What the first rank said of each rank, as far as it begins so."""
    facts: dict[int, str] = {}
    for first, last, fact in re.findall(rf"^ranks? (\d+)(?:-(\d+))?: ({after}.*)$", text, re.MULTILINE):
        facts |= {rank: fact for rank in range(int(first), int(last or first) + 1) if rank not in facts}
    assert list(facts) == list(range(len(facts)))
    return list(facts.values())


def worst_difference(lines: list[dict], reference: list[dict]) -> float:
    assert [line["sample_ids"] for line in lines] == [line["sample_ids"] for line in reference]
    return max(abs(a[n] - b[n]) / abs(b[n]) for a, b in zip(lines, reference, strict=True) for n in EXACT)


def identical(lines: list[dict], reference: list[dict]) -> bool:
    """Whether all that does not depend on the clock is the same to the last bit."""
    names = ("step", "sample_ids", "learning_rate", "target_tokens_pairs", "target_tokens_text", "bad_pairs", *EXACT)
    return [[line[n] for n in names] for line in lines] == [[line[n] for n in names] for line in reference]


@pytest.fixture(scope="module")
def one_rank():
    """Metrics of one rank by overrides, each computed once."""
    return {}


def reference(train, one_rank, **overrides) -> list[dict]:
    key = json.dumps(overrides)
    if key not in one_rank:
        one_rank[key] = train(1, overrides, name=f"reference{len(one_rank)}").metrics
    return one_rank[key]


# every layout


@pytest.mark.parametrize(("language", "tensor", "encoder"), LAYOUTS, ids=lambda size: str(size))
def test_every_layout_trains_as_one_rank_does(train, one_rank, language, tensor, encoder):
    wanted = reference(train, one_rank)
    rows = random.Random(f"{language} {tensor} {encoder}").randint(1, 4)
    layout = {"parallel.tensor": tensor, "parallel.encoder": encoder, "data.micro_batch_rows": rows}
    run = train(language + encoder, layout)
    assert worst_difference(run.metrics, wanted) < 1e-5
    crossing = 6 * 17 * (96 + 96) * 2 if encoder else 0
    assert {line["feature_bytes"] for line in run.metrics} == {crossing}
    said = facts_of_ranks(run.ranks.text(0))
    assert [fact.split(",")[0] for fact in said] == ["language"] * language + ["encoder"] * encoder
    if encoder:
        assert all(fact.endswith("encoder weights 0 bytes") for fact in said[:language])
        assert all("language weights 0 bytes" in fact for fact in said[language:])
        assert f"= {crossing:,} bytes of features cross, 0 come back" in run.ranks.text(0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"training.activation_checkpointing": "full"},
        {"data.micro_batch_rows": 1},
        {"data.micro_batch_rows": 9},
        {"stage.lookahead": 1, "parallel.encoder": 1},
        {"data.workers": 5, "parallel.encoder": 1},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_what_must_not_matter_does_not(train, one_rank, overrides):
    ranks = 1 + overrides.get("parallel.encoder", 0)
    assert worst_difference(train(ranks, overrides).metrics, reference(train, one_rank)) < 1e-5


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss.text_weight": 0.25},
        {"data.isolate_documents": False},
        {"data.text_tokens_per_step": 149, "data.pairs_per_step": 5},
        {"data.pairs_per_step": 70},
    ],
    ids=str,
)
def test_settings_that_matter_do_so_in_every_layout(train, one_rank, overrides):
    wanted = reference(train, one_rank, **overrides)
    lines = train(5, overrides | {"parallel.tensor": 2, "parallel.encoder": 1}).metrics
    assert worst_difference(lines, wanted) < 1e-5
    assert worst_difference_of_loss(wanted, reference(train, one_rank)) > 1e-4


def worst_difference_of_loss(lines: list[dict], other: list[dict]) -> float:
    return max(abs(a["gradient_norm"] - b["gradient_norm"]) for a, b in zip(lines, other, strict=True))


def test_the_loss_is_one_mean_over_all_target_tokens(train, one_rank):
    for line in reference(train, one_rank, **{"loss.text_weight": 0.25}):
        pairs, text = line["target_tokens_pairs"], 0.25 * line["target_tokens_text"]
        mean = (line["loss_pairs"] * pairs + line["loss_text"] * text) / (pairs + text)
        assert line["loss"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("overrides", [{"data.text_tokens_per_step": 0}, {"data.pairs_per_step": 0}], ids=str)
def test_one_stream_alone_trains_in_every_role(train, one_rank, overrides):
    lines = train(4, overrides | {"parallel.encoder": 2}).metrics
    wanted = reference(train, one_rank, **overrides)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)
    missing = "loss_text" if "data.text_tokens_per_step" in overrides else "loss_pairs"
    assert {line[missing] for line in lines} == {None}


def test_bf16_stays_near_fp32_and_learns(train, one_rank):
    longer = {"training.steps": 25, "optimizer.warmup_steps": 2}
    exact = reference(train, one_rank, **longer)
    for layout in ({"parallel.encoder": 1}, {"parallel.tensor": 2}):
        lines = train(3 if "parallel.encoder" in layout else 2, layout | longer | {"training.precision": "bf16"},
                      name=str(len(layout) + len(str(layout)))).metrics  # fmt: skip
        assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=2e-3)
        assert lines[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.1)
        assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_uneven_work_of_replicas_is_said_with_its_remedy(train):
    uneven = {"data.row_multiple": 1, "data.micro_batch_rows": 1, "data.text_tokens_per_step": 100, "training.steps": 1}
    run = train(2, uneven)
    assert run.metrics[0]["imbalance"] > 1.05
    assert "the replicas' work is uneven: data.row_multiple=2 would divide it better" in run.ranks.text(0)
    assert "the replicas' work is uneven" not in train(2, uneven | {"data.row_multiple": 2}, name="even").ranks.text(0)
    (line,) = train(1, uneven, name="one").metrics
    assert line["imbalance"] == 1
    assert 0.5 < line["fill"] <= 1
    assert line["padding_share"] == 0


# what a run writes and holds


def test_the_run_folder_says_what_was_run(train):
    run = train(2, {"parallel.encoder": 1})
    marks = json.loads((run.folder / "encoders.json").read_text())
    assert marks == {"clip_convnext_small": "random 3", "dinov2_small": "random 3"}
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.folder / "tensorboard").iterdir())
    for number, line in enumerate(run.metrics):
        assert line["step"] == number
        assert line.keys() >= KEYS
        assert 0 < line["model_flops_utilization"] < 1
        assert line["text_tokens"] == 150


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, {}),
        (3, {"parallel.tensor": 2, "parallel.encoder": 1}),
        (4, {"parallel.pipeline": 2}),
        (4, {"parallel.pipeline": 2, "parallel.expert": 2, "model.experts": 4}),
        (4, {"parallel.expert": 2, "model.experts": 4}),
        (2, {"training.train": "projections", "parallel.expert": 2, "model.experts": 4}),
        (4, {"training.train": "language", "parallel.pipeline": 2}),
    ],
    ids=str,
)
def test_ranks_hold_what_zero2_needs(train, world, overrides):
    model = {"model.layers": 3, "model.hidden": 64, "training.precision": "bf16"}
    text = train(world, model | overrides).ranks.text(0)
    found = facts_of_ranks(text, "bytes of")
    assert len(found) == world - overrides.get("parallel.encoder", 0)
    for line in found:
        numbers = re.findall(r"(\w+) ([\d,]+) \(formula ([\d,]+)\)", line)
        assert [name for name, *_ in numbers] == ["weights", "gradients", "optimizer"]
        for name, held, formula in numbers:
            held, formula = (int(number.replace(",", "")) for number in (held, formula))
            # DeepSpeed pads each of three groups so that its partitions begin at 4 bytes
            assert formula <= held <= formula + (0 if name == "weights" else 12 * 3 * 2 * world), line


# the schedule


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine():
    config = OptimizerConfig(learning_rate=1.0, minimum_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(config, step, 15) for step in range(15)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0)
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps=-1: must be at least 0"):
        OptimizerConfig(warmup_steps=-1)
