"""Which share of the time a GPU was at work, as NVIDIA's management library sees it: cheap enough for every step."""

from collections.abc import Callable
from threading import Event, Lock, Thread

import torch

from megatron_sphinx.device import Platform

_INTERVAL_SECONDS = 0.1  # between two readings; one takes some ten microseconds, on a thread of its own


class GpuBusy:
    """Reads now and then how busy a GPU is, and averages that over the steps of a run.

    A reading is the percentage of the library's last sampling period, of 1/6 s to 1 s, in which a kernel ran on the
    GPU, whichever process had started it. So a step that is shorter than such a period has the value of the steps
    around it. Where the library cannot be read there is no value: on a CPU, without the package nvidia-ml-py, on a part
    of a GPU (MIG).

    Args:
        read: gives a reading, from 0 to 100; None where there is no GPU.
        interval: seconds between two readings.
    """

    def __init__(self, read: Callable[[], float] | None, interval: float = _INTERVAL_SECONDS) -> None:
        self._sum, self._count, self._last = 0.0, 0, float("nan")
        self._lock, self._end = Lock(), Event()
        self._thread: Thread | None = None
        if read is not None:
            self._thread = Thread(target=self._watch, args=(read, interval), name="gpu busy", daemon=True)
            self._thread.start()

    @classmethod
    def of(cls, platform: Platform) -> "GpuBusy":
        """Watch the GPU of this rank; on a CPU nothing."""
        return cls((lambda: torch.cuda.utilization(platform.device)) if platform.is_cuda else None)

    def share(self) -> float | None:
        """Average the readings since this was last asked, from 0 to 1; the last one where there is none since."""
        with self._lock:
            mean = self._sum / self._count if self._count else self._last
            self._sum, self._count = 0.0, 0
        return None if mean != mean else mean / 100  # NaN: nothing was ever read

    def close(self) -> None:
        """Stop to read how busy the GPU is."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, read: Callable[[], float], interval: float) -> None:
        """Read until the end, or until that fails: then it would fail again."""
        while not self._end.is_set():
            try:
                value = float(read())
            except Exception:  # the package is missing, the driver refuses, or the GPU is not one it knows of
                return
            with self._lock:
                self._last, self._sum, self._count = value, self._sum + value, self._count + 1
            self._end.wait(interval)
