"""The model that commands load; a place holder until the engine is there."""

from pathlib import Path

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.generation.answering import Answers


def load(path: str | Path, *, tensor: int = 1) -> Answers:
    """Load a model; raise ConfigError, since there is no engine yet."""
    raise ConfigError(f"{path}: nothing loads models yet (tensor={tensor}); wait for the engine")
