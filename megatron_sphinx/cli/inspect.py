"""Say what a checkpoint of any format is: format, layout, architecture, parameters, types.

    megatron-sphinx inspect PATH [--keys] [--json]
    megatron-sphinx inspect PATH --hash > manifest.json
    megatron-sphinx inspect PATH --check manifest.json
    megatron-sphinx inspect PATH --diff OTHER

--check and --diff exit with 0 where nothing differs, 1 where something does, 2 where that cannot be said. OTHER may be
of another format or layout: weights are compared, a tensor of PATH at a time. Needs no GPU, and memory for a tensor.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sphinx.cli.command import add_ignore, add_sha256, place
from megatron_sphinx.console import complain

if TYPE_CHECKING:
    from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("path", type=place, metavar="PATH", help="folder of a checkpoint, or a run folder")
    parser.add_argument("--keys", action="store_true", help="also each tensor's file, name, shape and type")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_ignore(parser)
    add_sha256(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--hash", action="store_true", help="print a manifest: a digest of each tensor")
    what.add_argument("--check", type=Path, metavar="MANIFEST", help="name what is other than a manifest says")
    what.add_argument("--diff", type=place, metavar="OTHER", help="norms of the differences, the largest first")
    parser.add_argument(
        "--preset", type=Path, help="or a configuration, of a torch_dist checkpoint, which does not tell its shape"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.checkpoint import inspect as inspection
    from megatron_sphinx.checkpoint.open import open_checkpoint
    from megatron_sphinx.config import load

    shape = load(args.preset).model if args.preset else None
    checkpoint = open_checkpoint(args.path, shape, ignored=args.ignore)
    for note in checkpoint.notes:
        complain(note)
    if args.hash:
        print(json.dumps({"digests": inspection.digests(checkpoint, args.algorithm, show=True)}, indent=1))
        return 0
    if args.check:
        return _check(checkpoint, args.check)
    if args.diff:
        return _diff(
            checkpoint, open_checkpoint(args.diff, checkpoint.model.language, ignored=args.ignore), is_json=args.json
        )
    return _describe(checkpoint, has_keys=args.keys, is_json=args.json)


def _describe(checkpoint: SourceCheckpoint, *, has_keys: bool, is_json: bool) -> int:
    from megatron_sphinx.checkpoint import inspect as inspection

    description = inspection.describe(checkpoint)
    keys = inspection.keys(checkpoint) if has_keys else {}
    if is_json:
        print(json.dumps(description | ({"keys": keys} if has_keys else {}), indent=1))
        return 0
    print("{path}: {format}, {layout}; {architecture}".format_map(description))
    for name in ("model", "channels", "dtypes"):
        if description[name]:
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in description[name].items())}")
    counts = dict(description["parameters"])
    print(f"parameters: {counts.pop('all'):,} ({', '.join(f'{name} {count:,}' for name, count in counts.items())})")
    print(f"tensors: {description['tensors']:,}, {description['bytes']:,} bytes")
    for name, tensor in keys.items():
        print(f"{name} {tensor['shape']} {tensor['dtype']}")
    return 0


def _check(checkpoint: SourceCheckpoint, manifest: Path) -> int:
    from megatron_sphinx.checkpoint import inspect as inspection
    from megatron_sphinx.checkpoint.digests import algorithm_of

    known = inspection.read_digests(manifest)
    algorithm = algorithm_of(next(iter(known.values())))
    changes = inspection.changes(known, inspection.digests(checkpoint, algorithm, show=True))
    for line in changes:
        print(line)
    verdict = f"{len(changes)} of {len(known)} tensors differ" if changes else "as it was"
    print(f"{checkpoint.folder}: {verdict}")
    return 1 if changes else 0


def _diff(checkpoint: SourceCheckpoint, other: SourceCheckpoint, *, is_json: bool) -> int:
    from megatron_sphinx.checkpoint import inspect as inspection

    differences = inspection.compare(checkpoint, other, show=True)
    rows = [*differences, inspection.total(differences)]
    if is_json:
        print(json.dumps([{**vars(row), "relative": row.relative} for row in rows], indent=1))
    else:
        print(f"{'norm':>10} {'relative':>10} {'most':>10}")
        for row in (row for row in rows if row.norm or row.name == "all"):
            print(f"{row.norm:10.3g} {row.relative:10.3g} {row.most:10.3g} {row.name}")
    return 1 if any(row.norm for row in rows) else 0
