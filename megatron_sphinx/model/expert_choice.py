"""Which MoE experts answer: how many of them compute a token, and which of them are kept at all. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import ConfigError, shortened
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.parsing import ParseError, read_json
from megatron_sphinx.ranges import Range, check_range

_ACTIVE = Range(least=1, most=10_000)
_KEPT = "kept"  # the key of a file of kept experts
_FORM = 'give numbers from 0 on as 0,2,5, or a file {"kept": [[0, 2, 5], ...]} with a list for each layer'


@dataclass(frozen=True)
class KeptExperts:
    """The experts of each layer that are not pruned.

    Attributes:
        layers: for each layer the numbers of its kept experts, ascending, the first expert being 0; a single entry is
            for all layers alike.
    """

    layers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, given: Any) -> "KeptExperts":
        """Read kept experts from what a user gives.

        Args:
            given: a file that `experts --prune` wrote, or its path; numbers with commas between them; a list of
                numbers for all layers, or one list for each layer.

        Raises:
            ConfigError: it is none of these, or the file cannot be read.
        """
        if isinstance(given, cls):
            return given
        shown = f"keep_experts={shortened(given, 80)}"
        if isinstance(given, str | Path):
            text = str(given)
            if all(word.strip().isdecimal() for word in text.split(",")):
                given = [int(word) for word in text.split(",")]
            else:
                given = _content_of(Path(text), shown)
        rows = [given] if isinstance(given, Sequence) and given and type(given[0]) is int else given
        is_whole = isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0
        if not is_whole or not all(_is_row(row) for row in rows):
            raise ConfigError(f"{shown}: names no experts; {_FORM}")
        return cls(tuple(tuple(sorted(row)) for row in rows))

    def of_layers(self, config: LanguageConfig) -> tuple[tuple[int, ...], ...]:
        """Return the kept experts of each layer of a model.

        Args:
            config: the shape of the model.

        Raises:
            ConfigError: the model has no experts, fewer of them, or another number of layers.
        """
        _require_experts(config, f"keep_experts={shortened(self, 80)}")
        if len(self.layers) not in (1, config.layers):
            raise ConfigError(
                f"keep_experts: has lists for {len(self.layers)} layers, the model has {config.layers}; "
                f"give one for each, or one for all"
            )
        most = max(max(row) for row in self.layers)
        if most >= config.experts:
            raise ConfigError(f"keep_experts: expert {most}: the model has 0 to {config.experts - 1}; give those")
        return self.layers * (config.layers if len(self.layers) == 1 else 1)

    def as_json(self, **told: Any) -> str:
        """Return the content of a file that `of` reads.

        Args:
            told: plain values on how the experts were chosen, which stand beside them.
        """
        return json.dumps({_KEPT: [list(row) for row in self.layers], **told}) + "\n"

    def __str__(self) -> str:
        return " ".join(",".join(map(str, row)) for row in self.layers)


def _content_of(path: Path, shown: str) -> Any:
    """Return the lists in a file of kept experts."""
    try:
        content = read_json(path)
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror or error}); {_FORM}") from error
    except ParseError as error:
        raise ConfigError(f"{shown}: {error}; {_FORM}") from error
    return content.get(_KEPT) if isinstance(content, dict) else content


def _is_row(row: Any) -> bool:
    """Say whether a value lists experts, each once."""
    if not isinstance(row, Sequence) or isinstance(row, str) or not row:
        return False
    return all(type(one) is int and one >= 0 for one in row) and len(set(row)) == len(row)


@dataclass(frozen=True)
class ExpertChoice:
    """The experts that compute a token where these are others than in training.

    The weights of the chosen experts are the softmax over their logits alone, so one that is chosen alone has weight 1.

    Attributes:
        active: experts that compute each token; None for as many as in training. In a layer that keeps fewer, all
            kept ones do.
        kept: experts that may be chosen, the router's logits of the others being minus infinity; None for all.
    """

    active: int | None = None
    kept: KeptExperts | None = None

    def __post_init__(self) -> None:
        if self.active is not None:
            check_range(self.active, _ACTIVE, "active_experts")

    def fitting(self, config: LanguageConfig) -> "ExpertChoice":
        """Return the choice as it changes a model: what is as in training is None, what is kept is told for each layer.

        Args:
            config: the shape of the model.

        Raises:
            ConfigError: the model has no experts, or fewer.
        """
        if self.active is not None:
            _require_experts(config, f"active_experts={self.active}")
            if self.active > config.experts:
                raise ConfigError(
                    f"active_experts={self.active}: the model has {config.experts} in each layer; give at most that"
                )
        rows = self.kept.of_layers(config) if self.kept is not None else ()
        is_all = all(len(row) == config.experts for row in rows)
        active = None if self.active == config.experts_per_token else self.active
        return ExpertChoice(active, None if is_all else KeptExperts(rows))

    @property
    def told(self) -> dict[str, str]:
        """What tells answers by this choice from others, by names; nothing where all is as in training."""
        told = {"active_experts": self.active, "keep_experts": self.kept}
        return {name: str(value) for name, value in told.items() if value is not None}


def _require_experts(config: LanguageConfig, shown: str) -> None:
    if not config.experts:
        raise ConfigError(f"{shown}: the model has no MoE experts; leave it out")
