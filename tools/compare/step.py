"""A step of ours beside a bare one of megatron-core and DeepSpeed, and beside transformers', in turn, in one run.

    tools/compare/step.py [--ranks 2] [--rounds 9] [--precision bf16] [--layers 4] [--hidden 512] [--only NAME ...]

Ours is the whole training loop: plan, loader, checks, metrics. All sides train the same weights on the same samples of
each step by the same AdamW under DeepSpeed ZeRO-2, and what comes of the frozen encoders lies ready for all of them.
That their first losses agree, before and after an update, is checked.

* `bare`: the same model by a loop of a few lines around deepspeed.initialize, on batches that lie ready in memory:
  pairs and text in one step, as stage 1 has them.
* `transformers_captions`: LlamaForCausalLM, image-text pairs only. The peer's samples come in the plan's order, dealt
  to its ranks in turn, padded to the longest of a batch; its batches lie ready in memory.
* `transformers_captions_small_vocabulary`: the same with 512 tokens instead of 32,000. That gives the output layer 2 %
  of the matrix products, as in LLaMA2-7B. With the larger one it is more than half of them here, and we compute logits
  only where there is a target, which is more than padding and overhead in a model as small as this.
* `transformers_text`: text only, in full rows: nobody pads.

The peer has the micro-batch, and then the type of DeepSpeed's communication, that are fastest on the first steps,
scaled dot-product attention without a mask (padding stands behind), and no activation checkpointing. Captions have the
lengths of tests/real_lengths.json; tokens and features are random.

Prints a table of medians over the rounds (CPU: of all ranks) and, as the last line, one JSON object. `ratios` are our
speed over the peer's in target tokens per second, medians over steps taken in turn; `cpu_ratio` of a row is the same
for the processors' time, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sphinx import config as configuration
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.config import Config
from megatron_sphinx.console import say
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.index import SAMPLE
from megatron_sphinx.data.packing import Row
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.pixels import views_in
from megatron_sphinx.data.plan import StepPlan, rounds
from megatron_sphinx.data.sources import Sources, make_planner
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.data.tokenizer import TokenizerIdentity
from megatron_sphinx.device import Stopwatch, current_platform, use_platform
from megatron_sphinx.liveness.stop import StopSignal
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.shards import shards_of
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import train as run
from megatron_sphinx.stage.channel import Round
from megatron_sphinx.training.deepspeed_engine import Engine
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.metrics import Reporter, read
from megatron_sphinx.training.optimizer import learning_rate, parameter_groups

LENGTHS = Path(__file__).parents[2] / "tests" / "real_lengths.json"
PAIRS, TEXT_TOKENS = 4096, 2**20  # of the made data
PICTURES = 32  # whose features there are; more pairs share them
MARK = {"vocabulary": 0, "sha256": "made by tools/compare/step.py"}
NAMES = ("bare", "transformers_captions", "transformers_captions_small_vocabulary", "transformers_text")
SMALL_VOCABULARY = 512
AGREEMENT = 1e-3  # of the first two losses, relative


def make_data(folder: Path, vocabulary: int) -> None:
    """Write indexes of pairs, whose captions have real lengths, and of text, one document; tokens are random."""
    rng = np.random.default_rng(0)
    counted = json.loads(LENGTHS.read_text())["captions"]
    lengths = np.repeat(np.array(list(counted), np.int64), list(counted.values()))
    samples = np.zeros(PAIRS, SAMPLE)
    samples["tokens"] = rng.choice(lengths, PAIRS)
    samples["caption"] = np.cumsum(samples["tokens"]) - samples["tokens"]
    samples["width"] = samples["height"] = 224
    (folder / "pairs").mkdir(parents=True)
    samples.tofile(folder / "pairs" / "samples.bin")
    rng.integers(3, vocabulary, samples["tokens"].sum()).astype(np.uint16).tofile(folder / "pairs" / "captions.bin")
    content = {"tokenizer": MARK, "caption_type": "<u2", "shards": [{"path": "0.tar", "bytes": 0, "samples": PAIRS}]}
    (folder / "pairs" / "index.json").write_text(json.dumps(content))
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    builder.add_document(torch.from_numpy(rng.integers(3, vocabulary, TEXT_TOKENS)), [TEXT_TOKENS])
    builder.finalize(str(folder / "text.idx"))


def configured(args: argparse.Namespace, name: str, folder: Path) -> Config:
    """The configuration of our run of a comparison, on the data in a folder."""
    has_pairs, has_text = name != "transformers_text", name in ("bare", "transformers_text")
    vocabulary = SMALL_VOCABULARY if name.endswith("small_vocabulary") else args.vocabulary
    values = {
        "run": {"folder": str(folder / name), "seed": 1, "print_interval": 2**30},
        "model": {
            "layers": args.layers, "hidden": args.hidden, "ffn": args.ffn, "vocabulary": vocabulary,
            "heads": args.hidden // 64, "groups": args.hidden // 64,
        },
        "vision": {"experts": [{"name": args.expert, "weights": "random"}], "grid": args.grid},
        "data": {
            "pairs": str(folder / "pairs"), "text": str(folder / "text"), "tokenizer": "none",
            "pairs_per_step": args.pairs * has_pairs,
            "text_tokens_per_step": args.rows * args.sequence_length * has_text,
            "sequence_length": args.sequence_length, "row_multiple": args.ranks,
            "micro_batch_rows": args.micro_batch_rows,
        },
        "optimizer": {"learning_rate": 1e-4, "minimum_learning_rate": 1e-4, "warmup_steps": 0},
        "training": {"steps": args.warmup + args.rounds + 1, "precision": args.precision},
    }  # fmt: skip
    return configuration.build(Config, values)


def opened(config: Config, folder: Path) -> run.RankContext:
    """A job of all ranks as replicas, on the made data."""
    here = current_platform()
    groups = ProcessGroups.create(ParallelLayout(world=dist.get_world_size(), config=ParallelConfig()), here.backend)
    tokenizer: Any = SimpleNamespace(bos=1, eos=2, identity=TokenizerIdentity(config.model.vocabulary, "none"))
    sources = Sources(tokenizer, SampleIndex([folder / "pairs"]), TextIndex([folder / "text"]))
    planner = make_planner(
        config.data, sources, config.model, config.vision, replicas=groups.layout.data, seed=config.run.seed
    )
    return run.RankContext(config, here, groups, sources, planner)


class Features:
    """What the frozen encoders have made of the pictures: a source for our loop, and features for the others."""

    def __init__(self, job: run.RankContext) -> None:
        self.waiting, self.received_bytes = Stopwatch(job.platform), 0
        values = job.config.vision.feature_values
        self.bank = torch.randn(PICTURES, values, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        self._rounds: Iterator[Round] = rounds(job.planner, 0, job.config.training.steps)
        self._replica = job.groups.seat.data

    def of(self, rows: Sequence[Row]) -> Tensor:
        """Features of the views of some rows: bf16 [views, feature_values]."""
        return self.bank[[pair % PICTURES for pair, _ in views_in(rows)]]

    def prepare(self, count: int) -> None:
        """Nothing is to be prepared."""

    def next(self) -> Tensor:
        """Features of this replica's next micro-batch."""
        return self.of(next(self._rounds)[self._replica])


