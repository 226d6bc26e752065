"""A model that answers: loaded from a run or a checkpoint, asked from Python, by many threads if need be."""

import atexit
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import ConfigError, DataError, SphinxError, nearest
from megatron_sphinx.generation.answering import ChatPrompt, Listener, Load, Message, QueueFullError
from megatron_sphinx.generation.chat import ends_of, make_chat
from megatron_sphinx.generation.engine import Language
from megatron_sphinx.generation.expert_orders import ExpertOrder, Restrict, WatchedExperts
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.pictures import picture_of
from megatron_sphinx.generation.requests import Chunk, Finish, Generation, Picture, Prompt, Sampling, default_new_tokens
from megatron_sphinx.generation.service import ClosedError, RequestTicket, Service
from megatron_sphinx.generation.stopping import Detokenizer
from megatron_sphinx.generation.templates import ChatTemplate, template_of
from megatron_sphinx.serving.ranks import Job, LoadOptions, start

_PLAIN, _SPHINX, _CHATML = "plain", "sphinx", "chatml"

Shown = bytes | str | Path | None  # a picture: the content of its file, or its path
Asked = str | Sequence[Message] | Prompt  # a question, a chat, or tokens


def load(path: str | Path, *, template: str | None = None, limits: Limits | None = None, **options: Any) -> "Model":
    """Load a model to answer, in this process or on the ranks of the job that torchrun or srun has started.

    In a job, every rank calls this. It returns on the first one alone; the others compute what the first one says, and
    end their process when the model is closed.

    Args:
        path: a run folder, one of its checkpoints, or a checkpoint in any format that `convert` reads.
        template: what stands around the messages of a chat, by its name in `generation.templates`; None for that of
            SPHINX for a model that sees, chatml where the tokenizer has its tokens, and plain text otherwise.
        limits: how much is taken on at once.
        options: the attributes of `LoadOptions`; those of `ParallelConfig` may be given by themselves: `tensor=2`; so
            may `active_experts` and `keep_experts` of a mixture of experts.

    Raises:
        SphinxError: the user's mistake, such as no checkpoint, a damaged one, or a layout that does not fit.
    """
    wanted = LoadOptions.of(**options)
    if template is not None:
        template_of(template)  # which refuses a name before the weights are read
    job = start(Path(path), wanted)
    try:
        return Model(job, template, limits or Limits())
    except BaseException:
        job.close()
        raise


