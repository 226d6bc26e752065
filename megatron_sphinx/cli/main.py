"""The command line: which commands there are, and how they are told from each other."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_sphinx import __version__
from megatron_sphinx.cli import (
    benchmark,
    chat,
    config,
    convert,
    demo,
    doctor,
    evaluate,
    experts,
    export_embeddings,
    generate,
    gpu_check,
    inspect,
    judge,
    measure,
    mix,
    packing,
    report,
    serve,
    train,
    views,
)
from megatron_sphinx.cli.cascade import describe, inpaint, segment, video
from megatron_sphinx.cli.command import Command, add_command, execute, help_line
from megatron_sphinx.cli.plan import plain
from megatron_sphinx.cli.prepare import conversations, ocr, pairs, som, tasks, text

if TYPE_CHECKING:
    from megatron_sphinx.cli.command import Subparsers

PREPARE: Mapping[str, Command] = {
    "pairs": pairs, "text": text, "conversations": conversations, "tasks": tasks, "ocr": ocr, "som": som,
}  # fmt: skip
CASCADES: Mapping[str, Command] = {"segment": segment, "inpaint": inpaint, "describe": describe, "video": video}
COMMANDS: Mapping[str, Command] = {
    "train": train, "config": config, "plan": plain, "convert": convert, "mix": mix, "inspect": inspect,
    "views": views, "packing": packing, "benchmark": benchmark, "report": report, "measure": measure, "doctor": doctor,
    "gpu-check": gpu_check, "chat": chat, "generate": generate, "serve": serve, "demo": demo,
    "export-embeddings": export_embeddings, "evaluate": evaluate, "judge": judge, "experts": experts,
}  # fmt: skip
PROGRAM = "megatron-sphinx"
SHELLS = ("bash", "zsh", "tcsh")


def make_parser(*, has_plan_kinds: bool) -> argparse.ArgumentParser:
    """Make the parser of the whole command line.

    Args:
        has_plan_kinds: whether `plan` is followed by what is planned (`plan sizes CONFIG`) instead of by a
            configuration (`plan CONFIG --step 3`); argparse cannot tell these apart itself.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Train SPHINX models with megatron-core and DeepSpeed, and ask them."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument(
        "--print-completion", choices=SHELLS, action=_PrintCompletion, help="print what lets a shell complete commands"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_group(subparsers, "prepare", PREPARE, "Make data ready to train on: pairs, text, conversations.")
    _add_group(subparsers, "cascade", CASCADES, "Hand a model's boxes on: masks, inpainting, dense captions; videos.")
    for name, command in COMMANDS.items():
        if name == "plan" and has_plan_kinds:
            _add_group(subparsers, name, plain.KINDS, help_line(plain))
        else:
            add_command(subparsers, name, command)
    return parser


def _add_group(subparsers: Subparsers, name: str, commands: Mapping[str, Command], title: str) -> None:
    group = subparsers.add_parser(name, help=title, description=title)
    kinds = group.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, command in commands.items():
        add_command(kinds, kind, command)


class _PrintCompletion(argparse.Action):
    """Prints a script for a shell, and ends the process."""

    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: object, shell: Any, _option: str | None = None
    ) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion: shtab is not installed; pip install 'megatron-sphinx[completion]'")
        print(shtab.complete(make_parser(has_plan_kinds=True), shell))
        parser.exit()


def _as_override(words: Sequence[str]) -> str:
    """Say how a key that was given as if it were an option is written; nothing where none was."""
    given = re.match(r"--?([a-z_]+(?:\.\w+)+)(?:[= ](.*))?$", " ".join(words))
    return f"; a key is given without dashes: {given[1]}={given[2] or 'value'}" if given else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 2 the user's mistake, 75 stopped by a signal, 1 anything else."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(has_plan_kinds=words[:1] == ["plan"] and len(words) > 1 and words[1] in plain.KINDS)
    args, rest = parser.parse_known_args(words)  # overrides may also stand behind options
    takes_overrides = hasattr(args, "overrides")
    if unknown := [word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_as_override(unknown) if takes_overrides else ''}")
    if rest:
        args.overrides += rest
    return execute(args)
