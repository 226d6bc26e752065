"""Answer files of questions, or describe pictures: one JSON line an answer, in the order of the questions.

    megatron-sphinx generate MODEL --input questions.jsonl --output answers.jsonl
    megatron-sphinx generate MODEL --input pictures/ --prompt 'Describe the image.' --output captions.jsonl

MODEL is a checkpoint or a run's folder. An input is .jsonl, .json, .csv, .tsv, .parquet, a WebDataset .tar, or a folder
of pictures, tars or parquet files. A row has its picture under image, images, image_path or url, if it has one, and
what is asked under question, prompt or text, or as a chat under messages (OpenAI's form) or conversations (LLaVA's);
the last answer of a chat is left out. --prompt is asked about rows without a question; with {question} in it, it stands
around each question.

Killed, the same command goes on where it was, and ends with the same file; with another model, prompt, sampling or
input it is refused. What cannot be asked, such as a damaged picture, gets a line with `error`.
"""

import argparse
from pathlib import Path

from megatron_sphinx.cli.command import add_model, add_sampling, check_model, model_options, sampling_of
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.ranges import Range, check_range

_IN_FLIGHT = Limits.sequences  # of each replica, which computes as many at once
_IN_FLIGHT_RANGE = Range(least=1, most=65536)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_model(parser)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="asked where a row has no question")
    parser.add_argument("--system", default="", metavar="TEXT", help="before the first question; default: the model's")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of the pictures; default: that of the input")
    parser.add_argument("--follow-links", action="store_true", help="also take pictures that links lead out of it to")
    parser.add_argument("--allow-urls", action="store_true", help="read pictures from URLs, too")
    parser.add_argument(
        "--in-flight", type=int, metavar="N", help=f"questions at a time; default: {_IN_FLIGHT} for each replica"
    )
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    sampling_of(args)  # what is wrong with it is said before the model is loaded
    if args.in_flight is not None:
        check_range(args.in_flight, _IN_FLIGHT_RANGE, "--in-flight")
    limits = Limits(waiting=max(Limits.waiting, args.in_flight or 0))
    check_model(args)
    from megatron_sphinx.serving.batch import answer_all
    from megatron_sphinx.serving.questions import Asking
    from megatron_sphinx.serving.rows import sources_of

    sources = sources_of(args.input, follow_links=args.follow_links)
    from megatron_sphinx.serving.model import load

    asking = Asking(args.prompt, args.system, args.images, args.follow_links, args.allow_urls)
    with load(args.model, limits=limits, **model_options(args)) as model:
        report = answer_all(
            model, args.model, sources, args.output, asking, sampling_of(args, model.positions),
            in_flight=args.in_flight or _IN_FLIGHT * model.replicas, show=True,
        )  # fmt: skip
    before = f", {report.before} of them from before" if report.before else ""
    print(f"{args.output}: {report.answered} answers, {report.errors} errors{before}")
    return 0
