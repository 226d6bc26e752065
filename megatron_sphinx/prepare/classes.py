"""Folders of classes: a folder of pictures for each class, called as the folder is, or as its synset of ImageNet is."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import files_in

_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ClassPicture:
    """A picture in a folder of classes.

    Attributes:
        path: from the folder of classes to the picture.
        folder: name of the folder of its class.
        name: what its class is called.
    """

    path: str
    folder: str
    name: str


def read_classes(root: Path, *, follow_links: bool = False) -> Iterator[ClassPicture]:
    """Yield the pictures of a folder of classes, class by class, each in all folders below that of its class.

    Folders whose names begin with a dot are left out, as are files beside the folders of classes.

    Args:
        root: has a folder for each class, such as ILSVRC/Data/CLS-LOC/train of ImageNet.
        follow_links: whether links in the folders may lead out of them.

    Raises:
        DataError: there are no folders of classes, one cannot be read or has no pictures, or two classes have one name.
    """
    names = _names_of(root, _folders_in(root))
    pictures = {folder: _pictures_in(root / folder, follow_links) for folder in names}
    for folder, found in pictures.items():
        yield from (ClassPicture(str(path.relative_to(root)), folder, names[folder]) for path in found)


def image_net_names() -> dict[str, str]:
    """Return what the 1,000 classes of ImageNet are called, by their synsets: the first of timm's names of each.

    Where two classes have one first name, small letters or large, such as Cardigan and cardigan, both have all their
    names; where these are alike, too, as those of the two cranes are, what WordNet says of each follows in parentheses.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    lemmas = {synset: info.label_name_to_description(synset, detailed=False) for synset in info.label_names()}
    first = {synset: found.split(",")[0] for synset, found in lemmas.items()}
    firsts, alike = (Counter(name.casefold() for name in found.values()) for found in (first, lemmas))
    names = {}
    for synset, name in first.items():
        if firsts[name.casefold()] > 1:
            name = lemmas[synset]
        if alike[name.casefold()] > 1:
            meaning = info.label_name_to_description(synset, detailed=True).partition(": ")[2]
            name = f"{name} ({meaning.partition(';')[0]})"
        names[synset] = name
    return names


def _folders_in(root: Path) -> list[str]:
    """Return the names of the folders of classes, sorted."""
    try:
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"{root}: cannot be read ({error.strerror}); give a folder with a folder for each class"
        ) from error
    if not folders:
        raise DataError(f"{root}: has no folders; give a folder with a folder of pictures for each class")
    return folders


def _names_of(root: Path, folders: list[str]) -> dict[str, str]:
    """Return what classes are called by the names of their folders."""
    if all(_SYNSET.fullmatch(folder) for folder in folders):
        known = image_net_names()
        if unknown := [folder for folder in folders if folder not in known]:
            raise DataError(
                f"{root / unknown[0]}: is none of the 1,000 classes of ImageNet; call its folder as the class is called"
            )
        return {folder: known[folder] for folder in folders}
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    for folder in folders:
        name = " ".join(folder.replace("_", " ").split())
        if not name:
            raise DataError(f"{root / folder}: its name has no letters; call the folder as the class is called")
        other = first.setdefault(name.casefold(), folder)
        if other != folder:
            raise DataError(f"{root / folder}: is called {name}, as {other} is; join them, or rename one of them")
        names[folder] = name
    return names


def _pictures_in(place: Path, follow_links: bool) -> list[Path]:
    """Return the pictures of a class, sorted."""
    from megatron_sphinx.data.images import ENDINGS

    try:
        next(place.iterdir(), None)  # which a walk over folders would pass over in silence
        found = files_in(place, ENDINGS, follow_links=follow_links)
    except OSError as error:
        raise DataError(
            f"{place}: cannot be read ({error.strerror}); get the right to read it, or remove it"
        ) from error
    if not found:
        raise DataError(f"{place}: holds no pictures ({', '.join(ENDINGS)}); fill it, or remove it")
    return found
