"""The first samples of what is held out as questions: what is asked of the model in a validation, and what is true."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from megatron_sphinx.data import images
from megatron_sphinx.data.pairs import ImageReader
from megatron_sphinx.data.sources import Sources
from megatron_sphinx.data.template import STOP, SYSTEM
from megatron_sphinx.errors import DataError
from megatron_sphinx.training.sample_book import Shown


@dataclass(frozen=True)
class Question:
    """What is asked about a sample.

    Attributes:
        sample: number of the sample.
        tokens: of the prompt behind the picture, without BOS; none where a caption is asked for.
        shown: what a reader sees of it.
    """

    sample: int
    tokens: tuple[int, ...]
    shown: Shown


class Answerer(Protocol):
    """Generates answers in the midst of a training, with its weights as they are."""

    def answer(self, questions: Sequence[Question], features: Mapping[int, Tensor]) -> Sequence[str]:
        """Answer questions; every language rank calls this, together. No gradient is kept, nothing is changed.

        Args:
            questions: all of them, the same on every rank.
            features: by number of the question, for those of this replica, what the encoders give for its picture: bf16
                [views, feature_values], NaN where it cannot be read; empty behind the first stage of a pipeline.

        Returns:
            The answers, in the order of the questions; on the first rank.
        """


def questions_of(sources: Sources, count: int) -> list[Question]:
    """Read the first samples: of a pair its caption is asked for, of a conversation the answer to its first question.

    Args:
        sources: what is held out.
        count: how many samples.

    Raises:
        DataError: the index has been cut since it was opened.
    """
    samples = sources.samples
    assert samples is not None, "there are no samples"
    reader, found = ImageReader(samples), []
    for sample in range(count):
        tokens = samples.caption(sample)
        is_answer = samples.is_target(sample, len(tokens))[:-1]
        begin = int(is_answer.argmax())
        length = int(np.append(~is_answer[begin:], True).argmax())  # of the first answer
        texts = [sources.tokenizer.decode(part.tolist()) for part in (tokens[:begin], tokens[begin : begin + length])]
        question, truth = _plain(texts[0]), _plain(texts[1])
        picture = None
        if samples.location(sample).bytes:
            try:
                picture = images.decode(reader.read(sample), is_upright=samples.is_upright(sample))
            except (DataError, OSError):  # which is in quarantine.jsonl then
                picture = None
        shown = Shown(samples.name(sample), picture, question, truth)
        found.append(Question(sample, tuple(tokens[:begin].tolist()), shown))
    return found


def _plain(text: str) -> str:
    """Leave out of a turn, or of what comes before the first answer, what the template puts around it."""
    stop = STOP.strip()
    text = text.strip().removeprefix(SYSTEM).strip().removeprefix(stop).strip().removeprefix("Human: ")
    return text.removesuffix("Assistant:").strip().removesuffix(stop).strip()
