"""Say what a checkpoint of any format is: format, layout, architecture, parameters, types.

    tools/inspect_checkpoint.py PATH [--keys] [--json]
    tools/inspect_checkpoint.py PATH --hash > manifest.json
    tools/inspect_checkpoint.py PATH --check manifest.json
    tools/inspect_checkpoint.py PATH --diff OTHER

--check and --diff exit with 0 where nothing differs, 1 where something does, 2 where that cannot be said. OTHER may be
of another format or layout: weights are compared, a tensor of PATH at a time. Needs no GPU, and memory for a tensor.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_sphinx.checkpoint import inspect as inspection
from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.config import load
from megatron_sphinx.errors import SphinxError


def main() -> int:
    """Run the tool; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of a checkpoint, or a run folder")
    parser.add_argument("--keys", action="store_true", help="also each tensor's file, name, shape and type")
    parser.add_argument("--json", action="store_true", help="print JSON")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--hash", action="store_true", help="print a manifest: the sha256 of each tensor")
    what.add_argument("--check", type=Path, metavar="MANIFEST", help="name what is other than a manifest says")
    what.add_argument("--diff", type=Path, metavar="OTHER", help="norms of the differences, the largest first")
    parser.add_argument(
        "--preset", type=Path, help="or a configuration, of a torch_dist checkpoint, which does not tell its shape"
    )
    args = parser.parse_args()
    try:
        opened = open_checkpoint(args.path, load(args.preset).model if args.preset else None)
        if args.hash:
            print(json.dumps({"sha256": inspection.digests(opened, show=True)}, indent=1))
            return 0
        if args.check:
            return _check(opened, args.check)
        if args.diff:
            return _diff(opened, open_checkpoint(args.diff, opened.model.language), is_json=args.json)
        return _describe(opened, has_keys=args.keys, is_json=args.json)
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status


def _describe(opened: SourceCheckpoint, *, has_keys: bool, is_json: bool) -> int:
    about = inspection.describe(opened)
    keys = inspection.keys(opened) if has_keys else {}
    if is_json:
        print(json.dumps(about | ({"keys": keys} if has_keys else {}), indent=1))
        return 0
    print(f"{about['path']}: {about['format']}, {about['layout']}; {about['architecture']}")
    for name in ("model", "channels", "dtypes"):
        if about[name]:
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in about[name].items())}")
    parts = dict(about["parameters"])
    print(f"parameters: {parts.pop('all'):,} ({', '.join(f'{name} {count:,}' for name, count in parts.items())})")
    print(f"tensors: {about['tensors']:,}, {about['bytes']:,} bytes")
    for name, of in keys.items():
        print(f"{name} {of['shape']} {of['dtype']}")
    return 0


def _check(opened: SourceCheckpoint, manifest: Path) -> int:
    known = inspection.read_digests(manifest)
    found = inspection.changes(known, inspection.digests(opened, show=True))
    for line in found:
        print(line)
    print(f"{opened.folder}: {len(found)} of {len(known)} tensors differ" if found else f"{opened.folder}: as it was")
    return 1 if found else 0


def _diff(one: SourceCheckpoint, other: SourceCheckpoint, *, is_json: bool) -> int:
    found = inspection.compare(one, other, show=True)
    rows = [*found, inspection.total(found)]
    if is_json:
        print(json.dumps([{**vars(row), "relative": row.relative} for row in rows], indent=1))
    else:
        print(f"{'norm':>10} {'relative':>10} {'most':>10}")
        for row in (row for row in rows if row.norm or row.name == "all"):
            print(f"{row.norm:10.3g} {row.relative:10.3g} {row.most:10.3g} {row.name}")
    return 1 if any(row.norm for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
