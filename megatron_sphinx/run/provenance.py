"""What a run is made of, as its checkpoints and folder tell it: what must stay the same, and what a user changed."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.identity import differences, in_order, require_same
from megatron_sphinx.checkpoint.manifest import read_manifest
from megatron_sphinx.checkpoint.steps import newest_of
from megatron_sphinx.config import Config
from megatron_sphinx.data.sources import Sources
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.parsing import ParseError, read_yaml


def identity(config: Config, sources: Sources, encoder_digests: Mapping[str, str]) -> dict[str, Any]:
    """Tell what a checkpoint must agree with to be resumed. The number of encoder ranks is free: they keep no state.

    Args:
        config: of the run.
        sources: its opened data.
        encoder_digests: what identifies the weights of each visual expert, by its name, in the order of the mixture.
    """
    data = config.data
    names = (
        "pairs_per_step",
        "conversations_per_step",
        "text_tokens_per_step",
        "sequence_length",
        "row_multiple",
        "isolate_documents",
    )
    streams = {"pairs": (sources.samples, data.samples), "text": (sources.text, data.text)}
    amounts = {
        name: {
            "bounds": source.bounds,
            "weights": [item.weight for item in given],
            "fingerprint": source.fingerprint,
        }
        if source
        else None
        for name, (source, given) in streams.items()
    }
    return {
        "run": {"seed": config.run.seed},
        "model": config.model.shape,
        "vision": _vision(config, encoder_digests),
        "tokenizer": sources.tokenizer.identity.sha256,
        "data": {name: getattr(data, name) for name in names} | amounts | _text_order(data.text_order, sources.text),
        "training": {"precision": config.training.precision, "train": config.training.train},
    }


def _text_order(order: str, text: object) -> dict[str, str]:
    """Tell in which order text is taken, where the run takes any."""
    return {"text_order": order} if text else {}


def _vision(config: Config, encoder_digests: Mapping[str, str]) -> dict[str, Any]:
    """Tell which visual experts there are, and how they are shown pictures."""
    settings = ("grid", "views", "padding", "skip_padding_views", "resize")
    return {"experts": dict(encoder_digests), **{name: getattr(config.vision, name) for name in settings}}


def describe(config: Config, layout: ParallelLayout, encoder_digests: Mapping[str, str]) -> dict[str, Any]:
    """Tell what else a checkpoint says of the run that wrote it.

    `layout` is how the run was divided, `encoders` where the frozen weights were, which no checkpoint holds, `config`
    everything that it was told.
    """
    return {
        "layout": sizes_of(config, layout),
        "encoders": {
            item.name: {"path": item.weights, "sha256": encoder_digests[item.name]} for item in config.vision.experts
        },
        "config": _plain(config),
    }


def sizes_of(config: Config, layout: ParallelLayout) -> dict[str, Any]:
    """Tell how a run is divided, as plain values."""
    sizes = asdict(config.parallel) | {"world": layout.world}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}


def keep_config(folder: Path, config: Config) -> str:
    """Write a run's `config.yaml`; an earlier one that differs stays beside it as `config.<number>.yaml`.

    Returns:
        The name that the earlier one has now; nothing where there was none, or an equal one.
    """
    path, text, name = folder / "config.yaml", config.to_yaml(), ""
    if path.is_file() and path.read_text() != text:
        name = next(name for number in count(1) if not (folder / (name := f"config.{number}.yaml")).exists())
        path.rename(folder / name)
    path.write_text(text)
    return name


def earlier_config(checkpoint: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read what the run was told that wrote a checkpoint, as plain values; nothing where it cannot be known.

    Args:
        checkpoint: where it is; the config.yaml of its run folder tells it for one that does not.
        manifest: what the checkpoint says of itself; it is read, as far as it can be, unless given.
    """
    if manifest is None:
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError:  # which the run will say, or pass over, when it looks for one that is intact
            manifest = {}
    earlier, path = manifest.get("config"), checkpoint.parent.parent / "config.yaml"
    if earlier is None and path.is_file():
        with suppress(OSError, ParseError):  # it is only told of
            earlier = read_yaml(path)
    return dict(earlier) if isinstance(earlier, Mapping) else {}


def changes(checkpoint: Path, manifest: Mapping[str, Any], config: Config) -> list[str]:
    """List what a run is told otherwise than the one whose checkpoint it goes on from, key by key.

    Args:
        checkpoint: where it is; the config.yaml of its run folder tells it for one that does not.
        manifest: what the checkpoint says of itself.
        config: of the run.
    """
    if not (earlier := earlier_config(checkpoint, manifest)):
        return []
    now = _known_to(earlier, _plain(config))
    return [f"{key}: {before} -> {after}" for key, before, after in differences(earlier, now)]


def require_trained_as(folder: Path, config: Config, tokenizer: str, encoder_digests: Mapping[str, str]) -> None:
    """Make sure that the newest checkpoint in a folder was trained with a model, a tokenizer and encoders.

    Args:
        folder: a run folder, or what holds its checkpoints.
        config: of the model, and of how pictures are shown to its encoders.
        tokenizer: digest of the tokenizer.
        encoder_digests: what identifies the weights of each visual expert, by its name, in the order of the mixture.

    Raises:
        CheckpointError: there is none, or it is of others.
    """
    path = newest_of(folder)
    made = read_manifest(path)["identity"]
    own = {"model": config.model.shape, "tokenizer": tokenizer, "vision": in_order(_vision(config, encoder_digests))}
    made = {**made, "vision": in_order(made.get("vision", {}))}
    require_same(str(path), made, own, "take the configuration in its run folder")


def _known_to(earlier: Any, values: Any) -> Any:
    """Leave out of nested mappings the keys that an earlier version of this package did not have."""
    if not (isinstance(earlier, Mapping) and isinstance(values, Mapping)):
        return values
    return {key: _known_to(earlier[key], value) for key, value in values.items() if key in earlier}


def _plain(config: Config) -> dict[str, Any]:
    """Turn a configuration into what JSON holds."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain
