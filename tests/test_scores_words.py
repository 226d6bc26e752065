"""Scores of short answers: VQA's soft accuracy, exact match, ANLS, relaxed accuracy, F1 of fields; their quirks."""

import math
from itertools import pairwise

import made_up_answers as made_up
import pytest
from answered import answered, judge, verdict

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.metrics.exact_match import EXACT_MATCH, GQA_MATCH, OPTION_TEXT, TABLE_MATCH
from megatron_sphinx.evaluation.metrics.fields import FIELD_F1
from megatron_sphinx.evaluation.metrics.figures import percent
from megatron_sphinx.evaluation.metrics.relaxed import RELAXED_ACCURACY, is_relaxed_match
from megatron_sphinx.evaluation.metrics.text_distance import ANLS, anls, edit_distance
from megatron_sphinx.evaluation.metrics.vqa_soft import (
    CONTRACTIONS,
    VQA_SOFT,
    VQA_SOFT_EVALAI,
    settle_words,
    soft_score,
    strip_punctuation,
)
from megatron_sphinx.evaluation.samples import Protocol

PAPER, OFFICIAL, ACCESSORY = Protocol


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_by_how_many_of_ten_agree(matches, score):
    assert soft_score("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(score)


def test_where_all_ten_agree_nothing_is_changed():
    assert verdict(VQA_SOFT, "two", *["2"] * 10)[0] == 0
    assert verdict(VQA_SOFT, "two", *["2"] * 9, "3")[0] == 1
    assert verdict(VQA_SOFT_EVALAI, "two", *["2"] * 10)[0] == 1


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("red/blue", "red blue"),  # no space next to the mark: a space
        ("red / blue", "red  blue"),  # a space next to it: nothing
        ("red /blue/green", "red bluegreen"),  # one of them is enough for all
        ("1,000 a/b", "1000 ab"),  # a comma between digits is enough for all marks
        ("it's 'so'", "it's 'so'"),  # apostrophes, colons and the like stay
        ("a:b&c", "a:b&c"),
    ],
)
def test_punctuation_goes_by_spaces_anywhere_and_commas_between_digits(text, stripped):
    assert strip_punctuation(text) == stripped


def test_a_period_goes_unless_a_digit_follows_even_behind_a_digit():
    assert strip_punctuation("3.5 5. .5 end.") == "3.5 5 .5 end"


def test_no_more_than_32_periods_go():
    assert strip_punctuation("." * 40) == "." * 8


def test_contractions_are_mended_and_one_is_undone():
    assert settle_words("dont Couldntve couldnt've 'owsat") == "don't couldntve couldn't've 'owsat"
    assert settle_words("somebody'd the ten None") == "somebodyd 10 0"
    assert len(CONTRACTIONS) == 114
    assert all(made.replace("'", "") == word.replace("'", "") for word, made in CONTRACTIONS.items())


def test_accessory_settles_the_answer_always_and_peoples_words_never():
    assert verdict(VQA_SOFT, "Two", *["2"] * 10, protocol=ACCESSORY)[0] == 1
    assert verdict(VQA_SOFT, "two", *["two"] * 9, "a", protocol=ACCESSORY)[0] == 0
    assert verdict(VQA_SOFT, "two", *["two"] * 9, "a")[0] == 1
    assert verdict(VQA_SOFT_EVALAI, "two", *["two"] * 10, protocol=ACCESSORY)[0] == 0


def accessory_soft(answer, truths):
    """Accessory's copy of vqaEval written out, beside ours: slow and plain."""
    marks = [*';/[]"{}()=+\\_-><@`,?!']

    def plain(text):
        made = text
        for mark in marks:
            near = any(left + right == mark + " " or left + right == " " + mark for left, right in pairwise(text))
            joined = any(
                a.isdecimal() and b == "," and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:], strict=False)
            )
            made = "".join(("" if near or joined else " ") if letter == mark else letter for letter in made)
        kept, gone = "", 0
        for place, letter in enumerate(made):
            is_end = letter == "." and not made[place + 1 : place + 2].isdecimal() and gone < 32
            gone += is_end
            kept += "" if is_end else letter
        return kept

    if len(set(truths)) > 1:
        truths = [plain(truth) for truth in truths]
    form = settle_words(plain(answer.replace("\n", " ").replace("\t", " ").strip()))
    total = 0
    for left_out in range(10):
        total += min(1, sum(truths[place] == form for place in range(10) if place != left_out) / 3)
    return total / 10


