"""Scores beside those that official scorers gave the same made-up answers; `record_scores` says how they were made."""

import gzip
import json
from pathlib import Path

import made_up_answers as made_up
import pytest

from megatron_sphinx.evaluation.metrics.captions import CIDER, cider
from megatron_sphinx.evaluation.metrics.mathvista import settle
from megatron_sphinx.evaluation.metrics.mmmu import MMMU, read_choice
from megatron_sphinx.evaluation.metrics.options import read_letter
from megatron_sphinx.evaluation.metrics.relaxed import RELAXED_ACCURACY
from megatron_sphinx.evaluation.metrics.text_distance import ANLS
from megatron_sphinx.evaluation.metrics.vqa_soft import VQA_SOFT, VQA_SOFT_EVALAI
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Sample

RECORDED = json.loads(gzip.decompress((Path(__file__).parent / "data/scores/official.json.gz").read_bytes()))


def values(metric, asked):
    """The values of verdicts of answers with their truths, by the official protocol."""
    answers = [
        Answered(
            sample=Sample(id=str(place), picture=None, picture_id="", fields={}, answers=tuple(truths)), text=answer
        )
        for place, (answer, truths) in enumerate(asked)
    ]
    return [verdict.value for verdict in metric.judge(answers, Protocol.OFFICIAL)]


def test_the_recorded_scores_are_those_of_these_answers():
    assert made_up.digest(made_up.everything()) == RECORDED["digest"]


@pytest.mark.parametrize(
    ("metric", "name", "asked"),
    [
        (VQA_SOFT, "vqa", made_up.questions(1)),
        (VQA_SOFT_EVALAI, "evalai", made_up.questions(1)),
        (ANLS, "anls", made_up.questions(2)),
        (RELAXED_ACCURACY, "relaxed", [(answer, [target]) for answer, target in made_up.numbers(3)]),
        (MMMU, "mmmu_open", [(answer, truths[:2]) for answer, truths in made_up.questions(5) if answer.strip()]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_are_the_official_ones(metric, name, asked):
    official = RECORDED[name]
    if name == "mmmu_open":  # an answer without a word is not read here; there it is part of nothing, or of a space
        official = [value for value, (answer, _) in zip(official, made_up.questions(5), strict=True) if answer.strip()]
    assert len(official) > 900
    assert 0.05 < sum(official) / len(official) < 0.95
    assert values(metric, asked) == pytest.approx(official, abs=1e-6)


@pytest.mark.parametrize(
    ("read", "name", "seed"), [(read_choice, "mmmu", 4), (read_letter, "letters", 8)], ids=["mmmu", "vlmevalkit"]
)
def test_letters_are_the_official_ones(read, name, seed):
    asked = made_up.choices(seed)
    assert [read(answer, options) for answer, options in asked] == RECORDED[name]
    assert 0.05 < RECORDED[name].count(None) / len(asked) < 0.9


def test_mathvista_settles_answers_as_its_scorer():
    ours = [
        settle(answer, question_type, answer_type, options, decimals)
        for answer, options, question_type, answer_type, decimals in made_up.typed_questions(6)
    ]
    assert ours == RECORDED["mathvista"]


def test_cider_is_that_of_the_java_tokenizer_and_the_official_scorer():
    captions, references = made_up.captions(9)
    assert cider(captions, references) == pytest.approx(RECORDED["cider"], abs=1e-6)
    answers = [
        Answered(
            sample=Sample(id=str(place), picture=None, picture_id="", fields={}, answers=tuple(texts)), text=caption
        )
        for place, (caption, texts) in enumerate(zip(captions, references, strict=True))
    ]
    verdicts = CIDER.judge(answers, Protocol.PAPER)
    figure = CIDER.figures([Judged(one, verdict) for one, verdict in zip(answers, verdicts, strict=True)])["CIDEr"]
    assert figure == pytest.approx(100 * sum(RECORDED["cider"]) / len(captions), abs=1e-6)
