"""Benchmarks of documents, infographics, charts and tables."""

from functools import partial

from megatron_sphinx.evaluation.benchmark import Benchmark, Metric, OfficialFile
from megatron_sphinx.evaluation.benchmarks.submissions import json_list
from megatron_sphinx.evaluation.metrics.captions import CIDER
from megatron_sphinx.evaluation.metrics.exact_match import EXACT_MATCH, TABLE_MATCH
from megatron_sphinx.evaluation.metrics.fields import FIELD_F1
from megatron_sphinx.evaluation.metrics.relaxed import RELAXED_ACCURACY
from megatron_sphinx.evaluation.metrics.text_distance import ANLS
from megatron_sphinx.evaluation.readers.layout import Layout, one, read_layout, several, where_given
from megatron_sphinx.evaluation.readers.vqa import read_ureader
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.prepare.tasks import PROMPTS

_READING = "rrc.cvc.uab.es/?ch=17&com=downloads"
_UREADER = "huggingface.co/datasets/Mizukiluke/ureader-instruction-1.0"


def _document(
    name: str, title: str, file: str, picture: str, folders: tuple[str, ...], tokens: int, root: str = ""
) -> Benchmark:
    """Return a benchmark of the document reading challenge; the answers of test are the server's."""
    layout = Layout(
        parts={"": file},
        rows="data",
        id="{questionId}",
        picture=picture,
        folders=folders,
        picture_root=root,
        answers=where_given(several("answers"), "answers"),
        record=("questionId",),
    )
    family, _, _ = name.partition("_")
    return Benchmark(
        name=name,
        title=title,
        files=(OfficialFile(file, _READING), OfficialFile(" or ".join(folders), _READING)),
        read=partial(read_layout, layout=layout),
        prompts={Protocol.PAPER: PROMPTS["vqa"]},
        max_new_tokens=tokens,
        metric=ANLS,
        submission=json_list(f"{name}_results.json", "questionId", "answer", "questionId"),
        table=family,
        folder=family,
    )


def _forms(name: str, *folders: str) -> str:
    """Return the names that a file of questions has, with kinds of questions and without."""
    return " or ".join(f"{place}{name}{kind}.json" for place in ("", *folders) for kind in ("", "_withQT"))


def _ureader(name: str, title: str, file: str, metric: Metric, tokens: int, *, is_bare: bool) -> Benchmark:
    """Return a data set of the DUE benchmark, or VisualMRC, as UReader has it."""
    path = f"ureader_json/test_{file}.jsonl or test_{file}.jsonl"
    return Benchmark(
        name=name,
        title=title,
        files=(OfficialFile(path, _UREADER),),
        read=partial(read_ureader, name=file),
        prompts={Protocol.PAPER: "{question}" if is_bare else PROMPTS["vqa"]},
        max_new_tokens=tokens,
        metric=metric,
        table=name,
        folder="ureader",
    )


_TEST = "ChartQA Dataset/test/", "test/", "ChartQA/test/"
CHARTQA = Benchmark(
    name="chartqa",
    title="ChartQA",
    files=tuple(
        OfficialFile(" or ".join(f"{place}{name}" for place in _TEST), "github.com/vis-nlp/ChartQA")
        for name in ("test_human.json", "test_augmented.json", "png")
    ),
    read=partial(
        read_layout,
        layout=Layout(
            parts={
                part: " or ".join(f"{place}test_{part}.json" for place in _TEST) for part in ("human", "augmented")
            },
            id="{part}-{number}",
            picture="{imgname}",
            folders=tuple(f"{place}png" for place in _TEST),
            fields={"question": "query"},
            answers=one("label"),
            categories={"split": "part"},
        ),
    ),
    prompts={Protocol.PAPER: PROMPTS["vqa"]},
    max_new_tokens=10,
    metric=RELAXED_ACCURACY,
    table="chartqa",
)  # fmt: skip

BENCHMARKS = (
    _document("docvqa_val", "DocVQA (val)", _forms("val_v1.0", "val/", "spdocvqa_qas/"), "{image}",
              ("val/documents", "documents", "spdocvqa_images"), 32, "documents"),
    _document("docvqa_test", "DocVQA (test)", _forms("test_v1.0", "test/", "spdocvqa_qas/"), "{image}",
              ("test/documents", "documents", "spdocvqa_images"), 32, "documents"),
    _document("infovqa_val", "InfoVQA (val)", _forms("infographicsVQA_val_v1.0", "infographicsvqa_qas/"),
              "{image_local_name}", ("infographicsvqa_images", "infographicVQA_val_v1.0_images", "images"), 25),
    _document("infovqa_test", "InfoVQA (test)", _forms("infographicsVQA_test_v1.0", "infographicsvqa_qas/"),
              "{image_local_name}", ("infographicsvqa_images", "infographicVQA_test_v1.0_images", "images"), 25),
    CHARTQA,
    _ureader("deepform", "DeepForm", "DeepForm", FIELD_F1, 20, is_bare=True),
    _ureader("klc", "Kleister Charity", "KleisterCharity", FIELD_F1, 25, is_bare=True),
    _ureader("wtq", "WikiTableQuestions", "WikiTableQuestions", TABLE_MATCH, 20, is_bare=False),
    _ureader("tabfact", "TabFact", "TabFact", EXACT_MATCH, 10, is_bare=False),
    _ureader("visualmrc", "VisualMRC", "VisualMRC", CIDER, 35, is_bare=True),
)  # fmt: skip
