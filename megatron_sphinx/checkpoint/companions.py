"""What lies beside the tensors of a checkpoint and goes along with them: its tokenizer, and how it generates text.

A checkpoint of a run has neither in its folder: the run's configuration knows where they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_sphinx.checkpoint.digests import sha256_of
from megatron_sphinx.checkpoint.encoders import ENCODERS
from megatron_sphinx.checkpoint.formats.format import Format, SourceCheckpoint
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.data.tokenizer_files import BESIDE, JSON, SENTENCEPIECE, tokenizers_in
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.settings.keys import shortened

GENERATION = "generation_config.json"
TOKENIZERS = (SENTENCEPIECE, JSON)
FILES = (
    *TOKENIZERS, *BESIDE, "added_tokens.json", "vocab.json",
    "merges.txt", "tekken.json", "tokenizer.model.v3", "chat_template.jinja", "chat_template.json",
    GENERATION,
)  # fmt: skip
_CODE = "tokenization_*.py"  # of tokenizers that transformers does not have, such as InternLM2's
_CONFIG = "config.yaml"
_REPLACED = {"config.json", "params.json", "meta.json", "metadata.json", "checkpoint.json", "common.pt", ".metadata",
             "interpolation.json"}  # fmt: skip
_WEIGHTS = {".safetensors", ".bin", ".pth", ".distcp"}


@dataclass(frozen=True)
class Companions:
    """What goes along with the tensors of a checkpoint.

    Attributes:
        files: where each file lies, by its name.
        kept: what transformers' configuration has beside the weights.
        notes: what is not there, or stays behind, a line each.
    """

    files: dict[str, Path] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def companions_of(checkpoint: SourceCheckpoint) -> Companions:
    """Find what goes along with a checkpoint: in its folder, or where the configuration of its run says."""
    folder = checkpoint.folder
    files = _files_in(folder)
    left = sorted(path.name for path in folder.iterdir() if _is_left(path, checkpoint) and path.name not in files)
    notes = (f"{folder}: {', '.join(left)} stays behind",) if left else ()
    found = Companions(files, checkpoint.kept, notes)
    run = _run_of(checkpoint)
    return _of_run(found, checkpoint, run) if run else found


def _files_in(folder: Path) -> dict[str, Path]:
    paths = [*(folder / name for name in FILES), *sorted(folder.glob(_CODE))]
    return {path.name: path for path in paths if path.is_file()}


def _is_left(path: Path, checkpoint: SourceCheckpoint) -> bool:
    """Whether a conversion writes nothing in place of something in the folder."""
    is_other = path.name not in _REPLACED and path.suffix not in _WEIGHTS and path.name != ENCODERS
    return is_other and not path.name.endswith(".index.json") and not path.name.startswith(".")


def _run_of(checkpoint: SourceCheckpoint) -> dict[str, Any]:
    """The configuration of the run that has written a checkpoint; nothing where there is none."""
    if "identity" not in checkpoint.description:
        return {}
    told, path = checkpoint.description.get("config"), checkpoint.folder.parent.parent / _CONFIG
    if not isinstance(told, dict) and path.is_file():
        try:
            told = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return {}
    return told if isinstance(told, dict) else {}


def _of_run(found: Companions, checkpoint: SourceCheckpoint, run: Mapping[str, Any]) -> Companions:
    """Add what the configuration of a run knows: its tokenizer, and the checkpoint that it began with."""
    identity = checkpoint.description.get("identity", {})
    data, model = (part if isinstance(part := run.get(name), dict) else {} for name in ("data", "model"))
    files, kept, notes = dict(found.files), dict(found.kept), list(found.notes)
    if origin := model.get("weights"):
        try:
            begun = companions_of(open_checkpoint(Path(str(origin)), checkpoint.model.language))
        except (CheckpointError, OSError) as error:
            begun = Companions(notes=(f"model.weights={origin}, which the run began with, tells nothing: {error}",))
        digests = [sha256_of(begun.files[name]) for name in TOKENIZERS if name in begun.files]
        if not digests or identity.get("tokenizer") in digests:
            files, kept = {**begun.files, **files}, {**begun.kept, **kept}
        notes += begun.notes if not begun.files else ()
    if (tokenizer := data.get("tokenizer")) and not any(name in files for name in TOKENIZERS):
        given = Path(str(tokenizer))
        beside, note = _tokenizer_of(given, identity.get("tokenizer"))
        files |= beside
        notes += [f"data.tokenizer={given}: {note}, so no tokenizer goes along"] if note else []
    if type(length := data.get("sequence_length")) is int:
        kept.setdefault("max_position_embeddings", length)
    return Companions(files, kept, tuple(notes))


def _tokenizer_of(given: Path, digest: str | None) -> tuple[dict[str, Path], str]:
    """Find the files of a run's tokenizer.

    Args:
        given: the file, or the folder that holds it.
        digest: of the file that the run had; None where nothing knows.

    Returns:
        The files by the names that they get, and what keeps them from going along.
    """
    path = next(iter(tokenizers_in(given)), given)
    if not path.is_file():
        return {}, "is not there"
    if digest and sha256_of(path) != digest:
        return {}, "is not the one that the run had"
    if path.suffix != ".json":
        return {SENTENCEPIECE: path}, ""
    return {JSON: path} | {name: path.with_name(name) for name in BESIDE if path.with_name(name).is_file()}, ""


def with_tokens(kept: Mapping[str, Any], files: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    """Add the first and last token of a sequence, as the tokenizer has them, where nothing else tells them."""
    yield from kept.items()
    names = {"bos_token_id", "eos_token_id"} - kept.keys()
    if names and (path := next((files[name] for name in TOKENIZERS if name in files), None)):
        from megatron_sphinx.data.tokenizer import Tokenizer  # libraries that few conversions need
        from megatron_sphinx.errors import DataError

        try:
            tokenizer = Tokenizer(path)
        except DataError:  # another kind of tokenizer under this name
            return
        tokens = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        yield from ((name, tokens[name]) for name in sorted(names))


def with_companions(checkpoint: SourceCheckpoint, to: Format) -> tuple[SourceCheckpoint, dict[str, Path]]:
    """Return a checkpoint that knows what goes along with it, and the files that do, by their names.

    Args:
        checkpoint: what is converted.
        to: the format that it is converted to.
    """
    found = companions_of(checkpoint)
    kept, notes = dict(with_tokens(found.kept, found.files)), [*checkpoint.notes, *found.notes]
    if not to.keeps_settings:
        lost = [f"{key}={shortened(value)}" for key, value in sorted(kept.items()) if value is not None]
        lost += [GENERATION] if found.files.pop(GENERATION, None) else []
        notes += [f"{checkpoint.folder}: {to.name} has no place for {', '.join(lost)}"] if lost else []
    return replace(checkpoint, kept=kept, notes=tuple(notes)), found.files
