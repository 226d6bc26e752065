"""Benchmarks of videos, of which the middle frame is looked at: Video-Bench and MVBench.

Source: SPHINX-X, arXiv:2402.05935, section 4.4: frames are sampled evenly, and the middle one is the only input.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_sphinx.errors import shortened
from megatron_sphinx.evaluation.readers.layout import letter_in, option_lines, same_as
from megatron_sphinx.evaluation.readers.rows import Row, checked, first_there, located, rows_of
from megatron_sphinx.evaluation.samples import Sample
from megatron_sphinx.generation.videos import middle_frame

PARTS_OF_VIDEO_BENCH = (
    "ActivityNet", "MSVD", "MSRVTT", "TGIF", "Youcook2", "Ucfcrime", "MOT", "TVQA", "MV", "NBA", "Driving-exam",
    "Driving-decision-making", "SQA3D",
)  # fmt: skip
PLACES_OF_MVBENCH = {
    "action_sequence": "star/Charades_v1_480", "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video", "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test", "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480", "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation", "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video", "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation", "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos", "fine_grained_pose": "nturgbd", "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}  # fmt: skip


@checked
def read_video_bench(folder: Path) -> Iterator[Sample]:
    """Yield the samples of Video-Bench: 13 data sets, whose answers are with the questions or in a file of their own.

    Raises:
        DataError: a file is missing or has another layout, or no decoder of videos is installed.
    """
    truths = located(folder, "ANSWER.json or Eval_QA/ANSWER.json or answer/ANSWER.json")
    told = {row.key: row for row in rows_of(truths)} if truths.exists() else {}
    for part in PARTS_OF_VIDEO_BENCH:
        source = located(folder, f"Eval_QA/{part}_QA_new.json or {part}_QA_new.json")
        for row in rows_of(source):
            options = row.inner("choices").content
            choices = tuple(str(options[letter]).strip() for letter in sorted(options))
            truth = row
            if not row.has("answer") and part in told:
                truth = told[part].inner(row.key)
            letter = letter_in("answer")(truth, choices)
            video = row.path("{vid_path}", folder)
            yield Sample(
                id=f"{part}/{row.key}",
                picture=middle_frame(video),
                picture_id=row.text("vid_path"),
                fields={"question": row.filled("question"), "options": option_lines(choices)},
                answers=(letter,) if letter else (),
                choices=choices,
                categories={"part": part},
            )


@checked
def read_mvbench(folder: Path) -> Iterator[Sample]:
    """Yield the samples of MVBench: 20 tasks; where a question is about a part of a video, its middle frame is taken.

    Raises:
        DataError: a file is missing or has another layout, or no decoder of videos is installed.
    """
    for task, place in PLACES_OF_MVBENCH.items():
        for row in rows_of(folder / "json" / f"{task}.json"):
            choices = row.texts("candidates")
            video = row.path("{video}", first_there(folder, (f"video/{place}", place)))
            span = (_seconds(row, "start"), _seconds(row, "end")) if row.has("start") and row.has("end") else None
            yield Sample(
                id=f"{task}/{row.number}",
                picture=middle_frame(video, span),
                picture_id=f"{place}/{row.text('video')} {span or ''}".rstrip(),
                fields={"question": row.filled("question"), "options": option_lines(choices)},
                answers=(same_as("answer")(row, choices),),
                choices=choices,
                categories={"task": task},
            )


def _seconds(row: Row, field: str) -> float:
    value = row.content[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise row.fault(f"no {field}: {shortened(value, 80)!r} is no time in seconds")
    return float(value)
