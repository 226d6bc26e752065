"""Break the package in many places, one at a time, and count how many of the faults `make test` finds.

The faults are data: tests/planted_faults.yaml. Each names a passage that stands once in the package, what stands there
instead, and the test files in which it should be found; only these are run, and of these only what `make test` runs.

    python tools/mutate.py              # all faults; about half a minute each
    python tools/mutate.py mask spikes  # those whose names hold one of the words

Exit status 0 where all were found, 1 where one was not.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import yaml

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "planted_faults.yaml"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault to plant.

    Attributes:
        name: what is broken.
        text: a passage that stands exactly once in the package.
        instead: what stands there when it is broken.
        tests: files in tests/, without `.py`, that are run.
    """

    name: str
    text: str
    instead: str
    tests: tuple[str, ...]

    def place(self, root: Path) -> Path:
        """Return the file of the package in a copy of the repository that holds the passage.

        Raises:
            ValueError: it stands nowhere, or more than once.
        """
        counts = {path: path.read_text().count(self.text) for path in (root / "megatron_sphinx").rglob("*.py")}
        if (times := sum(counts.values())) != 1:
            raise ValueError(f"{self.name}: the passage stands {times} times in the package, it must once: {self.text}")
        return next(path for path, count in counts.items() if count)


def read_faults() -> list[Fault]:
    """Return the faults in the order of their file."""
    return [Fault(**entry | {"tests": tuple(entry["tests"].split())}) for entry in yaml.safe_load(FAULTS.read_text())]


@contextmanager
def planted(fault: Fault, root: Path) -> Iterator[None]:
    """Break a copy of the repository, and mend it afterwards."""
    path = fault.place(root)
    whole = path.read_text()
    path.write_text(whole.replace(fault.text, fault.instead))
    try:
        yield
    finally:
        path.write_text(whole)


def is_found(fault: Fault, root: Path) -> bool:
    """Plant a fault in a copy of the repository and return whether a test fails.

    Raises:
        RuntimeError: the tests could not be run at all.
    """
    files = [f"tests/{name}.py" for name in fault.tests]
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider", *files]
    with planted(fault, root):
        ended = subprocess.run(
            command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
        )
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"{fault.name}: pytest ended with status {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return ended.returncode == 1


def copy_repository(target: Path) -> Path:
    """Copy what git tracks, as it is in the working tree."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def try_all(faults: Sequence[Fault], jobs: int) -> list[str]:
    """Plant the faults one after the other in each of several copies; return the names of those that no test found."""
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies: Queue[Path] = Queue()
        for number in range(jobs):
            copies.put(copy_repository(Path(folder) / str(number)))

        def try_one(fault: Fault) -> None:
            root, began = copies.get(), time.monotonic()
            try:
                found = is_found(fault, root)
            finally:
                copies.put(root)
            print(f"{'found' if found else 'MISSED':7} {time.monotonic() - began:5.0f} s  {fault.name}", flush=True)
            if not found:
                missed.append(fault.name)

        list(pool.map(try_one, faults))
    return missed


def main() -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults whose names hold one of these")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the repository that are tested at once")
    args = parser.parse_args()
    faults = [fault for fault in read_faults() if not args.words or any(word in fault.name for word in args.words)]
    missed = try_all(faults, args.jobs)
    print(json.dumps({"planted": len(faults), "found": len(faults) - len(missed), "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
