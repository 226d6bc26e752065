"""A model that answers: loaded from a run or a checkpoint, asked from Python, by many threads if need be."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError, SphinxError
from megatron_sphinx.generation.answering import ChatPrompt, Listener, Load, Message
from megatron_sphinx.generation.chat import ends_of, make_chat
from megatron_sphinx.generation.engine import Language
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.pictures import picture_of
from megatron_sphinx.generation.requests import Chunk, Generation, Picture, Prompt, Sampling
from megatron_sphinx.generation.service import RequestTicket, Service
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
        options: the attributes of `LoadOptions`; those of `ParallelConfig` may be given by themselves: `tensor=2`.

    Raises:
        SphinxError: the user's mistake, such as no checkpoint, a damaged one, or a layout that does not fit.
    """
    job = start(Path(path), LoadOptions.of(**options))
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
        tokenizer: its tokenizer.
        template: what stands around the messages of a chat.
        cache_bytes: what the key-value cache takes on this rank.
    """

    def __init__(self, job: Job, template: str | None, limits: Limits) -> None:
        source = job.source
        self._job, self._vision = job, source.vision
        self.name, self.positions, self.cache_bytes = source.name, job.executor.positions, job.cache_bytes
        self.has_vision = self._vision is not None
        self.padding = self._vision.padding if self._vision else "centre"
        self.tokenizer = Tokenizer(source.tokenizer)
        self.tokenizer.check_vocabulary(str(source.tokenizer), source.language.vocabulary)
        self.template: ChatTemplate = template_of(template or self._likely_template())
        language = Language(ends=ends_of(self.template, self.tokenizer), texts=partial(Detokenizer, self.tokenizer))
        self._service = Service(job.executor, language, limits)

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
        if self._vision is None:
            raise DataError(f"{self.name}: reads text only; leave the picture out, or load a model with projections")
        return picture_of(content, self._vision)

    def chat(
        self, messages: Sequence[Message], picture: Picture | None, max_new_tokens: int = Sampling.max_new_tokens
    ) -> ChatPrompt:
        """Make a chat ready to be answered; see Answers."""
        return make_chat(
            messages, picture, self.template, self.tokenizer, positions=self.positions, max_new_tokens=max_new_tokens
        )

    def prompt(self, text: str, picture: Shown = None) -> Prompt:
        """Make a prompt of a text as it is, without a template: BOS, the picture, the text."""
        shown = self._shown(picture)
        head = [self.tokenizer.bos] + [0] * (shown.positions if shown else 0)
        return Prompt((*head, *self.tokenizer.encode(text)), shown)

    # answers

    def submit(self, prompt: Prompt, sampling: Sampling, listen: Listener) -> RequestTicket:
        """Hand in a request; see Answers."""
        return self._service.submit(prompt, sampling, listen)

    def stream(self, asked: Asked, picture: Shown = None, **sampling: Any) -> Iterator[Chunk]:
        """Answer a question, a part at a time.

        Args:
            asked: the question; or a chat; or a prompt, to which nothing is added.
            picture: what it is about: the content of a file, or its path; not for a prompt, which has its own.
            sampling: the attributes of Sampling.

        Yields:
            The parts of the answer, the last one with its finish. Closing the generator ends the request.

        Raises:
            SphinxError: it cannot be asked so, or the model fails.
        """
        prompt, how = self._ready(asked, picture, Sampling(**sampling))
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
            sampling: the attributes of Sampling, for all of them.

        Raises:
            DataError: there are more or fewer pictures than questions; or a question cannot be asked so.
            SphinxError: the model fails.
        """
        shown = pictures if pictures is not None else [None] * len(asked)
        if len(shown) != len(asked):
            raise DataError(f"{len(shown)} pictures for {len(asked)} questions; give None where there is no picture")
        how = Sampling(**sampling)
        ready = [self._ready(one, picture, how) for one, picture in zip(asked, shown, strict=True)]
        heard: list[SimpleQueue[Chunk | SphinxError]] = [SimpleQueue() for _ in ready]
        tickets = [
            self._service.submit(prompt, each, hears.put) for (prompt, each), hears in zip(ready, heard, strict=True)
        ]
        answers = []
        for (prompt, _), ticket, hears in zip(ready, tickets, heard, strict=True):
            chunks = [_heard(hears)]
            while chunks[-1].finish is None:
                chunks.append(_heard(hears))
            answers.append(Generation.of(chunks, len(prompt.tokens), ticket.cached_tokens))
        return answers

    def score(
        self, asked: Asked, continuations: Sequence[str | Sequence[int]], picture: Shown = None
    ) -> list[tuple[float, ...]]:
        """Compute how likely texts are to follow; what they follow is computed once.

        Args:
            asked: what they follow; see `stream`.
            continuations: the texts, or ids of their tokens.
            picture: what they are about; see `stream`.

        Returns:
            For each continuation the log-probability of each of its tokens, in nats.

        Raises:
            DataError: there is nothing to score, or it does not fit.
            SphinxError: the model fails.
        """
        prompt, _ = self._ready(asked, picture, Sampling(max_new_tokens=1))
        heard: list[SimpleQueue[Chunk | SphinxError]] = [SimpleQueue() for _ in continuations]
        for one, hears in zip(continuations, heard, strict=True):
            tokens = self.tokenizer.encode(one) if isinstance(one, str) else one
            self._service.score(prompt, tuple(tokens), hears.put)
        return [tuple(each.logprob for each in _heard(hears).logprobs) for hears in heard]

    def _ready(self, asked: Asked, picture: Shown, sampling: Sampling) -> tuple[Prompt, Sampling]:
        """Make what is asked a prompt, and say how it is answered."""
        if isinstance(asked, Prompt):
            if picture is not None:
                raise DataError("picture: the prompt that it is given with has its own; make the prompt with it")
            return asked, sampling
        messages = [Message("user", asked)] if isinstance(asked, str) else asked
        chat = self.chat(messages, self._shown(picture), sampling.max_new_tokens)
        return chat.prompt, replace(sampling, stop=(*sampling.stop, *chat.stop))

    def _shown(self, picture: Shown) -> Picture | None:
        if picture is None or isinstance(picture, bytes):
            return None if picture is None else self.picture(picture)
        try:
            content = Path(picture).read_bytes()
        except OSError as error:
            raise DataError(f"picture={picture}: {error.strerror}; give a picture that can be read") from error
        return self.picture(content)

    # its life

    def token_text(self, token: int) -> str:
        """Return what a token alone decodes to; a part of a character is U+FFFD."""
        return self.tokenizer.decode([token])

    def load(self) -> Load:
        """Return what the model is at; see Answers."""
        if self._service.error is not None:
            raise self._service.error
        return self._service.load()

    def close(self) -> None:
        """End the answers that are under way, and let the other ranks of the model go."""
        self._service.close(finish=False)
        if self._service.error is not None:
            self._job.leave(self._service.error)
        self._job.close()


def _heard(hears: "SimpleQueue[Chunk | SphinxError]") -> Chunk:
    """Wait for the next part of an answer."""
    one = hears.get()
    if isinstance(one, SphinxError):
        raise one
    return one
