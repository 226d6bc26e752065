"""The page of all benchmarks, made from their records.

`python -m megatron_sphinx.evaluation.reference > docs/evaluation_files.md` writes it; a test holds the page to this.
"""

import sys

from megatron_sphinx.evaluation.benchmark import Benchmark
from megatron_sphinx.evaluation.benchmarks.registry import named, names
from megatron_sphinx.evaluation.samples import Protocol

_HEAD = """# Benchmarks

<!-- Made by `python -m megatron_sphinx.evaluation.reference`: change the records of the benchmarks, not this. -->

`megatron-sphinx evaluate NAMES --data DIR` reads the official files of these benchmarks, as their authors distribute
them, in the folder of DIR that is named here. Where several paths are given, one of them is enough. A path that begins
with `../coco` is in a folder that benchmarks may share. Prompts are those of the protocol `paper`, where another
protocol asks otherwise that is said, and `\\n` is the end of a line.
"""


def page() -> str:
    """Return the page as Markdown."""
    return _HEAD + "".join(_entry(named(name)) for name in names())


def _entry(benchmark: Benchmark) -> str:
    """Return the section of a benchmark."""
    lines = [f"\n## {benchmark.title}\n", f"`{benchmark.name}`, in `DIR/{benchmark.folder or benchmark.name}`:\n"]
    for file in benchmark.files:
        forms = " or ".join(f"`{form}`" for form in file.path.split(" or "))
        lines.append(f"- {forms}{'' if file.is_needed else ', if it is there'}: {file.where}")
    lines.append("")
    asked = benchmark.prompts[Protocol.PAPER]
    lines.append(f"Asks {_shown(asked)} for at most {benchmark.max_new_tokens} tokens.")
    for protocol in (Protocol.OFFICIAL, Protocol.ACCESSORY):
        if benchmark.prompts.get(protocol, asked) != asked:
            lines.append(f"The protocol `{protocol}` asks {_shown(benchmark.prompts[protocol])}.")
    for protocol, prefix in benchmark.answer_prefix.items():
        if prefix:
            lines.append(f"By `{protocol}` the answer is made to begin with {_shown(prefix)}.")
    judge = " Another model judges." if benchmark.is_judged else ""
    server = " There is a file for its server." if benchmark.submission else ""
    lines.append(f"Scored by {benchmark.metric.name}.{judge}{server}")
    return "\n".join(lines) + "\n"


def _shown(text: str) -> str:
    return "`" + text.replace("\n", "\\n") + "`"


if __name__ == "__main__":
    sys.stdout.write(page())
