"""Benchmarks of questions with short answers about photographs, and about text in them."""

from functools import partial

from megatron_sphinx.evaluation.benchmark import Benchmark, OfficialFile
from megatron_sphinx.evaluation.benchmarks.submissions import json_list
from megatron_sphinx.evaluation.metrics.exact_match import EXACT_MATCH, GQA_MATCH
from megatron_sphinx.evaluation.metrics.vqa_soft import VQA_SOFT, VQA_SOFT_EVALAI
from megatron_sphinx.evaluation.prompts import SHORT
from megatron_sphinx.evaluation.readers.layout import (
    Layout,
    answers_of_ten,
    nothing,
    one,
    read_layout,
    word,
)
from megatron_sphinx.evaluation.readers.rows import Row
from megatron_sphinx.evaluation.readers.vqa import TwoFiles, read_ocr_vqa, read_text_vqa, read_two_files
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.prepare.tasks import PROMPTS

_VQA = "visualqa.org/download.html"
_COCO = "cocodataset.org/#download; the folder coco may hold it for all benchmarks"
_VALIDATION = OfficialFile("val2014 or ../coco/val2014", _COCO)


def _vqa(
    name: str, title: str, layout: TwoFiles, files: tuple[OfficialFile, ...], where: str, folder: str
) -> Benchmark:
    """Return a benchmark in VQA's layout."""
    named = [OfficialFile(path, where) for path in (layout.questions, layout.annotations) if path]
    return Benchmark(
        name=name,
        title=title,
        files=(*named, *files),
        read=partial(read_two_files, layout=layout),
        prompts={Protocol.PAPER: PROMPTS["vqa"]},
        max_new_tokens=10,
        metric=VQA_SOFT,
        submission=json_list(f"{name}_results.json", "question_id", "answer", "question_id"),
        table=folder,
        folder=folder,
    )


VQAV2_VAL = _vqa(
    "vqav2_val", "VQAv2 (val)",
    TwoFiles(
        questions="v2_OpenEnded_mscoco_val2014_questions.json",
        annotations="v2_mscoco_val2014_annotations.json",
        picture="COCO_val2014_{image_id:012d}.jpg",
        folders=("val2014", "../coco/val2014"),
    ),
    (_VALIDATION,), _VQA, "vqav2",
)  # fmt: skip
VQAV2_TESTDEV = _vqa(
    "vqav2_testdev", "VQAv2 (test-dev)",
    TwoFiles(
        questions="v2_OpenEnded_mscoco_test-dev2015_questions.json",
        annotations="",
        picture="COCO_test2015_{image_id:012d}.jpg",
        folders=("test2015", "../coco/test2015"),
    ),
    (OfficialFile("test2015 or ../coco/test2015", _COCO),), _VQA, "vqav2",
)  # fmt: skip
OKVQA = _vqa(
    "okvqa", "OKVQA",
    TwoFiles(
        questions="OpenEnded_mscoco_val2014_questions.json",
        annotations="mscoco_val2014_annotations.json",
        picture="COCO_val2014_{image_id:012d}.jpg",
        folders=("val2014", "../coco/val2014"),
    ),
    (_VALIDATION,), "okvqa.allenai.org/download.html", "okvqa",
)  # fmt: skip


def _viz_wiz(split: str) -> Benchmark:
    """Return a split of VizWiz; the answers of test are the server's."""
    layout = Layout(
        parts={"": f"{split}.json or Annotations/{split}.json"},
        id="{image}",
        picture="{image}",
        folders=(split,),
        answers=nothing if split == "test" else answers_of_ten("answers"),
        categories={"answer type": "answer_type"},
    )
    return Benchmark(
        name=f"vizwiz_{split}",
        title=f"VizWiz ({split})",
        files=tuple(OfficialFile(path, "vizwiz.org/tasks-and-datasets/vqa") for path in (layout.parts[""], split)),
        read=partial(read_layout, layout=layout),
        prompts={Protocol.PAPER: PROMPTS["vqa_unanswerable"]},
        max_new_tokens=10,
        metric=VQA_SOFT,
        submission=json_list(f"vizwiz_{split}_results.json", "image", "answer"),
        table="vizwiz",
        folder="vizwiz",
    )


