"""Scores of regions, of yes and no, of reviews: frames, slips and sums of the official scorers, by their quirks."""

import math
import random

import numpy as np
import pytest
from answered import answered, judge, verdict

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.metrics.boxes import BOX_ACCURACY, POINT_ACCURACY, accessory_box, overlap
from megatron_sphinx.evaluation.metrics.captions import CIDER, cider
from megatron_sphinx.evaluation.metrics.reviews import LLAVA_BENCH, MM_VET, read_llava_review, read_mm_vet_review
from megatron_sphinx.evaluation.metrics.yes_no import COGNITION, HALLUSION_BENCH, MME, PERCEPTION, POPE
from megatron_sphinx.evaluation.samples import Judged, Protocol
from megatron_sphinx.prepare.boxes import format_box

PAPER, OFFICIAL, ACCESSORY = Protocol
WIDE = {"width": 200, "height": 100, "box": (20.0, 10.0, 120.0, 60.0)}


@pytest.mark.parametrize("padding", ["centre", "corner"])
def test_a_box_is_judged_in_the_frame_of_its_models_padding(padding):
    text = format_box(WIDE["box"], 200, 100, padding)
    other = format_box(WIDE["box"], 200, 100, "corner" if padding == "centre" else "centre")
    assert verdict(BOX_ACCURACY, f"it is [no box] at {text}", padding=padding, **WIDE)[0] == 1
    assert verdict(BOX_ACCURACY, other, padding=padding, **WIDE)[0] == 0


def test_accessory_has_the_centre_for_its_frame_whatever_the_padding():
    text = format_box(WIDE["box"], 200, 100, "centre")
    for padding in ("centre", "corner"):
        assert verdict(BOX_ACCURACY, text, padding=padding, protocol=ACCESSORY, **WIDE)[0] == 1
    assert verdict(BOX_ACCURACY, f"[a] {text}", protocol=ACCESSORY, **WIDE) == (0, None)  # only the first pair counts


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2,0.3,0.4] [1,1,1,1]", (0.1, 0.2, 0.3, 0.4)),
        ("0.1,0.2,0.3,0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1,0.2,0.3,0.4;0,0,1,1]", None),
        ("[0.1,0.2,0.3]", None),
        ("none", None),
    ],
)
def test_what_accessory_reads_as_a_box(text, box):
    assert accessory_box(text) == box


@pytest.mark.parametrize("protocol", Protocol)
def test_half_an_overlap_is_enough(protocol):
    square = {"width": 100, "height": 100, "box": (0.0, 0.0, 50.0, 100.0)}
    assert verdict(BOX_ACCURACY, "[0.00,0.00,1.00,1.00]", protocol=protocol, **square)[0] == 1
    assert verdict(BOX_ACCURACY, "[0.00,0.00,1.00,0.99]", protocol=protocol, **square)[0] == 0
    for text in ("", "[0.5,0.5]", "[0.50,0.50,0.50,0.50]"):
        assert verdict(BOX_ACCURACY, text, protocol=protocol, **square)[0] == 0
    assert verdict(BOX_ACCURACY, "[0,0,1e999,1]", **square) == (0, None)


def test_accessorys_overlap_is_that_of_single_precision_written_out():
    chance = random.Random(41)
    for _ in range(200):
        width, height = chance.randint(40, 640), chance.randint(40, 640)
        left, top = chance.uniform(0, width / 2), chance.uniform(0, height / 2)
        truth = (left, top, chance.uniform(left + 1, width), chance.uniform(top + 1, height))
        said = [round(chance.random(), 2) for _ in range(4)]
        shift = (max(height - width, 0) // 2, max(width - height, 0) // 2) * 2
        right = np.array([a + b for a, b in zip(truth, shift, strict=True)], np.float32)
        mine = np.array(said, np.float32) * np.float32(max(width, height))
        inner = np.maximum(np.minimum(mine[2:], right[2:]) - np.maximum(mine[:2], right[:2]), 0)
        areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (mine, right)]
        is_right = inner.prod() / (sum(areas) - inner.prod()) >= 0.5
        text = "[" + ",".join(map(str, said)) + "]"
        found = verdict(BOX_ACCURACY, text, width=width, height=height, box=truth, protocol=ACCESSORY)
        assert found[0] == is_right


