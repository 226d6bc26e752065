"""Benchmarks of regions: the box that a sentence describes, and the place of a control on a screen."""

from functools import partial

from megatron_sphinx.evaluation.benchmark import Benchmark, OfficialFile
from megatron_sphinx.evaluation.metrics.boxes import BOX_ACCURACY, POINT_ACCURACY
from megatron_sphinx.evaluation.readers.folders import read_screen_spot
from megatron_sphinx.evaluation.readers.referring import read_references
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.prepare.tasks import PROMPTS

_REFER = "github.com/lichengunc/refer"
_TITLES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}
_SPLITS = {"refcoco": ("val", "testA", "testB"), "refcoco+": ("val", "testA", "testB"), "refcocog": ("val", "test")}
_ON_SCREEN = 'In this UI screenshot, what is the position of the element corresponding to the command "{phrase}"'


def _references(family: str, split: str) -> Benchmark:
    """Return a split of one of the three; RefCOCOg's is that of UMD."""
    references = "refs(umd).p" if family == "refcocog" else "refs(unc).p"
    return Benchmark(
        name=f"{family}_{split}",
        title=f"{_TITLES[family]} {split}",
        files=(
            OfficialFile(references, _REFER),
            OfficialFile("instances.json", _REFER),
            OfficialFile("train2014 or images/train2014 or ../coco/train2014", "cocodataset.org/#download"),
        ),
        read=partial(read_references, references=references, split=split),
        prompts={Protocol.PAPER: PROMPTS["locate"]},
        max_new_tokens=30,
        metric=BOX_ACCURACY,
        table=f"{family}_{split}",
        folder=family,
    )


def _screens(device: str) -> Benchmark:
    """Return ScreenSpot on one kind of device; its own prompt is that of SeeClick, arXiv:2401.10935."""
    return Benchmark(
        name=f"screenspot_{device}",
        title=f"ScreenSpot {device}",
        files=(
            OfficialFile(f"screenspot_{device}.json", "github.com/njucckevin/SeeClick"),
            OfficialFile("screenspot_imgs or images", "github.com/njucckevin/SeeClick"),
        ),
        read=partial(read_screen_spot, device=device),
        prompts={Protocol.PAPER: PROMPTS["locate"], Protocol.OFFICIAL: f"{_ON_SCREEN} (with point)?"},
        max_new_tokens=30,
        metric=POINT_ACCURACY,
        table=f"screenspot_{device}",
        folder="screenspot",
    )


BENCHMARKS = (
    *(_references(family, split) for family, splits in _SPLITS.items() for split in splits),
    *(_screens(device) for device in ("mobile", "desktop", "web")),
)
