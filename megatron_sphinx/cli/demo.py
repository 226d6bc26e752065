"""Open a web page to ask a server about pictures; boxes in its answers are drawn.

    megatron-sphinx serve MODEL
    megatron-sphinx demo --server http://127.0.0.1:8000

The page holds no model: it asks the server, over HTTP, which may be on another machine. It listens on this machine
alone, unless --host says otherwise; whoever reaches it may ask the server, with the key that the page was given.
Needs gradio: pip install 'megatron-sphinx[page]'.
"""

import argparse
import importlib.util
import os
import signal
import sys

from megatron_sphinx.console import say
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.ranges import Range, check_range

_KEY = "MEGATRON_SPHINX_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    address = "http://127.0.0.1:8000"
    parser.add_argument("--server", default=address, metavar="URL", help=f"that answers; default: {address}")
    parser.add_argument("--api-key", metavar="KEY", help=f"that the server wants; default: {_KEY} of the environment")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free; default: 7860")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    check_range(args.port, Range(least=0, most=65535), "--port")
    for library in ("gradio", "openai"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(f"{library} is not installed; pip install 'megatron-sphinx[page]'")
    from megatron_sphinx.serving.client import Server
    from megatron_sphinx.serving.page import Site

    site = Site(Server(args.server, args.api_key or os.environ.get(_KEY)), args.host, args.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the page's folder is removed
    say(f"the page is at {site.url}; Ctrl-C ends it")
    try:
        site.wait()
    finally:
        site.close()
    return 0
