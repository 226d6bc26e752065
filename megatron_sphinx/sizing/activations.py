"""Bytes that forward keeps for backward: of decoder layers, projections and logits. Arithmetic only.

Counted from the code that runs: what megatron-core's layers and our attention, norms and experts save
(tests/test_sizing_memory.py compares with autograd's own account).
"""

from dataclasses import dataclass

from megatron_sphinx.config import Config
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.sizing.work import Work

FP32_BYTES = 4


@dataclass(frozen=True)
class MicroBatchSize:
    """How much is in the largest micro-batch of a replica.

    Attributes:
        positions: tokens and image positions.
        targets: positions whose loss is computed.
        views: views of pictures that are encoded.
    """

    positions: float
    targets: float
    views: float

    @classmethod
    def of_rows(cls, work: Work, rows: int) -> "MicroBatchSize":
        """Return the size of a micro-batch whose every row is as large as the largest row of the step."""
        return cls(rows * work.most_positions, rows * work.most_targets, rows * work.most_views)


def rows_at_once(work: Work, layout: ParallelLayout, micro_batch_rows: int) -> tuple[int, int]:
    """Return the rows of a replica's largest micro-batch, and how many micro-batches the busiest replica has."""
    replica_rows = -(-work.rows // layout.data)
    return min(replica_rows, micro_batch_rows), -(-replica_rows // micro_batch_rows)


def number_bytes(precision: str) -> int:
    """Bytes of one number of a weight or an activation in this precision (fp32, bf16 or fp8)."""
    return FP32_BYTES if precision == "fp32" else 2


def feed_forward_values(model: LanguageConfig, sizes: ParallelConfig) -> float:
    """How many numbers the feed-forward part of one layer keeps for backward, for each position of a replica.

    Gate and up are one tensor; SiLU of the gate and its product with up are one each, of which liger's kernel keeps the
    product only. (What `auto` will take is not known here: it is counted like torch's.) MoE experts get each token
    `experts_per_token` times: the token, its place among the others and their result are kept too.
    """
    widths = 3 if model.kernels == "liger" else 4
    if not model.experts:
        return widths * model.ffn / sizes.tensor
    copies = model.experts_per_token / sizes.tensor * sizes.expert_tensor
    return copies * (widths * model.ffn / sizes.expert_tensor + 4 * model.hidden)


def layer_bytes(model: LanguageConfig, sizes: ParallelConfig, precision: str, recompute: str) -> tuple[float, float]:
    """Bytes for one decoder layer and one position of a replica.

    A norm keeps its input and, for each position, its scale; RoPE keeps nothing of its own.

    Args:
        model: shape of the layer.
        sizes: how it is divided.
        precision: of the activations: fp32, bf16 or fp8.
        recompute: what backward computes again: none, selective or full.

    Returns:
        What the layer keeps from forward to backward, and what it has beside that while it is computed again.
    """
    width, hidden, tensor = number_bytes(precision), model.hidden, sizes.tensor
    token_ranks = tensor if sizes.sequence else 1  # ranks that share the tokens between the matrices
    own_hidden = hidden / token_ranks
    keys = model.groups * (hidden // model.heads)
    norms = 2 * (own_hidden * 2 * width + FP32_BYTES / token_ranks)
    attention = width * (4 * hidden + 3 * keys) / tensor  # queries, keys, values; turned queries and keys; output twice
    attention += FP32_BYTES * model.heads / tensor  # softmax's sums
    router = 0.0
    if model.experts:
        fp32_input = FP32_BYTES * own_hidden if width == 2 else 0.0  # the router computes in fp32
        router = fp32_input + (10 * model.experts + 50) / token_ranks
    feed_forward = width * feed_forward_values(model, sizes)
    everything = norms + attention + router + feed_forward
    if recompute == "none":
        return everything, 0.0
    if recompute == "selective":
        return everything - feed_forward - router, feed_forward + router
    return width * own_hidden, everything


def kept_layers(config: Config, layers: int) -> tuple[int, int]:
    """Split the layers of a stage into those that keep their activations and those that are computed again whole."""
    if config.training.activation_checkpointing != "full":
        return layers, 0
    recomputed = min(config.training.checkpointed_layers or layers, layers)
    return layers - recomputed, recomputed


def activation_bytes(config: Config, layout: ParallelLayout, stage: int, size: MicroBatchSize, in_flight: int) -> float:
    """Bytes of a stage's activations at the start of backward, those of a layer being computed again included.

    Args:
        config: the run; its `parallel` is not read.
        layout: how it is divided.
        stage: number of the pipeline stage.
        size: what is in a micro-batch.
        in_flight: micro-batches whose backward has not begun when most are.
    """
    model, sizes, recompute = config.model, layout.config, config.training.activation_checkpointing
    width, precision = number_bytes(config.training.precision), config.training.precision
    whole_layers, recomputed_layers = kept_layers(config, sizes.stage_layers(model.layers)[stage])
    kept, extra = layer_bytes(model, sizes, precision, "selective" if recompute == "selective" else "none")
    total = whole_layers * kept * in_flight
    if recomputed_layers:
        inputs, extra = layer_bytes(model, sizes, precision, "full")
        total += recomputed_layers * inputs * in_flight
    total += extra
    # gradients inside one layer, where it is widest
    copies = model.experts_per_token / sizes.tensor if model.experts else 1 / sizes.tensor
    total += 4 * width * copies * model.ffn + 2 * width * model.hidden
    if sizes.sequence:  # a matrix's input, gathered from all ranks once more, and its gradient before it is scattered
        total += 2 * width * model.hidden
    total *= size.positions
    if stage == 0:
        fp32_features = FP32_BYTES * config.vision.feature_values if width == FP32_BYTES else 0
        projected = 2 * width * config.vision.tokens_per_view * model.hidden
        embeddings = 2 * width * model.hidden * size.positions
        total += (size.views * (fp32_features + projected) + embeddings) * in_flight
    return total


def logit_bytes(config: Config, layout: ParallelLayout, size: MicroBatchSize) -> float:
    """Bytes of logits on a rank of the last stage at the moment when it holds most of them.

    That is inside the cross entropy, which holds two tensors [targets, this rank's part of the vocabulary]:

    * the output layer's logits, in the precision of the run, with the padded vocabulary masked (the masked copy takes
      the place of the first one, which is freed, in bf16);
    * a tensor of fp32. In bf16 it is the copy that megatron-core's `calculate_logits_max` makes and turns into the
      softmax in place. In fp32 no such copy is made, but the unmasked logits are still there beside the masked ones.
      (Without padding fp32 holds one tensor only, until backward makes the gradient; both are counted.)
    """
    own_vocabulary = config.model.padded_vocabulary / layout.config.tensor
    logits, softmax = number_bytes(config.training.precision), FP32_BYTES
    return size.targets * own_vocabulary * (logits + softmax)