def test_a_sample_without_a_box_is_refused():
    with pytest.raises(DataError, match=r"sample 3: has no box, or no picture .*; check the benchmark's files"):
        verdict(BOX_ACCURACY, "[0,0,1,1]", number=3, width=10, height=10)
    with pytest.raises(DataError, match="sample 0: has no box, or no picture"):
        verdict(POINT_ACCURACY, "[0,0]", box=(0.0, 0.0, 1.0, 1.0))


def test_overlap_of_boxes_without_area_is_none():
    assert overlap((1, 1, 1, 1), (1, 1, 1, 1)) == 0
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "padding", "is_right"),
    [
        ("click [0.30,0.40]", "centre", True),
        ("[0.10,0.30,0.60,0.55]", "centre", True),  # the middle of a box
        ("[0.10,0.30]", "centre", True),  # on the edge
        ("[0.30,0.40]", "corner", False),
        ("[0.30,0.20]", "corner", True),
        ("[0.30,0.90]", "centre", False),
        ("nowhere", "centre", False),
    ],
)
def test_a_point_has_to_be_in_the_box(text, padding, is_right):
    assert verdict(POINT_ACCURACY, text, padding=padding, **WIDE)[0] == is_right


@pytest.mark.parametrize(
    ("text", "read"),
    [("No, it is", "no"), ("it is not", "no"), ("Yes. No", "yes"), ("NO", "yes"), ("none", "yes"), ("no\n", "yes"),
     ("", "yes")],
)  # fmt: skip
def test_pope_reads_no_from_three_words_of_the_first_sentence(text, read):
    assert verdict(POPE, text, "no") == (float(read == "no"), read)


def test_pope_by_split_and_its_mean_with_the_share_of_yes_that_was_said():
    asked = [("yes", "yes", "random"), ("yes", "no", "random"), ("no", "yes", "popular"), ("no", "no", "popular")]
    found = judge(POPE, [answered(text, right, categories={"split": part}) for text, right, part in asked])
    figures = POPE.figures(found)
    assert list(figures)[:5] == ["accuracy", "precision", "recall", "F1", "yes ratio"]
    assert figures["yes ratio random"] == 100
    assert figures["yes ratio popular"] == 0
    assert figures["F1 random"] == pytest.approx(200 / 3)
    assert figures["F1 popular"] == 0
    assert figures["F1"] == pytest.approx(100 / 3)
    assert figures["recall random"] == figures["precision random"] * 2 == 100
    alone = POPE.figures(judge(POPE, [answered("yes", "yes"), answered("no", "no"), answered("no", "yes")]))
    assert alone == pytest.approx(
        {"accuracy": 200 / 3, "precision": 100, "recall": 50, "F1": 200 / 3, "yes ratio": 100 / 3}
    )


@pytest.mark.parametrize(
    ("text", "read"),
    [("Yes", "yes"), ("YES!", "yes"), ("a no", "no"), ("noyes", "no"), ("well, yes", None), ("", None), ("  no", "no"),
     ("yeno", "no"), ("now", "no")],
)  # fmt: skip
def test_mme_reads_the_first_four_characters(text, read):
    assert verdict(MME, text, "yes") == (float(read == "yes"), read)


def test_mme_adds_accuracy_and_that_of_pictures_with_both_right():
    def task(name, *texts):
        return [answered(text, "Yes" if n % 2 else "No", number=f"{name}{n}", picture_id=f"{name}{n // 2}",
                         categories={"task": name}) for n, text in enumerate(texts)]  # fmt: skip

    answers = (
        task("existence", "No", "Yes", "Yes", "Yes") + task("OCR", "No", "Yes") + task("code_reasoning", "x", "Yes")
    )
    figures = MME.figures(judge(MME, answers))
    assert figures == pytest.approx(
        {"perception": 325, "cognition": 50, "existence": 125, "OCR": 200, "code_reasoning": 50}
    )
    assert (len(PERCEPTION), len(COGNITION)) == (10, 4)
    every = [one for name in (*PERCEPTION, *COGNITION) for one in task(name, "No", "Yes")]
    assert list(MME.figures(judge(MME, every)).items())[:2] == [("perception", 2000), ("cognition", 800)]


def of_hallusion(text, question, figure, category="VD"):
    """An answer to a question of HallusionBench, which is yes."""
    record = {"category": category, "subcategory": "math", "set_id": 0, "question_id": question, "figure_id": figure}
    return answered(text, "yes", number=f"{category}{question}{figure}", record=record)


