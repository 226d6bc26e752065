"""Judged benchmarks: what another model is asked about answers, what it says is read as, each kept in a file."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.evaluation.judge_prompts import PROMPTS, JudgePrompt
from megatron_sphinx.evaluation.results import Results
from megatron_sphinx.evaluation.samples import Judged
from megatron_sphinx.serving.answer_file import AnswerFile

FOLDER = "judgements"
_RETRIES = 5  # of a question whose answer is not understood
_WARMER, _WARMEST = 0.5, 2.0  # by how much the temperature of each retry is above that before; the most of all

Ask = Callable[[Sequence[Mapping[str, str]], float], str]  # messages and temperature in, an answer out


@dataclass(frozen=True)
class Judging:
    """What a judge made of the answers to a benchmark.

    Attributes:
        judged: the answers with their verdicts, those that the judge was not understood about left out.
        not_understood: ids of those.
        model: the name of the judge.
    """

    judged: tuple[Judged, ...]
    not_understood: tuple[str, ...]
    model: str

    def __str__(self) -> str:
        count = len(self.judged) + len(self.not_understood)
        if not self.not_understood:
            return f"{count} judged by {self.model}"
        ids = shortened(", ".join(self.not_understood), 200)
        return f"{count} judged by {self.model}; {len(self.not_understood)} of {count} were not understood: {ids}"


def judge_prompt_of(results: Results) -> JudgePrompt:
    """Return what a judge is asked about answers.

    Raises:
        DataError: the benchmark is not judged.
    """
    name = results.benchmark.name
    if name not in PROMPTS:
        raise DataError(f"{name}: is not judged by a model; judged are {', '.join(sorted(PROMPTS))}")
    return PROMPTS[name]


def judge(results: Results, folder: Path, ask: Ask, model: str, *, threads: int = 8, show: bool = False) -> Judging:
    """Have answers judged that are not judged yet; killed and called again, it goes on.

    Args:
        results: the answers.
        folder: of the benchmark.
        ask: asks the judge; several threads call it at once.
        model: the judge's name.
        threads: how many answers are judged at a time.
        show: whether there is a progress bar.

    Raises:
        DataError: the benchmark is not judged, or other answers were judged in the folder before.
        SphinxError: the judge cannot be asked.
    """
    prompt = judge_prompt_of(results)
    content = {one.sample.id: prompt.messages(one) for one in results.answered}
    told = json.dumps(content, sort_keys=True).encode()
    settings = {"judge": model, "temperature": prompt.temperature, "asked": hashlib.sha256(told).hexdigest()}
    path = _path_of(folder, model)
    with AnswerFile(path, settings) as file, ThreadPoolExecutor(threads) as pool:
        if not file.is_whole:
            todo = {number: one.sample.id for number, one in enumerate(results.answered) if number not in file}
            futures = {pool.submit(_judged, ask, content[name], prompt): number for number, name in todo.items()}
            bar = {"total": len(results.answered), "initial": len(file), "unit": "answer", "disable": not show}
            try:
                with tqdm(**bar, dynamic_ncols=True) as shown:
                    for future in as_completed(futures):
                        number = futures[future]
                        file.add(number, {"id": todo[number], **future.result()})
                        shown.update()
            except BaseException:  # Ctrl-C, too, does not wait for what has not begun
                pool.shutdown(cancel_futures=True)
                for future, number in futures.items():
                    if number not in file and not future.cancelled() and future.exception() is None:
                        file.add(number, {"id": todo[number], **future.result()})
                raise
        file.finish()
    return _read(path, results, prompt, model)


def judgings_in(folder: Path, results: Results) -> list[Judging]:
    """Return what all judges made of answers that have judged them to the end, by the names of their files.

    Args:
        folder: of the benchmark.
        results: the answers.

    Raises:
        DataError: a file cannot be read, or is of other answers.
    """
    if results.benchmark.name not in PROMPTS:
        return []
    prompt = judge_prompt_of(results)
    found = []
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        try:
            settings = json.loads(path.with_name(f"{path.name}.settings.json").read_bytes())
            model = str(settings["judge"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: what made it cannot be read; remove it, and judge again") from error
        found.append(_read(path, results, prompt, model))
    return found


def _path_of(folder: Path, model: str) -> Path:
    """Return the file of a judge's verdicts; names that differ in signs that files cannot have are told apart."""
    plain = re.sub(r"[^\w.-]+", "_", model)
    digest = "" if plain == model else f"-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
    return folder / FOLDER / f"{plain}{digest}.jsonl"


def _judged(ask: Ask, messages: Sequence[Mapping[str, str]], prompt: JudgePrompt) -> dict[str, Any]:
    """Ask a judge until it is understood, each time at a higher temperature."""
    said: list[str] = []
    for number in range(1 + _RETRIES):
        said.append(ask(messages, min(prompt.temperature + _WARMER * number, _WARMEST)))
        if prompt.read(said[-1]).parsed is not None:
            return {"said": said[-1], "tries": len(said)}
    return {"error": "not understood", "said": said[-1], "tries": len(said)}


def _read(path: Path, results: Results, prompt: JudgePrompt, model: str) -> Judging:
    """Read what a judge said of answers."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        said = {line["id"]: prompt.read(line["said"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({shortened(error)}); remove it, and judge again") from error
    if said.keys() != {one.sample.id for one in results.answered}:
        raise DataError(f"{path}: is of other answers; remove it, and judge again")
    judged = [Judged(one, said[one.sample.id]) for one in results.answered]
    return Judging(
        tuple(one for one in judged if one.verdict.parsed is not None),
        tuple(one.answered.sample.id for one in judged if one.verdict.parsed is None),
        model,
    )
