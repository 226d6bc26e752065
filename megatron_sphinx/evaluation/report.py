"""The report of an evaluation: figures with intervals beside those of a paper, in JSON, Markdown and HTML."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.identity import differences
from megatron_sphinx.data.files import renamed
from megatron_sphinx.errors import DataError, remedy_of, shortened
from megatron_sphinx.evaluation.benchmark import Benchmark
from megatron_sphinx.evaluation.exports import write_exports
from megatron_sphinx.evaluation.judge import judgings_in
from megatron_sphinx.evaluation.pages import Block, Heading, Paragraph, Plot, Table, html, markdown
from megatron_sphinx.evaluation.plots import Bar, plot_figures, plot_parts
from megatron_sphinx.evaluation.results import Results, benchmarks_in, read_results
from megatron_sphinx.evaluation.run import settings_in
from megatron_sphinx.evaluation.samples import Judged, Protocol
from megatron_sphinx.evaluation.scores import Scores, scores_of

_SHOWN_FAULTS = 10
_ABSENT = "-"
_MOST_BARS = 40  # of a plot of parts


@dataclass(frozen=True)
class Entry:
    """A line of the report: a benchmark, as judged by its metric or by one judge.

    Attributes:
        results: the answers.
        scores: what they came to; without figures where a judge is still to be asked.
        judge: the name of the judge; empty for the metric.
        not_understood: ids of answers that the judge was not understood about.
        waits_for: who is still to judge: a judge, or the benchmark's server; empty for nobody.
        paper: what the paper gives, by the names of figures.
    """

    results: Results
    scores: Scores
    judge: str
    not_understood: tuple[str, ...]
    waits_for: str
    paper: Mapping[str, float]

    @property
    def title(self) -> str:
        """What the report calls it."""
        title = self.results.benchmark.title
        return f"{title}, judged by {self.judge}" if self.judge else title

    @property
    def figure(self) -> str:
        """The name of its figure that papers give; empty without figures."""
        return self.results.benchmark.figure or next(iter(self.scores.figures), "")


@dataclass(frozen=True)
class Written:
    """What a report came to.

    Attributes:
        entries: its lines.
        left_out: by name, why benchmarks of which there are answers have no line.
        path: of the report in Markdown.
    """

    entries: tuple[Entry, ...]
    left_out: Mapping[str, str]
    path: Path

    def lines(self) -> list[str]:
        """Return a line for each benchmark, for a terminal."""
        shown = [f"{entry.title}: {_line(entry)}" for entry in self.entries]
        return shown + [f"{name}: left out: {why}" for name, why in self.left_out.items()]


def write_report(
    folder: Path,
    data: Path,
    known: Mapping[str, Benchmark],
    paper: tuple[str, Mapping[str, float]] | None = None,
) -> Written:
    """Compute what the answers in a folder came to, and write it there.

    The report follows from the answers alone: however often an evaluation was killed, it is the same.

    Args:
        folder: of the evaluation.
        data: the folder that holds one for each benchmark.
        known: all benchmarks by their names.
        paper: the model that it is compared with, and the paper's numbers for it by column; None for no comparison.

    Raises:
        DataError: there are no answers, they cannot be read, or are to other questions; or the folder cannot be
            written.
    """
    settings = settings_in(folder)
    entries: list[Entry] = []
    left_out: dict[str, str] = {}
    try:
        for benchmark in benchmarks_in(folder, known):
            try:
                results = read_results(folder, benchmark, data)
                _agree(results, settings, folder)
                entries += _entries(results, folder / benchmark.name, paper[1] if paper else {})
                write_exports(results, folder / benchmark.name)
            except DataError as error:  # the others are reported all the same
                left_out[benchmark.name] = str(error)
        if not entries:
            raise DataError(
                next(iter(left_out.values()), f"{folder}: has no answers to any benchmark; run evaluate first")
            )
        name = paper[0] if paper else ""
        blocks = _blocks(settings, entries, left_out, name)
        content = {"settings": settings, "paper": name or None, "left_out": left_out,
                   "benchmarks": [_as_json(entry) for entry in entries]}  # fmt: skip
        files = {"report.json": json.dumps(content, indent=1, ensure_ascii=False), "report.md": markdown(blocks),
                 "report.html": html(blocks)}  # fmt: skip
        written: dict[str, bytes] = {one: text.encode("utf-8", "replace") for one, text in files.items()}
        written |= {block.name: block.content for block in blocks if isinstance(block, Plot)}
        for file, text in written.items():
            with renamed(folder / file) as partial:
                partial.write_bytes(text)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); {remedy_of(error)}") from error
    return Written(tuple(entries), left_out, folder / "report.md")


def _agree(results: Results, settings: Mapping[str, Any], folder: Path) -> None:
    """Raise a DataError where answers follow from something else than what their folder says of all."""
    names = {*settings, "by_ranking"} - {"sampling"}  # which differs by benchmark
    of_all, own = ({name: one.get(name) for name in names} for one in (settings, results.settings))
    for key, wanted, found in differences(of_all, own):
        raise DataError(
            f"{folder / results.benchmark.name}: its answers were made with {key}={shortened(found, 80)}, not "
            f"{shortened(wanted, 80)}; evaluate into another --output"
        )


def _entries(results: Results, folder: Path, columns: Mapping[str, float]) -> list[Entry]:
    """Return the lines of a benchmark: one, or one for each judge."""
    benchmark, protocol = results.benchmark, results.protocol
    metric = benchmark.metric
    if benchmark.submission is not None and not any(one.sample.answers or one.sample.box for one in results.answered):
        return [Entry(results, scores_of([], metric.figures), "", (), "its server", {})]
    if not benchmark.is_judged:
        counted = results.countable
        verdicts = metric.judge(counted, protocol) if counted else []
        judged = [Judged(one, verdict) for one, verdict in zip(counted, verdicts, strict=True)]
        scores = scores_of(judged, metric.figures)
        return [Entry(results, scores, "", (), "", _paper_of(benchmark, scores, columns))]
    entries = []
    for judging in judgings_in(folder, results):
        scores = scores_of(judging.judged, metric.figures)
        paper = _paper_of(benchmark, scores, columns)
        entries.append(Entry(results, scores, judging.model, judging.not_understood, "", paper))
    return entries or [Entry(results, scores_of([], metric.figures), "", (), "a judge", {})]


def _paper_of(benchmark: Benchmark, scores: Scores, columns: Mapping[str, float]) -> dict[str, float]:
    """Return what the paper gives for the figures of a benchmark, by their names."""
    main = benchmark.figure or next(iter(scores.figures), "")
    names = {name: benchmark.table if name == main else f"{benchmark.table} {name}" for name in scores.figures}
    return {name: columns[column] for name, column in names.items() if benchmark.table and column in columns}


def _as_json(entry: Entry) -> dict[str, Any]:
    """Return a line of the report as plain values."""
    results, scores = entry.results, entry.scores
    return {
        "name": results.benchmark.name,
        "title": results.benchmark.title,
        "metric": results.benchmark.metric.name,
        "judge": entry.judge or None,
        "waits_for": entry.waits_for or None,
        "asked": results.asked,
        "answered": len(results.answered),
        "scored": scores.judged,
        "faults": dict(results.faults),
        "not_understood": list(entry.not_understood),
        "unparsed": scores.unparsed,
        "figure": entry.figure,
        "figures": {name: asdict(figure) for name, figure in scores.figures.items()},
        "paper": dict(entry.paper),
        "parts": {division: {name: asdict(part) for name, part in parts.items()}
                  for division, parts in scores.parts.items()},
        "replicates": scores.replicates,
        "settings": dict(results.settings),
    }  # fmt: skip


def _blocks(
    settings: Mapping[str, Any], entries: Sequence[Entry], left_out: Mapping[str, str], paper: str
) -> list[Block]:
    """Lay the page out."""
    model = settings["model"]
    blocks: list[Block] = [Heading(f"Evaluation of {model['name']}", 1), Paragraph(_introduction(settings))]
    blocks.append(_overview(entries, paper))
    blocks += [Paragraph(f"{name} is left out: {why}.") for name, why in left_out.items()]
    bars = [
        Bar(entry.title, entry.scores.figures[entry.figure], entry.paper.get(entry.figure))
        for entry in entries
        if entry.figure in entry.scores.figures
    ]
    blocks.append(Plot("report.png", "figures with their intervals", plot_figures(bars, paper)))
    for number, entry in enumerate(entries):
        blocks += _details(entry, paper, number)
    rows = [(key, str(value)) for key, value in _flat(settings)]
    rows += [(f"{entry.results.benchmark.name}.digest", entry.results.settings["digest"]) for entry in entries]
    blocks += [Heading("Settings"), Table(("setting", "value"), tuple(dict.fromkeys(rows)), words=2)]
    return blocks


def _introduction(settings: Mapping[str, Any]) -> str:
    limit = settings.get("limit")
    first = f" Only the first {limit} questions of each benchmark were asked." if limit else ""
    return (
        f"Protocol: {Protocol(settings['protocol']).value}. Intervals are of 95 %, by bootstrap over pictures. An "
        f"answer that could not be read counts as wrong; a question that could not be asked does not count.{first}"
    )


def _overview(entries: Sequence[Entry], paper: str) -> Table:
    """Return the table of all benchmarks, those figures first that papers give."""
    head = ("benchmark", "figure", "value", "95 %", *((f"{paper} in its paper",) if paper else ()), "scored",
            "unparsed")  # fmt: skip
    return Table(head, tuple(_row(entry, paper) for entry in entries), words=2)


def _row(entry: Entry, paper: str) -> tuple[str, ...]:
    scores, results = entry.scores, entry.results
    counted = f"{scores.judged} of {results.asked}"
    given = entry.paper.get(entry.figure)
    beside = (_number(given),) if paper else ()
    figure = scores.figures.get(entry.figure)
    if figure is None:
        state = f"waits for {entry.waits_for}" if entry.waits_for else _ABSENT
        return entry.title, state, _ABSENT, _ABSENT, *beside, counted, _ABSENT
    interval = f"{_number(figure.low)} to {_number(figure.high)}"
    return entry.title, entry.figure, _number(figure.value), interval, *beside, counted, _share(scores)


def _line(entry: Entry) -> str:
    """Write the figure of a benchmark that papers give, for a terminal."""
    scores, asked = entry.scores, entry.results.asked
    figure = scores.figures.get(entry.figure)
    if figure is None:
        return f"waits for {entry.waits_for}" if entry.waits_for else f"nothing to score of {asked} questions"
    given = entry.paper.get(entry.figure)
    beside = "" if given is None else f", the paper has {_number(given)}"
    return (
        f"{entry.figure} {_number(figure.value)} ({_number(figure.low)} to {_number(figure.high)}){beside}; "
        f"{scores.judged} of {asked} questions, {_share(scores)} unparsed"
    )


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.2f}"


def _share(scores: Scores) -> str:
    return f"{scores.unparsed / scores.judged:.1%}" if scores.judged else _ABSENT


def _details(entry: Entry, paper: str, number: int) -> list[Block]:
    """Return the part of the page about one line of the report, of which this is the number."""
    scores, results = entry.scores, entry.results
    blocks: list[Block] = [Heading(entry.title)]
    missing = results.asked - len(results.answered)
    lost = len(results.answered) - len(results.countable)
    beside = f", and {lost} that count together with them are left out" if lost else ""
    blocks.append(
        Paragraph(
            f"{scores.judged} of {results.asked} questions are scored by {results.benchmark.metric.name}; "
            f"{missing} could not be asked{beside}; intervals are of {scores.replicates} draws."
        )
    )
    if entry.waits_for:
        ways = {"a judge": "ask one by megatron-sphinx judge", "its server": "send it what is in the folder submission"}
        blocks.append(Paragraph(f"The answers wait for {entry.waits_for}: {ways[entry.waits_for]}."))
    if scores.figures:
        head = ("figure", "value", "low", "high", *(("paper",) if paper else ()))
        rows = [
            (name, *map(_number, (one.value, one.low, one.high)), *((_number(entry.paper.get(name)),) if paper else ()))
            for name, one in scores.figures.items()
        ]
        blocks.append(Table(head, tuple(rows)))
    for division, parts in scores.parts.items():
        cells = [(name, str(part.count), _number(part.value), str(part.unparsed)) for name, part in parts.items()]
        blocks.append(Table((division, "answers", next(iter(scores.figures)), "unparsed"), tuple(cells)))
        if 1 < len(parts) <= _MOST_BARS:
            name = f"report_{results.benchmark.name}_{number}_{len(blocks)}.png"
            blocks.append(Plot(name, f"parts by {division}", plot_parts(parts, next(iter(scores.figures)))))
    blocks += _listed("could not be asked", [f"{one}: {why}" for one, why in results.faults.items()])
    blocks += _listed("were judged by words that were not understood", entry.not_understood)
    return blocks


def _listed(what: str, items: Sequence[str]) -> list[Block]:
    """Return a paragraph that lists the first of some items, and counts all."""
    if not items:
        return []
    more = f"; and {len(items) - _SHOWN_FAULTS} more, see report.json" if len(items) > _SHOWN_FAULTS else ""
    return [Paragraph(f"{len(items)} {what}: {'; '.join(items[:_SHOWN_FAULTS])}{more}.")]


def _flat(settings: Any, key: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested settings, by keys with dots."""
    if not isinstance(settings, Mapping):
        return [(key, settings)]
    return [leaf for name, value in settings.items() for leaf in _flat(value, f"{key}.{name}" if key else name)]