class Side(Protocol):
    """One of the sides."""

    def __call__(self, step: int) -> None:
        """Train a step."""

    def loss(self) -> float:
        """Mean loss of the last step's targets, in nats; all ranks ask together."""


class Ours:
    """Our training loop, one step at a time."""

    def __init__(self, job: run.RankContext) -> None:
        config, groups = job.config, job.groups
        model = run.build_model(config, groups, job.platform)
        engine = Engine(
            model, shards_of(model, config.model, groups), groups, job.platform, config.optimizer,
            precision=config.training.precision,
        )  # fmt: skip
        job.folder.mkdir(parents=True, exist_ok=True)
        store = CheckpointStore(job.folder / "checkpoints", groups, keep=1, identity=dict, about={})
        reporter = None
        if groups.seat.rank == 0:
            reporter = Reporter(job.folder, start=0, steps=config.training.steps, interval=config.run.print_interval)
        loop = run.make_loop(job, engine, store, Features(job), reporter, StopSignal(), Watch(config.divergence))
        self.loop, self.folder = replace(loop, save=lambda _: None, say_memory=lambda: None), job.folder

    def __call__(self, step: int) -> None:
        """See Side."""
        self.loop.run(step, step + 1)

    def loss(self) -> float:
        """See Side."""
        found = [read(self.folder / "metrics.jsonl")[-1]["loss"] if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        return float(found[0])


class WithDeepSpeed:
    """A model under deepspeed.initialize, and its micro-batches in memory.

    Args:
        job: its precision, its optimizer.
        model: gives the sum of the losses of a micro-batch.
        batches: [step][micro-batch] what the model is called with.
        targets: of each step, on all ranks.
        settings: of DeepSpeed beside those that follow from these.
    """

    def __init__(
        self,
        job: run.RankContext,
        model: nn.Module,
        batches: Sequence[Sequence[tuple[Any, ...]]],
        targets: Sequence[int],
        settings: dict[str, Any],
    ) -> None:
        import deepspeed

        config = job.config.optimizer
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config),
            lr=learning_rate(config, 0, 1),
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        deepspeed.comm.init_distributed(dist_init_required=False)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": len(batches[0]),
                "gradient_clipping": config.gradient_clip,
                "bf16": {"enabled": job.config.training.precision == "bf16"},
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**62,
            }
            | settings,
        )
        self.batches, self.targets, self.sum = batches, targets, torch.zeros([])

    def __call__(self, step: int) -> None:
        """See Side."""
        self.sum = torch.zeros([])
        for batch in self.batches[step]:
            loss = self.engine(*batch) * (dist.get_world_size() / self.targets[step])
            self.engine.backward(loss, scale_wrt_gas=False)
            self.engine.step()
            self.sum += loss.detach()

    def loss(self) -> float:
        """See Side."""
        dist.all_reduce(self.sum)
        return float(self.sum) / dist.get_world_size()


