"""The web page: a picture, a chat about it, boxes drawn in the colours of their words; a client of a server."""

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sphinx.data.images import decode
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.generation.grounding import draw_groundings
from megatron_sphinx.generation.requests import default_new_tokens
from megatron_sphinx.serving.client import Part, ServedModel, Server, ServerError
from megatron_sphinx.serving.transcript import Turn, escaped, messages_of, shown

# Source: the kinds of questions that accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory offers
EXAMPLES = (
    "What's in the image?",
    "Generate a detailed description about the image.",
    "Provide a one-sentence caption for the provided image.",
    "Please provide the bounding box coordinate of the region this sentence describes: blue backpack.",
    "Describe the image concisely. Include the bounding box for each mentioned object.",
    "Detect all people shown in the image.",
    "Detect the key points of the person in the region [x1, y1, x2, y2].",
    "Please detect all texts and provide their bounding box coordinate.",
    "Convert this chart to a table.",
)
_REFRESH_SECONDS = 0.05  # between two pictures of an answer that comes
_MOST_BYTES = 32 * 2**20  # of a picture's file
_AT_ONCE = 64  # answers
_MOST_TOKENS = 2048  # of an answer of a model that does not say how long a chat may be
_KEEP_SECONDS = 24 * 3600  # pictures on the page's disk


class Page:
    """What the page does, whatever shows it.

    Args:
        server: that answers.
        model: the name of its model.
    """

    def __init__(self, server: Server, model: str) -> None:
        self._server, self._model = server, model

    async def ask(
        self, question: str, picture: str | None, turns: list[Turn], **sampling: float
    ) -> AsyncGenerator[list[Turn]]:
        """Yield the chat as the answer to one more question comes; an error of the server is a note in it.

        Args:
            question: what is asked.
            picture: path of its file; None for a chat about none.
            turns: the chat before.
            sampling: temperature, top_p, top_k and max_tokens.
        """
        coming = _Coming(Turn(question))
        yield [*turns, coming.turn]
        try:
            messages = messages_of([*turns, coming.turn], Path(picture) if picture else None)
            task = asyncio.create_task(coming.take(self._server.stream(self._model, messages, sampling)))
            try:
                while not task.done():
                    await coming.news()
                    yield [*turns, coming.turn]
                    await asyncio.sleep(_REFRESH_SECONDS)
                await task
            finally:
                task.cancel()
                await asyncio.wait([task])
        except ServerError as error:
            coming.turn = replace(coming.turn, note=str(error), is_failed=True)
        yield [*turns, coming.turn]


class _Coming:
    """An answer that comes, taken as fast as it does, and looked at now and then.

    Attributes:
        turn: as much of it as there is.
    """

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self._news = asyncio.Event()

    async def take(self, stream: AsyncGenerator[Part]) -> None:
        """Take all parts of an answer; raise ServerError where it does not come to its end."""
        try:
            async with aclosing(stream) as parts:
                async for part in parts:
                    turn, note = self.turn, self.turn.note
                    if part.dropped:
                        note = f"the {part.dropped} oldest turns did not fit, and were left out"
                    if part.finish == "length":
                        note = "; ".join(filter(None, (note, "cut off at max tokens")))
                    self.turn = replace(
                        turn, answer=turn.answer + part.text, groundings=turn.groundings + part.groundings, note=note
                    )
                    self._news.set()
        finally:
            self._news.set()

    async def news(self) -> None:
        """Wait for what has not been looked at."""
        await self._news.wait()
        self._news.clear()


def build(page: Page, model: ServedModel) -> Any:
    """Lay the page out, and connect it; a `gradio.Blocks`."""
    import gradio

    most = model.positions or _MOST_TOKENS
    with gradio.Blocks(title=model.name, analytics_enabled=False, delete_cache=(3600, _KEEP_SECONDS)) as blocks:
        gradio.Markdown(f"## {escaped(model.name)}")
        turns = gradio.State([])
        with gradio.Row():
            with gradio.Column(scale=2):
                picture = gradio.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    elem_id="picture",
                )
                drawn = gradio.Image(
                    label="Boxes", interactive=False, format="png", elem_id="drawn", buttons=["download"]
                )
                with gradio.Accordion("Sampling", open=False):
                    sliders = [
                        gradio.Slider(0, 2, 0.1, step=0.05, label="temperature", elem_id="temperature"),
                        gradio.Slider(0, 1, 0.75, step=0.01, label="top_p", elem_id="top_p"),
                        gradio.Slider(0, 200, 0, step=1, label="top_k (0: all)", elem_id="top_k"),
                        gradio.Slider(
                            1, most, default_new_tokens(most), step=1, label="max tokens", elem_id="max_tokens"
                        ),
                    ]
            with gradio.Column(scale=3):
                chat = gradio.Chatbot(
                    label="Chat", height=480, elem_id="chat", latex_delimiters=[], allow_tags=False,
                    feedback_options=None, buttons=["copy"],
                )  # fmt: skip
                question = gradio.Textbox(label="Question", lines=1, max_lines=4, elem_id="question", autofocus=True)
                with gradio.Row():
                    buttons = {
                        name: gradio.Button(
                            name, elem_id=name.lower(), variant="primary" if name == "Submit" else "secondary"
                        )
                        for name in ("Submit", "Stop", "Undo", "Clear")
                    }
                gradio.Examples([[example] for example in EXAMPLES], [question], label="For example")
        _connect(page, picture, drawn, turns, chat, question, sliders, buttons)
    return blocks


