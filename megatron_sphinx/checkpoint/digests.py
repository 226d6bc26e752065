"""Digests of files: XXH3 of 128 bits, which costs less than reading, or SHA-256, which nobody can forge.

A digest is written as `xxh3_128:` and hexadecimal digits. One of 64 digits alone is a SHA-256: that is how manifests
had them before there was a choice, and have them still where SHA-256 is asked for.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol

import xxhash

Algorithm = Literal["xxh3_128", "sha256"]
THREADS = min(4, len(os.sched_getaffinity(0)))  # in which the tools for checkpoints compute
_BLOCK = 2**18  # bytes hashed at a time: they stay in a core's cache between reading and hashing


class _Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class RunningDigest:
    """A digest of bytes that come one behind the other.

    Args:
        algorithm: what it is computed by.

    Source: xxHash, doc/xxhash_spec.md, for XXH3; FIPS 180-4 for SHA-256.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self._hasher: _Hasher = hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()
        self._prefix = "" if algorithm == "sha256" else f"{algorithm}:"

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        self._hasher.update(data)

    def text(self) -> str:
        """Return the digest of all bytes so far, as it is written."""
        return self._prefix + self._hasher.hexdigest()


def algorithm_of(digest: str) -> Algorithm:
    """Tell by which algorithm a digest was made."""
    return "xxh3_128" if digest.startswith("xxh3_128:") else "sha256"


def digest_of(path: Path, algorithm: Algorithm = "xxh3_128") -> str:
    """Return the digest of a file."""
    digest, block = RunningDigest(algorithm), memoryview(bytearray(min(_BLOCK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.text()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, by which tokenizers are known."""
    return digest_of(path, "sha256")


def is_as_written(path: Path, digest: str) -> bool:
    """Tell whether a file has a digest, whichever algorithm that was made by."""
    return digest_of(path, algorithm_of(digest)) == digest


class FollowingDigests:
    """Digests of files that others read, each computed behind the reader, while what it has read is still in memory.

    Args:
        algorithms: what is computed of each file.
    """

    def __init__(self, algorithms: Mapping[Path, Iterable[Algorithm]]) -> None:
        self._files = {path: _FollowedFile(path, wanted) for path, wanted in algorithms.items()}

    def advance(self, path: Path, end: int) -> None:
        """Compute with a file up to a byte, or let another thread do it that is at it now."""
        if path in self._files:
            self._files[path].advance(end)

    def finish(self, path: Path) -> dict[Algorithm, str]:
        """Compute with what is left of a file, and return its digests."""
        return self._files[path].finish()


class _FollowedFile:
    """A file that is read from its beginning on, a range at a time."""

    def __init__(self, path: Path, algorithms: Iterable[Algorithm]) -> None:
        self._path, self._lock = path, Lock()
        self._digests: dict[Algorithm, RunningDigest] = {each: RunningDigest(each) for each in algorithms}
        self._done = self._wanted = 0

    def advance(self, end: int) -> None:
        self._wanted = max(self._wanted, end)
        if self._lock.acquire(blocking=False):
            try:
                self._read(self._wanted)
            finally:
                self._lock.release()

    def finish(self) -> dict[Algorithm, str]:
        with self._lock:
            self._read(self._path.stat().st_size)
        return {algorithm: digest.text() for algorithm, digest in self._digests.items()}

    def _read(self, end: int) -> None:
        if self._done >= end:
            return
        block = memoryview(bytearray(min(_BLOCK, end - self._done)))
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._done)
            while self._done < end and (count := file.readinto(block[: end - self._done])):
                for digest in self._digests.values():
                    digest.update(block[:count])
                self._done += count
