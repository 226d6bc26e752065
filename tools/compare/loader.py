"""Our loading of image-text pairs beside webdataset's and megatron-energon's: the same shards, in turn, in one run.

    tools/compare/loader.py SHARDS... --tokenizer MODEL [--batch 64] [--samples 512] [--rounds 9]

Each shuffles, decodes, pads to a square and resizes by the same functions (data/canvas.py: antialiased bicubic, 224
pixels) and gives batches of as many pairs, by 1 and by 2 workers. The peers do what their users do: worker processes
normalise to float32, tokenise, and pad captions to the longest of the batch. Ours does what an encoder rank
and a language rank do for the same pairs: threads give uint8 pixels, which the encoder normalises where it runs, and
captions come tokenised from the index (made beforehand, as energon's is) and are packed. That work of the encoder is
real, so the rows `ours normalised` do it too, on the main thread; the JSON has their ratios under `normalised`.

`target_tokens` is caption tokens with a target that 2 workers give in a second, ours over webdataset's: a pair has the
same ones either way, so it is the ratio of samples. What packing then saves the language model is the column
targets/position, and its ratio `packed_over_padded`: a pair takes its view's positions (259), BOS, caption and EOS;
padding is computed all the same.

Prints a table of medians (CPU: of all processes) and, as the last line, one JSON object; ratios are ours over the
peer's, medians of the rounds' ratios. Needs psutil; without megatron-energon its ratios are null.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_sphinx.data import images
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.canvas import Canvas
from megatron_sphinx.data.config import DataConfig, DataSource
from megatron_sphinx.data.packing import views_in
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.data.plan import rounds
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.model.architecture import CLIP_MEAN, CLIP_STD, LanguageConfig, VisionConfig, VisualExpertConfig
from megatron_sphinx.model.views import GLOBAL
from megatron_sphinx.prepare.pairs import index_shards

LOOKAHEAD, SHUFFLED, WARM_UP = 4, 1000, 6  # batches we read ahead, samples a peer shuffles among, batches not timed
WORKERS = (1, 2)
VISION = VisionConfig(experts=(VisualExpertConfig(name="clip_vit_l14", weights="random"),))
(SIDE,) = VISION.sides
MEAN, STD = (torch.tensor(channels).view(3, 1, 1) for channels in (CLIP_MEAN, CLIP_STD))


@dataclass(frozen=True)
class Batch:
    """The size of what a loader gave.

    Attributes:
        samples: how many pairs.
        positions: how many positions the language model computes for them.
        targets: how many of these have a target.
    """

    samples: int
    positions: int
    targets: int


def normalised(pixels: Tensor) -> Tensor:
    """Normalise pixels for a CLIP encoder: uint8 [..., 3, side, side] to float32."""
    return pixels.float().div_(255).sub_(MEAN).div_(STD)


def ours(folder: Path, model: Path, size: int, workers: int, *, is_normalised: bool = False) -> Iterator[Batch]:
    """Yield batches of an encoder rank and a language rank: all that this program uses of ours, but for the index."""
    vocabulary = Tokenizer(model).identity.vocabulary
    language = LanguageConfig(layers=1, hidden=64, ffn=64, heads=1, groups=1, vocabulary=vocabulary)
    config = DataConfig(
        pairs=(DataSource(path=str(folder)),),
        tokenizer=str(model),
        pairs_per_step=size,
        text_tokens_per_step=0,
        micro_batch_rows=size,
    )
    sources = open_sources(config, language)
    planner = make_planner(config, sources, language, VISION, replicas=1, seed=1)
    builder = BatchBuilder(config, sources, VISION)
    pixels = PixelLoader(sources.samples, VISION, workers=workers, quarantine=folder / "quarantine.jsonl")
    ahead: deque[Any] = deque()
    try:
        for (rows,) in rounds(planner, 0, sys.maxsize):
            ahead.append((rows, pixels.submit(views_in(rows))))
            if len(ahead) > LOOKAHEAD:
                rows, pending = ahead.popleft()
                batch, views = builder.build(rows), pending.result().views[SIDE]
                if is_normalised:
                    views = torch.stack([normalised(view) for view in views])
                yield Batch(len(views), batch.tokens.numel(), int((batch.targets != -100).sum()))
    finally:
        for _, pending in ahead:
            pending.result()  # nothing is to be read in the turn of the next


class Peer:
    """What a worker process of a peer does with a pair and with a batch."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = Tokenizer(model)

    def picture(self, content: bytes) -> Tensor:
        """Return pixels for the encoder, float32 [3, side, side]."""
        view = Canvas(images.decode(content), VISION).cut(GLOBAL, SIDE)
        return normalised(torch.from_numpy(np.ascontiguousarray(view)))

    def caption(self, content: bytes) -> Tensor:
        """Return tokens for the language model, int64 [tokens]."""
        text = content.decode("utf-8", errors="replace").strip()
        return torch.tensor([self.tokenizer.bos, *self.tokenizer.encode(text), self.tokenizer.eos])

    def batch(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels, tokens padded to the longest caption [pairs, tokens], and targets in that shape."""
        pictures, captions = zip(*pairs, strict=True)
        tokens = pad_sequence(captions, batch_first=True)
        targets = pad_sequence([caption[1:] for caption in captions], batch_first=True, padding_value=-100)
        return torch.stack(pictures), tokens, targets


def counted(pixels: Tensor, tokens: Tensor, targets: Tensor) -> Batch:
    """Return the size of a peer's batch; its views stand behind BOS, like ours."""
    return Batch(len(pixels), tokens.numel() + len(pixels) * VISION.tokens_per_view, int((targets != -100).sum()))


def by_webdataset(shards: list[Path], model: Path, size: int, workers: int) -> Iterator[Batch]:
    """Yield batches of a plain webdataset pipeline."""
    peer = Peer(model)
    dataset = (
        webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=len(shards))
        .repeat()
        .shuffle(SHUFFLED)
        .to_tuple("jpg;jpeg", "txt")
        .map_tuple(peer.picture, peer.caption)
        .batched(size, collation_fn=peer.batch)
    )
    for batch in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield counted(*batch)


