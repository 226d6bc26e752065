"""Files of tensors that several threads write, and their digests where a manifest wants them."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from megatron_sphinx.checkpoint.digests import Algorithm, RunningDigest, digest_of
from megatron_sphinx.checkpoint.formats.format import Format
from megatron_sphinx.tensors.write import FileContents, TensorFile


class TargetFiles:
    """Files of the same tensors, one or several: they are made when the first tensor comes, and closed behind the last.

    Digests are computed while the bytes are still in memory, where they are written from the file's beginning to its
    end; else the file is read for that.

    Args:
        form: their format.
        paths: where they are made.
        contents: their tensors.
        algorithm: of the digests, if the format has a manifest.
    """

    def __init__(self, form: Format, paths: Sequence[Path], contents: FileContents, algorithm: Algorithm) -> None:
        self._form, self._paths, self._contents, self._algorithm = form, paths, contents, algorithm
        self._lock, self._left = Lock(), len(contents)
        self._files: list[TensorFile] = []
        self._digests: list[RunningDigest | None] = []

    def begin_tensor(self) -> Sequence[TensorFile]:
        """Return the files that the bytes of the next tensor are appended to."""
        with self._lock:
            if not self._files:
                self._files = [self._form.create_file(path, self._contents) for path in self._paths]
                self._digests = [self._watching(file) for file in self._files]
            return self._files

    def _watching(self, file: TensorFile) -> RunningDigest | None:
        digest = RunningDigest(self._algorithm)
        return digest if self._form.has_manifest and file.watch(digest.update) else None

    def end_tensor(self) -> str | None:
        """Note that a tensor is complete.

        Returns:
            A word on the files if they are complete now: their digests with commas between them, or "-".
        """
        with self._lock:
            self._left -= 1
            if self._left:
                return None
        for file in self._files:
            file.close()
        if not self._form.has_manifest:
            return "-"
        made = zip(self._digests, self._paths, strict=True)
        return ",".join(digest.text() if digest else digest_of(path, self._algorithm) for digest, path in made)
