"""The sides of tools/compare/step.py: our training loop, a bare one, and transformers', on the same made data."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
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
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.index import SAMPLE, UPRIGHT
from megatron_sphinx.data.packing import Row
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.pixels import views_in
from megatron_sphinx.data.plan import StepPlan, rounds
from megatron_sphinx.data.sources import Sources, make_planner
from megatron_sphinx.data.text import TextIndex
from megatron_sphinx.data.tokenizer import TokenizerIdentity
from megatron_sphinx.device import Stopwatch, current_platform
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import assembly
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.stage.channel import Round
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.metrics import Reporter, read
from megatron_sphinx.training.optimizer import learning_rate, parameter_groups

LENGTHS = Path(__file__).parents[2] / "tests" / "real_lengths.json"
PAIRS, TEXT_TOKENS = 4096, 2**20  # of the made data
PICTURES = 32  # whose features there are; more pairs share them
TOKENIZER = {"vocabulary": 0, "sha256": "made by tools/compare/step.py"}
SMALL_VOCABULARY = 512


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
    content = {
        "tokenizer": TOKENIZER,
        "caption_type": "<u2",
        "sizes": UPRIGHT,
        "shards": [{"path": "0.tar", "bytes": 0, "samples": PAIRS}],
    }
    (folder / "pairs" / "index.json").write_text(json.dumps(content))
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    builder.add_document(torch.from_numpy(rng.integers(3, vocabulary, TEXT_TOKENS)), [TEXT_TOKENS])
    builder.finalize(str(folder / "text.idx"))


def configure(args: argparse.Namespace, name: str, folder: Path) -> Config:
    """Configure our run of a comparison, on the data in a folder."""
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


def open_job(config: Config, folder: Path) -> RankContext:
    """Open a job of all ranks as replicas, on the made data."""
    platform = current_platform()
    groups = ProcessGroups.create(
        ParallelLayout(world=dist.get_world_size(), config=ParallelConfig()), platform.backend
    )
    tokenizer: Any = SimpleNamespace(bos=1, eos=2, identity=TokenizerIdentity(config.model.vocabulary, "none"))
    sources = Sources(tokenizer, SampleIndex([folder / "pairs"]), TextIndex([folder / "text"]))
    planner = make_planner(
        config.data, sources, config.model, config.vision, replicas=groups.layout.data, seed=config.run.seed
    )
    return RankContext(config, platform, groups, sources, planner)


class Features:
    """What the frozen encoders have made of the pictures: a source for our loop, and features for the others."""

    def __init__(self, job: RankContext) -> None:
        self.waiting, self.received_bytes = Stopwatch(job.platform), 0
        values = job.config.vision.feature_values
        self.bank = torch.randn(PICTURES, values, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        self._rounds: Iterator[Round] = rounds(job.planner, 0, job.config.training.steps)
        self._replica = job.groups.seat.data

    def of(self, rows: Sequence[Row]) -> Tensor:
        """Look up the features of the views of some rows: bf16 [views, feature_values]."""
        return self.bank[[pair % PICTURES for pair, _ in views_in(rows)]]

    def prepare(self, count: int) -> None:
        """Do nothing: all features lie ready."""

    def next(self) -> Tensor:
        """Look up the features of this replica's next micro-batch."""
        return self.of(next(self._rounds)[self._replica])


class Side(Protocol):
    """One of the sides that are compared."""

    def __call__(self, step: int) -> None:
        """Train one step, on all ranks together."""

    def loss(self) -> float:
        """Average the loss over the last step's targets, in nats; all ranks ask together."""


class Ours:
    """Our training loop, one step at a time."""

    def __init__(self, job: RankContext) -> None:
        config, groups = job.config, job.groups
        engine = assembly.build_engine(job, assembly.build_model(config, groups, job.platform))
        trainer = assembly.build_trainer(job, engine, Features(job), Watch(config.divergence))
        job.folder.mkdir(parents=True, exist_ok=True)
        store = CheckpointStore(job.folder / "checkpoints", groups, keep=1, identity=dict, about={})
        reporter = None
        if groups.seat.rank == 0:
            reporter = Reporter(job.folder, start=0, steps=config.training.steps, interval=config.run.print_interval)
        self.loop, self.folder = assembly.build_loop(job, trainer, store, reporter), job.folder

    def __call__(self, step: int) -> None:
        """Take one step of the loop: plan, loader, training, metrics."""
        self.loop.take_step(step)

    def loss(self) -> float:
        """Read the loss where our loop has written it."""
        losses = [read(self.folder / "metrics.jsonl")[-1]["loss"] if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(losses)
        return float(losses[0])


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
        job: RankContext,
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
        """Take each micro-batch forward and backward, and let DeepSpeed update the weights after the last."""
        self.sum = torch.zeros([])
        for batch in self.batches[step]:
            loss = self.engine(*batch) * (dist.get_world_size() / self.targets[step])
            self.engine.backward(loss, scale_wrt_gas=False)
            self.engine.step()
            self.sum += loss.detach()

    def loss(self) -> float:
        """Average the loss over all ranks."""
        dist.all_reduce(self.sum)
        return float(self.sum) / dist.get_world_size()


class Summed(nn.Module):
    """Our model, with the sum of its losses for its output."""

    def __init__(self, model: SphinxModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, features: Tensor) -> Tensor:
        """Add up the losses of a micro-batch."""
        return self.model(batch, features).sum()


def bare(job: RankContext, plans: Sequence[StepPlan]) -> WithDeepSpeed:
    """Put our model and our micro-batches into a loop without ours."""
    builder, features = BatchBuilder(job.config.data, job.sources, job.config.vision), Features(job)
    mine = [[replicas[job.groups.seat.data] for replicas in plan.micro_batches] for plan in plans]
    batches = [[(builder.build(rows), features.of(rows)) for rows in step] for step in mine]
    model = Summed(assembly.build_model(job.config, job.groups, job.platform))
    settings = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    return WithDeepSpeed(job, model, batches, [targets_of(plan) for plan in plans], settings)


def targets_of(plan: StepPlan) -> int:
    """Count the targets of a step."""
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
        """Add up the losses of a padded batch: tokens and targets [samples, positions], views behind the first."""
        embed, inputs = self.llama.get_input_embeddings(), {"input_ids": tokens}
        if features is not None:
            assert self.vision is not None
            views = self.vision(features)
            text = embed(tokens[:, 1 + views.shape[1] :])
            inputs = {"inputs_embeds": torch.cat([embed(tokens[:, :1]), views, text], 1)}
        loss: Tensor = self.llama(**inputs, labels=targets, shift_labels=targets, num_items_in_batch=1).loss
        return loss


def llama_weights(ours: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Give our weights Hugging Face's names."""
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


def padded_batches(job: RankContext, plan: StepPlan, size: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Make a peer's micro-batches of a step on this rank: samples in the plan's order, `size` at a time, padded."""
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


def transformers(job: RankContext, plans: Sequence[StepPlan], size: int, communication: str | None) -> WithDeepSpeed:
    """Make the peer with micro-batches of so many samples; without `communication` DeepSpeed takes its default type."""
    model = Llama(assembly.build_model(job.config, job.groups, job.platform), job.config)
    batches = [padded_batches(job, plan, size) for plan in plans]
    settings = {"communication_data_type": communication} if communication else {}
    return WithDeepSpeed(job, model, batches, [targets_of(plan) for plan in plans], settings)
