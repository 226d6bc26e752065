"""The file system behind memory://, which counts what is asked of it, and can be told to fail."""

from collections import Counter
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class Counted(MemoryFileSystem):  # type: ignore[misc]
    """Files in memory.

    Attributes:
        read: ranges that were asked for, by file: first byte and end.
        fail_behind: how many files may still be opened for writing before that fails; None for any number.
    """

    read: ClassVar[dict[str, list[tuple[int, int]]]] = {}
    fail_behind: int | None = None

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        content: bytes = super().cat_file(path, start, end, **options)
        Counted.read.setdefault(path, []).append((start or 0, (start or 0) + len(content)))
        return content

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb" and Counted.fail_behind is not None and not path.endswith(".files"):
            Counted.fail_behind -= 1
            if Counted.fail_behind < 0:
                raise ConnectionError("the store is gone")
        return super()._open(path, mode, **options)

    @classmethod
    def most_read(cls, path: str) -> int:
        """Return how often the byte of a file was read that was read most."""
        ends = Counter[int]()
        for start, end in cls.read.get(path, []):
            ends[start] += 1
            ends[end] -= 1
        most = depth = 0
        for place in sorted(ends):
            depth += ends[place]
            most = max(most, depth)
        return most
