"""Record what official scorers make of the answers of `made_up_answers`, as numbers in tests/data/scores.

It runs in an environment of its own, with `pycocoevalcap==1.2` and Java, and is given the folders of the unpacked
wheels of `lmms-eval==0.7.3` and `ms-vlmeval==0.0.20`, of whose files it takes single functions: the packages are never
imported.

    python tests/record_scores.py LMMS_EVAL VLMEVAL
"""

import ast
import gzip
import json
import math
import re
import string
import sys
from pathlib import Path
from typing import Any

import made_up_answers as made_up

DATA = Path(__file__).parent / "data" / "scores"


def taken(path: Path, *names: str) -> dict[str, Any]:
    """Return functions and classes of a file, made without the rest of it; those of a class by their own names."""
    wanted = [node for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "name", None) in names]
    scope: dict[str, Any] = {"re": re, "math": math, "string": string, "cp": __import__("copy"), "os": __import__("os")}
    for node in wanted:
        node.decorator_list.clear()  # type: ignore[attr-defined]
        exec(compile(ast.Module([node], []), str(path), "exec"), scope)  # type: ignore[list-item]
    return scope


def soft(answer: str, truths: list[str]) -> float:
    """Average over people as vqaEval and m4c_evaluator do, written out."""
    scores = []
    for left_out in range(len(truths)):
        others = [truth for place, truth in enumerate(truths) if place != left_out]
        scores.append(min(1, float(len([truth for truth in others if truth == answer])) / 3))
    return float(sum(scores)) / len(scores)


def vqa(folder: Path) -> dict[str, list[float]]:
    """Return the soft accuracies of vqaEval's form, where only differing answers are changed, and of EvalAI's."""
    processor = taken(folder / "_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")["EvalAIAnswerProcessor"]()

    def changed(text: str) -> str:
        return processor.process_digit_article(processor.process_punctuation(text))

    def flat(text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    official, evalai = [], []
    for answer, truths in made_up.questions(1):
        flattened, form = [flat(truth) for truth in truths], flat(answer)
        if len(set(flattened)) > 1:
            flattened, form = [changed(truth) for truth in flattened], changed(form)
        official.append(soft(form, flattened))
        evalai.append(soft(processor(answer), [processor(truth) for truth in truths]))
    return {"vqa": official, "evalai": evalai}


def documents(folder: Path) -> dict[str, list[float]]:
    """Return ANLS and relaxed accuracy."""
    scores = taken(folder.parent / "api/metrics.py", "levenshtein_distance", "anls")
    relaxed = taken(folder / "chartqa/utils.py", "relaxed_correctness")["relaxed_correctness"]
    return {
        "anls": [float(scores["anls"](truths, [answer])["anls"]) for answer, truths in made_up.questions(2)],
        "relaxed": [float(relaxed(answer, target)) for answer, target in made_up.numbers(3)],
    }


def exams(folder: Path) -> dict[str, list[Any]]:
    """Return the letters that MMMU's rules find, whether its values match, and MathVista's settled answers."""
    multiple = taken(folder / "_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response")
    multiple["random"] = type("Never", (), {"choice": staticmethod(lambda _options: None)})
    multiple["np"] = type("Places", (), {"argmax": staticmethod(lambda places: places.index(max(places)))})
    letters = [
        multiple["parse_mmmu_multi_choice_response"](
            answer,
            list(string.ascii_uppercase[: len(options)]),
            dict(zip(string.ascii_uppercase, options, strict=False)),
        )
        for answer, options in made_up.choices(4)
    ]
    values = taken(
        folder / "mmmu/utils.py",
        "parse_open_response",
        "normalize_str",
        "check_is_number",
        "extract_numbers",
        "eval_open",
    )
    opened = [
        float(values["eval_open"](truths[:2], values["parse_open_response"](answer)))
        for answer, truths in made_up.questions(5)
    ]
    settle = taken(folder / "mathvista/mathvista_evals.py", "normalize_extracted_answer", "get_most_similar")
    settle["distance"] = taken(folder.parent / "api/metrics.py", "levenshtein_distance")["levenshtein_distance"]
    own = type("Own", (), {"get_most_similar": settle["get_most_similar"]})()
    settled = [
        settle["normalize_extracted_answer"](own, answer, options, question_type, answer_type, decimals)
        for answer, options, question_type, answer_type, decimals in made_up.typed_questions(6)
    ]
    return {"mmmu": letters, "mmmu_open": opened, "mathvista": settled}


def options(folder: Path) -> dict[str, list[str | None]]:
    """Return the letters that VLMEvalKit's rules find; Z and no letter are one."""
    rules = taken(folder / "vlmeval/utils/matching_util.py", "can_infer_option", "can_infer_text", "can_infer")
    found = [
        rules["can_infer"](answer, dict(zip(string.ascii_uppercase, texts, strict=False)))
        for answer, texts in made_up.choices(8)
    ]
    return {"letters": [letter if letter and letter != "Z" else None for letter in found]}


def captions() -> dict[str, list[float]]:
    """Return CIDEr-D of captions, the tokenizer in Java included."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    answers, references = made_up.captions(9)
    tokenizer = PTBTokenizer()
    truths = tokenizer.tokenize(
        {place: [{"caption": text} for text in texts] for place, texts in enumerate(references)}
    )
    said = tokenizer.tokenize({place: [{"caption": text}] for place, text in enumerate(answers)})
    return {"cider": [float(score) for score in Cider().compute_score(truths, said)[1]]}


def main(lmms_eval: str, vlmeval: str) -> None:
    """Record all scores."""
    tasks = Path(lmms_eval) / "lmms_eval" / "tasks"
    recorded = vqa(tasks) | documents(tasks) | exams(tasks) | options(Path(vlmeval)) | captions()
    recorded |= {"digest": made_up.digest(made_up.everything())}
    DATA.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(DATA / "official.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(recorded).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
