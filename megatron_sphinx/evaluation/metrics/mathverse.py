"""MathVerse by rules: those of MMMU, and a letter with a colon behind it, as the benchmark writes its options.

The benchmark's own scorer asks a language model to extract and to compare answers. Where an option is in the picture
alone, its choice is its letter, and no answer is read by its text.

Source: options and answers of testmini.json of MathVerse (arXiv:2403.14624); eval/eval_utils.py of MMMU.
"""

import re
from collections.abc import Sequence

from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import accuracy, each
from megatron_sphinx.evaluation.metrics.mmmu import MANY_WORDS, judge_by, letter_that_stands
from megatron_sphinx.evaluation.metrics.options import choice_letters

_WITH_COLON = re.compile(r"\b([A-Z])\s*[:\uff1a]")


def read_verse_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that an answer means; None where it means none.

    A letter with a colon that begins the answer comes first, then letters by MMMU's rules, then a letter with a colon
    anywhere, and in an answer of more than five words the texts of the choices. Of several the one that stands last is
    meant.
    """
    letters = choice_letters(choices)
    text = text.strip()
    begins = _WITH_COLON.match(text)
    if begins and begins[1] in letters:
        return begins[1]
    if letter := letter_that_stands(text, letters):
        return letter
    if found := [letter for letter in _WITH_COLON.findall(text) if letter in letters]:
        return str(found[-1])
    if len(text.split()) <= MANY_WORDS:
        return None
    places = {text.lower().rfind(choice.lower()): letter for letter, choice in letters.items() if choice != letter}
    return places[max(places)] if max(places, default=-1) >= 0 else None


MATH_VERSE = Metric("MathVerse by rules", each(judge_by(read_verse_choice)), accuracy)
