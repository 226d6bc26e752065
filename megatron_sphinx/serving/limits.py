"""What the server takes from its clients: who they are, what they may name, how much they may ask for."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from megatron_sphinx.generation.requests import default_new_tokens
from megatron_sphinx.ranges import Range, check_range, range_of, types_of

LOCAL = ("127.0.0.1", "::1", "localhost")  # hosts at which only this machine is listened to


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a client may ask for, and what a request gets that does not say it.

    Attributes:
        requests: requests that are read, wait or are answered at a time; more are told to come again.
        body_mebibytes: of a request, the pictures in it among them.
        picture_mebibytes: of the file of a picture.
        choices: answers to one request at most.
        max_tokens: tokens of an answer where the request does not say it; None for 512, or for a quarter of what the
            model takes where that is less.
        temperature: where the request does not say it.
        top_p: where the request does not say it.
        upload_seconds: that the body of a request may take to arrive.
        fetch_seconds: that a picture's download may take.
        grace_seconds: that requests may still run after SIGTERM.

    Source: temperature and top_p of accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory.
    """

    requests: Annotated[int, Range(least=1, most=100_000)] = 256
    body_mebibytes: Annotated[int, Range(least=1, most=1024)] = 32
    picture_mebibytes: Annotated[int, Range(least=1, most=64)] = 20  # as `generation.pictures` takes
    choices: Annotated[int, Range(least=1, most=128)] = 16
    max_tokens: Annotated[int | None, Range(least=1, most=2**20)] = None
    temperature: Annotated[float, Range(least=0, most=100)] = 0.1
    top_p: Annotated[float, Range(least=0, most=1)] = 0.75
    upload_seconds: Annotated[float, Range(above=0, most=3600)] = 60.0
    fetch_seconds: Annotated[float, Range(above=0, most=600)] = 10.0
    grace_seconds: Annotated[float, Range(least=0, most=86_400)] = 60.0

    def __post_init__(self) -> None:
        for item in fields(self):
            _, bounds = range_of(types_of(Limits)[item.name])
            value = getattr(self, item.name)
            if bounds is not None and value is not None:
                check_range(value, bounds, f"--{item.name.replace('_', '-')}")

    def default_tokens(self, positions: int) -> int:
        """Return how many tokens an answer may have where the request does not say it.

        Args:
            positions: tokens of prompt and answer that the model takes.
        """
        return self.max_tokens or default_new_tokens(positions)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask, and where pictures may be that a request only names.

    Attributes:
        keys: API keys; whoever has none of them is refused. Empty where everybody may ask.
        folders: pictures in these folders, and in those below them, may be named by file: URLs.
        hosts: pictures of these hosts may be named by https: URLs; `host` or `host:port`.
    """

    keys: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    hosts: tuple[str, ...] = ()
