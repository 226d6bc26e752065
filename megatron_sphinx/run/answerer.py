"""Answers in the midst of a training: the likeliest tokens, by the ranks and the weights that train."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.data.template import STOP
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.generation.runner import ModelRunner
from megatron_sphinx.generation.stopping import Detokenizer
from megatron_sphinx.generation.ticks import Draw, Piece
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.model.views import encoded_views
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.run.questions import Question

_MOST_TOKENS = 64  # of an answer
_LIKELIEST = Draw(seed=0, number=0)


class _Answer:
    """A question that is being answered, and where it lies in the cache: its tokens are one stretch."""

    def __init__(self, tokens: Sequence[int], picture: str | None, place: int, text: Detokenizer) -> None:
        self._new, self._picture, self._place, self._text = tuple(tokens), picture, place, text
        self._done, self.said, self.is_over = 0, "", False

    def piece(self) -> Piece:
        """Return the tokens that are computed next."""
        known = self._done + len(self._new)
        segments = ((self._place, known),)
        return Piece(self._new, self._done, segments, self._picture, draw=_LIKELIEST)

    def hear(self, token: int, eos: int) -> None:
        """Take the token behind them."""
        self._done += len(self._new)
        self._new = (token,)
        text, is_stopped = ("", True) if token == eos else self._text.feed(token)
        self.said += text
        self.is_over = is_stopped
        if token == eos:
            self.end()

    def end(self) -> None:
        """End the answer with what was held back."""
        self.said, self.is_over = self.said + self._text.rest(), True


class TrainingAnswerer:
    """Answers the samples of validations; an Answerer.

    Sample n is answered by replica n modulo their number, whose first stage has its features.

    Args:
        context: of the rank.
        model: its shard.

    Raises:
        ConfigError: the layers are transformer-engine's, which know no key-value cache.
    """

    def __init__(self, context: RankContext, model: SphinxModel) -> None:
        if model.language.kernels.is_transformer_engine:
            raise ConfigError(
                f"validation.samples={context.config.validation.samples}: layers of model.kernels=transformer_engine "
                f"cannot answer; use 0, or other kernels"
            )
        self._context, self._model = context, model

    def answer(self, questions: Sequence[Question], features: Mapping[int, Tensor]) -> Sequence[str]:
        """Answer questions; see Answerer."""
        was_training = self._model.training
        self._model.eval()
        try:
            return self._gathered(len(questions), self._answer_own(questions, features))
        finally:
            self._model.train(was_training)

    def _answer_own(self, questions: Sequence[Question], features: Mapping[int, Tensor]) -> dict[int, str]:
        """Answer the questions of this replica; those whose picture cannot be read get no answer."""
        groups, config = self._context.groups, self._context.config
        own = range(groups.seat.data, len(questions), groups.layout.data)
        views = {number: self._encoded(questions[number]) for number in own}
        prompts = {number: self._prompt(questions[number], len(views[number])) for number in own}
        places = sum(len(prompt) + _MOST_TOKENS for prompt in prompts.values())
        vocabulary, decode = config.model.vocabulary, self._model.decode
        runner = ModelRunner(self._model, places=places, vocabulary=vocabulary, decode=decode)
        tokenizer = self._context.sources.tokenizer
        answers, place = {}, 0
        for number, prompt in prompts.items():
            picture = str(number) if views[number] else None
            answers[number] = _Answer(prompt, picture, place, Detokenizer(tokenizer, (STOP,)))
            place += len(prompt) + _MOST_TOKENS
            if picture and groups.is_first_stage:
                runner.add_picture(picture, features[number].nan_to_num(), views[number])
        for _ in range(_MOST_TOKENS):
            open_ = [answer for answer in answers.values() if not answer.is_over]
            if not self._is_any_open(bool(open_)):
                break
            for answer, token in zip(open_, self._likeliest(runner, [one.piece() for one in open_]), strict=True):
                answer.hear(token, tokenizer.eos)
        for answer in answers.values():
            if not answer.is_over:
                answer.end()
        unread = {number for number, values in features.items() if values.isnan().any()}
        return {number: "" if number in unread else answer.said.strip() for number, answer in answers.items()}

    def _encoded(self, question: Question) -> tuple[int, ...]:
        """List the views of a question's picture that are encoded; none where it has no picture."""
        held_out = self._context.held_out
        samples = held_out.sources.samples if held_out is not None else None
        assert samples is not None, "questions about nothing"
        if not samples.location(question.sample).bytes:
            return ()
        size = samples.sizes(question.sample, question.sample + 1)
        return encoded_views(int(size.width[0]), int(size.height[0]), self._context.config.vision)

    def _prompt(self, question: Question, encoded: int) -> list[int]:
        vision = self._context.config.vision
        positions = encoded * vision.tokens_per_view + vision.views - encoded if encoded else 0
        return [self._context.sources.tokenizer.bos, *[0] * positions, *question.tokens]

    def _is_any_open(self, is_own: bool) -> bool:
        """Whether any replica has still to answer: where experts are shared, all compute together."""
        count = torch.tensor(int(is_own))
        dist.all_reduce(count, group=self._context.groups.storage)
        return bool(count)

    def _likeliest(self, runner: ModelRunner, pieces: Sequence[Piece]) -> list[int]:
        """Compute pieces, and return the likeliest token behind each on every rank of the replica."""
        groups = self._context.groups
        logits = runner.run(pieces)
        tokens = torch.zeros(len(pieces), dtype=torch.int64, device=self._context.platform.device)
        if logits is not None:
            tokens = logits.argmax(-1)
        if pieces and dist.get_world_size(groups.model) > 1:
            last = groups.layout.config.pipeline - 1
            drawing = groups.layout.rank_of(data=groups.seat.data, tensor=0, pipeline=last)
            dist.broadcast(tokens, src=drawing, group=groups.model)
        found: list[int] = tokens.tolist()
        return found

    def _gathered(self, count: int, own: dict[int, str]) -> list[str]:
        """Bring the answers of all replicas together; on the first rank they are all there."""
        parts: list[dict[int, str]] = [{} for _ in range(self._context.groups.layout.language)]
        told = own if self._context.groups.is_first_stage else {}  # others do not know which pictures cannot be read
        dist.all_gather_object(parts, told, group=self._context.groups.storage)
        known = {number: text for part in parts for number, text in part.items()}
        return [known[number] for number in range(count)]
