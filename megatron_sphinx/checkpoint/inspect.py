"""What a checkpoint holds, whether it is what it was, and how far two are apart: a tensor at a time."""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf, isnan, prod, sqrt
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from megatron_sphinx import parsing
from megatron_sphinx.checkpoint.bar import progress_bar
from megatron_sphinx.checkpoint.digests import THREADS, Algorithm, RunningDigest
from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint
from megatron_sphinx.checkpoint.mapping.conversion import Conversion
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.tensors.dtypes import FLOAT32, Array, bytes_of, converted, is_floating, promoted
from megatron_sphinx.tensors.entries import Entry

_BLOCK = 1 << 18  # elements that are handled at once: few enough to stay in a core's cache


def tensors(checkpoint: SourceCheckpoint) -> dict[str, Entry]:
    """List all tensors of a checkpoint by file and name, those of frozen experts behind the others."""
    own = {f"{file}: {name}": entry for (file, name), entry in sorted(checkpoint.source.stored.items())}
    frozen = (entries for _, entries in sorted(checkpoint.encoders.items()))
    return own | {f"{entry.chunks[0].path.name}: {name}": entry for one in frozen for name, entry in one.items()}


def describe(checkpoint: SourceCheckpoint) -> dict[str, Any]:
    """Describe format, layout, architecture, parameters and types of a checkpoint as plain values.

    Parameters are those of the model: what several ranks' files hold alike counts once.
    """
    model, shape = checkpoint.model, checkpoint.model.language
    projections = {"visual_proj": model.channels, "qformer_proj": model.queries}
    parameters = {"language": shape.parameters}
    if model.channels:
        linear = sum((channels + 3) * shape.hidden for channels in projections.values() if channels)
        parameters["projections and tags"] = linear + (2 + model.has_skip_token) * shape.hidden
    for name, entries in checkpoint.encoders.items():
        parameters[name] = sum(prod(entry.shape) for entry in entries.values())
    entries_of_all = tensors(checkpoint).values()
    return {
        "path": str(checkpoint.folder),
        "format": checkpoint.format,
        "layout": checkpoint.layout,
        "architecture": ("Mixtral" if shape.experts else "LLaMA") + (", SPHINX" if model.channels else ""),
        "model": shape.shape,
        "channels": {name: channels for name, channels in projections.items() if channels},
        "parameters": parameters | {"all": sum(parameters.values())},
        "tensors": len(entries_of_all),
        "bytes": sum(entry.nbytes for entry in entries_of_all),
        "dtypes": dict(Counter(entry.dtype.name for entry in entries_of_all)),
    }


def keys(checkpoint: SourceCheckpoint) -> dict[str, dict[str, Any]]:
    """Return shape and type of each tensor, by file and name."""
    return {
        name: {"shape": list(entry.shape), "dtype": entry.dtype.name} for name, entry in tensors(checkpoint).items()
    }


# contents


def digests(checkpoint: SourceCheckpoint, algorithm: Algorithm = "xxh3_128", *, show: bool = False) -> dict[str, str]:
    """Return the digest of each tensor: of its type, its shape, and its elements in row-major order.

    Memory: for each thread the pages of one tensor, and itself where it lies in several pieces.
    """
    entries, maps = tensors(checkpoint), checkpoint.source.maps
    lock = Lock()

    def digest_of(entry: Entry) -> str:
        digest = RunningDigest(algorithm)
        digest.update(f"torch.{entry.dtype.name} {list(entry.shape)}".encode())
        for rows in _blocks(maps.read(entry)):
            digest.update(bytes_of(rows))
        maps.release()
        with lock:
            bar.update(entry.nbytes)
        return digest.text()

    size = sum(entry.nbytes for entry in entries.values())
    with progress_bar("hashing", size, show) as bar, ThreadPoolExecutor(THREADS, "hash") as pool:
        return dict(zip(entries, pool.map(digest_of, entries.values()), strict=True))


def read_digests(path: Path) -> dict[str, str]:
    """Read a manifest that was written before.

    Raises:
        CheckpointError: the file is missing, or is no manifest.
    """
    try:
        content = parsing.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give a file that --hash has written") from error
    known = content if isinstance(content, dict) else {}
    sums = known.get("digests", known.get("sha256"))  # as manifests called them at first
    if not isinstance(sums, dict) or not sums or not all(isinstance(digest, str) for digest in sums.values()):
        raise CheckpointError(f"{path}: is no manifest; give a file that --hash has written")
    return sums


