"""What a judge is asked about an answer of MM-Vet or LLaVA-Bench, and how its review is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_sphinx.evaluation.metrics.reviews import read_llava_review, read_mm_vet_review
from megatron_sphinx.evaluation.samples import Answered, Verdict

Messages = tuple[Mapping[str, str], ...]

_MM_VET = """\
Score how correct a prediction is, by its ground truth. Where parts of the ground truth are joined by <AND>, only a \
prediction that has all of them is wholly correct; where they are joined by <OR>, one that has any of them is. The \
score is one of 0.0 (wholly wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 and 1.0 (wholly correct). Complete the \
last line of the table with the score alone.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which numbers solve the equation? | 2 <AND> -7 | x = 2 | 0.5
Which numbers solve the equation? | 2 <AND> -7 | x = 4 | 0.0
Which numbers solve the equation? | 2 <AND> -7 | x = -7 or x = 2 | 1.0
What colour is the car? | red <OR> dark red | It is a dark red sports car. | 1.0
What colour is the car? | red <OR> dark red | It is orange. | 0.2
Why is the picture funny? | A cat in a business suit sits at a desk as if it led the meeting. | \
There is a cat in it. | 0.3
"""
_LLAVA_SYSTEM = "You judge the quality of answers, and are fair and exact."


@dataclass(frozen=True)
class JudgePrompt:
    """How a judge is asked about the answers to a benchmark.

    Attributes:
        messages: what is said to it about an answer, in OpenAI's form.
        read: what its review is read as; it is unparsed where it is not understood.
        temperature: at which it is asked first.
    """

    messages: Callable[[Answered], Messages]
    read: Callable[[str], Verdict]
    temperature: float


def _ask_mm_vet(answered: Answered) -> Messages:
    """Ask for the last cell of a table whose other rows show how scores are given."""
    sample = answered.sample
    row = (sample.fields["question"], sample.answers[0], answered.text)
    cells = " | ".join(" ".join(cell.split()) for cell in row)
    return ({"role": "user", "content": f"{_MM_VET}{cells} | "},)


def _ask_llava_bench(answered: Answered) -> Messages:
    """Ask to compare an answer with that of GPT-4, which saw the caption alone, by the rule among the official files.

    Source: the order of the parts in llava/eval/eval_gpt_review_bench.py of LLaVA.
    """
    sample = answered.sample
    record = sample.record
    role = record["rule"].get("role", "Assistant")
    parts = [("Context", record["caption"]), ("Question", sample.fields["question"])]
    for number, text in enumerate((sample.answers[0], answered.text), 1):
        parts.append((f"{role} {number}", f"{text}\n\n[End of {role} {number}]"))
    parts.append(("System", record["rule"]["prompt"]))
    content = "\n\n".join(f"[{name}]\n{text}" for name, text in parts)
    return ({"role": "system", "content": _LLAVA_SYSTEM}, {"role": "user", "content": f"{content}\n\n"})


PROMPTS: Mapping[str, JudgePrompt] = {
    "mm_vet": JudgePrompt(_ask_mm_vet, read_mm_vet_review, 0.0),
    "llava_bench": JudgePrompt(_ask_llava_bench, read_llava_review, 0.2),
}