def prepare_energon(shards: list[Path], folder: Path) -> None:
    """Make the folder that energon reads from: links to the shards, and its own index of them."""
    folder.mkdir()
    for shard in shards:
        (folder / shard.name).symlink_to(shard.resolve())
    options = {"split-ratio": "1,0,0", "sample-type": "CaptioningSample", "num-workers": "2"}
    options["field-map"] = json.dumps({"image": "jpg", "caption": "txt"})
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    code = "from megatron.energon.cli.main import main; main()"
    command = [sys.executable, "-c", code, "prepare", "--non-interactive", "--no-progress", *words, str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def by_energon(folder: Path, model: Path, size: int, workers: int) -> Iterator[Batch]:
    """Yield batches of a megatron-energon loader."""
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless

    peer = Peer(model)

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
        decoder = None  # samples carry the files' bytes, so that nothing is decoded twice

        @stateless
        def encode_sample(self, sample: Any) -> Any:
            sample.image, sample.caption = peer.picture(sample.image), peer.caption(sample.caption)
            return sample

        @stateless
        def batch(self, samples: list[Any]) -> Any:
            return peer.batch([(sample.image, sample.caption) for sample in samples])

    dataset = get_train_dataset(
        str(folder),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=size,
        shuffle_buffer_size=SHUFFLED,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    for batch in get_loader(dataset):
        yield counted(*batch[:3])


Turn = dict[str, float]


def cpu_seconds() -> float:
    """Return the processor time of this process and its children so far."""
    me = psutil.Process()
    return float(sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True))))


def measure(make: Callable[[], Iterator[Batch]], samples: int) -> Turn:
    """Measure one turn: samples a second, CPU milliseconds a sample, and targets a position."""
    given: list[Batch] = []
    with closing(make()) as batches:  # type: ignore[type-var]
        for _ in islice(batches, WARM_UP):
            pass
        cpu, begin = cpu_seconds(), time.perf_counter()
        while sum(batch.samples for batch in given) < samples:
            given.append(next(batches))
        took, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    count = sum(batch.samples for batch in given)
    share = sum(batch.targets for batch in given) / sum(batch.positions for batch in given)
    return {
        "samples_per_second": count / took,
        "cpu_ms_per_sample": 1000 * cpu / count,
        "targets_per_position": share,
    }


def compare(contenders: dict[str, Callable[[], Iterator[Batch]]], samples: int, repeats: int) -> dict[str, list[Turn]]:
    """Let the contenders take turns, one after the other, round after round; return the turns of each."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, make in contenders.items():
            turns[name].append(measure(make, samples))
    return turns


def ratio(turns: dict[str, list[Turn]], mine: str, theirs: str, key: str = "samples_per_second") -> float | None:
    """Return the median of the rounds' ratios of one figure; None where the peer is not there."""
    if theirs not in turns:
        return None
    return median(our[key] / their[key] for our, their in zip(turns[mine], turns[theirs], strict=True))


def ratios(turns: dict[str, list[Turn]], mine: str) -> dict[str, float | None]:
    """Return ours over each peer's samples a second, with as many workers."""
    names = [(peer, workers) for peer in ("webdataset", "energon") for workers in WORKERS]
    return {f"{peer}_{workers}": ratio(turns, f"{mine}_{workers}", f"{peer}_{workers}") for peer, workers in names}


def main() -> int:
    """Run the comparison; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, nargs="+", help="WebDataset tars of .jpg and .txt")
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece model")
    for name, value in {"batch": 64, "samples": 512, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the peers' workers
    has_energon = find_spec("megatron.energon") is not None
    if not has_energon:
        print("megatron-energon is not installed, its ratios are null; for them: pip install megatron-energon==7.4.1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            index_shards(args.shards, folder / "index", Tokenizer(args.tokenizer))
        except SphinxError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return error.exit_status
        if has_energon:
            prepare_energon(args.shards, folder / "energon")
        contenders: dict[str, Callable[[], Iterator[Batch]]] = {}
        for workers in WORKERS:
            rest = (args.tokenizer, args.batch, workers)
            contenders[f"ours_{workers}"] = partial(ours, folder / "index", *rest)
            contenders[f"ours normalised_{workers}"] = partial(ours, folder / "index", *rest, is_normalised=True)
            contenders[f"webdataset_{workers}"] = partial(by_webdataset, args.shards, *rest)
            if has_energon:
                contenders[f"energon_{workers}"] = partial(by_energon, folder / "energon", *rest)
        turns = compare(contenders, args.samples, args.rounds)
    rows = {name: {key: median(turn[key] for turn in mine) for key in mine[0]} for name, mine in turns.items()}
    print(f"{'':<18} workers  samples/s  CPU ms/sample  targets/position")
    for name, row in rows.items():
        label, _, workers = name.rpartition("_")
        speed, cpu, share = row.values()
        print(f"{label:<18}{workers:>8}{speed:11.0f}{cpu:15.2f}{share:18.4f}")
    speeds = ratios(turns, "ours") | {"target_tokens": ratio(turns, "ours_2", "webdataset_2")}
    others = {
        "packed_over_padded": ratio(turns, "ours_2", "webdataset_2", "targets_per_position"),
        "normalised": ratios(turns, "ours normalised"),
    }
    print(json.dumps({"ratios": speeds, **others, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