def _connect(
    page: Page,
    picture: Any,
    drawn: Any,
    turns: Any,
    chat: Any,
    question: Any,
    sliders: list[Any],
    buttons: dict[str, Any],
) -> None:
    """Say what happens when something on the page is used."""
    import gradio

    async def submit(
        text: str, path: str | None, before: list[Turn], *values: float
    ) -> AsyncGenerator[tuple[Any, ...]]:
        if not text.strip():
            yield (gradio.skip(),) * 4
            return
        sampling = dict(zip(("temperature", "top_p", "top_k", "max_tokens"), values, strict=True))
        whole = {name: int(value) if name in ("top_k", "max_tokens") else value for name, value in sampling.items()}
        async with aclosing(page.ask(text.strip(), path, before, **whole)) as chats:
            async for now in chats:
                yield ("", now, shown(now), _drawn(path, now[-1]) or gradio.skip())

    def undo(before: list[Turn]) -> tuple[Any, ...]:
        if not before:
            return (gradio.skip(),) * 4
        return before[-1].question, before[:-1], shown(before[:-1]), None

    def clear() -> tuple[Any, ...]:
        return [], [], None

    private: Any = {"show_progress": "hidden", "api_visibility": "private"}
    outputs = [question, turns, chat, drawn]
    asking = gradio.on(
        [buttons["Submit"].click, question.submit], submit, [question, picture, turns, *sliders], outputs,
        concurrency_limit=_AT_ONCE, **private,
    )  # fmt: skip
    buttons["Stop"].click(None, cancels=[asking], **private)
    buttons["Undo"].click(undo, [turns], outputs, cancels=[asking], **private)
    buttons["Clear"].click(clear, None, outputs[1:], cancels=[asking], **private)
    chat.clear(clear, None, outputs[1:], cancels=[asking], **private)
    picture.change(clear, None, outputs[1:], cancels=[asking], **private)


def _drawn(path: str | None, turn: Turn) -> Any:
    """Return the picture with the boxes of an answer; None where there are none."""
    if path is None or not turn.groundings:
        return None
    try:
        return draw_groundings(decode(Path(path).read_bytes()), turn.groundings)
    except (DataError, OSError):  # the server could read it, and has said what it shows
        return None


class Site:
    """The page on a port of this machine, with a folder of its own for pictures, which goes with it.

    Args:
        server: that answers.
        host: address that the page listens on.
        port: its port; 0 for any that is free.

    Attributes:
        url: of the page.

    Raises:
        ConfigError: gradio is not installed, or the port cannot be had.
        ServerError: there is no server.
    """

    def __init__(self, server: Server, host: str, port: int) -> None:
        port = _free(host, port)
        self._folder = tempfile.TemporaryDirectory(prefix="sphinx-page-")
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": self._folder.name}
        try:
            import gradio
        except ImportError as error:
            raise ConfigError("gradio is not installed; pip install 'megatron-sphinx[page]'") from error
        model = server.model()
        self._blocks = build(Page(server, model.name), model).queue(api_open=False)
        fonts = ["system-ui", "sans-serif"]  # of the browser's machine: none is fetched from elsewhere
        _, self.url, _ = self._blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, allowed_paths=[],
            max_file_size=_MOST_BYTES, ssr_mode=False, footer_links=[], enable_monitoring=False, mcp_server=False,
            pwa=False, theme=gradio.themes.Default(font=fonts, font_mono=["monospace"]),
        )  # fmt: skip

    def wait(self) -> None:
        """Wait until the page is closed, or the process is told to end."""
        self._blocks.block_thread()

    def close(self) -> None:
        """Close the page, and remove its folder."""
        self._blocks.close()
        self._folder.cleanup()


def _free(host: str, port: int) -> int:
    """Return a port that can be listened on, 0 becoming any; raise ConfigError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
            return int(found.getsockname()[1])
        except OSError as error:
            fault = f"the page cannot listen there ({error.strerror}); give another --port, or --host"
            raise ConfigError(f"{host}:{port}: {fault}") from error
