"""Ranges: every number that a user or a file of ours gives has one, and nothing beside it or infinite is taken."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from math import inf, nan
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from megatron_sphinx import config as configuration
from megatron_sphinx.config import Config
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.sizing.hardware import Hardware
from megatron_sphinx.training.optimizer import OptimizerConfig, learning_rate
from megatron_sphinx.values import Range, build, range_of

DEMO = Path(__file__).parents[1] / "examples" / "demo.yaml"
Number = tuple[str, type, str, type, Range | None, Any]  # dotted name, class, field, int or float, range, default


def numbers_of(cls: type, path: str = "") -> Iterator[Number]:
    """Every number below a dataclass, also in the items of its lists."""
    noted, plain = get_type_hints(cls, include_extras=True), get_type_hints(cls)
    for item in fields(cls):
        name, (_, bounds) = f"{path}{item.name}", range_of(noted[item.name])
        kinds = [plain[item.name]]
        while kinds:
            kind = kinds.pop()
            if is_dataclass(kind):
                yield from numbers_of(kind, f"{name}.")
            elif kind in (int, float):
                yield name, cls, item.name, kind, bounds, item.default
            kinds += [inner for inner in get_args(kind) if isinstance(inner, type) or get_args(inner)]


NUMBERS = [*numbers_of(Config), *numbers_of(Hardware)]
IDS = [number[0] for number in NUMBERS]


def test_there_are_numbers_to_walk():
    assert len(NUMBERS) > 55
    assert {"run.seed", "data.text.weight", "parallel.pipeline_layers", "shares.usable"} <= set(IDS)


@pytest.mark.parametrize("number", NUMBERS, ids=IDS)
def test_every_number_has_a_range_that_its_default_is_in(number):
    _, _, _, _, bounds, default = number
    assert bounds is not None
    assert max(bounds.least, bounds.above) > -inf
    assert min(bounds.most, bounds.below) < inf
    for value in default if isinstance(default, tuple) else [default]:
        assert not isinstance(value, int | float) or not bounds.fault(value)


@pytest.mark.parametrize("number", NUMBERS, ids=IDS)
def test_no_number_beside_its_range_is_taken(number):
    _, cls, name, kind, bounds, _ = number
    step = 1 if kind is int else 1e-9
    low, high = (max(bounds.least, bounds.above), min(bounds.most, bounds.below))
    beside = [low - step, high * 1.01 + step, -(2**70), 2**1100] + [low] * (bounds.above > -inf)
    beside += [high] * (bounds.below < inf)
    never = [(value, "must be a finite number") for value in (nan, inf, -inf, "nan", "inf")] if kind is float else []
    lists = str(get_type_hints(cls)[name]).count("tuple[")
    for value, message in [(kind(v) if abs(v) < 2**64 else v, "must be ") for v in beside] + never:
        given: Any = value
        for _ in range(lists):
            given = [given]
        needed = {item.name: None for item in fields(cls) if item.default is MISSING} | {name: given}
        with pytest.raises(ConfigError, match=rf"x\.{name}(\.0)*=.*{message}"):
            build(cls, _only(cls, needed, name), "x.")


def _only(cls: type, values: dict[str, Any], name: str) -> dict[str, Any]:
    """The values with the one that is looked at first, so that none of the others is refused before it."""
    return {name: values[name]} | {other: value for other, value in values.items() if other != name}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.print_interval=0", r"run\.print_interval=0: must be at least 1; a line is printed every so many steps"),
        ("run.seed=1180591620717411303424", r"run\.seed=1180591620717411303424: must be at most 1,000,000,000,"),
        ("run.timeout=inf", r"run\.timeout=inf: must be a finite number, at least 3 and at most 2,592,000; ranks"),
        ("optimizer.beta1=2", r"optimizer\.beta1=2\.0: must be below 1; a running mean that keeps all"),
        ("optimizer.epsilon=-1", r"optimizer\.epsilon=-1\.0: must be above 0; it keeps a weight without a gradient"),
        ("optimizer.learning_rate=inf", r"optimizer\.learning_rate=inf: must be a finite number, at least 0"),
        ("optimizer.gradient_clip=nan", r"optimizer\.gradient_clip=nan: must be a finite number"),
        ("optimizer.warmup_steps=111", r"optimizer\.warmup_steps=111: training\.steps=110 end before it, so that the "
                                       r"rate never reaches optimizer\.learning_rate; use fewer, or null"),
        ("optimizer.minimum_learning_rate=1", r"minimum_learning_rate=1\.0: is above optimizer\.learning_rate=0\.002; "
                                              r"give less, or null for a tenth of it"),
        ("model.init_std=-1", r"model\.init_std=-1\.0: must be above 0"),
        ("model.rope_theta=0", r"model\.rope_theta=0\.0: must be at least 1"),
        ("model.norm_epsilon=0", r"model\.norm_epsilon=0\.0: must be above 0"),
        ("model.vocabulary=0", r"model\.vocabulary=0: must be at least 1"),
        ("model.layers=1000000000", r"model\.layers=1000000000: must be at most 10,000"),
        ("data.max_bad_share=-0.1", r"data\.max_bad_share=-0\.1: must be between 0 and 1; it is a share"),
        ("divergence.sigma=.nan", r"divergence\.sigma=nan: must be a finite number"),
        ("training.steps=100000000", r"training\.steps=100000000: must be at most 99,999,999; checkpoints are named"),
        ("run.folder=''", r"run\.folder='': all that a run writes would lie among what is there; name a folder of its"),
        ("run.folder=./", r"run\.folder='\./': all that a run writes"),
        ("run.folder=runs/..", r"run\.folder='runs/\.\.': all that a run writes"),
        ("run.folder=/", r"run\.folder='/': all that a run writes"),
        ("run.folder=", r"run\.folder=null: must be text"),
        ("run.folder=7", r"run\.folder=7: must be text; put it in quotes"),
        (r'data.tokenizer="a\0b"', r"data\.tokenizer=a\\u0000b: holds the character U\+0000; remove it"),
        ("training.steps=010", r"training\.steps=010: must be a whole number"),
        ("optimizer.lr=1", r"optimizer\.lr: unknown key; did you mean optimizer\.learning_rate\?"),
        ("training.lr=1", r"training\.lr: unknown key; did you mean optimizer\.learning_rate\?"),
        ("lr=1", r"lr: unknown key; did you mean optimizer\.learning_rate\?"),
        ("data.batch_size=1", r"data\.batch_size: unknown key; did you mean data\.pairs_per_step\?"),
        ("model.hidden_size=1", r"model\.hidden_size: unknown key; did you mean model\.hidden\?"),
        ("training.seed=1", r"training\.seed: unknown key; did you mean run\.seed\?"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_told_with_the_reason(override, message):
    with pytest.raises(ConfigError, match=message) as raised:
        configuration.load(DEMO, [override])
    assert "\n" not in str(raised.value)


def test_names_of_other_programs_lead_to_keys_that_exist():
    from megatron_sphinx.config_names import _OURS, keys_below

    known = set(keys_below(Config))
    assert set(_OURS.values()) <= known
    assert not set(_OURS) & {key.partition(".")[2] for key in known}, "a key of ours has its own meaning"


def test_the_warm_up_is_a_share_of_the_steps_and_the_minimum_one_of_the_rate():
    of_twelve = configuration.load(
        DEMO, ["training.steps=12", "optimizer.learning_rate=1e-4", "optimizer.warmup_steps=null"]
    )
    taken = of_twelve.with_epochs_in_steps(0).optimizer
    assert (taken.warmup_steps, taken.minimum_learning_rate) == (1, pytest.approx(1e-5))
    rates = [learning_rate(of_twelve.optimizer, step, 12) for step in range(12)]
    assert max(rates) == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-5)
    assert rates == [learning_rate(taken, step, 12) for step in range(12)]
    assert [OptimizerConfig().warmup_of(steps) for steps in (1, 100, 40_000, 180_000)] == [0, 5, 2000, 2000]
    given = configuration.load(DEMO, ["optimizer.warmup_steps=7", "optimizer.minimum_learning_rate=0"])
    assert given.with_epochs_in_steps(0).optimizer == given.optimizer


def test_a_warm_up_in_passes_that_the_run_never_leaves_is_refused():
    config = configuration.load(DEMO, ["optimizer.warmup_epochs=9", "optimizer.warmup_steps=0"])
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps=188: training\.steps=110 end before it"):
        config.with_epochs_in_steps(1000)


def test_groups_are_as_many_as_heads_where_none_are_given(tmp_path):
    values = yaml.safe_load(DEMO.read_text())
    del values["model"]["groups"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    config = configuration.load(tmp_path / "run.yaml")
    assert config.model.groups == config.model.heads == 4
    assert yaml.safe_load(config.to_yaml())["model"]["groups"] == 4


@pytest.mark.parametrize("words", [["--training.steps=5"], ["--training.steps", "5"]], ids=str)
def test_a_key_with_dashes_is_told_without(words, capsys):
    from megatron_sphinx.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["config", str(DEMO), *words])
    assert ended.value.code == 2
    assert "; a key is given without dashes: training.steps=5\n" in capsys.readouterr().err
