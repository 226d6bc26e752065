"""Who is asked about pictures in a cascade: a model that answers, or a script of answers."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.parsing import ParseError, read_json


class Question(NamedTuple):
    """A prompt about a picture.

    Attributes:
        picture: in RGB and upright.
        prompt: what is asked about it, without a template around it.
    """

    picture: Image.Image
    prompt: str


class Answerer(Protocol):
    """Whoever answers questions about pictures.

    Attributes:
        name: what results call it.
        padding: where a picture is in the square that boxes are fractions of: centre or corner.
    """

    name: str
    padding: str

    def ask(self, questions: Sequence[Question]) -> list[str]:
        """Answer several questions, each by itself, in their order.

        Raises:
            SphinxError: a question cannot be asked, or whoever answers fails.
        """


class Script:
    """Answers that were written before, by a person or by another program; a stand-in for a model, named as such.

    Args:
        path: of a JSON object that has for each prompt its answer, or a list of answers that are given in turn.

    Attributes:
        name: what results call it.
        padding: boxes are fractions of the square that has the picture at its centre.

    Raises:
        DataError: the file cannot be read, or is no such object.
    """

    padding = "centre"

    def __init__(self, path: Path) -> None:
        self.name = f"the script {path.name}, not a model"
        self._path = path
        try:
            content = read_json(path)
        except OSError as error:
            raise DataError(f"answers={path}: {error.strerror}; give a file of answers that can be read") from error
        except ParseError as error:
            raise DataError(f"answers={path}: is no JSON ({error}); give an object of prompts and answers") from error
        given = content.items() if isinstance(content, dict) else ()
        listed = {prompt: [answer] if isinstance(answer, str) else answer for prompt, answer in given}
        is_script = all(
            isinstance(each, list) and all(isinstance(one, str) for one in each) for each in listed.values()
        )
        if not listed or not is_script:
            raise DataError(f"answers={path}: is no script; give an object with a text or a list of texts per prompt")
        self._answers: dict[str, deque[str]] = {prompt: deque(answers) for prompt, answers in listed.items()}

    def ask(self, questions: Sequence[Question]) -> list[str]:
        """Answer several questions; the last answer to a prompt is given as often as it is asked for.

        Raises:
            DataError: the script has no answer to a prompt.
        """
        return [self._answer(question.prompt) for question in questions]

    def _answer(self, prompt: str) -> str:
        answers = self._answers.get(prompt)
        if not answers:
            raise DataError(f"answers={self._path}: has no answer to {shortened(prompt)!r}; add one")
        return answers.popleft() if len(answers) > 1 else answers[0]