def test_accessorys_soft_accuracy_on_made_up_answers():
    asked = made_up.questions(21, 400)
    found = judge(VQA_SOFT, [answered(answer, *truths) for answer, truths in asked], ACCESSORY)
    assert [one.verdict.value for one in found] == pytest.approx([accessory_soft(*one) for one in asked], abs=1e-9)


@pytest.mark.parametrize("protocol", Protocol)
def test_an_answer_without_a_word_is_not_read(protocol):
    assert verdict(VQA_SOFT, " \n", *["cat"] * 10, protocol=protocol) == (0, None)
    for metric in (EXACT_MATCH, GQA_MATCH, OPTION_TEXT, TABLE_MATCH, ANLS, RELAXED_ACCURACY, FIELD_F1):
        assert verdict(metric, "", "cat", protocol=protocol) == (0, None)


@pytest.mark.parametrize("metric", [VQA_SOFT, EXACT_MATCH, ANLS, RELAXED_ACCURACY])
def test_what_only_a_server_can_judge_is_refused(metric):
    with pytest.raises(DataError, match=r"sample 7: has no right answer to judge by; take a part .* or send"):
        verdict(metric, "cat", number=7)


def test_exact_match_loses_every_period_but_officially_only_the_last():
    assert verdict(EXACT_MATCH, " 3.5. ", "35") == (1, "35")
    assert verdict(EXACT_MATCH, "3.5", "35", protocol=OFFICIAL) == (0, "3.5")
    assert verdict(EXACT_MATCH, "Yes. ", "yes", protocol=OFFICIAL)[0] == 1
    assert verdict(EXACT_MATCH, "U.S", "us", "america", protocol=ACCESSORY)[0] == 1


@pytest.mark.parametrize("protocol", Protocol)
def test_accessorys_clean_up_of_gqa_has_no_effect(protocol):
    assert verdict(GQA_MATCH, "it is a dog of his", "dog", protocol=protocol)[0] == 0
    assert verdict(GQA_MATCH, "dog", "dog", protocol=protocol)[0] == 1
    assert verdict(GQA_MATCH, "Dog.", "dog", protocol=protocol)[0] == (protocol is not OFFICIAL)


def test_text_that_is_no_option_is_not_read():
    assert verdict(OPTION_TEXT, "a leaf.", "Leaf", choices=("Leaf", "root")) == (0, None)
    assert verdict(OPTION_TEXT, "root", "Leaf", choices=("Leaf", "root")) == (0, "root")
    assert verdict(OPTION_TEXT, "LEAF.", "Leaf", choices=("Leaf", "root")) == (1, "leaf")


@pytest.mark.parametrize(
    ("answer", "truth", "is_right"),
    [
        ("Café (old) [1]", "cafe", True),
        ("“Blue”", "blue", True),
        ("“Blue”.", "blue", False),  # the period goes last
        ("10.0000001", "10", True),
        ("10.1", "10", False),
        ("2004-xx-xx", "2004", True),
        ("2004-05-xx", "2004-5-xx", True),
        ("2004-13-01", "2004-13-1", False),
        ("xx-xx-xx", "xx-xx-x", False),
        ("inf", "1e999", False),
        ("1e400", "1e400", True),
        ("a-b-c", "a\u2013b\u2013c", True),
        ("[x]", "", False),
    ],
)
def test_values_of_tables_are_equal_as_text_number_or_date(answer, truth, is_right):
    assert verdict(TABLE_MATCH, answer, truth)[0] == is_right
    assert verdict(TABLE_MATCH, answer, truth, protocol=ACCESSORY)[0] == (answer.lower().replace(".", "") == truth)


