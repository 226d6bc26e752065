"""Frames of videos that are asked about, out of files and out of folders of frames."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from megatron_sphinx.errors import DataError

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_FRAMES_PER_SECOND = 3.0  # of folders of frames in MVBench
_LEAST_SECONDS = 0.001

Span = tuple[float, float]
_Frame = TypeVar("_Frame")


class NoFrameError(DataError):
    """A video is damaged, or has no frame where one is looked for."""


@dataclass(frozen=True)
class MiddleFrame:
    """The middle frame of a video file, which is decoded when it is asked about: frames of a benchmark fill no memory.

    Attributes:
        video: the file.
        span: the part that is meant, in seconds; None for all of it.
    """

    video: Path
    span: Span | None = None

    def picture(self) -> Path | bytes:
        """Decode the frame to a PNG; a file of which none can be read is returned as it is, for who opens it says so.

        Raises:
            DataError: no decoder is installed.
        """
        try:
            return frames_of(self.video, 1, self.span)[0]
        except NoFrameError:
            return self.video


def middle_frame(video: Path, span: Span | None = None) -> Path | MiddleFrame:
    """Return the middle frame of a video, which is all that SPHINX-X looks at.

    Args:
        video: a file, or a folder of frames that are named in their order.
        span: the part that is meant, in seconds; None for all of it.

    Returns:
        The file of the frame, or what decodes it. A video that is not there, or a folder without frames, is returned as
        it is: whoever opens it as a picture says so, and the other videos are asked about all the same.

    Raises:
        DataError: no decoder is installed, and the video is a file.

    Source: SPHINX-X, arXiv:2402.05935, section 4.4.
    """
    try:
        if video.is_file():
            _import_decoder(video)
            return MiddleFrame(video, span)
        return _in_folder(video, 1, span)[0] if video.exists() else video
    except (OSError, NoFrameError):  # such as a name that is too long
        return video


def frames_of(video: Path, count: int, span: Span | None = None) -> Sequence[Path | bytes]:
    """Return frames of a video: the middle ones of `count` parts of equal length; fewer where it has fewer.

    Args:
        video: a file, or a folder of frames that are named in their order.
        count: how many, 1 or more.
        span: the part that is meant, in seconds; None for all of it.

    Returns:
        Files of frames, or PNGs of them.

    Raises:
        NoFrameError: the video has no frame, or the file is no video that can be read.
        DataError: no decoder is installed.
    """
    return _in_folder(video, count, span) if video.is_dir() else _decoded(video, count, span)


def _in_folder(folder: Path, count: int, span: Span | None) -> list[Path]:
    """Return files of frames that a folder holds."""
    frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    if span:
        first, last = (int(seconds * _FRAMES_PER_SECOND) for seconds in span)
        frames = frames[first : max(last, first) + 1]
    if not frames:
        raise NoFrameError(f"{folder}: holds no frames of {span or 'the video'}; give the folder as distributed")
    return _spread(frames, count)


def _import_decoder(video: Path) -> Any:
    """Import what decodes videos."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"{video}: no decoder of videos is installed; pip install 'megatron-sphinx[video]', or give a folder of "
            "frames of this name"
        ) from error
    return av


def _spread(items: Sequence[_Frame], count: int) -> list[_Frame]:
    """Return the middle items of `count` parts of equal length, each item once."""
    places = dict.fromkeys((2 * part + 1) * len(items) // (2 * count) for part in range(count))
    return [items[place] for place in places]


@lru_cache(maxsize=4)
def _decoded(video: Path, count: int, span: Span | None) -> Sequence[bytes]:
    """Return PNGs of frames of a file, which several questions in a row are about."""
    av = _import_decoder(video)
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            times = [frame.time or 0.0 for frame in container.decode(stream)]
            low, high = span or (0.0, math.inf)
            meant = [number for number, time in enumerate(times) if low <= time <= max(high, low + _LEAST_SECONDS)]
            if not meant:
                raise NoFrameError(f"{video}: has no frame of {span or 'it'}; give the file as distributed")
            container.seek(0)
            chosen = set(_spread(meant, count))
            frames = []
            for number, frame in enumerate(container.decode(stream)):
                if number in chosen:
                    content = io.BytesIO()
                    frame.to_image().save(content, "PNG")
                    frames.append(content.getvalue())
                if len(frames) == len(chosen):
                    break
    except (av.FFmpegError, IndexError) as error:
        raise NoFrameError(f"{video}: is no video that can be read ({error}); give the file as distributed") from error
    return frames
