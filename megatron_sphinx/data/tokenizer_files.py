"""Which file a tokenizer is read from, and which tokens the files beside a tokenizer.json name as BOS and EOS."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.parsing import ParseError, read_json

SENTENCEPIECE, JSON = "tokenizer.model", "tokenizer.json"
KEY = "data.tokenizer"
# Where a token is named, the one that counts most first, and under which keys of its own BOS and EOS are there.
_TEXTS, _IDS = "{}_token", "{}_token_id"
_BESIDE = {
    "tokenizer_config.json": _TEXTS,
    "special_tokens_map.json": _TEXTS,
    "generation_config.json": _IDS,
    "config.json": _IDS,
}
BESIDE = tuple(_BESIDE)[:2]  # what belongs to the tokenizer alone
# Names that released tokenizers have, for one that comes alone; <|endoftext|> stands between documents.
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]", "<|endoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]", "<|im_end|>")


class NamedToken(NamedTuple):
    """A token that a file names.

    Attributes:
        file: the file.
        key: where in it.
        token: its text or its id.
    """

    file: Path
    key: str
    token: str | int


def tokenizers_in(folder: Path) -> list[Path]:
    """List the files of the tokenizer in a folder: tokenizer.model and tokenizer.json, the one that is taken first."""
    return [folder / name for name in (SENTENCEPIECE, JSON) if (folder / name).is_file()]


def tokenizer_file(path: Path) -> Path:
    """Return the file that a tokenizer is read from: that which is given, or the one in a folder that is given.

    Raises:
        DataError: the folder holds none.
    """
    if not path.is_dir():
        return path
    found = tokenizers_in(path)
    if not found:
        raise DataError(f"{KEY}={path}: holds no {SENTENCEPIECE} and no {JSON}; give a folder with one of them")
    return found[0]


def named_tokens(path: Path, name: str) -> Iterator[NamedToken]:
    """List what the files beside a tokenizer.json name as one of its special tokens, the one that counts most first.

    Args:
        path: the tokenizer.json.
        name: bos or eos.

    Raises:
        DataError: such a file is damaged.
    """
    for file, pattern in _BESIDE.items():
        if (beside := path.with_name(file)).is_file():
            key = pattern.format(name)
            if (token := _token(_read(path, beside).get(key))) is not None:
                yield NamedToken(beside, key, token)


def _read(path: Path, beside: Path) -> Mapping[str, Any]:
    try:
        values = read_json(beside)
    except (OSError, ParseError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{KEY}={path}: {beside.name} beside it cannot be read ({reason}); fetch it again") from error
    if not isinstance(values, dict):
        raise DataError(f"{KEY}={path}: {beside.name} beside it holds no keys: {shortened(values)}; fetch it again")
    return values


def _token(value: Any) -> str | int | None:
    """What a value names: text, an object with a content, an id, or a list whose first one counts."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("content")
    return value if type(value) in (str, int) else None
