"""A look at the MoE experts of a model: questions are answered, and what its routers choose meanwhile is counted."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from tqdm import tqdm

from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.evaluation.expert_data import DataSet
from megatron_sphinx.evaluation.expert_routing import RoutingCounter, RoutingCounts, kinds_of_tokens
from megatron_sphinx.generation.expert_orders import Choices, Collect, Watch, WatchedExperts
from megatron_sphinx.generation.requests import Prompt
from megatron_sphinx.serving.model import Model
from megatron_sphinx.serving.questions import Asking, Question

_BATCH = 64  # questions whose choices are in memory at a time


@dataclass
class Look:
    """What was seen of the experts of a model.

    Attributes:
        counts: of each data set.
        errors: by layer and subset of experts; see WatchedExperts.
        norms: by layer; see WatchedExperts.
        faults: how many questions could not be asked.
    """

    counts: list[RoutingCounts] = field(default_factory=list)
    errors: dict[int, dict[tuple[int, ...], float]] = field(default_factory=lambda: defaultdict(dict))
    norms: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    faults: int = 0

    def add_errors(self, seen: WatchedExperts) -> None:
        """Add the errors that a rank has summed up."""
        for layer, errors in seen.errors.items():
            own = self.errors[layer]
            for subset, error in errors.items():
                own[subset] = own.get(subset, 0.0) + error
            self.norms[layer] += seen.norms[layer]


@dataclass(frozen=True)
class Looking:
    """How questions are asked.

    Attributes:
        asking: how rows of files become questions.
        limit: questions of each data set; None for all.
        max_new_tokens: of each answer.
        keep: sizes of the subsets of experts whose errors are summed up.
        show: whether there is a progress bar.
    """

    asking: Asking = field(default_factory=lambda: Asking(follow_links=True))
    limit: int | None = None
    max_new_tokens: int = 16
    keep: tuple[int, ...] = ()
    show: bool = False


def look(model: Model, data: Sequence[DataSet], how: Looking) -> Look:
    """Ask questions, and count what the routers choose.

    Args:
        model: the model.
        data: what it is asked.
        how: the questions are asked.

    Raises:
        ConfigError: the model has no experts.
        DataError: no question of a data set could be asked.
    """
    if not model.language.experts:
        raise ConfigError(f"{model.name}: has no MoE experts to look at; give a mixture of experts")
    model.order_experts(Watch(how.keep))
    found = Look()
    for one in data:
        counter = RoutingCounter(one.name, model.vision.views if model.vision is not None else 0)
        fault = "there is none"
        left = iter(tqdm(one.questions(how.asking, how.limit), one.name, unit="row", disable=not how.show))
        while questions := list(islice(left, _BATCH)):
            prompts: list[tuple[str, Prompt]] = []
            for question in questions:
                try:
                    prompts.append(_prompt_of(model, question, how))
                except DataError as error:
                    fault, found.faults = str(error), found.faults + 1
            for seen in _count(model, prompts, counter, how.max_new_tokens):
                found.add_errors(seen)
        if (counts := counter.counts) is None:
            raise DataError(f"--data={one.name}={one.path}: no question can be asked ({fault}); give others")
        found.counts.append(counts)
    return found


def _prompt_of(model: Model, question: Question, how: Looking) -> tuple[str, Prompt]:
    """Make a question a prompt, and name its picture; empty for none."""
    content = question.content(how.asking)
    picture = None if content is None else model.picture(content)
    prompt = model.chat(question.messages, picture, how.max_new_tokens, question.answer_prefix).prompt
    return picture.key if picture is not None else "", prompt


def _count(
    model: Model, prompts: Sequence[tuple[str, Prompt]], counter: RoutingCounter, max_new_tokens: int
) -> list[WatchedExperts]:
    """Answer prompts, and count their choices; return what the ranks have seen."""
    marked = [replace(prompt, mark=number) for number, (_, prompt) in enumerate(prompts)]
    model.generate(marked, max_new_tokens=max_new_tokens, stop=model.template.stop)
    seen = model.order_experts(Collect())
    for (unit, prompt), choices in zip(prompts, _whole(seen, len(prompts)), strict=True):
        tokens = choices.experts.shape[1]
        kinds = kinds_of_tokens(prompt.picture, model.vision, len(prompt.tokens), tokens)
        counter.add(unit, kinds, choices, model.language.experts)
    return seen


def _whole(seen: Sequence[WatchedExperts], count: int) -> list[Choices]:
    """Put the layers of pipeline stages together: the choices of each prompt."""
    in_order: list[Mapping[int, Choices]] = [one.prompts for one in sorted(seen, key=lambda one: one.layers)]
    return [Choices.joined([prompts[mark] for prompts in in_order if mark in prompts], 0) for mark in range(count)]
