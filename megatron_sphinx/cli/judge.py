"""Have a model judge the answers of an evaluation: MM-Vet and LLaVA-Bench.

    megatron-sphinx judge results --data benchmarks --endpoint https://api.openai.com/v1 --judge-model gpt-4-0613
        --key-env OPENAI_API_KEY

DIR is the --output of `megatron-sphinx evaluate`. The judge is any server that speaks OpenAI's protocol. What it says
is kept, a line for each answer: killed, the same command goes on where it was. A reply that is no score is asked for
again, up to five times, each time at a temperature that is higher by 0.5; an answer whose judge is not understood even
then is listed, and has no score. Several judges may judge the same answers; the report has a line for each.
"""

import argparse
import os
from pathlib import Path

from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.ranges import Range, check_range

_THREADS = Range(least=1, most=256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="answers of evaluate")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="that the questions came from")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--judge-model", required=True, metavar="NAME", help="what the server calls it")
    parser.add_argument("--key-env", metavar="VAR", help="environment variable that holds the server's key")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="answers judged at a time; default: 8")
    parser.add_argument("--paper", metavar="NAME", help="whose numbers to show; see evaluate")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    if not (args.folder / "evaluation.json").is_file():
        raise DataError(f"{args.folder}: holds no evaluation; give the --output of evaluate")
    if not args.data.is_dir():
        raise DataError(f"--data={args.data}: no such folder; give the --data of evaluate")
    if args.key_env is not None and not os.environ.get(args.key_env):
        raise ConfigError(f"--key-env={args.key_env}: the environment has no such variable; export it first")
    check_range(args.threads, _THREADS, "--threads")
    key = os.environ[args.key_env] if args.key_env else None
    _judge(args, key)
    from megatron_sphinx.cli.evaluate import report

    return report(args.folder, args.data, args.paper)


def _judge(args: argparse.Namespace, key: str | None) -> None:
    """Have all judged benchmarks of a folder judged.

    Raises:
        ConfigError: the library that speaks OpenAI's protocol is not installed.
        DataError: no benchmark of the folder is judged.
    """
    from megatron_sphinx.evaluation.benchmarks.registry import named, names
    from megatron_sphinx.evaluation.judge import judge
    from megatron_sphinx.evaluation.results import benchmarks_in, is_whole, read_results

    try:
        from megatron_sphinx.serving.client import Server
    except ImportError as error:
        raise ConfigError("openai is not installed; pip install 'megatron-sphinx[evaluation]'") from error
    server = Server(args.endpoint, key, option="--endpoint")
    known = {name: named(name) for name in names()}
    judged = [one for one in benchmarks_in(args.folder, known) if one.is_judged and is_whole(args.folder, one)]
    if not judged:
        raise DataError(
            f"{args.folder}: has whole answers of no judged benchmark; evaluate mm_vet or llava_bench first"
        )
    for benchmark in judged:
        made = judge(
            read_results(args.folder, benchmark, args.data),
            args.folder / benchmark.name,
            lambda messages, temperature: server.ask(
                args.judge_model, messages, {"temperature": temperature, "max_tokens": 1024}
            ),
            args.judge_model,
            threads=args.threads,
            show=True,
        )
        print(f"{benchmark.name}: {made}")
