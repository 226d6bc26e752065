"""Letters of options and their groups by the rules of VLMEvalKit, LLaVA, Accessory and MMMU; MathVista; quirks."""

import made_up_answers as made_up
import pytest
from answered import answered, judge, verdict

from megatron_sphinx.evaluation.metrics.cmmmu import CMMMU
from megatron_sphinx.evaluation.metrics.mathverse import MATH_VERSE
from megatron_sphinx.evaluation.metrics.mathvista import MATH_VISTA, extract
from megatron_sphinx.evaluation.metrics.mmmu import MMMU, read_values
from megatron_sphinx.evaluation.metrics.options import (
    CIRCULAR,
    OPTION_LETTER,
    PAIRS,
    SCIENCE_LETTER,
    VIDEO_PARTS,
    read_letter,
    read_pair_letter,
    read_science_letter,
)
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Sample, Verdict

FOUR = ("cat", "dog", "cow", "red panda")
PAPER, OFFICIAL, ACCESSORY = Protocol


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("B. dog", "B"),
        ("b", None),
        ("A or B", None),
        ("B is what I see in the middle of it", None),  # not among the last four words
        ("in the middle I see B", "B"),
        ("The correct answer is **b** as far as one can see here", "B"),
        ("it is a dog", "B"),  # by the text of the only option in it
        ("it is a dog or a cat", None),
        ("a dog " * 9, None),  # much longer than the options
        ("E", None),
        ("Cannot determine the answer: B", None),
        ("Z", None),
        ("Failed to obtain answer via API. B", None),
        ("", None),
    ],
)
def test_letters_by_vlmevalkits_rules(text, letter):
    assert read_letter(text, FOUR) == letter
    assert verdict(OPTION_LETTER, text, "B", choices=FOUR) == (float(letter == "B"), letter)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. dog", "B"),
        ("B.", None),
        (" B", None),
        ("The answer is B.", "B"),
        ("The answer is B. The answer is B.", None),  # exactly one
        ("The answer is E.", None),  # four options
        ("E", None),
        ("The answer is B", None),
        ("", None),
        ("AB", None),
    ],
)
def test_letters_of_scienceqa_by_llavas_rules(text, letter):
    assert read_science_letter(text, FOUR) == letter
    assert verdict(SCIENCE_LETTER, text, "B", choices=FOUR, protocol=OFFICIAL) == (float(letter == "B"), letter)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B.", "B"),
        (" B.", "B"),
        ("B", "B"),
        (" B", "B"),
        ("(B).", "B"),
        ("B. dog", "B"),
        ("B: dog", "B"),
        ("B dog", "B"),
        (" The answer is B.", "B"),
        ("A cat is not an animal", None),  # the article
        ("Bison", None),
        ("E.", None),  # four options
        ("a dog", None),
        ("", None),
    ],
)
def test_letters_of_scienceqa_go_on_from_what_the_answer_is_made_to_begin_with(text, letter):
    assert verdict(SCIENCE_LETTER, text, "B", choices=FOUR, protocol=PAPER) == (float(letter == "B"), letter)


@pytest.mark.parametrize("metric", [OPTION_LETTER, SCIENCE_LETTER, CIRCULAR, PAIRS])
def test_accessory_reads_what_stands_before_the_period_and_never_draws(metric):
    assert verdict(metric, "B. A", "B", choices=FOUR, protocol=ACCESSORY) == (1, "B")
    assert verdict(metric, "E", "B", choices=FOUR, protocol=ACCESSORY) == (0, "E")
    for _ in range(20):  # there a letter is drawn by chance
        assert verdict(metric, " B", "B", choices=FOUR, protocol=ACCESSORY) == (0, None)
    assert verdict(metric, "f", "F", choices=FOUR, protocol=ACCESSORY) == (1, "f")


def test_letters_of_made_up_answers_are_options_or_nothing():
    for text, options in made_up.choices(31, 300):
        letters = "ABCDE"[: len(options)]
        for read in (read_letter, read_science_letter, read_pair_letter):
            letter = read(text, options)
            assert letter is None or letter in letters


@pytest.mark.parametrize(
    ("text", "letter"),
    [("(a)", "A"), ("b.", "B"), ("(b) open", "B"), ("(a) or (b)", None), ("A", "A"), ("a cat", None)],
)
def test_letters_of_mmvp_may_be_small(text, letter):
    assert read_pair_letter(text, ("Open", "Closed")) == letter


def rotations(*texts, group="g"):
    """Answers to the rotations of a question, of which the right one is A."""
    return [answered(text, "A", choices=FOUR, number=f"{group}{n}", group=group) for n, text in enumerate(texts)]


