"""Ask a model about a picture, or about none, in the terminal.

    megatron-sphinx chat runs/x picture.jpg
    megatron-sphinx chat runs/x picture.jpg -m 'What is this?' -m 'What colour is it?'
    megatron-sphinx chat runs/x < questions.txt > answers.txt

MODEL is a checkpoint or a run's folder. In a terminal answers stream; /picture PATH begins anew with another picture,
/clear begins anew, /save PATH writes the chat as JSON, Ctrl-C ends an answer, Ctrl-D the program. With -m, or with a
pipe, each question is a turn of one chat, and each answer a line.
"""

import argparse
import sys
from pathlib import Path

from megatron_sphinx.cli.command import add_model, add_sampling, check_model, model_options, sampling_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_model(parser)
    parser.add_argument("picture", type=Path, nargs="?", metavar="PICTURE", help="what is asked about")
    parser.add_argument("-m", "--message", action="append", default=[], metavar="QUESTION", help="ask this, and end")
    parser.add_argument("--system", default="", metavar="TEXT", help="before the first question; default: the model's")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="the picture with the boxes of the last answer")
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    sampling_of(args)  # what is wrong with it is said before the model is loaded
    check_model(args)
    from megatron_sphinx.serving.terminal import Chat, content_of, converse

    if args.picture is not None:
        content_of(args.picture)
    from megatron_sphinx.serving.model import load

    with load(args.model, **model_options(args)) as model:
        chat = Chat(model, sampling_of(args, model.positions), args.system, args.draw)
        if args.picture is not None:
            chat.look_at(args.picture)
        return converse(chat, args.message, sys.stdin, sys.stdout)
