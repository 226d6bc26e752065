"""A model of ours in VLMEvalKit: a class for its table of models.

from functools import partial
from megatron_sphinx.evaluation.adapters.vlmevalkit import Sphinx
supported_VLM["sphinx"] = partial(Sphinx, path="runs/sphinx")
"""

import string
from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from megatron_sphinx.prepare.tasks import PROMPTS
from megatron_sphinx.serving.model import load

Item = dict[str, str]  # a part of a message: its type, text or image, and its value


class Sphinx(BaseModel):  # type: ignore[misc]
    """A loaded model that answers messages of VLMEvalKit; of several pictures it is shown the first one.

    Args:
        path: a run's folder or a checkpoint.
        max_new_tokens: of an answer, at most; None for what the model takes by itself.
        options: what else `load` takes.
    """

    INTERLEAVE = False

    def __init__(self, path: str, max_new_tokens: int | None = None, **options: Any) -> None:
        super().__init__()
        self.model, self._max_new_tokens = load(path, **options), max_new_tokens

    def generate_inner(self, message: Sequence[Item], dataset: str | None = None) -> str:
        """Answer a message of VLMEvalKit.

        Args:
            message: texts, which are joined, and paths of pictures.
            dataset: what it is of; it makes no difference.
        """
        prompt = "\n".join(part["value"] for part in message if part["type"] == "text")
        image = next((part["value"] for part in message if part["type"] == "image"), None)
        (answer,) = self.model.generate([prompt], [image], max_new_tokens=self._max_new_tokens)
        return answer.text

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Say whether a data set is asked about as the papers do: questions with options, or with short answers."""
        return dataset is not None and DATASET_TYPE(dataset) in ("MCQ", "Y/N", "VQA")

    def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[Item]:
        """Return what is asked about a row of a data set, its picture first.

        Args:
            line: the row.
            dataset: its name.
        """
        paths = self.dump_image(line, dataset)
        pictures = [paths] if isinstance(paths, str) else paths
        prompt = prompt_of(line, has_options=DATASET_TYPE(dataset) == "MCQ")
        return [*({"type": "image", "value": path} for path in pictures), {"type": "text", "value": prompt}]


def prompt_of(line: Mapping[str, Any], *, has_options: bool) -> str:
    """Return what the papers ask about a row of a table of VLMEvalKit.

    Args:
        line: the row; options that are no texts are none.
        has_options: whether a letter is asked for.
    """
    question = str(line["question"])
    options = {letter: line[letter] for letter in string.ascii_uppercase if isinstance(line.get(letter), str)}
    if not has_options or not options:
        return PROMPTS["vqa"].format(question=question)
    hint = line.get("hint")
    asked = f"{hint}\n{question}" if isinstance(hint, str) and hint else question
    lines = "\n".join(f"{letter}. {option}" for letter, option in options.items())
    return PROMPTS["choice"].format(question=asked, options=lines)
