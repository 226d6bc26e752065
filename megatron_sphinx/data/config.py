"""What `data:` and `validation:` of a configuration say: where samples and text come from, and what steps take."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.ranges import Range, check_ranges
from megatron_sphinx.values import check_choice

_AMOUNT = Range(least=0, most=10**9, why="0 is for none")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of prepared data, and its share of its stream.

    Attributes:
        path: folder of prepared pairs, conversations or text; for text also the prefix of Megatron's .bin and .idx.
        weight: share of the stream's samples or tokens that this source gives, beside the weights of the others; above
            0. With null for all sources they are one, and each gives what it has.
    """

    path: str
    weight: Annotated[float | None, Range(above=0, most=1e15, why="a source that gives nothing is left out")] = None

    @classmethod
    def from_text(cls, path: str) -> "DataSource":
        """Return the source that a configuration gives by its path alone."""
        return cls(path=path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The two streams, of samples and of text, and what a step takes of each.

    Attributes:
        pairs: folders of image-text pairs made by `megatron-sphinx prepare pairs`: one path, or a list of paths or of
            {path, weight}.
        conversations: folders of conversations made by `megatron-sphinx prepare conversations`, given as those of
            data.pairs are, and instead of them.
        text: folders of text made by `megatron-sphinx prepare text`, or prefixes of Megatron's .bin and .idx, given as
            the folders of data.pairs are.
        tokenizer: what all of the data was made with: a sentencepiece model, a tokenizer.json, or a folder with one.
        pairs_per_step (pairs): image-text pairs in every optimizer step; 0 for a run without pairs.
        conversations_per_step (conversations): conversations in every optimizer step, with an image or without; 0 for
            a run without conversations.
        text_tokens_per_step (tokens): text tokens in every optimizer step; 0 for a run without text.
        text_order: how text documents follow each other: parts, cut into parts of at most data.sequence_length tokens
            that lie far apart, so that each step's text is of many documents; documents, each whole behind the one
            before it, as runs were made before there was this key; or auto, parts for a run that begins, and for one
            that goes on the order that it began with.
        sequence_length (positions): the most positions of a row; longer documents are cut in consecutive segments,
            longer captions lose their end, longer conversations their last turns.
        row_multiple (rows): number that the rows of a step are a multiple of. The rows are of equal cost, so any number
            of replicas that divides it has even work; 1 takes as few rows as there can be. Long documents are cut where
            a row has its share of the cost, so let it be small beside the number of rows.
        micro_batch_rows (rows): the most rows that a replica computes at once; at least 1. With auto a run takes the
            most that fit into memory by the plan, prints them, and keeps them when it goes on.
        max_bad_share: share of the samples, from 0 to 1; the run stops when more than that could not be read.
        isolate_documents: whether attention stays inside each document and sample (true) or goes over the whole row.
        workers (threads): how many threads read and decode images on a rank; where shards are behind a URL, take
            several for each core.

    Source: SPHINX, arXiv:2311.07575, section 4.1: 640 pairs and 65,536 text tokens a step.
    """

    pairs: tuple[DataSource, ...] = ()
    conversations: tuple[DataSource, ...] = ()
    text: tuple[DataSource, ...] = ()
    tokenizer: str
    pairs_per_step: Annotated[int, _AMOUNT] = 640
    conversations_per_step: Annotated[int, _AMOUNT] = 0
    text_tokens_per_step: Annotated[int, _AMOUNT] = 65536
    text_order: str = "auto"
    sequence_length: Annotated[int, Range(least=1, most=2**24, why="a row holds tokens")] = 2048
    row_multiple: Annotated[int, Range(least=1, most=1_000_000, why="rows are whole")] = 8
    micro_batch_rows: Annotated[
        int | Literal["auto"], Range(least=1, most=1_000_000, why="a replica computes whole rows")
    ] = 1
    max_bad_share: Annotated[float, Range(least=0, most=1, why="it is a share of the samples")] = 0.05
    isolate_documents: bool = True
    workers: Annotated[int, Range(least=1, most=1024, why="somebody must read, and each is a thread")] = 2

    def __post_init__(self) -> None:
        check_choice("data.text_order", self.text_order, ("auto", "parts", "documents"))
        check_ranges(self, "data.")
        for amount, name in _AMOUNTS.items():
            value, sources = getattr(self, amount), getattr(self, name)
            if value and not sources:
                raise ConfigError(f"data.{name}: not given, but data.{amount}={value}; give it, or set that to 0")
            _check_weights(f"data.{name}", sources)
        if self.pairs_per_step and self.conversations_per_step:
            raise ConfigError(
                f"data.conversations_per_step={self.conversations_per_step}: data.pairs_per_step={self.pairs_per_step} "
                f"too; a run takes one of them: set the other to 0"
            )
        if not any(getattr(self, amount) for amount in _AMOUNTS):
            raise ConfigError(
                "data.pairs_per_step=0: data.conversations_per_step and data.text_tokens_per_step are 0 too; "
                "a step needs one of them"
            )

    @property
    def rows_at_once(self) -> int:
        """The number of `micro_batch_rows`, in a configuration whose values of auto have been taken."""
        assert self.micro_batch_rows != "auto", "data.micro_batch_rows=auto: no number has been taken yet"
        return self.micro_batch_rows

    @property
    def samples(self) -> tuple[DataSource, ...]:
        """Sources of the samples: of the pairs or of the conversations, whichever the run takes."""
        return self.conversations if self.conversations_per_step else self.pairs

    @property
    def samples_per_step(self) -> int:
        """How many pairs or conversations every optimizer step takes."""
        return self.conversations_per_step or self.pairs_per_step


_AMOUNTS = {"pairs_per_step": "pairs", "conversations_per_step": "conversations", "text_tokens_per_step": "text"}


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out data, whose loss is computed now and then, and which nothing is trained on.

    Attributes:
        pairs: folders of image-text pairs, given as those of data.pairs are. Without pairs, conversations and text
            nothing is validated.
        conversations: folders of conversations, given as those of data.pairs are, and instead of pairs.
        text: folders of text or prefixes of Megatron's .bin and .idx, given as the folders of data.pairs are.
        interval (steps): how often the loss is computed; behind the last step it always is.
        steps (steps): how many steps' worth of data a validation takes, always the same; each has as many samples and
            text tokens as a step of the training, or as there are where those are fewer, and nothing is taken twice.
        samples: how many of the first samples are answered in each validation, for samples.md and TensorBoard; 0 for
            none.
    """

    pairs: tuple[DataSource, ...] = ()
    conversations: tuple[DataSource, ...] = ()
    text: tuple[DataSource, ...] = ()
    interval: Annotated[int, Range(least=1, most=10**9, why="a validation is made every so many steps")] = 1000
    steps: Annotated[int, Range(least=1, most=1_000_000, why="a validation computes something")] = 1
    samples: Annotated[int, Range(least=0, most=1000, why="somebody is to look at them")] = 0

    def __post_init__(self) -> None:
        check_ranges(self, "validation.")
        for name in _AMOUNTS.values():
            _check_weights(f"validation.{name}", getattr(self, name))
        if self.pairs and self.conversations:
            raise ConfigError("validation.conversations: validation.pairs are given too; leave out one of them")
        if self.samples and not (self.pairs or self.conversations):
            raise ConfigError(
                f"validation.samples={self.samples}: there are neither validation.pairs nor validation.conversations "
                f"to take them from; give some, or set this to 0"
            )

    @property
    def is_on(self) -> bool:
        """Whether there is anything to validate on."""
        return bool(self.pairs or self.conversations or self.text)

    def check_amounts(self, data: DataConfig) -> None:
        """Refuse data that a step of the training says no amount for.

        Raises:
            ConfigError: the training takes no samples, or no text, but the validation has some.
        """
        for name, amount, what in (
            (
                "conversations" if self.conversations else "pairs",
                data.samples_per_step,
                "no pairs and no conversations",
            ),
            ("text", data.text_tokens_per_step, "no text"),
        ):
            if getattr(self, name) and not amount:
                raise ConfigError(
                    f"validation.{name}: a validation takes as many as a step of the training, which takes {what}; "
                    f"leave this out"
                )

    def data_of(self, data: DataConfig, samples: int, tokens: int) -> DataConfig:
        """Say what the steps of a validation take, and how their rows are filled: as those of the training.

        Args:
            data: of the training.
            samples: that there are.
            tokens: of text that there are.
        """
        amount = min(data.samples_per_step, samples)
        return replace(
            data,
            pairs=self.pairs,
            conversations=self.conversations,
            text=self.text,
            pairs_per_step=amount if self.pairs else 0,
            conversations_per_step=amount if self.conversations else 0,
            text_tokens_per_step=min(data.text_tokens_per_step, tokens) if self.text else 0,
            text_order="parts",
        )


def _check_weights(key: str, sources: tuple[DataSource, ...]) -> None:
    """Raise ConfigError where some of the sources of a stream have a weight and others have none."""
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError(f"{key}: some of the sources have no weight; give one to all, or to none")
