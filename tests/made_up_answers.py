"""Answers made up by chance, the same for a seed: for tests of scores, and for what official scorers made of them."""

import hashlib
import json
import random

WORDS = """
a an the A The one two ten none zero yes no Yes. NO not dont don't cant it's let's isn't oclock 'ows'at somebody'd red
Blue cat dogs man's surfboard traffic-light t-shirt caf\u00e9 na\u00efve \u00fcber Stra\u00dfe \u00df \u0149 \u0130
\u4f60\u597d \u732b \u0441\u0442\u043e\u043b \u0645\u0631\u062d\u0628\u0627 \U0001f600 \u00bd \u00b2 \u0663 \uff13
3 3.5 3.50 .5 0 0.0 1,000 1000 10,00 1e3 -5 +7 50% 5 % $5 \u20ac7 1/2 2:30 12-12-2010 U.S. Mr. etc. e.g. No. and/or (a)
(B) [1,2] {x} A. B) nan inf 1_000 \\ / _ - -- ... . , ; : ! ? ' " ` = + < > @ # & * ~ ^ |
"""
GLUE = (" ", " ", " ", " ", "", "  ", "\n", "\t", ", ", ". ", "\u00a0")


class MadeUp:
    """A stream of made-up texts."""

    def __init__(self, seed: int) -> None:
        """Begin the stream of a seed."""
        self.chance = random.Random(seed)

    def text(self, most: int = 5) -> str:
        """Return a text of some words, none now and then, of random characters now and then."""
        if self.chance.random() < 0.03:
            return self.chance.choice(("", " ", "\n", "."))
        if self.chance.random() < 0.05:
            begins = (33, 97, 0x3B1, 0x4E00, 0x1F600)
            return "".join(chr(self.chance.choice(begins) + self.chance.randrange(26)) for _ in range(9))
        words = [self.chance.choice(WORDS.split()) for _ in range(self.chance.randint(1, most))]
        return "".join(word + self.chance.choice(GLUE) for word in words[:-1]) + words[-1]

    def number(self) -> str:
        """Return a number as people and models write it."""
        value = self.chance.choice((0, 1, 12, 100, 2.5, 0.33, -4, 1234.5))
        value *= self.chance.choice((1, 1, 1.04, 1.06, 0.95))
        return self.chance.choice((f"{value:g}", f"{value:.2f}", f"{value:g}%", f"{value:,}", f" {value:g}"))

    def near(self, text: str) -> str:
        """Return a text, or what is nearly the same."""
        word = self.text()
        ways = (text, text, text.upper(), f"{text}.", f" {text}", f"the {text}", text.replace(" ", "  "), text[:-1])
        return self.chance.choice((*ways, f"{text}!", word))

    def question(self) -> tuple[str, list[str]]:
        """Return an answer and what ten people answered."""
        right, other = self.text(3), self.text(2)
        if self.chance.random() < 0.3:
            return self.near(right), [right] * 10
        return self.near(right), [self.chance.choice((right, self.near(right), other)) for _ in range(10)]


def questions(seed: int, count: int = 1000) -> list[tuple[str, list[str]]]:
    """Return answers, each with those of ten people."""
    made_up = MadeUp(seed)
    return [made_up.question() for _ in range(count)]


def numbers(seed: int, count: int = 1000) -> list[tuple[str, str]]:
    """Return answers and targets, numbers for the most part."""
    made_up = MadeUp(seed)
    pairs = []
    for _ in range(count):
        target = made_up.number() if made_up.chance.random() < 0.8 else made_up.text(2)
        pairs.append((made_up.near(target) if made_up.chance.random() < 0.5 else made_up.number(), target))
    return pairs


def choices(seed: int, count: int = 1000) -> list[tuple[str, list[str]]]:
    """Return answers and the options of their questions."""
    made_up = MadeUp(seed)
    asked = []
    for _ in range(count):
        options = [made_up.text(2) for _ in range(made_up.chance.randint(2, 5))]
        letter, option = made_up.chance.choice("ABCDEFZ"), made_up.chance.choice(options)
        forms = (
            *(letter, f"{letter}.", f"({letter})", f"{letter}. {option}", f"The answer is {letter}.", option),
            *(f"It is {option}.", f"{letter} {made_up.text()}", f"{made_up.text(9)} {letter}", made_up.text()),
            *(f"{made_up.text(3)} **{letter}** {made_up.text(9)}", f"A {option} or {letter}", f" {letter.lower()}\n"),
            f"I think that the one of these is ({letter}) or so {made_up.text()}",
            "I'm sorry, but without the image provided I cannot",
        )
        asked.append((made_up.chance.choice(forms), options))
    return asked


def captions(seed: int, count: int = 200) -> tuple[list[str], list[list[str]]]:
    """Return captions of pictures, and those of people."""
    made_up = MadeUp(seed)
    references = [[made_up.text(12) for _ in range(made_up.chance.randint(1, 5))] for _ in range(count)]
    return [made_up.near(made_up.chance.choice(texts)) for texts in references], references


def digest(value: object) -> str:
    """Return the SHA-256 of a value as JSON: recorded scores belong to these very answers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def typed_questions(seed: int, count: int = 1000) -> list[tuple[str, list[str], str, str, int]]:
    """Return answers with options, the types of question and answer, and decimals, as MathVista has them."""
    chance = random.Random(seed + 1)
    kinds = (("multi_choice", "text"), ("free_form", "integer"), ("free_form", "float"), ("free_form", "list"))
    return [(answer, options, *chance.choice(kinds), chance.randint(0, 3)) for answer, options in choices(seed, count)]


def everything() -> list[object]:
    """Return all answers that scores are recorded for, by the seeds that are used."""
    return [
        *(questions(1), questions(2), numbers(3), choices(4), questions(5), typed_questions(6), choices(8)),
        captions(9),
    ]
