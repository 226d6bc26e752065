"""The data of a run as it is opened at the start, and the planner that composes steps from it."""

from dataclasses import dataclass

from megatron_sphinx.data.config import DataConfig
from megatron_sphinx.data.content import BESIDE, Memory, Scan
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.model.views import encoded_views, image_positions


@dataclass(frozen=True)
class Sources:
    """What a run reads: its tokenizer and the indexes of its two streams.

    Attributes:
        samples: index of pairs or of conversations; None where steps take none.
        text: index of text; None where steps take none.
    """

    tokenizer: Tokenizer
    samples: SampleIndex | None
    text: TextIndex | None

    def check(self, memory: Memory = BESIDE) -> None:
        """Raise DataError where a file is missing or has changed, or was made with another tokenizer."""
        for index in (self.samples, self.text):
            if index is not None:
                index.check(self.tokenizer, memory)

    def scan(self, memory: Memory) -> Scan:
        """Return the scan that will read, in the background, all data whose content is not known yet."""
        indexes = [index for index in (self.samples, self.text) if index is not None]
        data = [source for index in indexes for source in index.content_sources]
        return Scan(data, self.tokenizer.identity.vocabulary, memory)


def open_sources(config: DataConfig, model: LanguageConfig) -> Sources:
    """Open what the training takes; this is cheap, and every rank does it.

    Raises:
        DataError: a file is missing or damaged, or a vocabulary differs.
    """
    tokenizer = Tokenizer(config.tokenizer)
    tokenizer.check_vocabulary(config.tokenizer, model.vocabulary)
    key = "conversations" if config.conversations_per_step else "pairs"
    samples = SampleIndex([source.path for source in config.samples], key) if config.samples_per_step else None
    text = TextIndex([source.path for source in config.text]) if config.text_tokens_per_step else None
    return Sources(tokenizer, samples, text)


def make_planner(
    config: DataConfig,
    sources: Sources,
    model: LanguageConfig,
    vision: VisionConfig,
    *,
    replicas: int,
    seed: int,
    multiple: int = 1,
) -> Planner:
    """Make the planner of a run, which is the same on every rank.

    Args:
        config: the streams and their shares.
        sources: the opened data.
        model: decides what a row costs.
        vision: decides the positions that an image takes.
        replicas: how many data-parallel replicas there are.
        seed: of the run.
        multiple: the positions of a replica's micro-batch are padded to a multiple of this.
    """

    def tokens_of_views(width: int, height: int) -> tuple[int, tuple[int, ...]]:
        views = encoded_views(width, height, vision)
        return image_positions(len(views), vision), views

    samples = sources.samples
    if samples is not None and vision.resize == "accessory":  # which leaves images as they are stored
        samples = samples.as_stored()
    return Planner(
        config,
        samples=samples,
        text=sources.text,
        tokens_of_views=tokens_of_views,
        cost=model.train_flops,
        replicas=replicas,
        seed=seed,
        multiple=multiple,
    )
