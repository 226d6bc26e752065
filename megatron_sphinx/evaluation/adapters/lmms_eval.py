"""A model of ours in lmms-eval, under the name `megatron_sphinx`.

    lmms-eval --model megatron_sphinx --model_args path=runs/sphinx,tensor=2 --tasks pope

lmms-eval finds it by an entry point of this package. What else `load` takes may stand among the arguments.
"""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.adapters.frames import in_picture
from megatron_sphinx.generation.answering import Message
from megatron_sphinx.serving.model import load

_PASSED_OVER = ("batch_size", "max_batch_size")


def manifest() -> ModelManifest:
    """Return what lmms-eval registers."""
    return ModelManifest(model_id="megatron_sphinx", chat_class_path=f"{__name__}.{Sphinx.__name__}")


class Sphinx(lmms):  # type: ignore[misc]
    """A loaded model that answers requests of lmms-eval, as many together as it has.

    Boxes in answers are fractions of the picture, as tasks of lmms-eval take them.

    Args:
        path: a run's folder or a checkpoint.
        options: what else `load` takes; the sizes of batches, which lmms-eval gives all models, are passed over.
    """

    is_simple = False

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__()
        given = {name: value for name, value in options.items() if value is not None and name not in _PASSED_OVER}
        if "device" in given:
            given["device"] = given["device"].partition(":")[0]  # the number of a GPU is the rank's own
        self.model = load(path, **given)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests; those that are drawn alike are answered together.

        Raises:
            DataError: a request shows several pictures, or something that is none; or wants several beams.
        """
        kinds: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            kinds[repr(request.args[2])].append(number)
        results: list[GenerationResult | None] = [None] * len(requests)
        for numbers in kinds.values():
            asked = [self._asked(requests[number]) for number in numbers]
            shown = [None if image is None else _content(image) for _, image in asked]
            sampling = sampling_of(requests[numbers[0]].args[2])
            answers = self.model.generate([messages for messages, _ in asked], shown, **sampling)
            for number, (_, image), answer in zip(numbers, asked, answers, strict=True):
                text = answer.text
                if image is not None:
                    text = in_picture(text, image.width, image.height, self.model.padding)
                results[number] = GenerationResult(text, TokenCounts(answer.prompt_tokens, len(answer.tokens)))
        return [result for result in results if result is not None]

    def _asked(self, request: Instance) -> tuple[list[Message], Image.Image | None]:
        """Return the chat of a request, and its picture."""
        _, messages_of, _, number, task, split = request.args
        chat = ChatMessages(messages=messages_of(self.task_dict[task][split][number]))
        images, videos, sounds = chat.extract_media()
        if len(images) > 1 or videos or sounds:
            raise DataError(
                f"{task}: shows {len(images)} pictures, {len(videos)} videos, {len(sounds)} sounds at once; "
                f"give tasks of one picture"
            )
        messages = [
            Message(one.role, "\n".join(part.text for part in one.content if part.type == "text"))
            for one in chat.messages
        ]
        return messages, images[0] if images else None

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: tasks that compare likelihoods are not answered.

        Raises:
            DataError: always.
        """
        raise DataError(f"{len(requests)} requests for likelihoods: only answers are given; take tasks that generate")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse: tasks that ask again by what was answered are not answered.

        Raises:
            DataError: always.
        """
        raise DataError(f"{len(requests)} requests of several rounds: only one is answered; take tasks of one round")


def sampling_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return how answers are drawn, by what lmms-eval gives.

    Raises:
        DataError: it wants several beams.
    """
    if (given.get("num_beams") or 1) != 1:
        raise DataError(f"num_beams={given['num_beams']}: answers have one beam; leave it out")
    until = given.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    found: dict[str, Any] = {"stop": tuple(text for text in stop if text)}
    is_drawn = bool(given.get("do_sample", (given.get("temperature") or 0) > 0))
    names = ("temperature", "top_p", "top_k") if is_drawn else ()
    for name in ("max_new_tokens", *names):
        if given.get(name) is not None:
            found[name] = given[name]
    return found


def _content(image: Image.Image) -> bytes:
    """Return the content of a file with a picture's pixels."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "png")
    return file.getvalue()
