"""The decoder for answers: the weights of megatron-core's modules, computed without what only training needs."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_sphinx.model.attention import PackedRows, Past, RMSNorm
from megatron_sphinx.model.experts import RowMoE
from megatron_sphinx.model.kernels import norm_in_fp32, rotated
from megatron_sphinx.model.language import TargetGPT
from megatron_sphinx.model.packed_linear import PackedLinear
from megatron_sphinx.parallel.groups import ProcessGroups

_FEW = 64  # tokens for which torch's norm is faster on CPUs: more kernels, each of less work


class InferenceDecoder:
    """What a rank's shard of a decoder computes of new tokens, without gradients.

    A step of few tokens is bound by the weights that are read, and by what Python does around each product: half of
    what megatron-core's layers take, since they are ready for gradients, dropout and biases. Here the products are
    PackedLinear's, and there is nothing else between them than what the arithmetic needs.

    Args:
        language: the shard, which has the portable layers; its matrices are taken over, so nothing else can compute
            with it any more.
        groups: the groups it computes in.
    """

    def __init__(self, language: TargetGPT, groups: ProcessGroups) -> None:
        self._tensor = groups.tensor if groups.layout.config.tensor > 1 else None
        self._layers = [_Layer(layer, self._tensor) for layer in language.decoder.layers]
        self._norm = _Norm(language.decoder.final_layernorm) if groups.is_last_stage else None
        self._output = PackedLinear(language.output_layer.weight) if groups.is_last_stage else None

    def __call__(self, hidden: Tensor, rows: PackedRows) -> Tensor:
        """Compute the layers of this stage, and behind the last one the logits.

        Args:
            hidden: of the new tokens, [tokens, hidden].
            rows: their documents, with rotation and past; logits are those of `target_positions`.

        Returns:
            [targets, padded vocabulary] on every tensor rank. Before the last stage: hidden states [tokens, hidden].
        """
        assert rows.rotation is not None, "tokens without a place"
        assert rows.past is not None, "tokens without a cache"
        for layer in self._layers:
            hidden = layer(hidden, rows.rotation, rows.past)
        if self._norm is None or self._output is None:
            return hidden
        if rows.target_positions is not None:
            hidden = hidden.index_select(0, rows.target_positions)
        logits = self._output(self._norm(hidden))
        if self._tensor is None:
            return logits
        gathered: Tensor = gather_from_tensor_model_parallel_region(logits, group=self._tensor)
        return gathered


class _Norm:
    """A root-mean-square norm."""

    def __init__(self, norm: RMSNorm) -> None:
        self._weight, self._epsilon = norm.weight, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        """Norm [tokens, hidden]."""
        if x.is_cuda or len(x) <= _FEW:
            return F.rms_norm(x, x.shape[-1:], self._weight, self._epsilon)
        return norm_in_fp32(x, self._weight, self._epsilon)[0]


class _Layer:
    """A layer of the decoder.

    Its query, key and value come from one matrix, whose rows megatron-core sorts by groups. Here they are sorted by
    kind: so queries and keys lie side by side, and are rotated at once.
    """

    def __init__(self, layer: TransformerLayer, tensor: torch.distributed.ProcessGroup | None) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self._number, self._tensor, self._scale = layer.layer_number, tensor, attention.core_attention.softmax_scale
        self._heads = attention.num_attention_heads_per_partition
        self._groups = groups = attention.num_query_groups_per_partition
        self._width = attention.hidden_size_per_attention_head
        rows = torch.arange((self._heads + 2 * groups) * self._width).view(groups, -1, self._width)
        order = torch.cat([part.flatten() for part in (rows[:, :-2], rows[:, -2], rows[:, -1])])
        self._query_key_value = PackedLinear(attention.linear_qkv.weight, order.to(attention.linear_qkv.weight.device))
        self._projection = PackedLinear(attention.linear_proj.weight)
        self._norm, self._norm_of_mlp = _Norm(layer.input_layernorm), _Norm(layer.pre_mlp_layernorm)
        self._experts = mlp if isinstance(mlp, RowMoE) else None
        if self._experts is None:
            self._gate_and_up, self._down = PackedLinear(mlp.linear_fc1.weight), PackedLinear(mlp.linear_fc2.weight)

    def __call__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], past: Past) -> Tensor:
        """Compute the layer: [tokens, hidden] to a tensor of this shape."""
        mixed = self._query_key_value(self._norm(hidden)).unflatten(1, (-1, self._width))
        query_key = rotated(mixed[:, : -self._groups], *rotation)
        query, key, value = query_key[:, : self._heads], query_key[:, self._heads :], mixed[:, -self._groups :]
        attended = past.attend(self._number, query, key, value, self._scale)
        hidden = self._summed(self._projection(attended.flatten(1))).add_(hidden)
        return self._mlp(self._norm_of_mlp(hidden)).add_(hidden)

    def _mlp(self, hidden: Tensor) -> Tensor:
        """Compute the feed-forward layer, or that of MoE experts."""
        if self._experts is not None:
            out: Tensor = self._experts(hidden[:, None])[0][:, 0]
            return out
        gate, up = self._gate_and_up(hidden).chunk(2, -1)
        return self._summed(self._down(F.silu(gate).mul_(up)))

    def _summed(self, part: Tensor) -> Tensor:
        """Sum what the tensor ranks have computed with their parts of a matrix."""
        if self._tensor is None:
            return part
        whole: Tensor = reduce_from_tensor_model_parallel_region(part, group=self._tensor)
        return whole
