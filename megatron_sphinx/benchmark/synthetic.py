"""Made-up data of a configured step's composition, so that a cluster can be measured before anything is downloaded.

Pictures, captions and documents are written by the package's own writers and read by its own loader; the encoders'
weights are drawn. Losses mean nothing.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_sphinx.config import Config
from megatron_sphinx.data.config import DataSource
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.pairs import index_shards, write_shards
from megatron_sphinx.prepare.token_writer import TokenWriter

# Sizes of what is made: a picture's shorter side in pixels (least, most) and its largest aspect ratio; log-normal
# lengths in tokens (median, sigma, most); how many pictures, and how many tokens of text.
SHORTER_SIDE, MOST_RATIO, QUALITY = (224, 512), 2.0, 90
CAPTION, DOCUMENT = (16, 0.6, 128), (400, 1.0, 16384)
PICTURES, TEXT_TOKENS = 256, 2**20
PATHS = [
    *(f"data.{name}=synthetic" for name in ("pairs", "conversations", "text", "tokenizer")),  # until they are made
    *(f"validation.{name}=[]" for name in ("pairs", "conversations", "text")),  # what is measured validates nothing
    "validation.samples=0",
]
DESCRIPTION = (
    f"{PICTURES} JPEG pictures (quality {QUALITY}) of smooth noise, shorter side {SHORTER_SIDE[0]} to {SHORTER_SIDE[1]}"
    f" pixels, sides up to {MOST_RATIO:g}:1; captions and documents of random words, one token each, lengths log-normal"
    f" with medians {CAPTION[0]} and {DOCUMENT[0]}, sigmas {CAPTION[1]} and {DOCUMENT[1]}; used again and again;"
    " weights of the encoders drawn"
)


def prepared(config: Config, folder: Path) -> Config:
    """Make up the data of a configuration, unless it is there, and return the configuration that reads it.

    Args:
        config: the configuration; its paths of data are replaced, and its weights are drawn.
        folder: where the data is made.

    Raises:
        ConfigError: the vocabulary has no room for a word.
    """
    data, vocabulary = config.data, config.model.vocabulary
    kind = "conversations" if data.conversations_per_step else "pairs"
    folder = folder.resolve() / f"{kind}_of_{vocabulary}_words"
    path = folder / "tokenizer.model"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_tokenizer(vocabulary))
        tokenizer, rng = Tokenizer(path), np.random.default_rng(0)
        _write_samples(folder, kind, tokenizer, rng)
        _write_text(folder / "text", tokenizer, rng)
        (folder / "done").touch()
    sources: dict[str, Any] = {"pairs": (), "conversations": ()}
    sources |= {name: (DataSource(path=str(folder / name)),) for name in (kind, "text")}
    return replace(
        config,
        data=replace(data, tokenizer=str(path), **sources),
        model=replace(config.model, weights=None),
        vision=replace(config.vision, experts=tuple(replace(item, weights="random") for item in config.vision.experts)),
    )


def _tokenizer(vocabulary: int) -> bytes:
    """Make a sentencepiece model of so many pieces, all words but three.

    Raises:
        ConfigError: the vocabulary has no room for a word.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    if vocabulary < 4:
        raise ConfigError(f"model.vocabulary={vocabulary}: synthetic text needs a word; use at least 4")
    model = ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}  # unknown, control, control
    for piece in (*kinds, *(f"\u2581{_word(number)}" for number in range(vocabulary - len(kinds)))):
        model.pieces.add(piece=piece, score=0.0 if piece in kinds else -1.0, type=kinds.get(piece, 1))
    model.trainer_spec.model_type = 1  # unigram
    model.trainer_spec.vocab_size = vocabulary
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    content: bytes = model.SerializeToString()
    return content


def _word(number: int) -> str:
    """The word with a number: a letter for each of its digits."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def _lengths(count: int, distribution: tuple[int, float, int], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw `count` lengths from a log-normal distribution, given as median, sigma and largest length."""
    center, sigma, largest = distribution
    return np.clip(np.rint(rng.lognormal(np.log(center), sigma, count)), 1, largest).astype(np.int64)


def _sentences(vocabulary: int, rng: np.random.Generator) -> Iterator[str]:
    """Yield a caption of random words for each picture."""
    for length in _lengths(PICTURES, CAPTION, rng):
        yield " ".join(_word(int(number)) for number in rng.integers(vocabulary - 3, size=length))


def _picture(rng: np.random.Generator) -> bytes:
    """Draw a picture of smooth noise with some fine noise on it, as the bytes of a JPEG."""
    short = int(rng.integers(*SHORTER_SIDE))
    size = [short, round(short * MOST_RATIO ** float(rng.random()))]
    rng.shuffle(size)
    coarse = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((size[0], size[1]))
    fine = rng.integers(-12, 13, size=(size[1], size[0], 1))
    content = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)).save(content, "jpeg", quality=QUALITY)
    return content.getvalue()


def _write_samples(folder: Path, kind: str, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    """Write pictures, and an index of pairs, or of conversations of one question and one answer."""
    pictures, vocabulary = folder / "pictures", tokenizer.identity.vocabulary
    pictures.mkdir(exist_ok=True)
    names = [f"{number:06d}" for number in range(PICTURES)]
    captions = list(_sentences(vocabulary, rng))
    for name, caption in zip(names, captions, strict=True):
        (pictures / f"{name}.jpg").write_bytes(_picture(rng))
        (pictures / f"{name}.txt").write_text(caption)
    if kind == "pairs":
        index_shards(write_shards(pictures, folder / "shards"), folder / kind, tokenizer)
        return
    items = []
    for name, answer, question in zip(names, captions, _sentences(vocabulary, rng), strict=True):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        items.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
    (folder / "conversations.json").write_text(json.dumps(items))
    index_conversations([folder / "conversations.json"], folder / kind, tokenizer, images=pictures)


def _write_text(prefix: Path, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    """Write documents of random tokens."""
    tokens = TEXT_TOKENS
    with TokenWriter(prefix, tokenizer) as writer:
        while tokens > 0:
            (length,) = _lengths(1, DOCUMENT, rng)
            words = rng.integers(3, tokenizer.identity.vocabulary, size=length).tolist()
            writer.add([tokenizer.bos, *words, tokenizer.eos])
            tokens -= int(length) + 2