def test_hallusion_bench_by_question_figure_answer_and_difficulty():
    one = of_hallusion
    asked = [one("Yes.", 0, 0), one("yes", 0, 1), one("yes and no", 1, 0), one("yes", 1, "1")]
    found = judge(HALLUSION_BENCH, asked)
    assert [answer.verdict.parsed for answer in found] == ["yes", "yes", None, "yes"]
    assert HALLUSION_BENCH.figures(found) == {"aAcc": 75, "qAcc": 50, "fAcc": 50, "easy": 50, "hard": 100}
    assert math.isnan(HALLUSION_BENCH.figures(found[:1])["hard"])


def test_questions_of_hallusion_bench_without_a_figure_are_of_no_figure_and_easy():
    one = of_hallusion
    asked = [one("yes", 0, "0"), one("no", 0, "1"), one("no", 0, "0", "VS"), one("yes", 0, "1", "VS")]
    figures = HALLUSION_BENCH.figures(judge(HALLUSION_BENCH, asked))
    assert figures == pytest.approx({"aAcc": 50, "qAcc": 0, "fAcc": 200 / 3, "easy": 50, "hard": 50})


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("I don't know.", "uncertain"),
        ("It cannot be determined from the question.", "uncertain"),
        ("Uncertain", "uncertain"),
        ("No, I am not sure", "no"),
        ("maybe so", None),
        ("", None),
    ],
)
def test_who_does_not_know_is_right_only_where_there_is_no_figure(text, parsed):
    asked = [of_hallusion(text, 0, "0", "VS"), of_hallusion(text, 0, "1", "VS"), of_hallusion(text, 0, "0", "VD")]
    verdicts = [one.verdict for one in judge(HALLUSION_BENCH, asked)]
    assert [(one.value, one.parsed) for one in verdicts] == [(float(parsed == "uncertain"), parsed), *[(0, parsed)] * 2]


@pytest.mark.parametrize(
    ("review", "score"), [("0.5", 0.5), (" 1.0 as it is right", 1), ("1.5", None), ("good", None), ("", None)]
)
def test_reviews_of_mm_vet(review, score):
    found = read_mm_vet_review(review)
    assert (found.value, found.parsed is None) == (score or 0, score is None)


@pytest.mark.parametrize(
    ("review", "read"),
    [("8 6.5\nbecause", "8 6.5"), ("8, 10", "8 10"), ("8", None), ("8 11", None), ("0 5", None), ("nan 5", None)],
)
def test_reviews_of_llava_bench(review, read):
    assert read_llava_review(review).parsed == read


def test_mm_vet_by_capability_and_combination():
    scores = [("ocr", "1"), ("ocr,math", "0.5"), ("math", "0"), ("ocr,math", "x")]
    found = [
        Judged(answered("", number=n, categories={"capability": names}), read_mm_vet_review(text))
        for n, (names, text) in enumerate(scores)
    ]
    assert MM_VET.figures(found) == pytest.approx({"total": 37.5, "math": 50 / 3, "ocr": 50, "ocr,math": 25})


def test_llava_bench_is_the_ratio_of_means_not_the_mean_of_ratios():
    found = [
        Judged(answered("", categories={"category": part}), read_llava_review(text))
        for part, text in (("conv", "10 5"), ("conv", "5 5"), ("detail", "?"))
    ]
    figures = LLAVA_BENCH.figures(found)
    assert figures["relative score"] == figures["conv"] == pytest.approx(1000 / 15)
    assert math.isnan(figures["detail"])


@pytest.mark.parametrize("metric", [MM_VET, LLAVA_BENCH])
def test_without_a_review_nothing_is_read(metric):
    assert verdict(metric, "a long answer") == (0, None)


def test_cider_of_the_only_caption_and_of_an_empty_one():
    assert cider(["a cat"], [["a cat"]]) == [0]  # of one picture all words are as frequent as pictures
    scores = cider(
        ["a black cat sits here", "", "a dog"], [["a black cat sits here"], ["two men"], ["one dog", "a dog"]]
    )
    assert scores[0] == pytest.approx(10)
    assert scores[1] == 0
    assert 0 < scores[2] < 10
    assert verdict(CIDER, " ", "a cat") == (0, None)
