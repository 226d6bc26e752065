"""Benchmarks whose questions are told by folders and small files in them: MME, classes, ScreenSpot's three devices."""

from collections.abc import Iterator
from pathlib import Path

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.metrics.yes_no import COGNITION, PERCEPTION
from megatron_sphinx.evaluation.readers.referring import corners
from megatron_sphinx.evaluation.readers.rows import checked, first_there, located, rows_of
from megatron_sphinx.evaluation.samples import Sample
from megatron_sphinx.prepare.classes import image_net_names, read_classes
from megatron_sphinx.prepare.tasks import CLASS_SENTENCE

_TASKS_OF_MME = (*PERCEPTION, *COGNITION)
_ENDINGS = (".jpg", ".png", ".jpeg", ".webp", ".bmp")


@checked
def read_mme(folder: Path) -> Iterator[Sample]:
    """Yield the samples of MME: two questions a picture, in a text file of its name, in a folder for each task.

    Raises:
        DataError: a task or a picture is missing, or a file has another layout.
    """
    root = first_there(folder, ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version", "."))
    for task in _TASKS_OF_MME:
        if not (root / task).is_dir():
            raise DataError(f"{root / task}: is missing; MME has a folder for each of {', '.join(_TASKS_OF_MME)}")
        questions = first_there(root / task, ("questions_answers_YN", "."))
        texts = sorted(path for path in questions.glob("*.txt") if path.is_file())
        if not texts:
            raise DataError(f"{questions}: holds no questions (*.txt); give the folder as its authors distribute it")
        places = first_there(root / task, ("images", "."))
        pictures = {path.stem: path for path in sorted(places.iterdir()) if path.suffix.lower() in _ENDINGS}
        for text in texts:
            picture = pictures.get(text.stem, places / f"{text.stem}.jpg")
            yield from _pair(task, text, picture)


def _pair(task: str, text: Path, picture: Path) -> Iterator[Sample]:
    """Yield the two questions of a picture."""
    try:
        lines = [line for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{text}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if len(lines) != 2:
        raise DataError(
            f"{text}: has {len(lines)} questions instead of two; give the file as its authors distribute it"
        )
    for number, line in enumerate(lines, 1):
        question, _, answer = line.rstrip().rpartition("\t")
        if not question or answer.strip().lower() not in ("yes", "no"):
            raise DataError(f"{text}: line {number}: is no question, a tab, and Yes or No")
        yield Sample(
            id=f"{task}/{picture.name}/{number}",
            picture=picture,
            picture_id=f"{task}/{picture.name}",
            fields={"question": question.strip()},
            answers=(answer.strip(),),
            group=f"{task}/{picture.name}",
            categories={"task": task},
            record={"image": picture.name, "question": question.strip(), "answer": answer.strip()},
        )


@checked
def read_image_net(folder: Path) -> Iterator[Sample]:
    """Yield the pictures of ImageNet's validation: in folders of classes, or flat with Kaggle's or the devkit's labels.

    Classes are called as `image_net_names` says.

    Raises:
        DataError: labels are missing, or have another layout.
    """
    root = first_there(folder, ("ILSVRC/Data/CLS-LOC/val", "val", "."))
    names = image_net_names()
    choices = tuple(names.values())
    for picture, synset in _labelled(folder, root):
        if synset not in names:
            raise DataError(f"{picture}: its class {synset} is none of ImageNet-1K; give the validation as distributed")
        yield Sample(
            id=picture.stem,
            picture=picture,
            picture_id=picture.stem,
            fields={},
            answers=(CLASS_SENTENCE.format(choice=names[synset]), names[synset]),
            choices=choices,
            categories={"class": names[synset]},
            record={"synset": synset},
        )


@checked
def read_class_folders(folder: Path) -> Iterator[Sample]:
    """Yield the pictures of a folder of classes, class by class.

    Raises:
        DataError: there are no folders of classes, one has no pictures, or two classes have one name.
    """
    found = list(read_classes(folder, follow_links=True))
    choices = tuple(dict.fromkeys(one.name for one in found))
    for one in found:
        yield Sample(
            id=one.path,
            picture=folder / one.path,
            picture_id=one.path,
            fields={},
            answers=(CLASS_SENTENCE.format(choice=one.name), one.name),
            choices=choices,
            categories={"class": one.name},
        )


def _labelled(folder: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the pictures with their synsets."""
    classes = sorted(path for path in root.glob("n[0-9]*") if path.is_dir())
    if classes:
        for place in classes:
            pictures = sorted(path for path in place.iterdir() if path.suffix.lower() in _ENDINGS)
            yield from ((picture, place.name) for picture in pictures)
        return
    kaggle = located(folder, "LOC_val_solution.csv or ILSVRC/LOC_val_solution.csv")
    if kaggle.exists():
        for row in rows_of(kaggle):
            yield row.path("{ImageId}.JPEG", root), row.filled("PredictionString").split()[0]
        return
    kit = first_there(folder, ("ILSVRC2012_devkit_t12/data", "data"))
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    if not truth.exists():
        raise DataError(
            f"{folder}: has neither folders of classes, nor LOC_val_solution.csv, nor {truth.name}; "
            "give one of them beside the pictures"
        )
    synsets = _synsets(kit / "meta.mat")
    for number, line in enumerate(truth.read_text().split(), 1):
        if line not in synsets:
            raise DataError(f"{truth}: line {number}: {line!r} is no class of meta.mat; give both as distributed")
        yield root / f"ILSVRC2012_val_{number:08d}.JPEG", synsets[line]


def _synsets(meta: Path) -> dict[str, str]:
    """Return the synsets of the devkit by their numbers there, which are in no order of names."""
    try:
        from scipy.io import loadmat

        table = loadmat(meta, squeeze_me=True)["synsets"]
        return {str(int(entry["ILSVRC2012_ID"])): str(entry["WNID"]) for entry in table}
    except Exception as error:  # scipy may be missing, and has many errors for a damaged file
        raise DataError(f"{meta}: cannot be read ({error}); give the file of the devkit") from error


@checked
def read_screen_spot(folder: Path, device: str) -> Iterator[Sample]:
    """Yield the samples of ScreenSpot on one kind of device.

    Args:
        folder: that of the benchmark.
        device: mobile, desktop or web.

    Raises:
        DataError: the file is missing, or has another layout.
    """
    pictures = first_there(folder, ("screenspot_imgs", "images"))
    for row in rows_of(folder / f"screenspot_{device}.json"):
        yield Sample(
            id=f"{device}-{row.number}",
            picture=row.path("{img_filename}", pictures),
            picture_id=row.text("img_filename"),
            fields={"phrase": row.filled("instruction")},
            box=corners(row, "bbox"),
            categories={"kind": row.text("data_type", ""), "source": row.text("data_source", "")},
        )
