"""Frames of a video, out of folders of frames and out of files."""

import io
import shutil
import sys
import wave
from pathlib import Path

import pytest
from answers_double import Double
from evaluation_double import benchmark, judge, run, write
from PIL import Image

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.benchmark import Metric
from megatron_sphinx.evaluation.metrics.figures import accuracy
from megatron_sphinx.evaluation.questions import digest_of
from megatron_sphinx.evaluation.report import write_report
from megatron_sphinx.evaluation.samples import Protocol, Sample
from megatron_sphinx.generation.videos import MiddleFrame, frames_of, middle_frame


def video(path: Path, frames: int, rate: int = 5) -> Path:
    """Write a video whose frame number n is grey of 20 n."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = 32, 32
        for number in range(frames):
            picture = Image.new("RGB", (32, 32), (20 * number,) * 3)
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def number_of(frame: Path | bytes) -> int:
    """Which frame a picture is, by its grey."""
    assert isinstance(frame, bytes)
    return round(Image.open(io.BytesIO(frame)).convert("L").getpixel((16, 16)) / 20)


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_the_middle_frame_of_a_file_is_decoded(frames, tmp_path):
    assert number_of(middle_frame(video(tmp_path / "a.mp4", frames)).picture()) == frames // 2


def test_the_middle_frame_of_a_part_is_decoded(tmp_path):
    assert number_of(middle_frame(video(tmp_path / "a.mp4", 11), (1.0, 1.8)).picture()) == 7  # frames 5 to 9


def test_a_part_behind_the_end_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no frame of \(9\.0, 10\.0\)"):
        frames_of(video(tmp_path / "a.mp4", 3), 1, (9.0, 10.0))


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"a\.mp4: is no video that can be read"):
        frames_of(tmp_path / "a.mp4", 1)


def test_a_file_without_pictures_is_refused(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "none"))
        sound.writeframes(bytes(1600))
    with pytest.raises(DataError, match="is no video that can be read"):
        frames_of(tmp_path / "a.wav", 1)


def test_without_a_decoder_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = video(tmp_path / "a.mp4", 1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"no decoder of videos is installed; pip install 'megatron-sphinx\[video\]'"):
        middle_frame(path)


def test_a_video_that_is_not_there_or_damaged_is_left_to_who_opens_it(tmp_path):
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    assert middle_frame(tmp_path / "damaged.mp4").picture() == tmp_path / "damaged.mp4"
    for name in ("a.mp4", "a" * 300, "empty"):
        assert middle_frame(tmp_path / name) == tmp_path / name


def test_frames_are_decoded_when_they_are_asked_about(tmp_path, monkeypatch):
    """A damaged video costs its own question; a report decodes nothing."""
    video(tmp_path / "a.mp4", 5)
    (tmp_path / "b.mp4").write_bytes(b"no video")

    def read(folder: Path):
        for name in ("a", "b"):
            yield Sample(
                id=name, picture=middle_frame(folder.parent / f"{name}.mp4"), picture_id=name,
                fields={"question": "What"}, answers=("grey",), categories={},
            )  # fmt: skip

    videos = benchmark(read=read, metric=Metric("word", judge, accuracy))
    write(tmp_path / "data")
    shutil.move(tmp_path / "a.mp4", tmp_path / "data")
    shutil.move(tmp_path / "b.mp4", tmp_path / "data")
    greys = []

    def answer(_messages, picture) -> str:
        greys.append(number_of(picture.content))
        return "grey"

    done = run(tmp_path / "data", tmp_path / "out", Double(answer), of=videos)
    assert (greys, done.report.answered, done.report.errors) == ([2], 1, 1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match="no decoder of videos is installed"):
        write_report(tmp_path / "out", tmp_path / "data", {"tiny": videos})
    monkeypatch.undo()
    monkeypatch.setattr(MiddleFrame, "picture", lambda _: pytest.fail("decoded"))
    assert "1 of 2 questions" in write_report(tmp_path / "out", tmp_path / "data", {"tiny": videos}).lines()[0]
    one, two = (digest_of(videos, [s], Protocol.PAPER, tmp_path) for s in read(tmp_path / "data" / "tiny"))
    assert one != two


def test_a_folder_of_frames_has_its_middle_by_name(tmp_path):
    for name in ("00003.jpg", "00001.jpg", "00002.JPG", "notes.txt"):
        (tmp_path / name).touch()
    assert middle_frame(tmp_path) == tmp_path / "00002.JPG"


@pytest.mark.parametrize(("count", "expected"), [(1, [4]), (2, [2, 6]), (4, [1, 3, 5, 7]), (20, list(range(8)))])
def test_frames_are_the_middles_of_equal_parts(count, expected, tmp_path):
    assert [number_of(frame) for frame in frames_of(video(tmp_path / "a.mp4", 8), count)] == expected
    (tmp_path / "frames").mkdir()
    for number in range(8):
        (tmp_path / "frames" / f"{number}.png").touch()
    assert [int(path.stem) for path in frames_of(tmp_path / "frames", count)] == expected
