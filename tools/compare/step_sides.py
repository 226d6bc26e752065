"""The sides of tools/compare/step.py: our training loop, a bare one, and transformers', on the same made data."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_sphinx import config as configuration
from megatron_sphinx.config import Config
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.gpu_check import peer
from megatron_sphinx.gpu_check.peer import Llama, padded_batches
from megatron_sphinx.gpu_check.workload import Features, targets_of
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.run import assembly
from megatron_sphinx.run.job import RankContext

SMALL_VOCABULARY = 512


def configure(args: argparse.Namespace, name: str, folder: Path) -> Config:
    """Configure our run of a comparison, on the data in a folder."""
    has_pairs, has_text = name != "transformers_text", name in ("bare", "transformers_text")
    vocabulary = SMALL_VOCABULARY if name.endswith("small_vocabulary") else args.vocabulary
    values = {
        "run": {"folder": str(folder / name), "seed": 1, "print_interval": 99_999_999},
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


class Side(Protocol):
    """One of the sides that are compared."""

    def __call__(self, step: int) -> None:
        """Train one step, on all ranks together."""

    def loss(self) -> float:
        """Average the loss over the last step's targets, in nats; all ranks ask together."""


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
        self.engine = peer.WithDeepSpeed(job, model, settings)
        self.batches, self.targets, self.sum = batches, targets, torch.zeros([])

    def __call__(self, step: int) -> None:
        """Take the micro-batches of a step, and update the weights."""
        self.sum = self.engine.step(self.batches[step], self.targets[step])

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


def with_our_weights(ours: SphinxModel, config: Config) -> Llama:
    """Make transformers' LLaMA with the same projections before it and the same weights as ours."""
    model = Llama(config, ours.vision if config.data.pairs_per_step else None)
    model.llama.load_state_dict(llama_weights(ours.language.state_dict(), config))
    return model.to(next(ours.parameters()).dtype)


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


def transformers(job: RankContext, plans: Sequence[StepPlan], size: int, communication: str | None) -> WithDeepSpeed:
    """Make the peer with micro-batches of so many samples; without `communication` DeepSpeed takes its default type."""
    model = with_our_weights(assembly.build_model(job.config, job.groups, job.platform), job.config)
    batches = [padded_batches(job, plan, (size, size), Features(job)) for plan in plans]
    settings = {"communication_data_type": communication} if communication else {}
    return WithDeepSpeed(job, model, batches, [targets_of(plan) for plan in plans], settings)
