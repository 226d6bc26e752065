"""What a benchmark asks, ready for a model: its samples in the order in which they are asked, prompts and sampling."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.evaluation.benchmark import Benchmark
from megatron_sphinx.evaluation.samples import Protocol, Sample
from megatron_sphinx.generation.answering import Message
from megatron_sphinx.generation.requests import Sampling
from megatron_sphinx.generation.videos import MiddleFrame
from megatron_sphinx.serving.questions import Question

# Source: accessory/eval_mm of the released code draws by these; the papers do not say how answers are drawn.
_SAMPLING = {Protocol.ACCESSORY: Sampling(temperature=0.1, top_p=0.75, seed=1)}


def sampling_of_protocol(protocol: Protocol) -> Sampling:
    """Return how answers are drawn where the user does not say it: the likeliest tokens, but for ACCESSORY."""
    return _SAMPLING.get(protocol, Sampling())


def samples_of(benchmark: Benchmark, data: Path, limit: int | None = None) -> list[Sample]:
    """Return the samples of a benchmark, those about one picture behind each other.

    Args:
        benchmark: what is asked.
        data: the folder that holds one for each benchmark.
        limit: how many of the first samples of the official file are taken; None for all.

    Raises:
        DataError: a file is missing, has another layout or no samples, or two samples have one id.
    """
    samples, ids = [], set[str]()
    for sample in islice(benchmark.samples(data), limit):
        if sample.id in ids:
            raise DataError(
                f"{benchmark.folder_in(data)}: {benchmark.name} has the id {shortened(sample.id, 80)} twice; "
                f"get its files anew"
            )
        ids.add(sample.id)
        samples.append(sample)
    if not samples:
        raise DataError(f"{benchmark.folder_in(data)}: {benchmark.name} has no samples; get its files anew")
    places: dict[str, int] = {}
    for sample in samples:
        places.setdefault(sample.picture_id, len(places))
    return sorted(samples, key=lambda sample: places[sample.picture_id])


def prompt_of(benchmark: Benchmark, sample: Sample, protocol: Protocol) -> str:
    """Return what is asked about a sample by a protocol, or by that of the paper where the benchmark has no other."""
    form = benchmark.prompts.get(protocol, benchmark.prompts[Protocol.PAPER])
    return form.format_map(dict(sample.fields))


def questions_of(benchmark: Benchmark, samples: Sequence[Sample], protocol: Protocol) -> Iterator[Question]:
    """Yield the questions of samples, in their order.

    Args:
        benchmark: the one that they are of.
        samples: what is asked.
        protocol: whose prompts are asked.
    """
    for sample in samples:
        prompt, picture = prompt_of(benchmark, sample, protocol), sample.picture
        if isinstance(picture, MiddleFrame):
            picture = picture.picture()
        yield Question(
            columns={"id": sample.id, "picture": sample.picture_id, "question": prompt},
            messages=(Message("user", prompt),),
            image=picture.name if isinstance(picture, Path) else picture,
            root=picture.parent if isinstance(picture, Path) else Path(),
            answer_prefix=benchmark.answer_prefix.get(protocol, ""),
            remedy="put it there",
        )


def digest_of(benchmark: Benchmark, samples: Sequence[Sample], protocol: Protocol, data: Path) -> str:
    """Return what differs when anything else is asked: the SHA-256 of ids, prompts, and of pictures or their names.

    Args:
        benchmark: the one that the samples are of.
        samples: what is asked.
        protocol: whose prompts are asked.
        data: what names of pictures are relative to.
    """
    digest = hashlib.sha256(benchmark.answer_prefix.get(protocol, "").encode())
    for sample in samples:
        picture = sample.picture
        if isinstance(picture, MiddleFrame):
            shown = f"{_relative(picture.video, data)} {picture.span}"
        elif isinstance(picture, Path):
            shown = _relative(picture, data)
        else:
            shown = "" if picture is None else hashlib.sha256(picture).hexdigest()
        asked = (sample.id, sample.picture_id, prompt_of(benchmark, sample, protocol), shown)
        digest.update(repr(asked).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
