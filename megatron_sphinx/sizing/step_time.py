"""How long a step takes: what counts.py counts, over what the hardware reaches. Arithmetic only.

Only hardware's numbers are measured or fitted, everything here follows from the sizes.
"""

from dataclasses import dataclass, fields, replace
from math import log2

from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.sizing.counts import (
    ReplicaWork,
    TrainingSetup,
    Transfer,
    communication,
    expert_transfers,
    feature_transfers,
    forward_flops,
    pipeline_transfers,
    recomputed,
    reductions,
    tensor_transfers,
)
from megatron_sphinx.sizing.hardware import Hardware
from megatron_sphinx.sizing.memory import EncoderCost, unlike_stages
from megatron_sphinx.sizing.work import Work
from megatron_sphinx.training.memory import rank_weights


@dataclass(frozen=True)
class Group:
    """Where the ranks of a group are.

    Attributes:
        ranks: of the group.
        in_node: how many of them share a node.
    """

    ranks: int
    in_node: int

    @property
    def nodes(self) -> float:
        """Nodes that the group spans."""
        return self.ranks / self.in_node


def group_of(name: str, layout: ParallelLayout, ranks_per_node: int, shards: int | None = None) -> Group:
    """The ranks of a group, of which neighbours are `stride` apart in the world."""
    sizes = layout.config
    data_shards = min(shards or layout.data, layout.data)
    expert_shards = min(shards or layout.expert_data, layout.expert_data)
    experts = sizes.expert * sizes.expert_tensor
    ranks, stride = {
        "tensor": (sizes.tensor, 1),
        "data": (layout.data, sizes.tensor),
        "data shards": (data_shards, sizes.tensor),
        "data copies": (layout.data // data_shards, sizes.tensor * data_shards),
        "expert": (sizes.expert, sizes.expert_tensor),
        "expert_tensor": (sizes.expert_tensor, 1),
        "expert_data": (layout.expert_data, experts),
        "expert_data shards": (expert_shards, experts),
        "expert_data copies": (layout.expert_data // expert_shards, experts * expert_shards),
        "pipeline": (sizes.pipeline, layout.stage),
        "model": (sizes.tensor * sizes.pipeline, 1 if sizes.pipeline == 1 else layout.stage),
        "features": (layout.world, 1),
    }[name]
    return Group(ranks, max(1, min(ranks, ranks_per_node // stride)))


def seconds_of(transfer: Transfer, group: Group, hardware: Hardware) -> float:
    """Seconds of a transfer alone: rings inside a node, and rings of nodes that use the adapters of all members there.

    Sources: nccl-tests/doc/PERFORMANCE.md for the bytes that each collective moves; a node's members of a group share
    its traffic to other nodes.
    """
    if group.ranks == 1 or not transfer.count:
        return 0.0
    inside = hardware.node_bandwidth * hardware.shares.link
    outside = hardware.network_bandwidth * hardware.shares.link
    here, nodes, ranks = group.in_node, group.nodes, group.ranks
    if transfer.kind == "send":
        moved = transfer.bytes / (inside if here == ranks else outside)
        return moved + transfer.count * hardware.latency_seconds
    if transfer.kind == "all_to_all":
        moved = max(transfer.bytes * (here - 1) / ranks / inside, transfer.bytes * (ranks - here) / ranks / outside)
        return moved + transfer.count * hardware.latency_seconds * log2(ranks)
    twice = 2 if transfer.kind == "all_reduce" else 1
    moved = transfer.bytes * twice * max((here - 1) / here / inside, (nodes - 1) / nodes / (here * outside))
    return moved + transfer.count * twice * hardware.latency_seconds * log2(ranks)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a step, by what takes them; communication only as far as it shows.

    Attributes:
        matrices, attention, elementwise, logits: of the slowest stage, all its micro-batches.
        recompute: of all three, done again.
        kernels: of starting operations, where that shows.
        tensor, experts, pipeline: communication.
        bubble: a stage's waiting for the others.
        reduction, gather: gradients and weights over the replicas.
        optimizer: the update.
        features: encoding on the language ranks, or what encoder ranks are slower by; and spreading features.
        encoder: of an encoder rank, whether it shows or not.
    """

    matrices: float
    attention: float
    elementwise: float
    logits: float
    recompute: float
    kernels: float
    tensor: float
    experts: float
    pipeline: float
    bubble: float
    reduction: float
    gather: float
    optimizer: float
    features: float
    encoder: float

    @property
    def language(self) -> float:
        """Seconds of a step of the language ranks, if they never wait for an encoder rank."""
        names = (field.name for field in fields(self) if field.name not in ("features", "encoder"))
        return float(sum(getattr(self, name) for name in names))

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.language + self.features


def elementwise_bytes(run: TrainingSetup, sizes: ParallelConfig) -> float:
    """Bytes that the layers' element-wise operations of a forward read and write, for each position.

    Fused: two norms and two residual sums read and write the hidden states, rotary embeddings the queries and keys,
    SwiGLU reads gate and up. fp8: each input of a matrix product is read and written twice, once transposed. What is
    not fused reads and writes in between.
    """
    model, width, tensor = run.model, run.width, sizes.tensor
    copies = model.experts_per_token if model.experts else 1
    part = model.hidden / (tensor if sizes.sequence else 1)
    keys = model.groups * (model.hidden // model.heads)
    norms, residuals = 2 * 2 * part, 2 * 3 * part
    rotary, swiglu = 2 * (model.hidden + keys) / tensor, 3 * copies * model.ffn / tensor
    dispatch = 4 * copies * model.hidden / tensor if model.experts else 0.0  # into the experts' order and back
    if not run.is_fused:
        norms, rotary, swiglu = 2.5 * norms, 3 * rotary, 3 * swiglu
    total = width * (norms + residuals + rotary + swiglu + dispatch)
    if run.precision == "fp8":
        total += 4 * (2 * part + model.hidden / tensor + copies * model.ffn / tensor)
    return total


# Operations started by a layer's forward, by its experts, for each document in it (rotary embeddings, attention), by a
# step, and for each weight that is reduced.
OPERATIONS = {"layer": 60, "experts": 60, "document": 8, "step": 400, "weight": 12}


def step_time(
    run: TrainingSetup,
    layout: ParallelLayout,
    work: Work,
    hardware: Hardware,
    *,
    ranks_per_node: int,
    encoders: EncoderCost | None = None,
) -> Timing:
    """Seconds of a step.

    The slowest stage works through all its micro-batches; the other stages' part of one micro-batch is the bubble.
    """
    share = ReplicaWork.of(work, layout, run.micro_batch_rows)
    counts = unlike_stages(layout, run.model.layers)
    stages = {stage: _stage(run, layout, share, stage, hardware, ranks_per_node) for stage in counts}
    totals = {stage: sum(parts.values()) for stage, parts in stages.items()}
    slowest = max(totals, key=lambda stage: totals[stage])
    m = share.micro_batches
    parts = {name: m * value for name, value in stages[slowest].items()}
    everyone = sum(counts[stage] * total for stage, total in totals.items())
    bubble = (everyone - totals[slowest]) / run.virtual_stages
    backward = totals[slowest] * 2 / 3
    exposed = _exposed(run, layout, share, slowest, hardware, ranks_per_node, backward)
    language = sum(parts.values()) + bubble + sum(exposed.values())
    features, encoder = _encoding(run, layout, work, share, hardware, ranks_per_node, encoders, language)
    return Timing(**parts, **exposed, bubble=bubble, features=features, encoder=encoder)


def _stage(
    run: TrainingSetup, layout: ParallelLayout, share: ReplicaWork, stage: int, hardware: Hardware, ranks_per_node: int
) -> dict[str, float]:
    """Seconds of one micro-batch on a stage, forward and backward."""
    model, sizes = run.model, layout.config
    layers = sizes.stage_layers(model.layers)[stage]
    once = forward_flops(run, layout, share, stage)
    matmul, attend = hardware.matmul_flops(run.precision), hardware.attention_flops(run.precision)
    plain = hardware.matmul_flops("bf16" if run.precision == "fp8" else run.precision)  # of logits and projections
    memory = hardware.memory_bandwidth * hardware.shares.memory
    elementwise = share.positions * elementwise_bytes(run, sizes) * layers / memory
    matrices, attention = once["matrices"] / matmul, once["attention"] / attend
    backward = 1.0 if run.train == "projections" else 2.0
    again = recomputed(run, layers) / layers * (matrices + attention + elementwise)
    if run.recompute == "selective":
        again = once["again"] / matmul
    logits = once["logits"] * (1 + backward) / plain
    if once["logits"]:
        logits += 5 * share.targets * model.padded_vocabulary / sizes.tensor * (4 + run.width) / memory
    one = replace(share, micro_batches=1)
    wire = {"tensor": 0.0, "experts": 0.0, "pipeline": 0.0}
    for name, transfers in (
        ("tensor", tensor_transfers(run, layout, one, stage)),
        ("experts", expert_transfers(run, layout, one, stage)),
        ("pipeline", pipeline_transfers(run, layout, one, stage)),
    ):
        for transfer in transfers:
            wire[name] += seconds_of(transfer, group_of(transfer.group, layout, ranks_per_node), hardware)
    if run.is_tensor_overlapped:
        wire["tensor"] = max(0.0, wire["tensor"] - (1 + backward) * matrices)
    if run.virtual_stages > 1:
        wire["pipeline"] = max(0.0, wire["pipeline"] - (1 + backward) * matrices)
    operations = float(layers) * (OPERATIONS["layer"] + (OPERATIONS["experts"] if model.experts else 0))
    operations += layers * OPERATIONS["document"] * share.documents
    return {
        "matrices": (1 + backward) * matrices + 3 * once["projections"] / plain,
        "attention": (1 + 2.5) * attention,
        "elementwise": (1 + backward) * elementwise,
        "logits": logits,
        "recompute": again,
        "kernels": hardware.kernel_seconds * (3 * operations + recomputed(run, layers) * OPERATIONS["layer"]),
        **wire,
    }


def _exposed(
    run: TrainingSetup,
    layout: ParallelLayout,
    share: ReplicaWork,
    stage: int,
    hardware: Hardware,
    ranks_per_node: int,
    backward_seconds: float,
) -> dict[str, float]:
    """Seconds of gradients' reduction, weights' gather and update, as far as they show."""
    found = {"reduction": 0.0, "gather": 0.0}
    for transfer in reductions(run, layout, share, stage):
        group = group_of(transfer.group, layout, ranks_per_node, run.shards)
        found["reduction" if transfer.purpose == "gradients" else "gather"] += seconds_of(transfer, group, hardware)
    times = share.micro_batches if run.reduces_each_micro_batch else 1
    if run.is_reduction_overlapped:
        found["reduction"] = max(0.0, found["reduction"] - times * backward_seconds)
    if run.is_gather_overlapped:
        hidden = backward_seconds / 2 * (3 * share.micro_batches if run.is_sharding_weights else 1)
        found["gather"] = max(0.0, found["gather"] - hidden)
    weights = rank_weights(run.model, run.vision, layout, stage, run.train)
    partition = weights.shared / min(run.shards or layout.data, layout.data)
    partition += weights.experts / min(run.shards or layout.expert_data, layout.expert_data)
    memory = hardware.memory_bandwidth * hardware.shares.memory
    passes = 1 if hardware.is_cuda else 3  # a fused AdamW, or one operation after the other
    tensors = layout.config.stage_layers(run.model.layers)[stage] * 6 + 3
    operations = OPERATIONS["step"] + times * tensors * OPERATIONS["weight"]
    update = passes * partition * (4 + 2 * 12 + 2 * run.width) / memory
    return found | {"optimizer": update + hardware.kernel_seconds * operations}


def _encoding(
    run: TrainingSetup,
    layout: ParallelLayout,
    work: Work,
    share: ReplicaWork,
    hardware: Hardware,
    ranks_per_node: int,
    encoders: EncoderCost | None,
    language: float,
) -> tuple[float, float]:
    """Seconds that features show, and seconds of an encoder rank."""
    if run.vision is None or encoders is None:
        return 0.0, 0.0
    sizes = layout.config
    rate = hardware.encoder_flops
    spread = sum(
        seconds_of(transfer, group_of(transfer.group, layout, ranks_per_node), hardware)
        for transfer in feature_transfers(run, layout, share, 0)
    )
    if not sizes.encoder:
        views = share.views * share.micro_batches / (sizes.tensor * sizes.pipeline)
        return views * encoders.flops / rate + spread, 0.0
    seconds = work.views * work.rows * encoders.flops / sizes.encoder / rate
    sent = communication(run, layout, work)["encoder"]
    seconds += sum(seconds_of(transfer, group_of("features", layout, ranks_per_node), hardware) for transfer in sent)
    return max(0.0, seconds - language) + spread, seconds


def tokens_per_second(work: Work, timing: Timing) -> float:
    """Positions of a step over its seconds."""
    return work.rows * work.positions / timing.total
