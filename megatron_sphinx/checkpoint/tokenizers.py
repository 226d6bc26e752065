"""Whether two checkpoints were made with one tokenizer, by the files of it that lie beside them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint
from megatron_sphinx.checkpoint.json_files import read_json
from megatron_sphinx.errors import CheckpointError

# Files that say which text a token id stands for; others say how a conversation is written.
_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tekken.json")
_FREE = {"padding", "truncation", "version"}  # of tokenizer.json: how a batch is made of texts


def same_tokenizer(first: SourceCheckpoint, other: SourceCheckpoint) -> list[str]:
    """Check that the tokenizers that lie beside two checkpoints are one.

    Returns:
        A line where only one of them has a tokenizer, so that nothing can be compared.

    Raises:
        CheckpointError: they differ.
    """
    ours, theirs = ([name for name in _FILES if (one.folder / name).is_file()] for one in (first, other))
    for name in ours:
        if name in theirs and _content(first.folder / name) != _content(other.folder / name):
            raise CheckpointError(
                f"{other.folder}: {name} differs from that of {first.folder}; "
                f"give checkpoints with the same model, encoders and tokenizer"
            )
    if bool(ours) == bool(theirs):
        return []
    has, lacks = (first, other) if ours else (other, first)
    return [f"{lacks.folder}: has no tokenizer beside it to compare with that of {has.folder}"]


def _content(path: Path) -> Any:
    """What counts of a file."""
    if path.suffix != ".json":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    values: Mapping[str, Any] = read_json(path)
    return json.dumps({key: value for key, value in values.items() if key not in _FREE}, sort_keys=True)