def _structure(row: Row) -> str:
    """Return GQA's kind of a question; empty where it has none."""
    return row.inner("types").text("structural", "") if row.has("types") else ""


GQA = Benchmark(
    name="gqa",
    title="GQA",
    files=tuple(
        OfficialFile(path, "cs.stanford.edu/people/dorarad/gqa/download.html")
        for path in ("testdev_balanced_questions.json or questions1.2/testdev_balanced_questions.json", "images")
    ),
    read=partial(
        read_layout,
        layout=Layout(
            parts={"": "testdev_balanced_questions.json or questions1.2/testdev_balanced_questions.json"},
            picture="{imageId}.jpg",
            folders=("images",),
            answers=one("answer"),
            categories={"structure": _structure},
        ),
    ),
    prompts={Protocol.PAPER: PROMPTS["vqa"]},
    max_new_tokens=10,
    metric=GQA_MATCH,
    submission=json_list("testdev_balanced_predictions.json", "questionId", "prediction"),
    table="gqa",
)


def _vsr(name: str, title: str, files: str, table: str = "") -> Benchmark:
    """Return a part of Visual Spatial Reasoning; the released code evaluates on all of it."""
    layout = Layout(
        parts={"": files},
        id="{number}",
        picture="{image}",
        folders=(
            "images",
            "data/images",
            "trainval2017",
            "data/trainval2017",
            "../coco/trainval2017",
            "../coco/train2017",
        ),
        fields={"caption": "caption"},
        answers=word("label", {"0": "false", "1": "true"}),
        categories={"relation": "relation"},
    )
    return Benchmark(
        name=name,
        title=title,
        files=(
            OfficialFile(files, "github.com/cambridgeltl/visual-spatial-reasoning"),
            OfficialFile(" or ".join(layout.folders), "github.com/cambridgeltl/visual-spatial-reasoning"),
        ),
        read=partial(read_layout, layout=layout),
        prompts={Protocol.PAPER: 'Is the following statement "{caption}" true or false?'},
        max_new_tokens=10,
        metric=EXACT_MATCH,
        table=table,
        folder="vsr",
    )


def _of_split(split: str) -> str:
    return f"splits/{split}/test.jsonl or data/splits/{split}/test.jsonl or {split}/test.jsonl"


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    files=(
        OfficialFile("TextVQA_0.5.1_val.json", "textvqa.org/dataset"),
        OfficialFile("TextVQA_Rosetta_OCR_v0.2_val.json", "textvqa.org/dataset", is_needed=False),
        OfficialFile("train_images", "textvqa.org/dataset"),
    ),
    read=partial(
        read_text_vqa,
        layout=Layout(
            parts={"": "TextVQA_0.5.1_val.json"},
            rows="data",
            id="{question_id}",
            picture="{image_id}.jpg",
            folders=("train_images",),
            answers=answers_of_ten("answers"),
            record=("question_id",),
        ),
        tokens="TextVQA_Rosetta_OCR_v0.2_val.json",
    ),
    prompts={Protocol.PAPER: "{question}{reference}" + SHORT, Protocol.ACCESSORY: PROMPTS["vqa"]},
    max_new_tokens=10,
    metric=VQA_SOFT_EVALAI,
    submission=json_list("textvqa_results.json", "question_id", "answer", "question_id"),
    table="textvqa",
)
OCRVQA = Benchmark(
    name="ocrvqa",
    title="OCR-VQA (val)",
    files=tuple(OfficialFile(path, "ocr-vqa.github.io") for path in ("dataset.json", "images")),
    read=partial(read_ocr_vqa, split="val"),
    prompts={Protocol.PAPER: PROMPTS["vqa"]},
    max_new_tokens=20,
    metric=EXACT_MATCH,
    table="ocrvqa",
)

BENCHMARKS = (
    VQAV2_VAL, VQAV2_TESTDEV, OKVQA, _viz_wiz("val"), _viz_wiz("test"), GQA,
    _vsr("vsr", "VSR (zero-shot)", f"{_of_split('zeroshot')} or test.jsonl"),
    _vsr("vsr_random", "VSR (random split)", _of_split("random")),
    _vsr("vsr_all", "VSR (all)", "all_vsr_validated_data.jsonl or data/data_files/all_vsr_validated_data.jsonl", "vsr"),
    TEXTVQA, OCRVQA,
)  # fmt: skip
