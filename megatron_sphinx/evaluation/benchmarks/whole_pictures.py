"""Benchmarks of sentences about a whole picture: answers that a model judges, captions, and classes as text."""

from dataclasses import replace
from functools import partial

from megatron_sphinx.evaluation.benchmark import Benchmark, OfficialFile
from megatron_sphinx.evaluation.benchmarks.submissions import json_list, json_object
from megatron_sphinx.evaluation.metrics.captions import CIDER
from megatron_sphinx.evaluation.metrics.classes import CLASS_MATCH
from megatron_sphinx.evaluation.metrics.reviews import LLAVA_BENCH as LLAVA_BENCH_REVIEWS
from megatron_sphinx.evaluation.metrics.reviews import MM_VET as MM_VET_REVIEWS
from megatron_sphinx.evaluation.readers.captions import read_captions
from megatron_sphinx.evaluation.readers.folders import read_class_folders, read_image_net
from megatron_sphinx.evaluation.readers.judged import read_llava_bench, read_mm_vet
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.prepare.tasks import CLASS_SENTENCE, PROMPTS

_IN_THE_WILD = "huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"

LLAVA_BENCH = Benchmark(
    name="llava_bench",
    title="LLaVA-Bench (In-the-Wild)",
    files=(
        OfficialFile("questions.jsonl", _IN_THE_WILD),
        OfficialFile("context.jsonl", _IN_THE_WILD),
        OfficialFile("answers_gpt4.jsonl", _IN_THE_WILD),
        OfficialFile("images", _IN_THE_WILD),
        OfficialFile("rule.json", "github.com/haotian-liu/LLaVA, llava/eval/table/rule.json"),
    ),
    read=read_llava_bench,
    prompts={Protocol.PAPER: "{question}"},
    max_new_tokens=1024,
    metric=LLAVA_BENCH_REVIEWS,
    is_judged=True,
    table="llava_bench",
)
MM_VET = Benchmark(
    name="mm_vet",
    title="MM-Vet",
    files=tuple(OfficialFile(path, "github.com/yuweihao/MM-Vet, mm-vet.zip") for path in ("mm-vet.json", "images")),
    read=read_mm_vet,
    prompts={Protocol.PAPER: "{question}"},
    max_new_tokens=512,
    metric=MM_VET_REVIEWS,
    is_judged=True,
    submission=json_object("mm-vet_results.json"),
    table="mm_vet",
)
FLICKR30K = Benchmark(
    name="flickr30k",
    title="Flickr30k (Karpathy's test)",
    files=(
        OfficialFile(
            "dataset_flickr30k.json or *flickr30k*.json",
            "cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        ),
        OfficialFile("flickr30k-images or flickr30k_images or images", "shannon.cs.illinois.edu/DenotationGraph"),
    ),
    read=partial(
        read_captions,
        file="dataset_flickr30k.json or *flickr30k*.json",
        folders=("flickr30k-images", "flickr30k_images", "images"),
        split="test",
    ),
    prompts={Protocol.PAPER: PROMPTS["caption"]},
    max_new_tokens=64,
    metric=CIDER,
)
NOCAPS = Benchmark(
    name="nocaps",
    title="NoCaps (val)",
    files=(
        OfficialFile("nocaps_val_4500_captions.json", "nocaps.org/download"),
        OfficialFile("validation or images or val", "nocaps.org/download, pictures of Open Images V4"),
    ),
    read=partial(read_captions, file="nocaps_val_4500_captions.json", folders=("validation", "images", "val")),
    prompts={Protocol.PAPER: PROMPTS["caption"]},
    max_new_tokens=64,
    metric=CIDER,
    submission=json_list("nocaps_results.json", "image_id", "caption", "image_id"),
)
IMAGENET = Benchmark(
    name="imagenet",
    title="ImageNet-1K (val) as text",
    files=(OfficialFile("val or ILSVRC/Data/CLS-LOC/val", "image-net.org/download.php"),),
    read=read_image_net,
    prompts={Protocol.PAPER: PROMPTS["classify"]},
    max_new_tokens=32,
    metric=CLASS_MATCH,
    table="imagenet",
    sentence=CLASS_SENTENCE,
)
CLASSES = replace(
    IMAGENET,
    name="classes",
    title="A folder of classes as text",
    files=(OfficialFile("*", "a folder of pictures for each class; the class is called as its folder is"),),
    read=read_class_folders,
    table="",
)

BENCHMARKS = (LLAVA_BENCH, MM_VET, FLICKR30K, NOCAPS, IMAGENET, CLASSES)
