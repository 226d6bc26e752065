"""What a checkpoint holds, whether it is what it was, and how far two are apart: a tensor at a time."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, isnan, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sphinx.checkpoint.conversion import Conversion
from megatron_sphinx.checkpoint.convert import progress_bar
from megatron_sphinx.checkpoint.formats.base import Opened
from megatron_sphinx.checkpoint.stream import Entry
from megatron_sphinx.errors import CheckpointError

_BLOCK = 1 << 18  # elements that are handled at once: few enough to stay in a core's cache


def tensors(opened: Opened) -> dict[str, Entry]:
    """All tensors of a checkpoint by file and name, those of frozen experts behind the others."""
    encoders = (entries for _, entries in sorted(opened.encoders.items()))
    own = {f"{file}: {name}": entry for (file, name), entry in sorted(opened.source.entries.items())}
    return own | {f"{entry.chunks[0].path.name}: {name}": entry for of in encoders for name, entry in of.items()}


def describe(opened: Opened) -> dict[str, Any]:
    """Format, layout, architecture, parameters and types of a checkpoint, as plain values.

    Parameters are those of the model: what several ranks' files hold alike counts once.
    """
    model, shape = opened.model, opened.model.language
    projections = {"visual_proj": model.channels, "qformer_proj": model.queries}
    parts = {"language": shape.parameters}
    if model.channels:
        linear = sum((channels + 3) * shape.hidden for channels in projections.values() if channels)
        parts["projections and tags"] = linear + (2 + model.has_skip_token) * shape.hidden
    for name, entries in opened.encoders.items():
        parts[name] = sum(prod(entry.shape) for entry in entries.values())
    found = tensors(opened).values()
    return {
        "path": str(opened.folder),
        "format": opened.format,
        "layout": opened.layout,
        "architecture": ("Mixtral" if shape.experts else "LLaMA") + (", SPHINX" if model.channels else ""),
        "model": shape.shape,
        "channels": {name: channels for name, channels in projections.items() if channels},
        "parameters": parts | {"all": sum(parts.values())},
        "tensors": len(found),
        "bytes": sum(entry.nbytes for entry in found),
        "dtypes": dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in found)),
    }


def keys(opened: Opened) -> dict[str, dict[str, Any]]:
    """Shape and type of each tensor, by file and name."""
    return {
        name: {"shape": list(entry.shape), "dtype": str(entry.dtype).removeprefix("torch.")}
        for name, entry in tensors(opened).items()
    }


# contents


def digests(opened: Opened, *, show: bool = False) -> dict[str, str]:
    """The sha256 of each tensor: of its type, its shape, and its elements in row-major order.

    Memory: the pages of one tensor, and itself where it lies in several pieces.
    """
    found, maps = tensors(opened), opened.source.maps
    sums = {}
    with progress_bar("hashing", sum(entry.nbytes for entry in found.values()), show) as bar:
        for name, entry in found.items():
            digest = hashlib.sha256(f"{entry.dtype} {list(entry.shape)}".encode())
            for rows in _blocks(maps.read(entry)):
                digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            maps.release()
            sums[name] = digest.hexdigest()
            bar.update(entry.nbytes)
    return sums


def read_digests(path: Path) -> dict[str, str]:
    """A manifest that was written before.

    Raises:
        CheckpointError: it is missing, or is none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give a file that --hash has written") from error
    sums = found.get("sha256") if isinstance(found, dict) else None
    if not isinstance(sums, dict):
        raise CheckpointError(f"{path}: is no manifest; give a file that --hash has written")
    return sums


