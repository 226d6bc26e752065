"""What the commands, the server and the tests ask of a model that answers; `serving.model.Model` is the real one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_sphinx.errors import DataError, SphinxError
from megatron_sphinx.generation.requests import Chunk, Picture, Prompt, Sampling


class TooLongError(DataError):
    """A prompt that does not fit into the model with the tokens that its answer may have."""


class QueueFullError(SphinxError):
    """So many requests wait already that no more are taken now."""


@dataclass(frozen=True)
class Message:
    """What somebody said in a chat.

    Attributes:
        role: system, user or assistant.
        text: what was said.
    """

    role: str
    text: str


@dataclass(frozen=True)
class ChatPrompt:
    """A chat made ready to be answered.

    Attributes:
        prompt: its tokens.
        dropped: how many of its oldest turns did not fit, and were left out.
        stop: texts that end an answer in the template of the chat.
    """

    prompt: Prompt
    dropped: int
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """What a model is at, and what it has done since it was loaded.

    Attributes:
        waiting: requests that no token has been computed of.
        running: requests that are computed.
        cached_places: tokens that the caches of all replicas hold for requests and for later ones.
        places: tokens that they have room for.
        prompt_tokens: of all prompts so far.
        hit_tokens: how many of those were in the prefix cache.
        new_tokens: drawn so far.
        pictures: encoded so far.
        picture_hits: pictures asked about so far that needed no encoding.
        finished: requests that ended, cancelled ones among them.
    """

    waiting: int = 0
    running: int = 0
    cached_places: int = 0
    places: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    new_tokens: int = 0
    pictures: int = 0
    picture_hits: int = 0
    finished: int = 0


Listener = Callable[[Chunk | SphinxError], None]


class Ticket(Protocol):
    """A request that has been handed in."""

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt were in the prefix cache; known once the first chunk has come."""

    def cancel(self) -> None:
        """End the request; what it held is free soon. Its listener hears a last chunk, of finish CANCELLED."""


class Answers(Protocol):
    """A model that answers requests of many threads at once.

    Attributes:
        name: what users call it.
        positions: tokens of prompt and answer together, at most.
        padding: where a picture is in the square that boxes are fractions of: centre or corner.
        has_vision: whether it can be asked about pictures.
        identity: by names, what its answers follow from beside its weights: plain values.
        replicas: how many of it answer beside each other.
    """

    name: str
    positions: int
    padding: str
    has_vision: bool
    identity: Mapping[str, str]
    replicas: int

    def picture(self, content: bytes) -> Picture:
        """Look at the content of a picture's file.

        Raises:
            DataError: it is no picture that can be read, it is too large, or the model has no eyes.
        """

    def chat(
        self, messages: Sequence[Message], picture: Picture | None, max_new_tokens: int, answer_prefix: str = ""
    ) -> ChatPrompt:
        """Make a chat ready to be answered, its oldest turns left out where it is too long.

        Args:
            messages: a system prompt or none, then questions and answers in turn, a question last.
            picture: what they are about.
            max_new_tokens: tokens of the answer, at most.
            answer_prefix: what the answer is made to begin with, its spaces included; what is generated follows it.

        Raises:
            DataError: the roles are out of order.
            TooLongError: the picture, the system prompt and the last question alone are too long for the model with so
                many new tokens.
        """

    def submit(self, prompt: Prompt, sampling: Sampling, listen: Listener) -> Ticket:
        """Hand in a request; returns at once.

        Args:
            prompt: what to answer.
            sampling: how.
            listen: called in another thread with each part of the answer, the last one with its finish; or with an
                error, which is then the last it hears.

        Raises:
            TooLongError: prompt and answer do not fit into the model, or into its cache.
            QueueFullError: too many requests wait already.
        """

    def token_text(self, token: int) -> str:
        """Return the text that a token stands for inside of a text; a part of a character is U+FFFD."""

    def load(self) -> Load:
        """Return what the model is at.

        Raises:
            SphinxError: it answers nothing any more, since a rank of it was lost.
        """

    def close(self) -> None:
        """End the answers that are under way, and let the other ranks of the model go."""


class Scorer(Answers, Protocol):
    """A model that says how likely texts are, too."""

    def answer_tokens(self, text: str) -> list[int]:
        """Return the ids of a whole answer: its text as it follows a question, and what ends it in the template."""

    def submit_score(
        self, prompt: Prompt, continuation: Sequence[int], listen: Listener, choices: Sequence[int] = ()
    ) -> Ticket:
        """Hand in a request for log-probabilities; returns at once.

        Args:
            prompt: what the tokens follow.
            continuation: ids of tokens, each scored behind those before it; empty where there are choices alone.
            listen: called in another thread with one chunk, which has the log-probability of each token and then of
                each choice; or with an error.
            choices: ids of tokens of which each may come next behind the continuation.

        Raises:
            DataError: there is nothing to score, or it does not fit.
            QueueFullError: too many requests wait already.
        """
