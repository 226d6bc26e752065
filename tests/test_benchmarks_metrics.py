"""Each benchmark's metric judges its own samples: right answers get all points, wrong ones none, by every protocol."""

import math
from pathlib import Path
from random import Random

import pytest
from official_layouts import LAYOUTS

from megatron_sphinx.evaluation.benchmarks.registry import named, names
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Sample
from megatron_sphinx.prepare.boxes import format_box

SIDE = 80  # of pictures, in pixels
MOST = {"mme": 2000.0, "vqav2_val": 30.0, "okvqa": 30.0, "vizwiz_val": 30.0, "textvqa": 30.0}
OPEN_ENDED = ("flickr30k", "nocaps", "visualmrc")  # CIDEr has no largest value


def right(sample: Sample) -> str:
    """A right answer."""
    return f"[{format_box(sample.box, SIDE, SIDE, 'centre').strip('[]')}]" if sample.box else sample.answers[0]


def headline(name: str, samples: list[Sample], texts: list[str], protocol: Protocol) -> float:
    """The figure that tables have."""
    benchmark = named(name)
    answered = [Answered(sample=sample, text=text, width=SIDE, height=SIDE)
                for sample, text in zip(samples, texts, strict=True)]  # fmt: skip
    verdicts = benchmark.metric.judge(answered, protocol)
    judged = [Judged(one, verdict) for one, verdict in zip(answered, verdicts, strict=True)]
    figures = benchmark.metric.figures(judged)
    return figures[benchmark.figure or next(iter(figures))]


def samples_of(name: str, tmp_path: Path) -> list[Sample]:
    """The samples of a benchmark's layout."""
    LAYOUTS[name](named(name).folder_in(tmp_path), Random(name))
    return list(named(name).samples(tmp_path))


@pytest.mark.parametrize("name", [name for name in names() if not named(name).is_judged])
def test_right_answers_get_all_points_and_wrong_ones_none(name, tmp_path):
    samples = samples_of(name, tmp_path)
    if not all(sample.answers or sample.box for sample in samples):
        assert named(name).submission
        return
    for protocol in Protocol:
        best = headline(name, samples, [right(sample) for sample in samples], protocol)
        worst = headline(name, samples, ["zebra crossing" for _ in samples], protocol)
        assert math.isfinite(best)
        assert best > 100 if name in OPEN_ENDED else best == pytest.approx(MOST.get(name, 100.0)), protocol
        assert worst < best


@pytest.mark.parametrize("name", [name for name in names() if named(name).figure])
def test_the_figure_of_a_table_is_one_of_the_metric(name, tmp_path):
    samples = samples_of(name, tmp_path)
    assert headline(name, samples, ["yes"] * len(samples), Protocol.PAPER) >= 0
