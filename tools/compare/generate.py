"""Our engine beside transformers' generate on the same weights, and questions about a picture with the prefix cache.

    tools/compare/generate.py [--precision fp32 bf16] [--threads 2] [--rounds 3] [--only NAME ...] [--checkpoint FOLDER]

Without a checkpoint in Hugging Face's format, whose LLaMA or Mixtral both sides load, the weights are random, in the
shape of SmolLM2-135M. All requests of a workload come at once; the peer pads prompts on their left and takes as many
steps as the longest answer has tokens. Ours runs without the prefix cache, since each round asks the same again.

* `1`, `8`, `32`: so many requests, prompts of 64 tokens, answers of 64.
* `32_ragged`: prompts of 16 to 128 tokens and answers of 8 to 128, both drawn evenly, by a fixed seed. Tokens of the
  peer behind the end of an answer do not count.
* `picture`: 16 questions about each of two pictures of 259 positions, answers of 4 tokens, with the prefix cache and
  without. The pictures are encoded once for all questions in both, so the ratio is of the prompts' tokens alone.

The peers are `transformers` (the dynamic cache), `static` (its static cache, with torch.compile; `--peers` names
those to run), and vLLM where it imports and the device is a GPU. A peer that fails is named, and left out.

Sides are run in turn; in fp32 their first tokens are compared. Prints a table of medians over the rounds, after one
that is not counted: tokens of all answers per second; those that come once every request has its first token, per
second from then on; the time to the first token (median over requests); the bytes of keys and values at the fullest
moment. Its last line is one JSON object; `ratios` are our tokens per second over the peer's, and of the picture those
with the prefix cache over those without.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from generate_sides import (
    Heard,
    Ours,
    Request,
    Side,
    Transformers,
    Vllm,
    compiled,
    make_llama,
    open_transformers,
    ours_of,
    questions,
    sphinx,
    start,
)

from megatron_sphinx.console import say
from megatron_sphinx.generation.requests import Prompt
from megatron_sphinx.model.architecture import LanguageConfig

NAMES = ("1", "8", "32", "32_ragged", "picture")
PEERS = ("transformers", "static", "vllm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST_EQUAL = {"fp32": 0.9, "bf16": 0.0}  # share of first tokens; where bf16 rounds, others are as likely
MOST_TOKENS, BLOCK_ROOM = 256, 16  # of a sequence


def workload(name: str, vocabulary: int, scale: int) -> list[Request]:
    """Make the requests of a workload; `scale` divides all lengths, for a quick look."""
    draw, count = random.Random(0), int(name.split("_")[0])
    lengths = [(64, 64)] * count
    if name.endswith("ragged"):
        lengths = [(draw.randint(16, 128), draw.randint(8, 128)) for _ in range(count)]
    return [
        Request(Prompt(tuple(draw.randrange(1, vocabulary) for _ in range(-(-prompt // scale)))), -(-answer // scale))
        for prompt, answer in lengths
    ]


def numbers(heard: Heard) -> dict[str, float]:
    """Say how fast the answers came."""
    ends, firsts = [seconds[-1] for seconds in heard.seconds], [seconds[0] for seconds in heard.seconds]
    tokens = sum(len(seconds) for seconds in heard.seconds)
    late = sum(one > max(firsts) for seconds in heard.seconds for one in seconds)
    return {
        "seconds": max(ends),
        "tokens_per_second": tokens / max(ends),
        "decode_tokens_per_second": late / (max(ends) - max(firsts)) if late else 0.0,
        "first_token_seconds": median(firsts),
        "cache_bytes": heard.cache_bytes,
        "hit_rate": heard.hit_rate,
    }


def require_equal(name: str, ours: Heard, peer: Heard, least: float) -> None:
    """Compare the first tokens of all answers.

    Raises:
        SystemExit: too few are equal.
    """
    same = sum(a[0] == b[0] for a, b in zip(ours.tokens, peer.tokens, strict=True)) / len(ours.tokens)
    if same < least:
        raise SystemExit(f"{name}: {same:.0%} of the first tokens are equal; the sides do not do the same work")


def in_turn(sides: dict[str, Callable[[int], Heard]], rounds: int) -> dict[str, list[Heard]]:
    """Run sides in turn, once to warm up, and then for each round; a side that fails in the first is left out."""
    heard: dict[str, list[Heard]] = {}
    for name, side in sides.items():
        try:
            heard[name] = [side(0)]
        except Exception as error:
            if name == "ours":
                raise
            say(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    for number in range(1, rounds + 1):
        for name, of_side in heard.items():
            of_side.append(sides[name](number))
    return heard


def row(heard: dict[str, list[Heard]], first: str) -> dict[str, Any]:
    """Join the medians of all sides, and those of the ratios of runs that were taken in turn."""
    found = {name: [numbers(one) for one in runs[1:]] for name, runs in heard.items()}
    sides = {name: {key: median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()}
    ratios = {
        name: {
            key: median(theirs[key] / ours[key] for ours, theirs in zip(found[first], runs, strict=True))
            for key in ("seconds", "first_token_seconds")
        }
        for name, runs in found.items()
        if name != first
    }
    return {"sides": sides, "ratios": ratios}


def texts(args: argparse.Namespace, precision: str, folder: Path, job: Any) -> dict[str, dict[str, Any]]:
    """Compare all workloads without pictures."""
    names, (platform, groups), dtype = [name for name in args.only if name != "picture"], job, DTYPES[precision]
    if not names:
        return {}
    model = open_transformers(folder, dtype, platform)
    peers: dict[str, Side] = {"transformers": Transformers(model), "static": Transformers(model, **compiled())}
    peers = {name: side for name, side in peers.items() if name in args.peers}
    if "vllm" in args.peers and platform.is_cuda and find_spec("vllm"):
        peers["vllm"] = Vllm(folder, precision)
    places = 32 * (MOST_TOKENS + BLOCK_ROOM)
    ours = ours_of(folder, dtype, groups, platform, places=places, positions=MOST_TOKENS)
    rows = {}
    for name in names:
        requests = workload(name, model.config.vocab_size, args.scale)
        sides = {who: partial(_ask, side, requests) for who, side in {"ours": ours, **peers}.items()}
        heard = in_turn(sides, args.rounds)
        for who in heard.keys() - {"ours"}:
            require_equal(f"{precision} {name} {who}", heard["ours"][0], heard[who][0], LEAST_EQUAL[precision])
        rows[name] = row(heard, "ours")
        say(line(f"{precision} {name}", rows[name]))
    ours.close()
    return rows


def _ask(side: Side, requests: Sequence[Request], _number: int) -> Heard:
    return side(requests)


def picture(args: argparse.Namespace, precision: str, job: Any) -> dict[str, dict[str, Any]]:
    """Compare questions about pictures with and without the prefix cache; each round has other pictures."""
    if "picture" not in args.only:
        return {}
    platform, groups = job
    shape = LanguageConfig(**{name: getattr(args, name) for name in ("layers", "hidden", "ffn", "heads", "groups")},
                           vocabulary=args.vocabulary)  # fmt: skip
    made: dict[str, Ours] = {}
    for name, is_on in (("cached", True), ("uncached", False)):
        made[name], vision = sphinx(shape, DTYPES[precision], groups, platform, places=2**14, has_prefix_cache=is_on)

    def ask(side: Ours, number: int) -> Heard:
        shown = [questions(vision, 2 * number + one, args.questions, args.vocabulary) for one in range(2)]
        return side([request for requests in shown for request in requests])

    heard = in_turn({name: partial(ask, side) for name, side in made.items()}, args.rounds)
    require_equal(f"{precision} picture", heard["cached"][0], heard["uncached"][0], LEAST_EQUAL[precision])
    for side in made.values():
        side.close()
    found = row(heard, "cached")
    say(line(f"{precision} picture", found))
    return {"picture": found}


def line(name: str, found: dict[str, Any]) -> str:
    """Say the ratios of a row."""
    return f"{name}: " + ", ".join(f"{ratio['seconds']:.2f} of {who}" for who, ratio in found["ratios"].items())


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Lay out the comparisons as text."""
    head = (f"{'':32}{'tokens/s':>10}{'decoding':>10}{'first token':>13}{'KV MiB':>9}{'hit rate':>10}"
            f"{'ratio':>8}{'of first':>10}")  # fmt: skip
    lines = [head]
    for name, found in rows.items():
        for number, (who, values) in enumerate(found["sides"].items()):
            ratio = found["ratios"].get(who)
            lines.append(
                f"{'' if number else name:18}{who:>14}{values['tokens_per_second']:10.1f}"
                f"{values['decode_tokens_per_second']:10.1f}{values['first_token_seconds']:11.3f} s"
                f"{values['cache_bytes'] / 2**20:9.1f}{values['hit_rate']:10.1%}"
                + (f"{ratio['seconds']:8.2f}{ratio['first_token_seconds']:10.2f}" if ratio else "")
            )
    return "\n".join(lines)


def main() -> int:
    """Run the comparisons; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "rounds": 3, "threads": 1, "questions": 16, "scale": 1, "layers": 30, "hidden": 576, "ffn": 1536, "heads": 9,
        "groups": 3, "vocabulary": 49152,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    job, rows = start(args.device), dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoint or Path(temporary)
        if args.checkpoint is None and set(args.only) != {"picture"}:
            make_llama(folder, args)
        for precision in args.precision:
            found = texts(args, precision, folder, job) | picture(args, precision, job)
            rows |= {f"{precision} {name}": one for name, one in found.items()}
    print(table(rows))
    ratios = {name: {who: one["seconds"] for who, one in found["ratios"].items()} for name, found in rows.items()}
    print(json.dumps({"ratios": ratios, "threads": args.threads, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
