"""Benchmarks of questions with options."""

from functools import partial

from megatron_sphinx.evaluation.benchmark import Benchmark, Metric, OfficialFile
from megatron_sphinx.evaluation.benchmarks.submissions import json_lines, json_object, table
from megatron_sphinx.evaluation.metrics.cmmmu import CMMMU as CMMMU_RULES
from megatron_sphinx.evaluation.metrics.exact_match import EXACT_MATCH, OPTION_TEXT
from megatron_sphinx.evaluation.metrics.mmmu import MMMU as MMMU_RULES
from megatron_sphinx.evaluation.metrics.options import CIRCULAR, OPTION_LETTER, PAIRS, SCIENCE_LETTER, SCIENCE_PREFIX
from megatron_sphinx.evaluation.prompts import CMMMU_PROMPT, LETTER, LETTER_IN_CHINESE, LETTER_SLIP, SHORT
from megatron_sphinx.evaluation.readers.exams import (
    read_ai2d,
    read_cmmmu,
    read_icon_qa,
    read_mmmu,
    read_science_qa,
    read_seed,
    read_table,
)
from megatron_sphinx.evaluation.readers.layout import Layout, in_brackets, letter_in, read_layout, same_as, several
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.prepare.tasks import PROMPTS

_SCIENCE = "scienceqa.github.io"
_ICONS = "iconqa.github.io"
_CONTEXT = "Context:\n{hint}\nQuestion:\n{question}\nChoices:\n{options}"
_SEVERAL = "{hint}{question}\nThere are several options: {options}"
_EXAM = "Question:\n{question}\n{choices}"


def _science(name: str, title: str, *, with_picture_only: bool) -> Benchmark:
    """Return the test part of ScienceQA; the model's answer is made to begin as the released code does.

    The paper's number is that of the questions with a picture.
    """
    return Benchmark(
        name=name,
        title=title,
        files=tuple(
            OfficialFile(path, _SCIENCE) for path in ("problems.json", "pid_splits.json", "test or images/test")
        ),
        read=partial(read_science_qa, split="test", with_picture_only=with_picture_only),
        prompts={Protocol.PAPER: _CONTEXT + LETTER, Protocol.ACCESSORY: _CONTEXT + LETTER_SLIP},
        max_new_tokens=10,
        metric=SCIENCE_LETTER,
        answer_prefix=SCIENCE_PREFIX,
        table="scienceqa" if with_picture_only else "",
        folder="scienceqa",
    )


def _icons(name: str, title: str, kind: str, prompt: str, metric: Metric) -> Benchmark:
    """Return the questions of one kind of IconQA; those whose options are pictures need several pictures a prompt.

    The paper's number is put beside the kind that is asked as the paper asks, for a letter.
    """
    return Benchmark(
        name=name,
        title=title,
        files=tuple(
            OfficialFile(f"{path} or iconqa_data/{path}", _ICONS)
            for path in ("problems.json", "pid_splits.json", f"iconqa/test/{kind}")
        ),
        read=partial(read_icon_qa, split="test", kind=kind),
        prompts={Protocol.PAPER: prompt},
        max_new_tokens=10,
        metric=metric,
        table="iconqa" if kind == "choose_txt" else "",
        folder="iconqa",
    )


def _table(name: str, title: str, file: str, *, column: str, folder: str, is_chinese: bool, is_once: bool) -> Benchmark:
    """Return a table of MMBench's layout."""
    end = LETTER_IN_CHINESE if is_chinese else LETTER
    return Benchmark(
        name=name,
        title=title,
        files=(OfficialFile(file, "github.com/open-compass/MMBench"),),
        read=partial(read_table, name=file),
        prompts={Protocol.PAPER: _SEVERAL, Protocol.OFFICIAL: "{hint}{question}\n{options}" + end},
        max_new_tokens=10,
        metric=OPTION_LETTER if is_once else CIRCULAR,
        submission=table(f"{name}.tsv"),
        table=column,
        folder=folder,
    )


