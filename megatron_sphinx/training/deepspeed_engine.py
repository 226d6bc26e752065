"""Gradients, optimizer state and update by DeepSpeed ZeRO-2; the one module that imports deepspeed."""

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import Tensor

from megatron_sphinx.checkpoint.pieces import Piece
from megatron_sphinx.device import Platform
from megatron_sphinx.model.micro_batch import MicroBatch
from megatron_sphinx.model.shards import WeightShard
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.training.memory import REDUCE_BUCKET
from megatron_sphinx.training.optimizer import EXPERTS, OptimizerConfig, parameter_groups

STATES = ("master", "exp_avg", "exp_avg_sq")  # fp32: weights, first and second moments


@dataclass(frozen=True)
class Fragment:
    """A run of elements of a weight that this rank updates.

    Attributes:
        shard: the weight.
        start: the first element, in this rank's part of the weight.
        count: how many elements.
        group: number of the optimizer's group that it is in.
        at: where it begins in this rank's flat partition of the group.
    """

    shard: WeightShard
    start: int
    count: int
    group: int
    at: int


@dataclass(frozen=True)
class FrozenWeight:
    """A weight that is not trained. Its fp32 values, which checkpoints hold, are partitioned like an optimizer's.

    Attributes:
        shard: the weight.
        weight: this rank's part of it, as the model computes with it.
        start: the first element that this rank keeps, in its part of the weight.
        master: fp32 values of those, on the CPU.
    """

    shard: WeightShard
    weight: Tensor
    start: int
    master: Tensor