class Model:
    """A loaded model; an Answers. It may be used as a context manager, which closes it.

    Args:
        job: the rank that leads it.
        template: name of the chat template; None to choose it.
        limits: how much is taken on at once.

    Attributes:
        name: the last part of its path.
        positions: tokens of prompt and answer together, at most.
        padding: where a picture is in the square that boxes are fractions of: centre or corner.
        has_vision: whether it can be asked about pictures.
        vision: how a picture is shown to it; None where it reads text only.
        language: shape of its language model.
        identity: by names, what its answers follow from beside its weights: see Answers.
        replicas: how many of it answer beside each other.
        tokenizer: its tokenizer.
        template: what stands around the messages of a chat.
        cache_bytes: what the key-value cache takes on this rank.
    """

    def __init__(self, job: Job, template: str | None, limits: Limits) -> None:
        source = job.source
        self._job, self.vision, self._vocabulary = job, source.vision, source.language.vocabulary
        self.name, self.positions, self.cache_bytes = source.name, job.executor.positions, job.cache_bytes
        self.has_vision = self.vision is not None
        self.padding = self.vision.padding if self.vision else "centre"
        self.tokenizer = Tokenizer(source.tokenizer)
        name = template or self._likely_template()
        self.template: ChatTemplate = template_of(name)
        self.replicas = job.executor.replicas
        self._whole: Mapping[str, str] = {
            "template": name,
            "precision": job.precision,
            "tokenizer": self.tokenizer.identity.sha256,
            "config": hashlib.sha256(repr((source.language, source.vision, source.seed)).encode()).hexdigest(),
        }
        self.language = source.language
        self.identity: Mapping[str, str] = {**self._whole, **job.choice.fitting(source.language).told}
        language = Language(ends=ends_of(self.template, self.tokenizer), texts=partial(Detokenizer, self.tokenizer))
        self._service = Service(job.executor, language, limits)
        self._is_closed = False
        if not job.is_alone:
            atexit.register(self.close)  # the other ranks wait for it, and would wait in vain

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _likely_template(self) -> str:
        if self.has_vision:
            return _SPHINX
        starts = template_of(_CHATML).control
        has_tokens = all(len(self.tokenizer.encode(name, has_special=True)) == 1 for name in starts)
        return _CHATML if has_tokens else _PLAIN

    # what is asked

    def picture(self, content: bytes) -> Picture:
        """Look at the content of a picture's file; see Answers."""
        if self.vision is None:
            raise DataError(f"{self.name}: reads text only; leave the picture out, or load a model with projections")
        return picture_of(content, self.vision)

    def chat(
        self,
        messages: Sequence[Message],
        picture: Picture | None,
        max_new_tokens: int | None = None,
        answer_prefix: str = "",
    ) -> ChatPrompt:
        """Make a chat ready to be answered; see Answers."""
        new = default_new_tokens(self.positions) if max_new_tokens is None else max_new_tokens
        return make_chat(
            messages, picture, self.template, self.tokenizer,
            positions=self.positions, max_new_tokens=new, answer_prefix=answer_prefix,
        )  # fmt: skip

    def prompt(self, text: str, picture: Shown = None) -> Prompt:
        """Make a prompt of a text as it is, without a template: BOS, the picture, the text."""
        shown = self._shown(picture)
        head = [self.tokenizer.bos] + [0] * (shown.positions if shown else 0)
        return Prompt((*head, *self.tokenizer.encode(text)), shown)

    # answers

    def submit(self, prompt: Prompt, sampling: Sampling, listen: Listener) -> RequestTicket:
        """Hand in a request; see Answers."""
        self._check(prompt)
        return self._service.submit(prompt, sampling, listen)

    def stream(self, asked: Asked, picture: Shown = None, **sampling: Any) -> Iterator[Chunk]:
        """Answer a question, a part at a time.

        Args:
            asked: the question; or a chat; or a prompt, to which nothing is added.
            picture: what it is about: the content of a file, or its path; not for a prompt, which has its own.
            sampling: the attributes of Sampling. Where `max_new_tokens` is not among them an answer may have 512, or a
                quarter of the positions where that is less; behind a prompt also fewer, as many as fit.

        Yields:
            The parts of the answer, the last one with its finish. Closing the generator ends the request.

        Raises:
            SphinxError: it cannot be asked so, or the model fails.
        """
        prompt, how = self._ready(asked, picture, sampling)
        heard: SimpleQueue[Chunk | SphinxError] = SimpleQueue()
        ticket = self.submit(prompt, how, heard.put)
        try:
            while True:
                chunk = _heard(heard)
                yield chunk
                if chunk.finish is not None:
                    return
        finally:
            ticket.cancel()

    def generate(
        self, asked: Sequence[Asked], pictures: Sequence[Shown] | None = None, **sampling: Any
    ) -> list[Generation]:
        """Answer several questions, together.

        Args:
            asked: the questions; see `stream`.
            pictures: what each is about; None for none at all.
            sampling: the attributes of Sampling, for all of them; see `stream`.

        Raises:
            DataError: there are more or fewer pictures than questions; or a question cannot be asked so.
            SphinxError: the model fails.
        """
        shown = pictures if pictures is not None else [None] * len(asked)
        if len(shown) != len(asked):
            raise DataError(f"{len(shown)} pictures for {len(asked)} questions; give None where there is no picture")
        ready = [self._ready(one, picture, sampling) for one, picture in zip(asked, shown, strict=True)]
        answers = self._all([partial(self.submit, prompt, how) for prompt, how in ready])
        return [
            Generation.of(chunks, len(prompt.tokens), ticket.cached_tokens)
            for (prompt, _), (ticket, chunks) in zip(ready, answers, strict=True)
        ]

    def score(
        self, asked: Asked, continuations: Sequence[str | Sequence[int]], picture: Shown = None
    ) -> list[tuple[float, ...]]:
        """Compute how likely texts are to follow; what they follow is computed once.

        Args:
            asked: what they follow; see `stream`.
            continuations: the texts, or ids of their tokens. Texts become the tokens that they have as answers in the
                template; behind a prompt, those that they have alone.
            picture: what they are about; see `stream`.

        Returns:
            For each continuation the log-probability of each of its tokens, in nats.

        Raises:
            DataError: there is nothing to score, or it does not fit.
            SphinxError: the model fails.
        """
        prompt, _ = self._ready(asked, picture, {"max_new_tokens": 1})
        encode = self.tokenizer.encode if isinstance(asked, Prompt) else self._encode_answer
        texts = [encode(one) if isinstance(one, str) else one for one in continuations]
        for tokens in texts:
            self._check(prompt, tokens)
        scores = self._all([partial(self.submit_score, prompt, tokens) for tokens in texts])
        if any(chunks[-1].finish is Finish.CANCELLED for _, chunks in scores):
            raise ClosedError("the model was closed before it had scored all; load it again")
        return [tuple(each.logprob for each in chunks[-1].logprobs) for _, chunks in scores]

    def submit_score(
        self, prompt: Prompt, continuation: Sequence[int], listen: Listener, choices: Sequence[int] = ()
    ) -> RequestTicket:
        """Hand in a request for log-probabilities; see Scorer."""
        self._check(prompt, (*continuation, *choices))
        return self._service.score(prompt, tuple(continuation), listen, tuple(choices))

    def answer_tokens(self, text: str) -> list[int]:
        """Return the ids of a whole answer; see Scorer. What ends it is EOS where the template has no text for it."""
        ends = [stop for stop in self.template.stop if self.template.after_answer.startswith(stop)]
        if ends and ends[0] not in self.template.control:
            return self._encode_answer(text + ends[0])
        end = self.tokenizer.encode(ends[0], has_special=True) if ends else [self.tokenizer.eos]
        return [*self._encode_answer(text), *end]

    def _all(self, requests: Sequence[Callable[[Listener], RequestTicket]]) -> list[tuple[RequestTicket, list[Chunk]]]:
        """Hand requests in, as many as may wait at a time, and wait until all are answered."""
        pending: deque[tuple[RequestTicket, SimpleQueue[Chunk | SphinxError]]] = deque()
        done = []

        def wait() -> None:
            ticket, hears = pending[0]
            chunks = [_heard(hears)]
            while chunks[-1].finish is None:
                chunks.append(_heard(hears))
            done.append((ticket, chunks))
            pending.popleft()

        try:
            for request in requests:
                hears: SimpleQueue[Chunk | SphinxError] = SimpleQueue()
                while True:
                    try:
                        pending.append((request(hears.put), hears))
                        break
                    except QueueFullError:
                        if not pending:
                            raise
                    wait()
            while pending:
                wait()
        finally:
            for ticket, _ in pending:
                ticket.cancel()
        return done

    def _ready(self, asked: Asked, picture: Shown, sampling: Mapping[str, Any]) -> tuple[Prompt, Sampling]:
        """Make what is asked a prompt, and say how it is answered."""
        how = _sampling_of(sampling, self.positions)
        if isinstance(asked, Prompt):
            if picture is not None:
                raise DataError("picture: the prompt that it is given with has its own; make the prompt with it")
            if sampling.get("max_new_tokens") is None:
                most = max(1, self.positions - len(asked.tokens))
                how = replace(how, max_new_tokens=min(how.max_new_tokens, most))
            return asked, how
        messages = [Message("user", asked)] if isinstance(asked, str) else asked
        chat = self.chat(messages, self._shown(picture), how.max_new_tokens)
        return chat.prompt, replace(how, stop=(*how.stop, *chat.stop))

    def _encode_answer(self, text: str) -> list[int]:
        """Return the tokens that a text has as an answer, behind what the template puts before it."""
        lead = self.template.before_answer
        anchor = ":" if lead else "\n"  # as templates end there; no token reaches over it
        before, whole = self.tokenizer.encode(anchor), self.tokenizer.encode(anchor + lead + text)
        is_apart = whole[: len(before)] == before
        return whole[len(before) :] if is_apart else self.tokenizer.encode(text)

    def _check(self, prompt: Prompt, continuation: Sequence[int] = ()) -> None:
        """Raise a DataError where tokens are not of the model, which would end it for everybody."""
        tokens = (*prompt.tokens, *continuation)
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < self._vocabulary:
                raise DataError(
                    f"token {token}: ids of {self.name} are 0 to {self._vocabulary - 1}; give those of its tokenizer"
                )
        if prompt.picture is not None and len(prompt.tokens) <= prompt.picture.positions:
            raise DataError(
                f"prompt of {len(prompt.tokens)} tokens: its picture alone takes {prompt.picture.positions} behind "
                f"BOS; make it by Model.prompt or Model.chat"
            )

    def _shown(self, picture: Shown) -> Picture | None:
        if picture is None or isinstance(picture, bytes):
            return None if picture is None else self.picture(picture)
        try:
            content = Path(picture).read_bytes()
        except OSError as error:
            raise DataError(f"picture={picture}: {error.strerror}; give a picture that can be read") from error
        return self.picture(content)

    # its experts

    def order_experts(self, order: ExpertOrder) -> list[WatchedExperts]:
        """Have all ranks obey an order about their MoE experts, while no request is under way.

        Args:
            order: what to do; see `generation.expert_orders`.

        Returns:
            What has been recorded, of each replica and stage, where that is asked for.

        Raises:
            ConfigError: the model has no experts, or fewer.
            BusyError: a request is under way.
        """
        if isinstance(order, Restrict):
            order = Restrict(order.choice.fitting(self.language))
        seen = self._service.call(lambda: self._job.executor.order_experts(order))
        if isinstance(order, Restrict):
            self.identity = {**self._whole, **order.choice.told}
        return seen

    # its life

    def token_text(self, token: int) -> str:
        """Return the text that a token stands for; see Answers."""
        return self.tokenizer.text_of(token)

    def load(self) -> Load:
        """Return what the model is at; see Answers."""
        if self._service.error is not None:
            raise self._service.error
        self._job.check()
        return self._service.load()

    def close(self) -> None:
        """End the answers that are under way, and let the other ranks of the model go; a second time does nothing.

        Where a rank is gone this ends the process, since what is left of the job cannot be ended otherwise.
        """
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        self._service.close(finish=False)
        if self._service.error is not None and not self._job.is_alone:
            self._job.leave(self._service.error)
        self._job.close()


def _sampling_of(given: Mapping[str, Any], positions: int) -> Sampling:
    """Return how an answer is drawn; a stop string may be given by itself."""
    known = [item.name for item in fields(Sampling)]
    if unknown := sorted(given.keys() - set(known)):
        raise ConfigError(f"{unknown[0]}={given[unknown[0]]}: unknown; {nearest(unknown[0], known)}")
    stop = () if given.get("stop") is None else given["stop"]
    new = given.get("max_new_tokens")
    fitting = {
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "max_new_tokens": default_new_tokens(positions) if new is None else new,
    }
    return Sampling(**{**given, **fitting})


def _heard(hears: "SimpleQueue[Chunk | SphinxError]") -> Chunk:
    """Wait for the next part of an answer."""
    one = hears.get()
    if isinstance(one, SphinxError):
        raise one
    return one