AI2D = Benchmark(
    name="ai2d",
    title="AI2D",
    files=(
        OfficialFile("ai2d/questions or questions", "ai2-website.s3.amazonaws.com/data/ai2d-all.zip"),
        OfficialFile("ai2d/images or images", "ai2-website.s3.amazonaws.com/data/ai2d-all.zip"),
        OfficialFile(
            "ai2d_test_ids.csv or ai2d/ai2d_test_ids.csv",
            "s3-us-east-2.amazonaws.com/prior-datasets/ai2d_test_ids.csv",
        ),
    ),
    read=read_ai2d,
    prompts={
        Protocol.PAPER: "{question}\n{choices}" + SHORT,
        Protocol.ACCESSORY: "{question}{choices}" + SHORT,  # eval_mm/annotations/ai2diagram_test.json
    },
    max_new_tokens=10,
    metric=OPTION_TEXT,
    table="ai2d",
)
SEED = Benchmark(
    name="seed",
    title="SEED-Bench (image)",
    files=(
        OfficialFile("SEED-Bench.json", "huggingface.co/datasets/AILab-CVC/SEED-Bench"),
        OfficialFile("SEED-Bench-image", "huggingface.co/datasets/AILab-CVC/SEED-Bench, SEED-Bench-image.zip"),
    ),
    read=read_seed,
    prompts={Protocol.PAPER: PROMPTS["choice"]},
    max_new_tokens=10,
    metric=OPTION_LETTER,
    submission=json_lines("seed_results.jsonl", "question_id", "prediction"),
    table="seed",
)
Q_BENCH = Benchmark(
    name="q_bench",
    title="Q-Bench (dev)",
    files=(
        OfficialFile("llvisionqa_dev.json", "huggingface.co/datasets/teowu/LLVisionQA-QBench"),
        OfficialFile(
            "images_llvisionqa or images or llvisionqa_qbench_dev", "huggingface.co/datasets/teowu/LLVisionQA-QBench"
        ),
    ),
    read=partial(
        read_layout,
        layout=Layout(
            parts={"": "llvisionqa_dev.json"},
            id="{number}",
            picture="{img_path}",
            folders=("images_llvisionqa", "images", "llvisionqa_qbench_dev"),
            choices=several("candidates"),
            right=same_as("correct_ans"),
            categories={"type": "type", "concern": "concern"},
        ),
    ),
    prompts={Protocol.PAPER: "Question:\n{question}\nChoices:\n{options}"},
    max_new_tokens=10,
    metric=OPTION_LETTER,
    table="q_bench",
)
MMVP = Benchmark(
    name="mmvp",
    title="MMVP",
    files=tuple(OfficialFile(path, "huggingface.co/datasets/MMVP/MMVP") for path in ("Questions.csv", "MMVP Images")),
    read=partial(
        read_layout,
        layout=Layout(
            parts={"": "Questions.csv"},
            id="{Index}",
            picture="{Index}.jpg",
            folders=("MMVP Images",),
            fields={"question": "Question", "in_brackets": "Options"},
            choices=in_brackets("Options"),
            right=letter_in("Correct Answer"),
            group=lambda row: str((row.integer("Index") + 1) // 2),
        ),
    ),
    prompts={Protocol.PAPER: PROMPTS["choice"], Protocol.OFFICIAL: "{question} {in_brackets}"},
    max_new_tokens=10,
    metric=PAIRS,
    table="mmvp",
)


MMMU = Benchmark(
    name="mmmu",
    title="MMMU (val)",
    files=(OfficialFile("*/validation-*.parquet", "huggingface.co/datasets/MMMU/MMMU"),),
    read=partial(read_mmmu, split="validation"),
    prompts={Protocol.PAPER: _EXAM + "{told}", Protocol.ACCESSORY: _EXAM + "{told_by_accessory}"},
    max_new_tokens=10,
    metric=MMMU_RULES,
    submission=json_object("mmmu_answers.json"),
    table="mmmu",
)
CMMMU = Benchmark(
    name="cmmmu",
    title="CMMMU (val)",
    files=(OfficialFile("*/val-*.parquet", "huggingface.co/datasets/m-a-p/CMMMU"),),
    read=partial(read_cmmmu, split="val"),
    prompts={Protocol.PAPER: CMMMU_PROMPT},
    max_new_tokens=10,
    metric=CMMMU_RULES,
    submission=json_object("cmmmu_answers.json"),
    table="cmmmu",
)

BENCHMARKS = (
    _science("scienceqa", "ScienceQA (images)", with_picture_only=True),
    _science("scienceqa_all", "ScienceQA (all)", with_picture_only=False),
    _icons("iconqa", "IconQA (texts)", "choose_txt", PROMPTS["choice"], OPTION_LETTER),
    _icons("iconqa_blank", "IconQA (blanks)", "fill_in_blank", PROMPTS["vqa"], EXACT_MATCH),
    AI2D,
    _table("mmbench_dev", "MMBench (dev)", "mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv",
           column="mmbench", folder="mmbench", is_chinese=False, is_once=False),
    _table("mmbench_test", "MMBench (test)", "mmbench_test_20230712.tsv or MMBench_TEST_EN.tsv",
           column="mmbench", folder="mmbench", is_chinese=False, is_once=False),
    _table("mmbench_dev_cn", "MMBench-CN (dev)", "mmbench_dev_cn_20231003.tsv or MMBench_DEV_CN.tsv",
           column="mmbench_cn", folder="mmbench", is_chinese=True, is_once=False),
    _table("mmbench_test_cn", "MMBench-CN (test)", "mmbench_test_cn_20231003.tsv or MMBench_TEST_CN.tsv",
           column="mmbench_cn", folder="mmbench", is_chinese=True, is_once=False),
    _table("ccbench", "CCBench", "CCBench.tsv or CCBench_legacy.tsv",
           column="ccbench", folder="ccbench", is_chinese=True, is_once=True),
    SEED, Q_BENCH, MMVP, MMMU, CMMMU,
)  # fmt: skip
