"""Answer over HTTP as OpenAI's chat API does: text and a picture, whole or streamed.

    megatron-sphinx serve runs/x
    megatron-sphinx serve runs/x --port 8000 --allow-files /data/pictures --allow-urls images.example.org

MODEL is a run's folder or a checkpoint. Clients of OpenAI's API ask http://127.0.0.1:8000/v1; /health says whether it
is ready, /metrics is for Prometheus. Only this machine is listened to unless --host says otherwise; then give an API
key, best in the environment variable MEGATRON_SPHINX_API_KEY, which no list of processes shows. SIGTERM lets requests
under way finish.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
from dataclasses import fields
from pathlib import Path

from megatron_sphinx.cli.command import add_model, check_model, model_options
from megatron_sphinx.console import complain
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.ranges import Range, check_range
from megatron_sphinx.serving.limits import LOCAL, Access, Limits

_KEY_VARIABLE = "MEGATRON_SPHINX_API_KEY"
_HELP = {
    "requests": (int, "requests that are under way at a time; more are told to come again"),
    "body_mebibytes": (int, "most of a request"),
    "picture_mebibytes": (int, "most of a picture's file"),
    "choices": (int, "answers to one request at most"),
    "max_tokens": (int, "of an answer, where the request does not say it; default: 512, or a quarter of what fits"),
    "temperature": (float, "where the request does not say it"),
    "top_p": (float, "where the request does not say it"),
    "upload_seconds": (float, "that a request may take to arrive"),
    "fetch_seconds": (float, "that a picture's download may take"),
    "grace_seconds": (float, "that requests may still run after SIGTERM"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 for any that is free")
    parser.add_argument("--api-key", action="append", default=[], metavar="KEY", help="that requests must have")
    parser.add_argument(
        "--allow-files", action="append", default=[], type=Path, metavar="FOLDER",
        help="pictures in it may be named by file: URLs",
    )  # fmt: skip
    parser.add_argument(
        "--allow-urls", action="append", default=[], metavar="HOST",
        help="pictures of it may be named by https: URLs; redirects are not followed",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print no line about each request")
    defaults = Limits()
    for name, (kind, text) in _HELP.items():
        default = getattr(defaults, name)
        shown = "" if default is None else f"; default: {default:g}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text + shown)


def access_of(args: argparse.Namespace) -> Access:
    """Return who may ask and what may be named.

    Raises:
        ConfigError: a key is empty or not of ASCII, a folder is none, or a host is none.
    """
    keys = [*args.api_key, *filter(None, [os.environ.get(_KEY_VARIABLE, "")])]
    if not all(key.isascii() and key.isprintable() and key == key.strip() and key for key in keys):
        raise ConfigError(f"--api-key or {_KEY_VARIABLE}: must be printable ASCII without spaces at its ends; give one")
    for folder in args.allow_files:
        if not folder.is_dir():
            raise ConfigError(f"--allow-files={folder}: is no folder; give one with pictures")
    for host in args.allow_urls:
        if not host or set(host) & set("/@?#* "):
            raise ConfigError(f"--allow-urls={host}: must be the name of a host, like images.example.org; give that")
    return Access(keys=tuple(keys), folders=tuple(args.allow_files), hosts=tuple(args.allow_urls))


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    for library in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(f"{library} is not installed; pip install 'megatron-sphinx[serve]'")
    check_range(args.port, Range(least=0, most=65_535), "--port")
    limits = Limits(**{item.name: getattr(args, item.name) for item in fields(Limits)})
    access = access_of(args)
    if args.host not in LOCAL and not access.keys:
        complain(f"--host={args.host}: whoever reaches this machine may ask; give --api-key to change that")
    check_model(args)
    from megatron_sphinx.parallel.place import find_place
    from megatron_sphinx.serving.gate import Gate
    from megatron_sphinx.serving.model import load
    from megatron_sphinx.serving.process import HttpServer, serve

    options = model_options(args)
    if find_place()[0] > 0:  # it follows the first rank, also to the end
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        load(args.model, **options)
    gate = Gate(None, limits.requests)
    server = HttpServer(gate, limits, access, args.host, args.port, is_quiet=args.quiet)
    return serve(lambda: load(args.model, **options), gate, server, limits)