def test_a_question_counts_where_all_rotations_are_right():
    found = judge(CIRCULAR, rotations("A", "A") + rotations("A", "B", "A", "A", group="h"))
    assert CIRCULAR.figures(found) == pytest.approx({"circular accuracy": 50, "accuracy": 500 / 6})


def test_a_question_drawn_twice_counts_twice():
    right, wrong = judge(CIRCULAR, rotations("A", "A")), judge(CIRCULAR, rotations("A", "B", "B", group="h"))
    assert CIRCULAR.figures(right + wrong + right)["circular accuracy"] == pytest.approx(200 / 3)
    assert PAIRS.figures(right + wrong + right)["pair accuracy"] == pytest.approx(200 / 3)


def test_a_question_without_a_group_is_its_own():
    found = judge(CIRCULAR, [answered(text, "A", choices=FOUR, number=n) for n, text in enumerate("AB")])
    assert CIRCULAR.figures(found) == {"circular accuracy": 50, "accuracy": 50}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(A) or (C)", "C"),  # the one that stands last
        ("it is C.x B.x", "B"),  # places are looked for with spaces around: of letters with periods the first option
        ("A cat it is", "A"),
        ("what one can see is the dog, I believe", "B"),  # an answer of more than five words by its text
        ("the dog", None),
        ("", None),
    ],
)
def test_letters_of_mmmu_by_its_rules_and_never_by_chance(text, letter):
    assert verdict(MMMU, text, "B", choices=FOUR) == (float(letter == "B"), letter)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B:60°", "B"),
        ("B: 60° where A is", "B"),
        ("b:60°", None),
        ("it is C:40°", "C"),
        ("选择 C\uff1a40°", "C"),
        ("(B)", "B"),
        ("B", "B"),
        ("E:3", None),
        ("the angle that is looked for is 60°", "B"),
        ("a long answer with no letter, as one sees", None),  # A and C are choices without a text
        ("", None),
    ],
)
def test_letters_of_mathverse_may_have_a_colon(text, letter):
    assert verdict(MATH_VERSE, text, "B", choices=("A", "60°", "C", "no correct")) == (float(letter == "B"), letter)


def test_open_answers_of_mathverse_are_read_as_those_of_mmmu():
    assert verdict(MATH_VERSE, "So x = 2.5", "2.5") == (1, "2.5")
    assert verdict(MATH_VERSE, " ", "2.5") == (0, None)


def test_open_answers_of_mmmu():
    assert verdict(MMMU, "So the total is 1,250.004", "1250")[0] == 1
    assert verdict(MMMU, "x = 5", "5")[0] == 1
    assert verdict(MMMU, "a cable", "b")[0] == 0  # a single letter has to be a word of its own
    assert verdict(MMMU, "it is vitamin b complex", "b")[0] == 1
    assert verdict(MMMU, "The red one", "blue", "RED")[0] == 1
    assert verdict(MMMU, " \n", "5") == (0, None)
    assert 4.0 in read_values("First is 3. Second is 4")


def test_sentences_of_mmmu_are_never_parted_at_periods():
    assert 3.0 not in read_values("it is 3. Then answer 4")


@pytest.mark.parametrize(
    ("text", "truth", "parsed"),
    [
        ("答案是B。", "B", "B"),
        ("B", "B", "B"),
        ("AB", "AB", "AB"),
        ("(B) 和 (A)", "AB", "AB"),
        ("A, B, 还是 B", "B", "B"),  # the most frequent
        ("(C) 不是 A A", "C", "C"),  # parentheses come first
        ("我选乙", "B", "B"),
        ("不知道", "B", None),
        ("", "B", None),
    ],
)
def test_letters_of_cmmmu_may_be_several(text, truth, parsed):
    found = verdict(CMMMU, text, truth, choices=("甲", "乙", "丙", "丁"), record={"type": "选择"})
    assert found == (float(parsed == truth), parsed)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("错误", "错"),
        ("不对", "错"),
        ("错。", "错"),
        ("这个说法不正确。", "错"),
        ("对", "对"),
        ("所以答案是正确的。", "对"),
        ("对的，没有错误", "对"),
        ("陈述是对的。答案是错。", None),  # as much for as against
        ("是否正确", None),
        ("图中有一只猫", None),
        ("", None),
    ],
)
def test_judgements_of_cmmmu_are_never_drawn(text, parsed):
    for truth in "对错":
        assert verdict(CMMMU, text, truth, record={"type": "判断"}) == (float(parsed == truth), parsed)