def test_edit_distance_is_that_of_a_plain_recursion():
    def slow(left, right):
        if not left or not right:
            return len(left) + len(right)
        step = slow(left[1:], right[1:]) + (left[0] != right[0])
        return min(step, slow(left[1:], right) + 1, slow(left, right[1:]) + 1)

    made = made_up.MadeUp(22)
    for _ in range(30):
        left, right = made.text(2)[:5], made.text(2)[:5]
        assert edit_distance(left, right) == slow(left, right)


def test_anls_divides_by_the_raw_texts_and_ends_at_a_half():
    assert anls("  A   b ", ("a c",)) == pytest.approx(1 - 1 / 8)
    assert anls("ab", ("ac",)) == 0.5
    assert anls("ab", ("cd", "ab")) == 1
    assert anls("abc", ("axy",)) == 0
    assert anls("", ("",)) == 1
    assert judge(ANLS, [answered("ab", "ab"), answered("x", "ab")])[0].verdict.value == 1
    assert ANLS.figures(judge(ANLS, [answered("ab", "ab"), answered("x", "ab")])) == {"ANLS": 50}


@pytest.mark.parametrize(
    ("target", "answer", "is_right"),
    [
        ("100", "105", True),
        ("100", "105.01", False),
        ("50%", "0.5", True),
        ("0", "0.0", False),  # a target of zero is compared as text
        ("0", "0", True),
        ("Yes", "yES", True),
        ("-10", "-9.6", True),
        ("10", "-10", False),
        ("1,000", "1000", False),
        ("nan", "nan", False),
    ],
)
def test_relaxed_accuracy(target, answer, is_right):
    assert is_relaxed_match(target, answer) is is_right
    assert verdict(RELAXED_ACCURACY, answer, target)[0] == is_right


def test_accessory_takes_five_percent_of_the_answer():
    assert verdict(RELAXED_ACCURACY, "105.2", "100")[0] == 0
    assert verdict(RELAXED_ACCURACY, "105.2 ", "100", protocol=ACCESSORY)[0] == 1
    assert verdict(RELAXED_ACCURACY, "0.0", "0", protocol=ACCESSORY)[0] == 0


def test_relaxed_accuracy_is_the_mean_of_both_parts_not_of_all_questions():
    asked = [("1", "1", "human"), ("1", "2", "augmented"), ("1", "2", "augmented"), ("1", "1", "augmented")]
    found = judge(RELAXED_ACCURACY, [answered(text, right, categories={"split": part}) for text, right, part in asked])
    figures = RELAXED_ACCURACY.figures(found)
    assert list(figures) == ["relaxed accuracy", "augmented", "human"]
    assert figures == pytest.approx({"relaxed accuracy": 200 / 3, "augmented": 100 / 3, "human": 100})
    assert RELAXED_ACCURACY.figures(judge(RELAXED_ACCURACY, [answered("1", "1")])) == {"relaxed accuracy": 100}


def test_f1_counts_fields_that_are_said_and_fields_that_are_there():
    asked = [("WXYZ", "wxyz"), ("None", "5"), ("None", "None"), ("7", "None"), ("", "8"), ("9", "9", "nine")]
    figures = FIELD_F1.figures(judge(FIELD_F1, [answered(*one) for one in asked]))
    precision, recall = 2 / 4, 2 / 4
    assert figures == pytest.approx({"F1": 200 * precision * recall, "precision": 50, "recall": 50})
    assert [one.verdict.value for one in judge(FIELD_F1, [answered(*one) for one in asked])] == [1, 0, 1, 0, 0, 1]
    assert FIELD_F1.figures([]) == {"F1": 0, "precision": 0, "recall": 0}


def test_the_mean_of_nothing_is_no_number():
    assert math.isnan(percent([]))