class Engine:
    """A model whose gradients are summed and whose optimizer is partitioned over the data-parallel ranks.

    Without a pipeline, gradients are reduced and partitioned after every micro-batch, in fp32. In a pipeline they stay
    whole on each rank until the schedule has ended. The number of micro-batches may differ from step to step.

    Attributes:
        loss_scale: what every loss is multiplied by, since DeepSpeed averages over replicas.
        fragments: what this rank updates.
        frozen: what nobody updates.
        held: bytes of weights, gradients and optimizer on this rank, as the first step found them.
    """

    def __init__(
        self,
        model: SphinxModel,
        shards: dict[str, WeightShard],
        groups: ProcessGroups,
        platform: Platform,
        config: OptimizerConfig,
        *,
        precision: str,
    ) -> None:
        warnings.filterwarnings("ignore", message=".*_into_tensor. is deprecated", category=FutureWarning)
        self.model, self.loss_scale = model, groups.layout.data
        self._groups, self._config, self._platform = groups, config, platform
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._optimizer = _AdamW(
            parameter_groups(model, config),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self._engine = _initialize(model, self._optimizer, groups, platform, precision=precision)
        self.held = {"weights": sum(weight.nbytes for weight in model.parameters()), "gradients": 0}
        self.fragments = list(self._fragments(shards))
        named = model.named_parameters()
        self.frozen = [self._freeze(shards[name], weight) for name, weight in named if not weight.requires_grad]
        self._loaded: list[Tensor] = []  # of each frozen weight, all of this rank's part

    def _fragments(self, shards: dict[str, WeightShard]) -> Iterator[Fragment]:
        names = {weight: name for name, weight in self.model.named_parameters()}
        for group, weights in enumerate(self._engine.optimizer.params_in_partition):
            for weight in weights:
                here, flat = weight._hp_mapping.lp_fragment_address, weight._hp_mapping.hp_fragment_address
                yield Fragment(shards[names[weight]], here.start, here.numel, group, flat.start)

    def _freeze(self, shard: WeightShard, weight: Tensor) -> FrozenWeight:
        copies = self._groups.expert_data if shard.is_expert else self._groups.data
        place, size = dist.get_rank(copies), dist.get_world_size(copies)
        start, stop = (weight.numel() * part // size for part in (place, place + 1))
        return FrozenWeight(shard, weight, start, weight.detach().view(-1)[start:stop].float().cpu().clone())

    # gradients

    def backward(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """Add the gradient of the sum of the losses of all micro-batches and replicas; every rank calls this together.

        Args:
            forward: computes a micro-batch on this pipeline stage; on the last one, its loss.
            batches: of this replica.
        """
        if self._groups.layout.config.pipeline == 1:
            for batch in batches:
                self._engine.backward(forward(batch) * self.loss_scale)
            return
        with self._engine.coalesce_grad_reduction():
            self._run_pipeline(forward, batches)
            if self._is_first_step:
                whole = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
                self.held["gradients"] += sum(gradient.nbytes for gradient in whole)
        self._engine.set_gradient_accumulation_boundary(True)
        while self._sent:
            self._sent.popleft()[0].wait()

    def _run_pipeline(self, forward: Callable[[MicroBatch], Tensor], batches: Sequence[MicroBatch]) -> None:
        """One forward, one backward, as megatron-core schedules it."""

        def loss(out: Tensor) -> tuple[Tensor, Tensor, None]:
            return out * self.loss_scale, torch.zeros([], dtype=torch.int, device=out.device), None

        def step(todo: Iterator[MicroBatch], _model: SphinxModel) -> tuple[Tensor, Callable[[Tensor], Any]]:
            return forward(next(todo)), loss

        config, sizes = self.model.config, self._groups.layout.config
        width = sizes.tensor if sizes.sequence else 1
        shapes = [(len(batch.tokens) // width, 1, config.hidden_size) for batch in batches]
        forward_backward_pipelining_without_interleaving(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=1,  # the planned shapes are the true ones
            micro_batch_size=1,
            p2p_communicator=_PlannedCommunicator(self._groups.pipeline, config, shapes),
            pg_collection=self._groups.collection,
        )

    def keep(self, work: dist.Work | None, sent: Tensor) -> None:
        """Hold a tensor that is being sent until it has gone, at the latest at the end of the step."""
        assert work is not None
        self._sent.append((work, sent))

    def gradients(self) -> Iterator[tuple[Fragment, Tensor]]:
        """The gradient of what this rank updates, after `backward`: by fragment, flat, to be changed in place."""
        kept: dict[int, list[Tensor]] = {}
        for fragment in self.fragments:
            group = fragment.group
            if group not in kept:
                kept[group] = self._parts(group)
            part = kept[group].pop(0).view(-1)
            is_cut = part.numel() == fragment.count  # in fp32 DeepSpeed keeps the whole, only the fragment summed up
            yield fragment, part if is_cut else part.narrow(0, fragment.start, fragment.count)
        assert not any(kept.values()), "DeepSpeed holds gradients of other weights than it updates"

    def _parts(self, group: int) -> list[Tensor]:
        """What DeepSpeed holds of a group's gradient, weight by weight."""
        optimizer = self._engine.optimizer
        flat = optimizer.averaged_gradients.get(group) or optimizer.all_grad_tensors.get(group) or []
        return [part for part in flat if not getattr(part, "_zero_padding", False)]

    def gradient_norm(self) -> float:
        """The global L2 norm of the gradient; every rank calls this together.

        DeepSpeed's own does not count experts rightly.
        """
        norms = [part for fragment, part in self.gradients() if fragment.shard.is_first_copy]
        squared = torch.zeros([], dtype=torch.float64, device=self._platform.device)
        if norms:
            squared += torch.stack(torch._foreach_norm(norms)).double().square().sum()
        dist.all_reduce(squared, group=self._groups.language)
        return float(squared.sqrt())

    def update(self, rate: float, norm: float, factor: float = 1.0) -> None:
        """Multiply the gradient, whose norm is then `norm`, by `factor`, clip it, change the weights, clear it."""
        clip = self._config.gradient_clip
        if clip and norm > clip:
            factor *= clip / norm
        if factor != 1.0:
            torch._foreach_mul_([part for _, part in self.gradients()], factor)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._step()

    def discard(self) -> None:
        """Clear the gradient; weights and the optimizer's state stay as they are, to the bit."""
        if not self._optimizer.state:
            self.prepare_state(0)
        self._optimizer.is_idle = True
        self._step()
        self._optimizer.is_idle = False

    def _step(self) -> None:
        partition = self._bytes_of_gradients() if self._is_first_step else 0
        self._engine.step()
        if self._is_first_step:
            states = self._engine.optimizer.optimizer.state
            moments = sum(value.nbytes for state in states.values() for value in state.values() if value.ndim)
            self.held |= {"gradients": self.held["gradients"] + partition, "optimizer": moments + moments // 2}

    @property
    def _is_first_step(self) -> bool:
        """Whether `held` is still to be found."""
        return "optimizer" not in self.held

    def _bytes_of_gradients(self) -> int:
        """What DeepSpeed holds of the gradient once it is reduced: storage of the parts of this rank's partition."""
        parts = [part for group in range(len(self._engine.optimizer.bit16_groups)) for part in self._parts(group)]
        return sum({part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in parts}.values())

    def reduction_buffers(self) -> list[Tensor]:
        """Where DeepSpeed gathers gradients before it reduces them, as long as it does."""
        return [buffer for bucket in self._engine.optimizer.ipg_buckets.values() for buffer in bucket.buffer]

    # state

    def pieces(self, *, of_copies: bool) -> Iterator[Piece]:
        """What must be kept of what this rank updates: fp32 weights and moments, named `master/...`, `exp_avg/...`.

        The values are the optimizer's own memory. Of frozen weights there are fp32 values only.

        Args:
            of_copies: to be loaded: also of weights that a tensor rank before this one holds as well, and all of this
                rank's part of frozen ones.
        """
        yield from self._frozen_to_load() if of_copies else self._frozen_to_save()
        optimizer = self._engine.optimizer
        for fragment in self.fragments:
            if not (of_copies or fragment.shard.is_first_copy):
                continue
            flat = optimizer.single_partition_of_fp32_groups[fragment.group]
            states = {"master": flat.detach()} | optimizer.optimizer.state[flat]
            for state in STATES:
                values = states[state].narrow(0, fragment.at, fragment.count)
                yield from _pieces(state, fragment.shard, fragment.start, values)

    def _frozen_to_save(self) -> Iterator[Piece]:
        for frozen in self.frozen:
            if frozen.shard.is_first_copy:
                yield from _pieces("master", frozen.shard, frozen.start, frozen.master)

    def _frozen_to_load(self) -> Iterator[Piece]:
        self._loaded = [frozen.weight.detach().flatten().float().cpu().clone() for frozen in self.frozen]
        for frozen, whole in zip(self.frozen, self._loaded, strict=True):
            yield from _pieces("master", frozen.shard, 0, whole)

    def prepare_state(self, steps: int) -> None:
        """Make room for a state after so many updates; then write into what `pieces` gives, and call `take_state`."""
        optimizer = self._engine.optimizer
        on = self._platform.device if self._platform.is_cuda else torch.device("cpu")
        for flat in optimizer.single_partition_of_fp32_groups:
            optimizer.optimizer.state[flat] = {
                "step": torch.tensor(float(steps), device=on),
                "exp_avg": torch.zeros_like(flat.detach()),
                "exp_avg_sq": torch.zeros_like(flat.detach()),
            }

    def take_state(self) -> None:
        """Set the model's weights from the state, on all replicas."""
        self._engine.optimizer.update_lp_params()
        for frozen, whole in zip(self.frozen, self._loaded, strict=True):
            frozen.weight.data.copy_(whole.view(frozen.weight.shape))
            frozen.master.copy_(whole[frozen.start :][: len(frozen.master)])
        self._loaded = []


def _pieces(state: str, shard: WeightShard, start: int, values: Tensor) -> Iterator[Piece]:
    """A run of elements of a rank's part of a weight, as parts of the whole one."""
    for block, at in shard.boxes(start, len(values)):
        part = values.narrow(0, at - start, prod(block.shape)).view(block.shape)
        yield Piece(f"{state}/{shard.name}", shard.whole, block, part)


class _AdamW(torch.optim.AdamW):
    """Lets a step pass while it is idle; all that DeepSpeed does around a step is done nevertheless."""

    is_idle = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return None if self.is_idle else super().step(closure)


class _PlannedCommunicator(P2PCommunicator):  # type: ignore[misc]
    """Takes the shapes of what comes from the plan: no stage has to tell the next one.

    Args:
        shapes: of the hidden states of each micro-batch; their gradients have the same, in the same order.
    """

    def __init__(self, group: Any, config: Any, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(group, config)
        self._forward, self._backward = iter(shapes), iter(shapes)

    def _communicate_shapes(self, _next: Any, _previous: Any, recv_prev: bool, recv_next: bool) -> tuple[Any, Any]:
        return next(self._forward) if recv_prev else None, next(self._backward) if recv_next else None


def _initialize(
    model: SphinxModel, optimizer: torch.optim.Optimizer, groups: ProcessGroups, platform: Platform, *, precision: str
) -> Any:
    """DeepSpeed's engine."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import groups as deepspeed_groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not platform.is_cuda:
        deepspeed.ops.__compatible_ops__ = {}  # none is needed here; looking for them would run a compiler
    experts = [weight for weight in model.parameters() if not getattr(weight, "allreduce", True)]
    for weight in experts:
        weight.group_name = EXPERTS  # type: ignore[attr-defined]
    if experts:
        deepspeed_groups._EXPERT_PARALLEL_GROUP[EXPERTS] = groups.expert
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = groups.expert_data
        ranks = dist.get_process_group_ranks(groups.expert_data)
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[EXPERTS] = ranks

    class EngineWithExperts(DeepSpeedEngine):  # type: ignore[misc]
        """Knows of megatron-core's experts; DeepSpeed looks for a layer class of its own."""

        def _configure_distributed_model(self, module: Any) -> None:
            if any(weight.requires_grad for weight in experts):
                self.has_moe_layers, self.num_experts = True, [module.config.num_moe_experts]
            super()._configure_distributed_model(module)

    deepspeed.comm.init_distributed(dist_init_required=False)
    settings = _deepspeed_config(
        is_cuda=platform.is_cuda, precision=precision, is_pipeline=groups.layout.config.pipeline > 1
    )
    mpu = _mpu(groups)
    return EngineWithExperts(
        args=SimpleNamespace(device_rank=platform.device.index or 0),  # it would take GPU LOCAL_RANK, seen or not
        model=model,
        optimizer=optimizer,
        mpu=mpu,
        dist_init_required=False,
        config=settings,
        config_class=DeepSpeedConfig(settings, mpu),
    )


def _mpu(groups: ProcessGroups) -> SimpleNamespace:
    """The groups under the names that DeepSpeed asks for; "model" is one whole replica."""
    answers: dict[str, Any] = {}
    for axis, group in (("model", groups.model), ("tensor_model", groups.tensor), ("data", groups.data)):
        answers[f"get_{axis}_parallel_group"] = partial(_same, group)
        answers[f"get_{axis}_parallel_rank"] = partial(dist.get_rank, group)
        answers[f"get_{axis}_parallel_world_size"] = partial(dist.get_world_size, group)
    return SimpleNamespace(**answers)


def _same(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return group


def _deepspeed_config(*, is_cuda: bool, precision: str, is_pipeline: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration; everything in it follows from ours. Norm and clipping are the Engine's."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": is_pipeline,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},  # the Engine looks at the norm
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": is_cuda,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": REDUCE_BUCKET,
            "compute_grad_norm": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
