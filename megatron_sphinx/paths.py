"""Paths that somebody else's files name: they stay inside the folder that the user named."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from megatron_sphinx.errors import DataError

_MOST_SHOWN = 200  # characters of a name in a message


def is_plain(name: object) -> bool:
    """Say whether something is the name of a file alone, which leads nowhere from the folder that it is joined to."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def relative(name: str, root: Path | None = None) -> str:
    """Normalise a path from a folder to a file in it or below it: without `..`, and without `/` before it.

    The path is read as text: what `a/../b.png` says is `b.png`, whatever `a` is.

    Args:
        name: the path.
        root: the folder, as a message should name it; None where it is not known yet.

    Raises:
        DataError: the path is absolute, leads out of the folder, or names no file.
    """
    path = os.path.normpath(name)
    if not _can_be_path(name) or path == ".":
        raise DataError(f"no path: {_shown(name)} names no file")
    if path.startswith("/") or path.split("/")[0] == "..":
        where = f"is not in {root}" if root else "is absolute or leads out by .."
        raise DataError(f"path out of the folder: {_shown(name)} {where}; give paths inside, or a folder that holds it")
    return path


def inside(root: Path, name: str, *, follow_links: bool = False) -> str:
    """Normalise a path from a folder to a file, which must stay inside the folder, also after links are resolved.

    Args:
        root: folder that the user named; it may be a link itself.
        name: path from there, or an absolute one that leads into it all the same; the file need not exist.
        follow_links: whether links in the folder may lead out of it. What the name says may not, even so.

    Raises:
        DataError: the path leads out of the folder, or names no file.
    """
    path = relative(_from(root, name) if _can_be_path(name) and os.path.isabs(name) else name, root)
    if not follow_links:
        target = os.path.realpath(root / path)
        if not _is_below(os.path.realpath(root), target):
            raise DataError(f"link out of the folder, which --follow-links takes: {root / path} leads to {target}")
    return path


def files_in(root: Path, endings: Collection[str] | None, *, follow_links: bool = False) -> list[Path]:
    """Return the files of a folder and of all folders in it that have one of the endings, sorted.

    Args:
        root: folder that the user named; it may be a link itself.
        endings: in small letters and without a dot; those of files may be in any letters. None for all files, of which
            links are not looked at, since nobody reads them.
        follow_links: whether links in the folder may lead out of it; linked folders are then gone into, each once.

    Raises:
        DataError: such a file, or a folder, is a link that leads out, and links are not followed; or one to nowhere.
    """
    if endings is None:
        return sorted(_walk(root, follow_links))
    paths = [path for path in _walk(root, follow_links) if path.suffix.lower().removeprefix(".") in endings]
    for path in paths:
        if path.is_symlink():  # folders have been looked at on the way
            inside(root, str(path.relative_to(root)), follow_links=follow_links)
            if not path.exists():
                raise DataError(f"{path}: is a link to nowhere; mend it or remove it")
    return sorted(paths)


def _walk(root: Path, follow_links: bool) -> Iterator[Path]:
    """Yield all files of a folder; a link to a folder that is walked anyway is passed over."""
    whole = os.path.realpath(root)
    known = {whole}
    for place, folders, files in os.walk(root, followlinks=True):
        yield from (Path(place, name) for name in files)
        gone_into = []
        for name in sorted(folders):
            path = Path(place, name)
            target = os.path.realpath(path)
            if target in known or (path.is_symlink() and _is_below(whole, target)):
                continue
            inside(root, str(path.relative_to(root)), follow_links=follow_links)
            known.add(target)
            gone_into.append(name)
        folders[:] = gone_into


def _from(root: Path, name: str) -> str:
    """Turn an absolute path that leads into a folder into a path from that; leave any other as it is."""
    path = os.path.normpath(name)
    for folder, target in ((os.path.abspath(root), path), (os.path.realpath(root), os.path.realpath(path))):
        if _is_below(folder, target):
            return os.path.relpath(target, folder)
    return name


def _is_below(folder: str, path: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def _can_be_path(name: str) -> bool:
    try:
        return bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return False


def printable(name: str) -> str:
    """Return a name as it can be printed and hashed: bytes in it that are not UTF-8 become escapes in ASCII."""
    try:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return name.encode(errors="backslashreplace").decode()


def _shown(name: str) -> str:
    return repr(name)[:_MOST_SHOWN]
