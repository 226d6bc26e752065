"""Shared fixtures: several ranks without a GPU, a port or a launcher, and a small real data set."""

import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import RLock

# for the processes of tests marked `gpu`; a worker of xdist finds it set
os.environ["GPUS_OF_TESTS"] = os.environ.get("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the ranks of a test are more than a machine's GPUs

# Ranks are forked from this process: what is imported here is imported once, not once a rank.
import deepspeed.module_inject.auto_ep_config  # noqa: F401
import matplotlib
import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from PIL import Image, ImageDraw
from torch._C._distributed_c10d import TCPStore
from torch.utils import tensorboard  # noqa: F401
from tqdm import tqdm

from megatron_sphinx import device
from megatron_sphinx.__main__ import main
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.pairs import index_shards, write_shards
from megatron_sphinx.prepare.text import write_text
from megatron_sphinx.run import train as _train  # noqa: F401

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: F401

torch.set_num_threads(1)  # a process that has started threads must not fork
tqdm.set_lock(RLock())  # its own lock is shared with what is forked: a rank killed while it holds it stops all others
TOOLS = Path(__file__).parents[1] / "tools"
EXAMPLES = Path(__file__).parents[1] / "examples"
HELD_OUT = 14  # pictures that nothing is trained on
COLOURS = ("red", "green", "blue", "black", "yellow", "purple", "orange", "gray")


def pytest_collection_finish() -> None:
    """What has been imported is never garbage: forked ranks that looked through it would each copy all of it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Share tests one by one among processes, those of Slurm jobs in one: a job needs the nodes for itself."""
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith("test_slurm.py") else nodeid

    return OneByOne(config, log)


@dataclass
class Ranks:
    """Ranks that have been forked.

    Attributes:
        pids: their processes.
        logs: what each prints, standard output and error together.
    """

    pids: list[int]
    logs: list[Path]

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit statuses (negative: the signal); kills everything and fails after `seconds`."""
        deadline, statuses = time.monotonic() + seconds, dict[int, int]()
        while len(statuses) < len(self.pids):
            for pid in self.pids:
                if pid not in statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    statuses[pid] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.02)
            if time.monotonic() > deadline:
                for pid in self.pids:
                    kill(pid)
                pytest.fail(f"ranks still ran after {seconds} s:\n{self.text()}")
        return [statuses[pid] for pid in self.pids]

    def text(self, rank: int | None = None) -> str:
        """What one rank printed, or all."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text() for log in logs)


def kill(pid: int) -> None:
    """Kill a forked process and forget it, if it is still there."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def fork_store() -> tuple[int, int]:
    """Process and port of a store where ranks meet, as they do at torchrun's.

    It has threads, so it lives in a process of its own: a process with threads must not fork.
    """
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        os.close(writer)
        while os.getppid() != 1:
            time.sleep(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        return pid, int(file.read())


def _rank(rank: int, world: int, port: int, log: Path, work: Callable[[], int | None]) -> None:
    """The whole life of a forked rank."""
    status = 1
    try:
        torch.set_num_threads(1)  # the pool of threads it was forked with is dead, and threads that repair it race
        gc.freeze()  # what is inherited is not this rank's to collect: some of it ends with threads that are not here
        device._chosen = None  # a rank chooses for itself, whatever a test chose for the process that it is forked from
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.fixture
def run_example(monkeypatch, capsys):
    """`run_example(name, *args)` runs a program of examples/, and returns what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        assert runpy.run_path(str(EXAMPLES / name))["main"]() == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A folder that is taken for a checkpoint as long as nobody opens it: for commands whose model is a double."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "consolidated.00.pth").touch()
    return str(folder)


@pytest.fixture
def start_ranks(tmp_path):
    """`start_ranks(world, work)` forks ranks that each do `work()` and returns them at once."""
    started: list[int] = []
    jobs = count()

    def start(world: int, work: Callable[[], int | None]) -> Ranks:
        store, port = fork_store()
        started.append(store)
        job = next(jobs)
        logs = [tmp_path / f"job{job}_rank{rank}.log" for rank in range(world)]
        pids = []
        for rank, log in enumerate(logs):
            log.touch()
            if (pid := os.fork()) == 0:
                _rank(rank, world, port, log, work)
            pids.append(pid)
        started.extend(pids)
        return Ranks(pids, logs)

    yield start
    for pid in started:
        kill(pid)


@pytest.fixture
def run_ranks(start_ranks):
    """`run_ranks(world, check)` calls `check()` on every rank; a rank that fails fails the test with its output."""

    def run_all(world: int, check: Callable[[], int | None], seconds: float = 120.0) -> Ranks:
        ranks = start_ranks(world, check)
        statuses = ranks.wait(seconds)
        assert not any(statuses), ranks.text(next(rank for rank, status in enumerate(statuses) if status))
        return ranks

    return run_all


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """`run_tool(name, *args)` runs a tool as if from the shell; its status, and what it printed."""

    def run_one(name: str, *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        status = runpy.run_path(str(TOOLS / name))["main"]()
        return status, *capsys.readouterr()

    return run_one


def draw(number: int) -> tuple[Image.Image, str]:
    """A picture of a coloured shape and its caption; sizes and aspect ratios differ."""
    rng = np.random.default_rng(number)
    colour, shape = COLOURS[rng.integers(len(COLOURS))], ("circle", "square")[rng.integers(2)]
    size = (int(rng.integers(24, 80)), int(rng.integers(24, 80)))
    image = Image.new("RGB", size, "white")
    box = (4, 4, size[0] - 5, size[1] - 5)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=colour)
    words = " ".join(["a", colour, shape, *["on a white ground"] * int(rng.integers(3))])
    return image, f"{words}."


@dataclass(frozen=True)
class Tiny:
    """A small data set and the configuration of a small model on it."""

    folder: Path
    values: dict

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder / "tokenizer.model")

    def write(self, target: Path, overrides: dict | None = None) -> Path:
        """The configuration as a file whose run folder is beside it."""
        values = json.loads(json.dumps(self.values))
        values["run"]["folder"] = str(target.with_suffix(""))
        for key, value in (overrides or {}).items():
            section, name = key.split(".", 1)
            values.setdefault(section, {})[name] = value
        target.write_text(yaml.safe_dump(values))
        return target


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """60 drawn pictures with captions, 50 generated documents, a tokenizer trained on both."""
    folder = tmp_path_factory.mktemp("tiny")
    pictures = folder / "pictures"
    pictures.mkdir()
    captions = []
    for number in range(60):
        image, caption = draw(number)
        image.save(pictures / f"{number:03d}.png")
        (pictures / f"{number:03d}.txt").write_text(caption)
        captions.append(caption)
    rng = np.random.default_rng(0)
    words = [colour + end for colour in COLOURS for end in ("", "ish", " light", " paint", "ness")]
    texts = [" ".join(rng.choice(words, int(rng.integers(5, 120)))) for _ in range(50)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    train_tokenizer(folder / "tokenizer", texts + captions, 300)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    index_shards(write_shards(pictures, folder / "shards", 25), folder / "pairs", tokenizer)
    write_text([folder / "text.jsonl"], folder / "text", tokenizer)
    values = {
        "run": {"folder": "", "seed": 3, "timeout": 60, "print_interval": 1},
        "model": {"layers": 2, "hidden": 32, "ffn": 48, "heads": 4, "groups": 2, "vocabulary": 300},
        "vision": {"grid": 4, "experts": [{"name": "clip_convnext_small", "weights": "random"},
                                          {"name": "dinov2_small", "weights": "random"}]},
        "data": {"pairs": str(folder / "pairs"), "text": str(folder / "text"),
                 "tokenizer": str(folder / "tokenizer.model"), "pairs_per_step": 6, "text_tokens_per_step": 150,
                 "sequence_length": 96, "row_multiple": 1, "micro_batch_rows": 2},
        "optimizer": {"learning_rate": 1.0e-2, "warmup_steps": 1},
        "training": {"steps": 3, "precision": "fp32"},
        "checkpoint": {"interval": 2},
    }  # fmt: skip
    return Tiny(folder, values)


@pytest.fixture(scope="session")
def dialogs(tiny) -> Path:
    """An index of 40 conversations on the drawn pictures, one in four without a picture, of one to three turns."""
    rng, items = np.random.default_rng(5), []
    for number in range(40):
        turns = []
        for _ in range(int(rng.integers(1, 4))):
            answer = " ".join([COLOURS[rng.integers(8)]] * int(rng.integers(1, 6)))
            turns.append({"from": "human", "value": f"Which {COLOURS[rng.integers(8)]} thing?"})
            turns.append({"from": "gpt", "value": answer})
        image = {} if number % 4 == 3 else {"image": f"{number:03d}.png"}
        items.append({"id": f"d{number}", **image, "conversations": turns})
    (tiny.folder / "dialogs.json").write_text(json.dumps(items))
    folder = tiny.folder / "conversations"
    index_conversations(
        [tiny.folder / "dialogs.json"], folder, tiny.tokenizer, images=tiny.folder / "pictures", samples_per_shard=15
    )
    return folder


@pytest.fixture(scope="session")
def held_out(tiny, tmp_path_factory):
    """14 more pictures with captions, one of which cannot be read; conversations on them; 12 more texts."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "pictures").mkdir()
    dialogs = []
    for number in range(HELD_OUT):
        image, caption = draw(1000 + number)
        image.save(folder / "pictures" / f"{number:03d}.png")
        (folder / "pictures" / f"{number:03d}.txt").write_text(caption)
        turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": caption}]
        picture = {} if number % 5 == 4 else {"image": f"{number:03d}.png"}
        dialogs.append({"id": f"h{number}", **picture, "conversations": turns})
    (folder / "dialogs.json").write_text(json.dumps(dialogs))
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(COLOURS, int(rng.integers(5, 60)))) for _ in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    [shard] = shards = write_shards(folder / "pictures", folder / "shards", HELD_OUT)
    index_shards(shards, folder / "pairs", tiny.tokenizer)
    content = bytearray(shard.read_bytes())
    place = content.index(b"IDAT")
    content[place : place + 40] = bytes(40)
    shard.write_bytes(content)
    write_text([folder / "text.jsonl"], folder / "text", tiny.tokenizer)
    index_conversations(
        [folder / "dialogs.json"], folder / "conversations", tiny.tokenizer, images=folder / "pictures",
        samples_per_shard=HELD_OUT,
    )  # fmt: skip
    return folder


@pytest.fixture
def seed(capsys) -> int:
    """The seed of a test that spoils valid files: another one each time, which is printed."""
    number = int.from_bytes(os.urandom(4), "big")
    with capsys.disabled():
        print(f" seed {number} ", end="")  # noqa: T201
    return number


def size_of(index: SampleIndex, pair: int) -> tuple[int, int]:
    """Width and height of a sample's image, as an index has them."""
    found = index.sizes(pair, pair + 1)
    return int(found.width[0]), int(found.height[0])


def train_tokenizer(prefix: Path, texts: Sequence[str], vocabulary: int) -> Path:
    """A small sentencepiece model with byte fallback."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(prefix),
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@dataclass(frozen=True)
class Trained:
    """A run that has ended."""

    folder: Path
    ranks: Ranks
    statuses: list[int]

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def train(start_ranks, tiny, tmp_path):
    """`train(world, overrides)` runs the train command on so many ranks; `name` keeps runs apart, or together."""

    def start(world: int, overrides: dict | None = None, name: str = "run") -> tuple[Path, Ranks]:
        config = tiny.write(tmp_path / f"{name}.yaml", overrides)
        return config.with_suffix(""), start_ranks(world, lambda: main(["train", str(config)]))

    def run_all(world: int, overrides: dict | None = None, name: str = "run", status: int = 0) -> Trained:
        folder, ranks = start(world, overrides, name)
        statuses = ranks.wait()
        assert statuses == [status] * world, f"statuses {statuses}\n{ranks.text()}"
        return Trained(folder, ranks, statuses)

    run_all.start = start
    return run_all
