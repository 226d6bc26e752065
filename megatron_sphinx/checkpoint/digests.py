"""SHA-256 of files. Imports no torch, so that a tool can begin with them while torch is imported."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

THREADS = min(4, len(os.sched_getaffinity(0)))  # in which the tools for checkpoints compute
_BLOCK = 2**22  # bytes hashed at a time: those of smaller blocks wait for the interpreter's lock more than they work
_LARGE = (".safetensors", ".bin", ".pth", ".distcp")


def sha256_of(path: Path, is_stopped: Callable[[], bool] = lambda: False) -> str:
    """Return the digest of a file; that of a part of it if it is stopped."""
    digest, block = hashlib.sha256(), memoryview(bytearray(min(_BLOCK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(block)) and not is_stopped():
            digest.update(block[:count])
    return digest.hexdigest()


class Digests:
    """Digests of files, computed in threads of their own from when they are first asked for."""

    def __init__(self) -> None:
        self._stop = Event()
        self._pool = ThreadPoolExecutor(THREADS, "digest")
        self._futures: dict[Path, Future[str]] = {}

    def __enter__(self) -> "Digests":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def future_of(self, path: Path) -> Future[str]:
        """Return the digest of a file that will be there once it is computed, which begins now if it has not."""
        if path not in self._futures:
            self._futures[path] = self._pool.submit(sha256_of, path, self._stop.is_set)
        return self._futures[path]

    def begin(self, folder: Path) -> None:
        """Begin with the files of tensors in a folder, if there is such a folder."""
        for path in sorted(folder.glob("*")):
            if path.suffix in _LARGE and path.is_file():
                self.future_of(path)