def changes(known: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """List what is other than a manifest says, a line each.

    Args:
        known: digests of tensors that the manifest has.
        current: digests of the tensors as they are.
    """
    return [
        f"{name}: {'is new' if name not in known else 'is missing' if name not in current else 'differs'}"
        for name in sorted(known.keys() | current.keys())
        if known.get(name) != current.get(name)
    ]


# differences


@dataclass(frozen=True)
class TensorDifference:
    """How far two tensors are apart.

    Attributes:
        name: name of the tensor, as the first checkpoint has it.
        norm: L2 norm of the difference.
        of_first: L2 norm of the first tensor.
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


def compare(one: SourceCheckpoint, other: SourceCheckpoint, *, show: bool = False) -> list[TensorDifference]:
    """Measure how far each tensor of one checkpoint is from the same weights of another, whatever its format.

    Padding of the vocabulary is not compared. Frozen experts are, where both have them.

    Memory: the pages of one tensor of each, and one of the first as it is made of the second.

    Args:
        one: the first checkpoint, whose tensors are named.
        other: the second one.
        show: whether there is a progress bar.

    Returns:
        The differences, the largest first.

    Raises:
        CheckpointError: they are of other models.
    """
    if one.model.sizes != other.model.sizes or one.model.weights != other.model.weights:
        name, first, second = next(_unlike(one, other))
        raise CheckpointError(f"{other.folder}: has {name}={second}, {one.folder} has {first}; give two of one model")
    source, conversion = one.source, Conversion(other.source, one.source.specs)
    differences = []
    with progress_bar("comparing", sum(entry.nbytes for entry in source.entries.values()), show) as bar:
        for spec in source.specs:
            entry = source.entries[spec.file, spec.name]
            first, second = source.maps.read(entry), conversion.make(spec)
            if "vocabulary" in spec.box:
                start, stop = spec.box["vocabulary"]
                rows = min(stop, spec.sizes["vocabulary"]) - start
                first, second = first[:rows], second[:rows]
            differences.append(_difference(f"{spec.file}: {spec.name}", first, second))
            source.maps.release()
            conversion.release()
            bar.update(entry.nbytes)
    for expert in sorted(one.encoders.keys() & other.encoders.keys()):
        differences += _compare_encoders(expert, one, other)
    return sorted(differences, key=lambda item: (isnan(item.norm), item.norm), reverse=True)


def total(differences: list[TensorDifference]) -> TensorDifference:
    """Sum up the differences of all tensors as that of one."""
    norm, of_first = (sqrt(sum(getattr(item, name) ** 2 for item in differences)) for name in ("norm", "of_first"))
    return TensorDifference("all", norm, of_first, max(item.most for item in differences))


def _unlike(one: SourceCheckpoint, other: SourceCheckpoint) -> Iterator[tuple[str, Any, Any]]:
    for name, value in one.model.language.shape.items():
        if value != other.model.language.shape[name]:
            yield f"model.{name}", value, other.model.language.shape[name]
    for name in ("channels", "queries", "has_skip_token"):
        if getattr(one.model, name) != getattr(other.model, name):
            yield name, getattr(one.model, name), getattr(other.model, name)


def _compare_encoders(expert: str, one: SourceCheckpoint, other: SourceCheckpoint) -> Iterator[TensorDifference]:
    mine, others = one.encoders[expert], other.encoders[expert]
    for name in sorted(mine.keys() | others.keys()):
        if name not in mine or name not in others or mine[name].shape != others[name].shape:
            raise CheckpointError(f"{other.folder}: {expert} has no {name} of the same shape; give two of one model")
        yield _difference(f"{expert}: {name}", one.source.maps.read(mine[name]), other.source.maps.read(others[name]))
        one.source.maps.release()
        other.source.maps.release()


def _difference(name: str, one: Array, other: Array) -> TensorDifference:
    squares, of_first, most = 0.0, 0.0, 0.0
    wide = np.dtype(np.float64)
    is_exact = not (is_floating(one.dtype) and is_floating(other.dtype))
    dtype = wide if is_exact else promoted([one.dtype, other.dtype, FLOAT32])
    with np.errstate(all="ignore"):
        for first, second in zip(_blocks(one), _blocks(other), strict=True):
            first, second = (converted(rows, dtype).reshape(-1) for rows in (first, second))
            exact = first.astype(wide)
            of_first += float(exact @ exact)
            apart = first - second
            if np.abs(apart).max() != 0:  # or is not a number
                apart[first == second] = 0  # infinities that are alike
                exact = apart.astype(wide)
                squares += float(exact @ exact)
                most = float(np.maximum(most, np.abs(exact).max()))
    return TensorDifference(name, sqrt(squares), sqrt(of_first), most)


def _blocks(values: Array) -> Iterator[Array]:
    """Whole rows of a tensor, so many as are handled at once."""
    if values.size == 0:
        return
    rows = values if values.ndim else values.reshape(1)
    count = max(1, _BLOCK // (rows[0].size or 1))
    for start in range(0, len(rows), count):
        yield rows[start : start + count]