@pytest.mark.parametrize("text", ["不对", "不正确。", "答案是不准确"])
def test_the_authors_of_cmmmu_find_affirmation_in_a_denial(text):
    for protocol, parsed in ((PAPER, "错"), (ACCESSORY, "错"), (OFFICIAL, "对")):
        assert verdict(CMMMU, text, "错", protocol=protocol, record={"type": "判断"}) == (float(parsed == "错"), parsed)


@pytest.mark.parametrize(
    ("text", "truth", "is_right"),
    [
        ("400J", "400", True),
        ("答案是400。", "400", True),
        ("由图可知。\n因此等于 1250.004 元", "1250", True),
        ("x = 5", "5", True),
        ("x = 5。然后不知道", "5", True),  # a number anywhere where no sentence has a mark
        ("等于1,250", "1250", True),
        ("等于 1,250 元", "1250", False),  # only a number by itself may have commas
        ("五四运动是1919年", "五四运动", False),  # what stands behind the mark
        ("它叫五四运动", "五四运动", True),
        ("五四" + "很长" * 20, "五四", False),
        ("as far as I can tell", "五四", False),
        (" \n", "5", False),
    ],
)
def test_blanks_of_cmmmu(text, truth, is_right):
    assert verdict(CMMMU, text, truth, record={"type": "填空"})[0] == is_right


def test_blanks_of_cmmmu_that_are_much_longer_than_the_truth_are_unparsed():
    assert verdict(CMMMU, "as far as I can tell", "五四", record={"type": "填空"}) == (0, None)
    assert verdict(CMMMU, " \n", "5", record={"type": "填空"}) == (0, None)


@pytest.mark.parametrize(
    ("kind", "text", "truth", "is_right"),
    [
        ("integer", "14", "14", True),
        ("integer", "The number missing in the sequence is 14.", "14", True),
        ("integer", "14.7", "14", True),  # cut, as its scorer does
        ("integer", "none that I see", "0", False),
        ("float", "0.61", "0.6", True),  # rounded to the precision
        ("float", "about 0.66 of it", "0.6", False),
        ("float", "1e999", "0.6", False),
        ("list", "They are [2007, 2008].", "[2007, 2008]", True),
        ("list", "2007", "[2007, 2008]", False),
        ("text", 'The answer is "red".', "red", True),
        ("integer", "It costs $1,450 or so", "1450", True),
    ],
)
def test_free_answers_of_mathvista(kind, text, truth, is_right):
    record = {"question_type": "free_form", "answer_type": kind, "precision": 1.0}
    assert verdict(MATH_VISTA, text, truth, record=record)[0] == is_right


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("(b) 8/11", "8/11"),
        ("B", "8/11"),
        ("The answer is B", "8/11"),
        ("3/5", "3/5"),
        ("8-11", "8/11"),  # the nearest by edit distance
        ("", None),
        (" ", None),
    ],
)
def test_choices_of_mathvista(text, settled):
    record = {"question_type": "multi_choice", "answer_type": "text", "precision": None}
    options = ("3/11", "8/11", "6/11", "3/5")
    assert verdict(MATH_VISTA, text, "8/11", choices=options, record=record) == (float(settled == "8/11"), settled)


def test_mathvista_rounds_to_a_whole_number_without_a_precision():
    assert verdict(MATH_VISTA, "2.4", "2", record={"question_type": "free_form", "answer_type": "float"}) == (1, "2")
    assert extract("", "free_form", "integer", ()) == ""


def test_video_bench_is_the_mean_of_its_parts_and_the_authors_weighted_score():
    """As Table 7 of SPHINX-X, whose 39.0 is the mean of its 13 parts; weights as in Step3_compute_scores.py."""
    counts = {"MSVD": (1000, 567), "MOT": (36, 2), "NBA": (100, 31), "Driving-exam": (10, 5), "SQA3D": (20, 5)}
    judged = [
        Judged(
            Answered(
                sample=Sample(id=f"{part} {n}", picture=None, picture_id=part, fields={}, categories={"part": part}),
                text="",
            ),
            Verdict(float(n < right), "A"),
        )
        for part, (count, right) in counts.items()
        for n in range(count)
    ]
    found = VIDEO_PARTS.figures(judged)
    shares = {part: 100 * right / count for part, (count, right) in counts.items()}
    assert next(iter(found)) == "mean accuracy"
    assert found["mean accuracy"] == pytest.approx(sum(shares.values()) / 5)
    first = (shares["MSVD"] + 0.5 * shares["MOT"]) / 1.5
    third = (0.5 * shares["Driving-exam"] + shares["SQA3D"]) / 1.5
    assert found["weighted score"] == pytest.approx((first + shares["NBA"] + third) / 3)
    assert {part: found[part] for part in shares} == pytest.approx(shares)
