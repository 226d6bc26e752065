"""What a command is: a module with a description, arguments and a function, reached by name or by a door in tools/."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from megatron_sphinx.console import last_words, leave_to_torchrun
from megatron_sphinx.errors import ConfigError, MeetingError, SphinxError
from megatron_sphinx.generation.requests import Sampling, default_new_tokens
from megatron_sphinx.ranges import Range, check_range, check_ranges

if TYPE_CHECKING:  # argparse has no public name for what `add_subparsers` gives
    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Command(Protocol):
    """A module of a command; the first line of its docstring is the help line, all of it the description."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Let a parser take the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command; the exit status."""


def add_command(subparsers: Subparsers, name: str, command: Command) -> None:
    """Make a command known under a name."""
    parser = subparsers.add_parser(
        name,
        help=help_line(command).replace("%", "%%"),  # to argparse, % begins a field
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.set_defaults(run=command.run, parser=parser)


def help_line(command: Command) -> str:
    """Return the first line of a command's description."""
    return (command.__doc__ or "").partition("\n")[0]


def run_alone(command: Command) -> int:
    """Run a command as a program of its own, with the words that the program was given; the exit status."""
    parser = argparse.ArgumentParser(description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    parser.set_defaults(run=command.run, parser=parser)
    return execute(parser.parse_args())


def execute(args: argparse.Namespace) -> int:
    """Run what parsed arguments ask for; the exit status: 2 with one line on standard error for the user's mistake."""
    parser: argparse.ArgumentParser = args.parser
    try:
        status: int = args.run(args)
    except argparse.ArgumentError as error:  # arguments that do not go together
        parser.error(str(error))
    except KeyboardInterrupt:
        last_words(f"{parser.prog}: stopped by Ctrl-C; run the same command again")
        return 75
    except SphinxError as error:
        is_own = isinstance(error, MeetingError) and not error.is_told  # the first rank may never hear of it
        is_said = not getattr(args, "may_be_rank", False) or is_own or _is_first_rank()
        (last_words if is_said else leave_to_torchrun)(f"{parser.prog}: {error}")
        return error.exit_status
    return status


def _is_first_rank() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def add_configuration(parser: argparse.ArgumentParser, *, is_optional: bool = False) -> None:
    """Let a parser take a configuration, and values of keys that go above those of the file.

    Such a command may be started on every rank of a job: the first one alone says what is wrong with the configuration.
    """
    parser.set_defaults(may_be_rank=True)
    text = "YAML file, e.g. examples/demo.yaml, or a preset's name"
    parser.add_argument("config", type=Path, metavar="CONFIG", help=text, nargs="?" if is_optional else None)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.tensor=2")


def place(text: str) -> Path:
    """Read an argument that is a path or a URL.

    Raises:
        ArgumentTypeError: nothing that is installed reads such a URL.
    """
    from megatron_sphinx.remote import place_of

    try:
        return place_of(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the number of processes that share the work."""
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")


def add_ignore(parser: argparse.ArgumentParser) -> None:
    """Let a parser take keys of a checkpoint's configuration that are to be passed over."""
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="go on although the configuration of the checkpoint has this key, which is not known or not computed here",
    )


def add_sha256(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the algorithm of digests."""
    parser.add_argument(
        "--sha256",
        action="store_const",
        const="sha256",
        default="xxh3_128",
        dest="algorithm",
        help="write digests of SHA-256, which nobody can forge and which take longer; default: of XXH3, 128 bits",
    )


def add_model(parser: argparse.ArgumentParser, *, is_option: bool = False) -> None:
    """Let a parser take the model that answers, and how it is loaded.

    Such a command may be started on every rank of a job: the first one alone says what is wrong.

    Args:
        parser: of the command.
        is_option: whether the model is given by --model, and may be left out.
    """
    parser.set_defaults(may_be_rank=True)
    name = "--model" if is_option else "model"
    parser.add_argument(name, type=Path, metavar="MODEL", help="checkpoint, or a run's folder")
    group = parser.add_argument_group("the model")
    group.add_argument("--config", type=Path, help="configuration or preset of a checkpoint that has none of its own")
    group.add_argument("--tokenizer", type=Path, help="default: the configuration's, or that beside the weights")
    group.add_argument("--template", help="what stands around the messages of a chat; default: what the model is for")
    group.add_argument("--device", help="auto, cpu or cuda; default: auto")
    group.add_argument("--precision", help="bf16 or fp32; default: that of the training")
    group.add_argument("--positions", type=int, help="of prompt and answer together; default: those of the training")
    group.add_argument(
        "--cache-gib", type=float, help="of each rank's key-value cache; default: what there is room for"
    )
    group.add_argument("--active-experts", type=int, metavar="K", help="of a token, in a mixture; default: as trained")
    group.add_argument(
        "--keep-experts", metavar="KEPT", help="of a mixture's experts choose among these: a file of experts, or 0,2,5"
    )
    group = parser.add_argument_group("its layout, started by torchrun or srun; replicas take the ranks that are left")
    group.add_argument("--tensor", type=int, metavar="RANKS", help="that share each matrix; default: 1")
    group.add_argument("--pipeline", type=int, metavar="STAGES", help="that the layers are cut into; default: 1")
    group.add_argument("--expert", type=int, metavar="RANKS", help="that share the experts of a layer; default: 1")
    group.add_argument("--encoder", type=int, metavar="RANKS", help="that encode and do nothing else; default: 0")


def check_model(args: argparse.Namespace) -> None:
    """Refuse what can be told to be wrong with a model that answers before anything that takes long is imported.

    Raises:
        CheckpointError: its folder is not there, or holds no checkpoint.
        ConfigError: its configuration, the name of a template, or a number of experts is wrong.
        DataError: its tokenizer cannot be read.
    """
    from megatron_sphinx.checkpoint.open import form_of
    from megatron_sphinx.checkpoint.steps import require_folder
    from megatron_sphinx.generation.templates import template_of

    require_folder(args.model)
    if args.template is not None:
        template_of(args.template)
    if "active_experts" in args:
        check_experts(args)
    if args.config is not None:
        from megatron_sphinx import config as configuration

        configuration.load(args.config, ["parallel={}"])
    if args.tokenizer is not None:
        from megatron_sphinx.data.tokenizer import Tokenizer

        Tokenizer(args.tokenizer)
    form_of(args.model)


def check_experts(args: argparse.Namespace) -> None:
    """Refuse numbers of MoE experts that no model has.

    Raises:
        ConfigError: one is out of its range, or the kept ones cannot be read.
    """
    from megatron_sphinx.model.expert_choice import ExpertChoice, KeptExperts

    ExpertChoice(args.active_experts)
    if args.keep_experts is not None:
        KeptExperts.of(args.keep_experts)


_OF_MODEL = (
    "config", "tokenizer", "template", "device", "precision", "positions", "tensor", "pipeline", "expert", "encoder",
    "active_experts", "keep_experts",
)  # fmt: skip


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return how a model is loaded, by what `add_model` took, as arguments of `serving.model.load`.

    Raises:
        ConfigError: the cache's size is out of its range.
    """
    given = {name: value for name in _OF_MODEL if (value := getattr(args, name)) is not None}
    given["command"] = args.parser.prog.split()[-1]
    if args.cache_gib is not None:
        check_range(args.cache_gib, Range(above=0, most=2**20), "--cache-gib")
        given["cache_bytes"] = int(args.cache_gib * 2**30)
    return given


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Let a parser take how answers are drawn; what is not given is as in `Sampling`."""
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="tokens at most; default: 512, or a quarter of the positions"
    )
    group.add_argument("--temperature", type=float, help="0, the default: the likeliest token")
    group.add_argument("--top-p", type=float, help="draw from the likeliest tokens with this probability; default: 1")
    group.add_argument("--top-k", type=int, metavar="N", help="draw from so many likeliest tokens; default: all")
    group.add_argument("--repetition-penalty", type=float, help="above 1: less of what was there; default: 1")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; may be given several times")
    group.add_argument("--seed", type=int, help="default: 0")


def sampling_of(args: argparse.Namespace, positions: int = 2**24) -> Sampling:
    """Return how answers are drawn, by what `add_sampling` took.

    Args:
        args: the arguments.
        positions: of the model, once it is known.

    Raises:
        ConfigError: a number is out of its range.
    """
    given = {field.name: getattr(args, field.name, None) for field in fields(Sampling)}
    given["stop"] = tuple(args.stop) if args.stop else None
    if args.max_new_tokens is None:
        given["max_new_tokens"] = default_new_tokens(positions)
    sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    check_ranges(sampling, "sampling.")
    return sampling


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the tokenizer, which cannot be left out."""
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="sentencepiece .model, tokenizer.json, or a folder with one"
    )
