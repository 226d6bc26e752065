"""A page of headings, texts, tables and plots, as Markdown and as HTML that needs no other file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:right}td.word,th.word{text-align:left}img{max-width:100%}"
)


@dataclass(frozen=True)
class Heading:
    """The title of a part.

    Attributes:
        text: what it says.
        level: 1 for that of the page.
    """

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Sentences of plain text.

    Attributes:
        text: what they say.
    """

    text: str


@dataclass(frozen=True)
class Table:
    """A table of words and numbers.

    Attributes:
        head: names of the columns.
        rows: each as long as the head.
        words: how many of the first columns are words; the others are numbers.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


@dataclass(frozen=True)
class Plot:
    """A plot in a file beside the page.

    Attributes:
        name: of the file.
        alt: what it shows.
        content: of the file, a PNG.
    """

    name: str
    alt: str
    content: bytes


Block = Heading | Paragraph | Table | Plot


def markdown(blocks: Sequence[Block]) -> str:
    """Write a page as Markdown."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def html(blocks: Sequence[Block]) -> str:
    """Write a page as HTML, plots inside it; its title is the first heading."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    body = "\n".join(map(_html, blocks))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _markdown(block: Block) -> str:
    """Write a block as Markdown; signs that it would read are taken as they are."""
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Plot):
        return f"![{block.alt}]({block.name})"
    rule = ("---",) * block.words + ("---:",) * (len(block.head) - block.words)
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (block.head, rule, *block.rows))


def _cell(text: str) -> str:
    """Return what a cell of a Markdown table holds, on one line."""
    return " ".join(text.split()).replace("|", "\\|")


def _html(block: Block) -> str:
    """Write a block as HTML."""
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Plot):
        content = base64.b64encode(block.content).decode()
        return f'<img alt="{escape(block.alt)}" src="data:image/png;base64,{content}">'
    rows = [_html_row("th", block.head, block.words), *(_html_row("td", row, block.words) for row in block.rows)]
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _html_row(tag: str, cells: Sequence[str], words: int) -> str:
    """Write a row of an HTML table."""
    kinds = [' class="word"' if number < words else "" for number in range(len(cells))]
    parts = [f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
    return f"<tr>{''.join(parts)}</tr>"
