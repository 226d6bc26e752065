"""Benchmarks whose answers are yes or no: POPE, MME, HallusionBench."""

from functools import partial

from megatron_sphinx.evaluation.benchmark import Benchmark, OfficialFile
from megatron_sphinx.evaluation.benchmarks.submissions import mme_results
from megatron_sphinx.evaluation.metrics.yes_no import HALLUSION_BENCH
from megatron_sphinx.evaluation.metrics.yes_no import MME as MME_SCORE
from megatron_sphinx.evaluation.metrics.yes_no import POPE as POPE_SCORE
from megatron_sphinx.evaluation.readers.folders import read_mme
from megatron_sphinx.evaluation.readers.layout import Layout, read_layout, word
from megatron_sphinx.evaluation.readers.rows import Row
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.prepare.tasks import PROMPTS

_SPLITS = ("random", "popular", "adversarial")


def _pope(name: str, title: str, splits: tuple[str, ...]) -> Benchmark:
    """Return some splits of POPE; they share their pictures."""
    layout = Layout(
        parts={split: f"coco_pope_{split}.json or output/coco/coco_pope_{split}.json" for split in splits},
        id="{part}-{question_id}",
        picture="{image}",
        folders=("val2014", "../coco/val2014"),
        fields={"question": "text"},
        answers=word("label", {"yes": "yes", "no": "no"}),
        categories={"split": "part"},
    )
    return Benchmark(
        name=name,
        title=title,
        files=(
            *(OfficialFile(path, "github.com/AoiDragon/POPE") for path in layout.parts.values()),
            OfficialFile("val2014 or ../coco/val2014", "cocodataset.org/#download"),
        ),
        read=partial(read_layout, layout=layout),
        prompts={Protocol.PAPER: PROMPTS["vqa"], Protocol.OFFICIAL: "{question}"},
        max_new_tokens=10,
        metric=POPE_SCORE,
        table="pope" if len(splits) == len(_SPLITS) else "",
        folder="pope",
    )


MME = Benchmark(
    name="mme",
    title="MME",
    files=(
        OfficialFile(
            "existence or MME_Benchmark_release_version/existence or MME_Benchmark_release_version/MME_Benchmark",
            "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation",
        ),
    ),
    read=read_mme,
    prompts={Protocol.PAPER: PROMPTS["vqa"], Protocol.OFFICIAL: "{question}"},
    max_new_tokens=10,
    metric=MME_SCORE,
    submission=mme_results,
    table="mme",
    figure="perception",
)


def _is_text_only(row: Row) -> bool:
    return row.text("visual_input") == "0"


def _difficulty(row: Row) -> str:
    """Return whether the question is about the first figure, or none, which is easy, or about another one."""
    return "easy" if row.text("figure_id") == "0" else "hard"


HALLUSIONBENCH = Benchmark(
    name="hallusionbench",
    title="HallusionBench",
    files=(
        OfficialFile("HallusionBench.json", "github.com/tianyi-lab/HallusionBench"),
        OfficialFile("hallusion_bench or VD", "github.com/tianyi-lab/HallusionBench"),
    ),
    read=partial(
        read_layout,
        layout=Layout(
            parts={"": "HallusionBench.json"},
            id="{category}/{subcategory}/{set_id}/{figure_id}/{question_id}",
            picture="{filename}",
            folders=("hallusion_bench", "."),
            picture_root="hallusion_bench",
            is_text_only=_is_text_only,
            answers=word("gt_answer", {"0": "no", "1": "yes"}),
            group=lambda row: "/".join(row.text(name) for name in ("category", "subcategory", "set_id")),
            categories={"category": "category", "subcategory": "subcategory", "difficulty": _difficulty},
            record=("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input"),
        ),
    ),
    prompts={Protocol.PAPER: PROMPTS["vqa"], Protocol.OFFICIAL: "{question}"},
    max_new_tokens=10,
    metric=HALLUSION_BENCH,
    table="hallusionbench",
)

BENCHMARKS = (
    _pope("pope", "POPE", _SPLITS),
    *(_pope(f"pope_{split}", f"POPE ({split})", (split,)) for split in _SPLITS),
    MME,
    HALLUSIONBENCH,
)