class Summed(nn.Module):
    """Our model, with the sum of its losses for its output."""

    def __init__(self, model: SphinxModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, features: Tensor) -> Tensor:
        """The sum of a micro-batch's losses."""
        return self.model(batch, features).sum()


def bare(job: run.RankContext, plans: Sequence[StepPlan]) -> WithDeepSpeed:
    """Our model and our micro-batches without our loop."""
    builder, features = BatchBuilder(job.config.data, job.sources, job.config.vision), Features(job)
    mine = [[replicas[job.groups.seat.data] for replicas in plan.micro_batches] for plan in plans]
    batches = [[(builder.build(rows), features.of(rows)) for rows in step] for step in mine]
    model = Summed(run.build_model(job.config, job.groups, job.platform))
    settings = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    return WithDeepSpeed(job, model, batches, [targets_of(plan) for plan in plans], settings)


def targets_of(plan: StepPlan) -> int:
    """Targets of a step."""
    return plan.targets(of_samples=True) + plan.targets(of_samples=False)


class Llama(nn.Module):
    """transformers' LLaMA with the same projections before it, as LLaVA has them, and the same weights as ours."""

    def __init__(self, ours: SphinxModel, config: Config) -> None:
        super().__init__()
        shape = config.model
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.padded_vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
                rms_norm_eps=shape.norm_epsilon, tie_word_embeddings=False, use_cache=False,
                rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, attn_implementation="sdpa",
            )
        )  # fmt: skip
        assert shape.padded_vocabulary == shape.vocabulary, "padding of the vocabulary would have a probability"
        self.llama.load_state_dict(llama_weights(ours.language.state_dict(), config))
        self.vision = ours.vision if config.data.pairs_per_step else None
        self.to(next(ours.parameters()).dtype)

    def forward(self, tokens: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """The sum of the losses of a padded batch: tokens and targets [samples, positions], views behind the first."""
        embed, inputs = self.llama.get_input_embeddings(), {"input_ids": tokens}
        if features is not None:
            assert self.vision is not None
            views = self.vision(features)
            text = embed(tokens[:, 1 + views.shape[1] :])
            inputs = {"inputs_embeds": torch.cat([embed(tokens[:, :1]), views, text], 1)}
        loss: Tensor = self.llama(**inputs, labels=targets, shift_labels=targets, num_items_in_batch=1).loss
        return loss


def llama_weights(ours: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names."""
    shape, state = config.model, {}
    for layer in range(shape.layers):
        here, there = f"decoder.layers.{layer}", f"model.layers.{layer}"
        qkv = ours[f"{here}.self_attention.linear_qkv.weight"].view(
            shape.groups, -1, shape.hidden // shape.heads, shape.hidden
        )
        gate, up = ours[f"{here}.mlp.linear_fc1.weight"].chunk(2)
        parts = {"q": qkv[:, :-2], "k": qkv[:, -2], "v": qkv[:, -1]}
        state |= {f"{there}.self_attn.{n}_proj.weight": part.reshape(-1, shape.hidden) for n, part in parts.items()}
        state |= {
            f"{there}.self_attn.o_proj.weight": ours[f"{here}.self_attention.linear_proj.weight"],
            f"{there}.input_layernorm.weight": ours[f"{here}.input_layernorm.weight"],
            f"{there}.post_attention_layernorm.weight": ours[f"{here}.pre_mlp_layernorm.weight"],
            f"{there}.mlp.gate_proj.weight": gate,
            f"{there}.mlp.up_proj.weight": up,
            f"{there}.mlp.down_proj.weight": ours[f"{here}.mlp.linear_fc2.weight"],
        }
    return state | {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }


def padded_batches(job: run.RankContext, plan: StepPlan, size: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """A peer's micro-batches of a step on this rank: its samples in the plan's order, `size` at a time, padded."""
    builder, features = BatchBuilder(job.config.data, job.sources, job.config.vision), Features(job)
    pieces = sorted((piece for row in plan.rows for piece in row), key=lambda piece: (piece.item, piece.start))
    mine = pieces[dist.get_rank() :: dist.get_world_size()]
    batches = []
    for chunk in (mine[first : first + size] for first in range(0, len(mine), size)):
        built = [builder.build([(piece,)]) for piece in chunk]
        tokens = pad_sequence([batch.tokens for batch in built], batch_first=True)
        targets = pad_sequence([batch.targets for batch in built], batch_first=True, padding_value=-100)
        seen = torch.cat([features.of([(piece,)]) for piece in chunk])
        batches.append((tokens, targets, seen if len(seen) else None))
    return batches


def transformers(
    job: run.RankContext, plans: Sequence[StepPlan], size: int, communication: str | None
) -> WithDeepSpeed:
    """The peer with micro-batches of so many samples; `communication` is DeepSpeed's type for it, None its default."""
    model = Llama(run.build_model(job.config, job.groups, job.platform), job.config)
    batches = [padded_batches(job, plan, size) for plan in plans]
    settings = {"communication_data_type": communication} if communication else {}
    return WithDeepSpeed(job, model, batches, [targets_of(plan) for plan in plans], settings)


@dataclass(frozen=True)
class Turn:
    """One step: seconds, and those of all ranks' processors."""

    seconds: float
    cpu_seconds: float


def turn(side: Side, step: int) -> Turn:
    """Train a step, timed; all ranks begin and end together."""
    dist.barrier()
    begin, busy = time.perf_counter(), time.process_time()
    side(step)
    used = torch.tensor(time.process_time() - busy, dtype=torch.float64)
    dist.barrier()
    seconds = time.perf_counter() - begin
    dist.all_reduce(used)
    return Turn(seconds, float(used))


def fastest(make: Callable[[Any], WithDeepSpeed], options: Sequence[Any]) -> Any:
    """The option with the fastest step; the first rank's clock decides for all."""
    taken = []
    for option in options:
        side = make(option)
        taken.append(min(turn(side, step).seconds for step in range(len(side.batches))))
    chosen = [int(np.argmin(taken))]
    dist.broadcast_object_list(chosen)
    return options[chosen[0]]


def compare(ours: Side, peer: Side, warmup: int, count: int) -> list[tuple[Turn, Turn]]:
    """Both sides' steps in turn, those after the warm-up.

    Raises:
        SystemExit: their losses differ in the first step, or in the second, after an update.
    """
    found = []
    for step in range(warmup + count):
        found.append((turn(ours, step), turn(peer, step)))
        if step < 2:
            losses = ours.loss(), peer.loss()
            if abs(losses[0] - losses[1]) > AGREEMENT * losses[0]:
                raise SystemExit(
                    f"step {step}: losses {losses[0]:.6f} and {losses[1]:.6f}; the sides do not do the same work"
                )
    return found[warmup:]


def sides(args: argparse.Namespace, name: str, folder: Path) -> tuple[Side, Side, dict[str, Any]]:
    """Both sides of a comparison, and what is to be said of it."""
    job = opened(configured(args, name, folder), folder)
    plans = [job.planner.step(step) for step in range(args.warmup + args.rounds)]
    about = {"targets": targets_of(plans[-1]), "positions": plans[-1].positions, "positions_peer": plans[-1].positions}
    if name == "bare":
        return Ours(job), bare(job, plans), about
    ours, samples = Ours(job), (job.config.data.pairs_per_step or args.rows) // args.ranks
    sizes, first = sorted({max(samples // parts, 1) for parts in (1, 2, 4)}), plans[:3]
    size = fastest(lambda size: transformers(job, first, size, None), sizes)
    communication = fastest(lambda communication: transformers(job, first, size, communication), [None, "fp32"])
    peer = transformers(job, plans, size, communication)
    about |= {"peer_micro_batch": size, "peer_communication": communication or "default"}
    padded = torch.tensor([sum(tokens.numel() for tokens, _, _ in peer.batches[-1])])
    dist.all_reduce(padded)
    return ours, peer, about | {"positions_peer": int(padded)}


def row(turns: Sequence[tuple[Turn, Turn]], about: dict[str, Any]) -> dict[str, Any]:
    """What is told of a comparison: medians, and medians of the ratios of steps that were taken in turn."""
    found = dict(about)
    for number, side in enumerate(("ours", "peer")):
        seconds = median(pair[number].seconds for pair in turns)
        found[side] = {
            "step_seconds": seconds,
            "cpu_seconds": median(pair[number].cpu_seconds for pair in turns),
            "target_tokens_per_second": about["targets"] / seconds,
        }
    found["ratio"] = median(peer.seconds / ours.seconds for ours, peer in turns)
    found["cpu_ratio"] = median(peer.cpu_seconds / ours.cpu_seconds for ours, peer in turns)
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The comparisons, readable."""
    lines = [f"{'':46}{'s/step':>9}{'CPU s/step':>12}{'targets/s':>11}{'positions':>11}{'ratio':>8}{'of CPU':>8}"]
    for name, found in rows.items():
        for side, suffix in (("ours", ""), ("peer", "_peer")):
            values = found[side]
            lines.append(
                f"{name if side == 'ours' else '':40}{side:>6}{values['step_seconds']:9.3f}"
                f"{values['cpu_seconds']:12.3f}{values['target_tokens_per_second']:11,.0f}"
                f"{found['positions' + suffix]:11,}"
                + (f"{found['ratio']:8.3f}{found['cpu_ratio']:8.3f}" if side == "ours" else "")
            )
    return "\n".join(lines)


def work(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """What every rank does."""
    here = use_platform(None)
    dist.init_process_group(here.backend)
    if dist.get_rank() == 0:
        make_data(folder, min(args.vocabulary, SMALL_VOCABULARY))
    dist.barrier()
    rows = {}
    for name in args.only:
        ours, peer, about = sides(args, name, folder)
        rows[name] = row(compare(ours, peer, args.warmup, args.rounds), about)
        if dist.get_rank() == 0:
            say(f"{name}: {rows[name]['ratio']:.3f}, of CPU {rows[name]['cpu_ratio']:.3f}")
    return rows


def main() -> int:
    """Run the comparisons; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "ranks": 2, "rounds": 9, "warmup": 2, "layers": 4, "hidden": 512, "ffn": 1376, "vocabulary": 32000, "grid": 16,
        "sequence_length": 1024, "micro_batch_rows": 4, "pairs": 16, "rows": 4,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--expert", default="clip_vit_l14")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks)]
            command += [__file__, *sys.argv[1:], "--folder", folder]
            return subprocess.run(command, check=False, env={"PYTHONWARNINGS": "ignore"} | os.environ).returncode
    rows = work(args, args.folder)
    if dist.get_rank() == 0:
        print(table(rows))
        print(json.dumps({"ratios": {name: found["ratio"] for name, found in rows.items()}, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
