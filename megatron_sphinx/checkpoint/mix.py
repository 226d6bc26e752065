"""Weights between checkpoints, tensor by tensor: what a model learned of real and of synthetic captions in one.

Inputs of any format give a mix of the same, its files as those of the first checkpoint. `pairing` finds what belongs
together, `blend` computes the sums.

Source: SPHINX, arXiv:2311.07575, equation 1.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.blend import MixedTensor, MixWriter, by_file
from megatron_sphinx.checkpoint.digests import THREADS, Algorithm, FollowingDigests, algorithm_of
from megatron_sphinx.checkpoint.encoders import ENCODERS
from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint, WrittenTensors
from megatron_sphinx.checkpoint.formats.registry import format_named
from megatron_sphinx.checkpoint.journal import Journal
from megatron_sphinx.checkpoint.manifest import MANIFEST, PROVENANCE
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.checkpoint.pairing import Scope, require_alike, tensors_to_mix
from megatron_sphinx.checkpoint.tally import balance
from megatron_sphinx.checkpoint.targets import is_taken, partial_of, publish, remove
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.remote import copy_file, is_remote, state_of

_Digests = Mapping[Path, Mapping[Algorithm, str]]  # of files, by each algorithm that was wanted
_COMPANIONS = (".json", ".jinja", ".md", ".model", ".py", ".txt")  # kinds of files beside the tensors that are copied


@dataclass(frozen=True)
class MixReport:
    """What has been made, in each target.

    Attributes:
        mixed: tensors of several checkpoints.
        copied: tensors of one checkpoint, to the bit.
        parameters: elements of all tensors.
        notes: what their reader must be told of the inputs, a line each.
        balances: what has become of the tensors of each input, a line each.
    """

    mixed: int
    copied: int
    parameters: int
    notes: tuple[str, ...] = ()
    balances: tuple[str, ...] = ()


def shares_of(beta: float) -> tuple[float, float]:
    """Return the shares of two checkpoints.

    Raises:
        CheckpointError: beta is out of range.
    """
    if not 0 <= beta <= 1:
        raise CheckpointError(f"beta={beta}: is not from 0 to 1; give the share of REAL")
    return beta, 1 - beta


def sweep(target: Path, betas: Iterable[float]) -> dict[Path, tuple[float, float]]:
    """Name folders in `target` for mixes of two checkpoints, with the shares of each."""
    return {target / f"beta_{beta:.10g}": shares_of(beta) for beta in betas}


def interpolate(
    inputs: Sequence[Path],
    targets: Mapping[Path, Sequence[float]],
    *,
    scope: Scope = "all",
    shape: LanguageConfig | None = None,
    algorithm: Algorithm = "xxh3_128",
    ignored: Collection[str] = (),
    show: bool = False,
) -> MixReport:
    """Write sums of the weights of checkpoints, each times its share: computed in fp32, rounded once.

    The inputs are read once for all targets. A run that was stopped goes on where it was, file by file. What a target
    says of itself it takes from the first input; it holds no optimizer state.

    Memory: buffers; of tensors that lie in several pieces, one of each input at a time.

    Args:
        inputs: checkpoints of one model in one format; in a run folder its newest one is taken.
        targets: folders to make, each with the inputs' shares, which sum to 1; one of share 1 is copied to the bit.
        scope: mix every tensor, or those of the language model only and take the others from the first input.
        shape: shape of the model, for the one format that does not tell it, torch_dist.
        algorithm: of the digests of what is written, and of those by which a mix names its inputs.
        ignored: keys of the inputs' configurations that the user says are of no matter.
        show: whether there is a progress bar.

    Raises:
        CheckpointError: shares are none, a target exists or cannot be written; an input is incomplete, damaged, or of
            another model, other encoders or another tokenizer than the first.

    Source: SPHINX, arXiv:2311.07575, equation 1.
    """
    _check_targets(inputs, targets)
    checkpoints = [open_checkpoint(folder, shape, ignored=ignored) for folder in inputs]
    notes = [note for one in checkpoints for note in one.notes]
    for other in checkpoints[1:]:
        notes += require_alike(checkpoints[0], other)
    tensors = tensors_to_mix(checkpoints, scope)
    notes += _left_behind(checkpoints[0], tensors)
    partials = [partial_of(target) for target in targets]
    try:
        _write(checkpoints, tensors, dict(zip(targets, partials, strict=True)), targets, scope, algorithm, show)
    except OSError as error:
        names, reason = ", ".join(map(str, targets)), error.strerror or error
        raise CheckpointError(f"{names}: could not be written ({reason}); put that right and run it again") from error
    is_mixed = any(max(shares) < 1 for shares in targets.values())
    mixed = sum(len(tensor.entries) > 1 for tensor in tensors) if is_mixed else 0
    parameters = sum(prod(tensor.entries[0].shape) for tensor in tensors)
    copied = len(tensors) - mixed
    balances = tuple(_balance(one, one is checkpoints[0], tensors, mixed) for one in checkpoints)
    return MixReport(mixed, copied, parameters, tuple(notes), balances)


def _balance(one: SourceCheckpoint, is_first: bool, tensors: Sequence[MixedTensor], mixed: int) -> str:
    """What has become of the tensors of an input."""
    own = len(one.source.stored) + sum(map(len, one.encoders.values()))
    left_out = dict(one.left_out)
    if is_first:  # all that its files hold goes along, but for states of an optimizer
        made = {f"{tensor.file}: {tensor.name}" for tensor in tensors}
        left_out = {name: reason for name, reason in left_out.items() if name not in made}
        copied = own + len(one.left_out) - len(left_out) - mixed
        return balance(str(one.folder), [(mixed, "mixed"), (copied, "copied")], left_out)
    return balance(str(one.folder), [(mixed, "mixed"), (own - mixed, "are the first one's")], left_out)


def _write(
    checkpoints: Sequence[SourceCheckpoint],
    tensors: Sequence[MixedTensor],
    partials: Mapping[Path, Path],
    targets: Mapping[Path, Sequence[float]],
    scope: Scope,
    algorithm: Algorithm,
    show: bool,
) -> None:
    """Write the targets into folders of their own, check the inputs, and give the folders their names at last."""
    task = [scope, algorithm, *([str(target), *shares] for target, shares in targets.items())]
    entries = [entry for one in checkpoints for entry in one.source.entries.values()]
    with Journal(partials.values(), task, entries) as journal, _nothing_left(partials.values()):
        form = format_named(checkpoints[0].format)
        algorithms = [_algorithms(one, algorithm) for one in checkpoints]
        wanted = {path: each for of_input in algorithms for path, each in of_input.items()}
        digests = FollowingDigests(wanted)
        folders, shares = list(partials.values()), list(targets.values())
        MixWriter(tensors, folders, shares, form, journal, digests, algorithm).run(show)
        with ThreadPoolExecutor(THREADS, "digest") as pool:
            found = dict(zip(wanted, pool.map(digests.finish, wanted), strict=True))
        for checkpoint in checkpoints:
            _check_sums(checkpoint, found)
        for number, (target, partial) in enumerate(partials.items()):
            inputs = [
                _origin(one, share, of_input, found)
                for one, share, of_input in zip(checkpoints, targets[target], algorithms, strict=True)
            ]
            sums = {name: words.split(",")[number] for name, words in journal.done.items()} if form.has_manifest else {}
            _finish(partial, checkpoints[0], tensors, sums, {"scope": scope, "inputs": inputs})
        journal.end()
        for target, partial in partials.items():
            publish(partial, target)


@contextmanager
def _nothing_left(partials: Iterable[Path]) -> Iterator[None]:
    """Remove what was made of an input that turns out to be damaged."""
    try:
        yield
    except CheckpointError:
        for partial in partials:
            remove(partial)
        raise


def _check_targets(inputs: Sequence[Path], targets: Mapping[Path, Sequence[float]]) -> None:
    for target, shares in targets.items():
        for folder, share in zip(inputs, shares, strict=True):
            if not 0 <= share <= 1:
                raise CheckpointError(f"{folder}={share}: is not from 0 to 1; give the share of this checkpoint")
        if abs(sum(shares) - 1) > 1e-6:
            raise CheckpointError(f"{'+'.join(map(str, shares))}: sums to {sum(shares):g}; give shares that sum to 1")
        if is_taken(target):
            raise CheckpointError(f"{target}: exists; give another target, or remove it")


def _algorithms(checkpoint: SourceCheckpoint, wanted: Algorithm) -> dict[Path, list[Algorithm]]:
    """The files by whose digests a checkpoint is known, each with what is computed of it.

    They are those of its manifest and that itself, or those of tensors. A manifest of SHA-256 is checked by that, and
    the mix then names the input by it too; where SHA-256 is asked for and the manifest has others, both are computed.
    """
    if not checkpoint.checksums:
        if is_remote(checkpoint.folder):  # they would be read once more; their versions tell as much
            return {}
        chunks = (chunk for entry in checkpoint.source.entries.values() for chunk in entry.chunks)
        return {path: [wanted] for path in sorted({chunk.path for chunk in chunks})}
    own = {name: algorithm_of(digest) for name, digest in checkpoint.checksums.items()}
    named = "sha256" if "sha256" in own.values() else wanted
    return {checkpoint.folder / name: list(dict.fromkeys((named, own.get(name, named)))) for name in (*own, MANIFEST)}


def _check_sums(checkpoint: SourceCheckpoint, digests: _Digests) -> None:
    for name, digest in checkpoint.checksums.items():
        if digest not in digests[checkpoint.folder / name].values():
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is damaged (its checksum differs); give an earlier checkpoint"
            )


def _origin(
    checkpoint: SourceCheckpoint, share: float, algorithms: Mapping[Path, list[Algorithm]], digests: _Digests
) -> dict[str, Any]:
    """What a mix says of an input."""
    told = {"path": str(checkpoint.folder.resolve()), "share": share}
    if not algorithms:
        paths = sorted({path for entry in checkpoint.source.entries.values() for path in entry.paths}, key=str)
        return {**told, "versions": {path.name: state_of(path) for path in paths}}
    named = {str(path.relative_to(checkpoint.folder)): digests[path][first] for path, (first, *_) in algorithms.items()}
    algorithm = next(first for first, *_ in algorithms.values())
    return {**told, "algorithm": algorithm, "digests": named}


def _finish(
    partial: Path,
    first: SourceCheckpoint,
    tensors: Sequence[MixedTensor],
    sums: Mapping[str, str],
    provenance: Mapping[str, Any],
) -> None:
    """Write what is beside the tensors: configuration, index, tokenizer, frozen experts, and where all comes from."""
    for path in _companions(first, tensors):
        copy_file(path, partial / path.name)
    if (first.folder / ENCODERS).is_dir():
        (partial / ENCODERS).mkdir()
        for name in (f"{expert}.safetensors" for expert in first.encoders):  # and nothing else that may lie there
            copy_file(first.folder / ENCODERS / name, partial / ENCODERS / name)
    written = WrittenTensors(partial, by_file(tensors), first, checksums=sums, provenance=provenance)
    format_named(first.format).finish(written)


def _left_behind(first: SourceCheckpoint, tensors: Sequence[MixedTensor]) -> list[str]:
    """What lies in the folder of the first input and is not in the targets, in a line."""
    taken = {path.name for path in _companions(first, tensors)} | {ENCODERS, MANIFEST, f"{PROVENANCE}.json"}
    taken |= {path.name for entry in first.source.entries.values() for path in entry.paths}
    names = {path.name for path in first.folder.iterdir() if not path.name.startswith(".")} - taken
    return [f"{first.folder}: {', '.join(sorted(names))} stays behind"] if names else []


def _companions(first: SourceCheckpoint, tensors: Sequence[MixedTensor]) -> Iterator[Path]:
    """Files beside the tensors; no index of files that are not there."""
    kind, companions = Path(tensors[0].file).suffix, format_named(first.format).companions
    for path in sorted(first.folder.iterdir()):
        is_other_index = path.name.endswith(".index.json") and Path(path.stem.removesuffix(".index")).suffix != kind
        is_own = path.name in (MANIFEST, f"{PROVENANCE}.json")
        is_wanted = path.suffix in _COMPANIONS or path.name in companions
        if path.is_file() and is_wanted and not is_own and not is_other_index:
            yield path