def changes(known: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What is other than a manifest says, a line each."""
    return [
        f"{name}: {'is new' if name not in known else 'is missing' if name not in found else 'differs'}"
        for name in sorted(known.keys() | found.keys())
        if known.get(name) != found.get(name)
    ]


# differences


@dataclass(frozen=True)
class Difference:
    """How far two tensors are apart.

    Attributes:
        name: of the tensor, as the first checkpoint has it.
        norm: L2 norm of the difference.
        of_first: L2 norm of the first one.
        most: largest absolute difference of two elements.
    """

    name: str
    norm: float
    of_first: float
    most: float

    @property
    def relative(self) -> float:
        """The norm of the difference over that of the first; infinite where that is zero and the other is not."""
        return self.norm / self.of_first if self.of_first else inf if self.norm else 0.0


def compare(one: Opened, other: Opened, *, show: bool = False) -> list[Difference]:
    """The differences of each tensor of one checkpoint to the same weights of another, whatever its format.

    Padding of the vocabulary is not compared. Frozen experts are, where both have them.

    Memory: the pages of one tensor of each, and one of the first as it is made of the second.

    Raises:
        CheckpointError: they are of other models.
    """
    if one.model.sizes != other.model.sizes or one.model.weights != other.model.weights:
        name, first, second = next(_unlike(one, other))
        raise CheckpointError(f"{other.folder}: has {name}={second}, {one.folder} has {first}; give two of one model")
    conversion, maps = Conversion(other.source, one.source.stored), one.source.maps
    found = []
    with progress_bar("comparing", sum(entry.nbytes for entry in one.source.entries.values()), show) as bar:
        for item in one.source.stored:
            entry = one.source.entries[item.file, item.name]
            first, second = maps.read(entry), conversion.make(item)
            if "v" in item.box:
                start, stop = item.box["v"]
                first, second = (values[: min(stop, item.sizes["v"]) - start] for values in (first, second))
            found.append(_difference(f"{item.file}: {item.name}", first, second))
            maps.release()
            conversion.release()
            bar.update(entry.nbytes)
    for expert in sorted(one.encoders.keys() & other.encoders.keys()):
        found += _compare_encoders(expert, one, other)
    return sorted(found, key=lambda item: (isnan(item.norm), item.norm), reverse=True)


def total(differences: list[Difference]) -> Difference:
    """All tensors as one."""
    norm, of_first = (sqrt(sum(getattr(item, name) ** 2 for item in differences)) for name in ("norm", "of_first"))
    return Difference("all", norm, of_first, max(item.most for item in differences))


def _unlike(one: Opened, other: Opened) -> Iterator[tuple[str, Any, Any]]:
    for name, value in one.model.language.shape.items():
        if value != other.model.language.shape[name]:
            yield f"model.{name}", value, other.model.language.shape[name]
    for name in ("channels", "queries", "has_skip_token"):
        if getattr(one.model, name) != getattr(other.model, name):
            yield name, getattr(one.model, name), getattr(other.model, name)


def _compare_encoders(expert: str, one: Opened, other: Opened) -> Iterator[Difference]:
    mine, others = one.encoders[expert], other.encoders[expert]
    for name in sorted(mine.keys() | others.keys()):
        if name not in mine or name not in others or mine[name].shape != others[name].shape:
            raise CheckpointError(f"{other.folder}: {expert} has no {name} of the same shape; give two of one model")
        yield _difference(f"{expert}: {name}", one.source.maps.read(mine[name]), other.source.maps.read(others[name]))
        one.source.maps.release()
        other.source.maps.release()


def _difference(name: str, one: Tensor, other: Tensor) -> Difference:
    squares, of_first, most = torch.zeros(3, dtype=torch.float64)
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    for first, second in zip(_blocks(one), _blocks(other), strict=True):
        first, second = first.to(dtype).flatten(), second.to(dtype).flatten()
        of_first = of_first + first.double().dot(first.double())
        apart = first - second
        if apart.abs().max() != 0:  # or is not a number
            apart = apart.masked_fill(first == second, 0.0).double()  # infinities that are alike
            squares = squares + apart.dot(apart)
            most = torch.maximum(most, apart.abs().max())
    return Difference(name, float(squares.sqrt()), float(of_first.sqrt()), float(most))


def _blocks(values: Tensor) -> Iterator[Tensor]:
    """Whole rows of a tensor, so many as are handled at once."""
    if values.numel() == 0:
        return
    rows = values if values.ndim else values.view(1)
    count = max(1, _BLOCK // (rows[0].numel() or 1))
    for start in range(0, len(rows), count):
        yield rows[start : start + count]
