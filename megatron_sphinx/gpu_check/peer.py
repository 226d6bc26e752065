"""The peer that our step is measured beside: transformers' LLaMA with sdpa under DeepSpeed ZeRO-2, fused AdamW."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from megatron_sphinx.config import Config
from megatron_sphinx.data.batches import BatchBuilder
from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.gpu_check.workload import Features
from megatron_sphinx.run.job import RankContext
from megatron_sphinx.training.optimizer import learning_rate, parameter_groups

PeerBatch = tuple[Tensor, Tensor, Tensor | None]  # tokens and targets [samples, positions], features of the views


class Llama(nn.Module):
    """transformers' LLaMA behind a projection of features, as LLaVA has them.

    Args:
        config: the shape; its vocabulary may not be padded, since the padding would have a probability.
        vision: projects features to the views' tokens; None for a model of text.
    """

    def __init__(self, config: Config, vision: nn.Module | None) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        shape = config.model
        assert shape.padded_vocabulary == shape.vocabulary, "padding of the vocabulary would have a probability"
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.padded_vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
                rms_norm_eps=shape.norm_epsilon, tie_word_embeddings=False, use_cache=False,
                rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, attn_implementation="sdpa",
            )
        )  # fmt: skip
        self.vision = vision

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


def padded_batches(job: RankContext, plan: StepPlan, sizes: tuple[int, int], features: Features) -> list[PeerBatch]:
    """Make a peer's micro-batches of a step on this rank, padded, in the plan's order; none holds samples and text.

    Args:
        job: the rank, with its data.
        plan: the step.
        sizes: how many samples a micro-batch has, and how many pieces of text.
        features: of the samples' views.
    """
    builder = BatchBuilder(job.config.data, job.sources, job.config.vision)
    pieces = sorted((piece for row in plan.rows for piece in row), key=lambda piece: (piece.item, piece.start))
    mine = pieces[dist.get_rank() :: dist.get_world_size()]
    batches: list[PeerBatch] = []
    for kind, size in zip((True, False), sizes, strict=True):
        same = [piece for piece in mine if piece.is_sample is kind]
        for chunk in (same[first : first + size] for first in range(0, len(same), size)):
            built = [builder.build([(piece,)]) for piece in chunk]
            tokens = pad_sequence([batch.tokens for batch in built], batch_first=True)
            targets = pad_sequence([batch.targets for batch in built], batch_first=True, padding_value=-100)
            seen = torch.cat([features.of([(piece,)]) for piece in chunk])
            device = job.platform.device
            batches.append((tokens.to(device), targets.to(device), seen if len(seen) else None))
    return batches


class WithDeepSpeed:
    """A model under deepspeed.initialize, which takes steps of any number of micro-batches.

    Args:
        job: its precision, its optimizer.
        model: gives the sum of the losses of a micro-batch.
        settings: DeepSpeed's, beside those that follow from these.
    """

    def __init__(self, job: RankContext, model: nn.Module, settings: dict[str, Any]) -> None:
        import deepspeed

        config = job.config.optimizer
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config),
            lr=learning_rate(config, 0, 1),
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        if not job.platform.is_cuda:
            deepspeed.ops.__compatible_ops__ = {}  # none is needed here; looking for them would run a compiler
        deepspeed.comm.init_distributed(dist_init_required=False)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 2,  # more than one; the boundary is told micro-batch by micro-batch
                "gradient_clipping": config.gradient_clip,
                "bf16": {"enabled": job.config.training.precision == "bf16"},
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**62,
            }
            | settings,
        )

    def step(self, batches: Sequence[tuple[Any, ...]], targets: int) -> Tensor:
        """Take each micro-batch forward and backward, and let DeepSpeed update the weights after the last.

        Args:
            batches: what the model is called with, micro-batch by micro-batch.
            targets: of the step, on all ranks.

        Returns:
            This rank's part of the mean loss, times the number of ranks.
        """
        total = torch.zeros([], device=next(self.engine.module.parameters()).device)
        for number, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss = self.engine(*batch) * (dist.get_world_size() / targets)
            self.engine.backward(loss, scale_wrt_gas=False)
            self.engine.step()
            total += loss.detach()
        return total
