"""Benchmarks of videos, of which the middle frame is looked at."""

from megatron_sphinx.evaluation.benchmark import Benchmark, OfficialFile
from megatron_sphinx.evaluation.metrics.options import OPTION_LETTER, VIDEO_PARTS
from megatron_sphinx.evaluation.readers.video import (
    PARTS_OF_VIDEO_BENCH,
    PLACES_OF_MVBENCH,
    read_mvbench,
    read_video_bench,
)
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.prepare.tasks import PROMPTS

VIDEO_BENCH = Benchmark(
    name="video_bench",
    title="Video-Bench (middle frame)",
    files=(
        *(
            OfficialFile(
                f"Eval_QA/{part}_QA_new.json or {part}_QA_new.json", "github.com/PKU-YuanGroup/Video-Bench"
            )
            for part in PARTS_OF_VIDEO_BENCH
        ),
        OfficialFile("Eval_video", "huggingface.co/datasets/LanguageBind/Video-Bench"),
        OfficialFile(
            "ANSWER.json or Eval_QA/ANSWER.json or answer/ANSWER.json",
            "huggingface.co/spaces/LanguageBind/Video-Bench, file/ANSWER.json",
            is_needed=False,
        ),
    ),
    read=read_video_bench,
    prompts={Protocol.PAPER: PROMPTS["choice"]},
    max_new_tokens=10,
    metric=VIDEO_PARTS,
    table="video_bench",
)  # fmt: skip
MVBENCH = Benchmark(
    name="mvbench",
    title="MVBench (middle frame)",
    files=(
        *(
            OfficialFile(f"json/{task}.json", "huggingface.co/datasets/OpenGVLab/MVBench")
            for task in PLACES_OF_MVBENCH
        ),
        OfficialFile("video or star", "huggingface.co/datasets/OpenGVLab/MVBench"),
    ),
    read=read_mvbench,
    prompts={Protocol.PAPER: PROMPTS["choice"]},
    max_new_tokens=10,
    metric=OPTION_LETTER,
    table="mvbench",
)  # fmt: skip

BENCHMARKS = (VIDEO_BENCH, MVBENCH)
