"""Mixture of experts: megatron-core's layer with routers that balance by row, and experts as grouped products."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_sphinx.device import current_platform

TEXT, IMAGE, PADDING = 0, 1, 2
_MOST_PADDING = 2.0  # rows with padding over rows without it, up to which batched products pay


@dataclass
class Routing:
    """What the routers must know of a micro-batch, and what they report of it.

    A row of the plan is computed by one replica at once in every layout, a micro-batch is not: so the balance loss is
    taken over each row, and weighted with the row's share of the step's tokens.

    Attributes:
        row_of_token: int64 [tokens]; the rows are numbered from 0, padding has the last number.
        kind_of_token: int64 [tokens]: TEXT, IMAGE or PADDING.
        row_lengths: int64 [rows], tokens of each row.
        weight: of a token in the balance loss: 1 / tokens of the step, times what the loss is scaled by.
        load: for each layer, tokens each expert took, int64 [TEXT and IMAGE, experts], of this rank's tokens.
        balance: for each layer, this rank's part of the balance loss before its coefficient.
    """

    row_of_token: Tensor
    kind_of_token: Tensor
    row_lengths: Tensor
    weight: float
    load: dict[int, Tensor] = field(default_factory=dict)
    balance: dict[int, Tensor] = field(default_factory=dict)


class RowRouter(TopKRouter):  # type: ignore[misc]
    """Softmax over the chosen logits, no token dropped; the losses of balance and size are attached row by row.

    Args:
        balance: coefficient of the balance loss of a layer. Source: Switch Transformer, arXiv:2101.03961, section 2.2,
            as megatron-core's switch_load_balancing_loss_func takes it.
        z_loss: coefficient of the squared log-sum-exp of the logits. Source: ST-MoE, arXiv:2202.08906, section 2.4.
    """

    routing_of_batch: Routing | None = None  # set before every forward

    def __init__(self, *args: Any, balance: float, z_loss: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balance, self.z_loss = balance, z_loss

    def gating(self, hidden: Tensor) -> Tensor:
        """Logits in fp32."""
        logits: Tensor = F.linear(hidden.float(), self.weight.float())
        return logits

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choice of experts.

        Args:
            logits: fp32 [tokens, 1, experts], under sequence parallelism this rank's part of the tokens.
            padding_mask: not used; the rows say what is padding.

        Returns:
            [tokens, experts] weights, zero where not chosen, and what is chosen.
        """
        weights, chosen = super().routing(logits)
        if self.routing_of_batch is not None and torch.is_grad_enabled():
            loss = self._losses(logits.flatten(0, 1), chosen, self.routing_of_batch)
            weights = MoEAuxLossAutoScaler.apply(weights, loss)
        return weights, chosen

    def _losses(self, logits: Tensor, chosen: Tensor, batch: Routing) -> Tensor:
        """This rank's part of both losses; reports load and balance."""
        row, kind = batch.row_of_token, batch.kind_of_token
        if self.config.sequence_parallel:
            row, kind = (part.chunk(self.tp_group.size())[self.tp_group.rank()] for part in (row, kind))
        zeros = logits.new_zeros(len(batch.row_lengths) + 1, self.num_experts)
        taken = zeros.index_add(0, row, chosen.to(logits.dtype))
        if self.config.sequence_parallel:
            dist.all_reduce(taken, group=self.tp_group)
        share = taken[:-1] / batch.row_lengths[:, None]  # tokens of a row for each expert, padding left out
        scores = zeros.index_add(0, row, logits.softmax(-1))[:-1]
        balance = batch.weight * self.num_experts / self.topk * (share * scores).sum()
        size = batch.weight * (logits.logsumexp(-1).square() * (kind != PADDING)).sum()
        counts = torch.zeros(3, self.num_experts, dtype=torch.int64, device=logits.device)
        batch.load[self.layer_number] = counts.index_add(0, kind, chosen.long())[:PADDING]
        batch.balance[self.layer_number] = balance.detach()
        loss: Tensor = self.balance * balance + self.z_loss * size
        return loss


class RowMoE(MoELayer):  # type: ignore[misc]
    """megatron-core's layer, told of the rows; can be computed again in backward instead of keeping activations."""

    routing_of_batch: Routing | None = None  # set before every forward

    def __init__(self, *args: Any, collection: ProcessGroupCollection, is_recomputed: bool, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"pg_collection": collection}))  # 0.16 hands it to its own class only
        self.is_recomputed = is_recomputed

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Through the chosen experts: [tokens, 1, hidden] to the same, and no bias."""
        batch = self.routing_of_batch

        def work(hidden: Tensor) -> Tensor:
            self.router.routing_of_batch = batch  # by now another micro-batch may have come by
            return super(RowMoE, self).forward(hidden)[0]  # type: ignore[no-any-return]

        out = checkpoint(work, False, hidden_states) if self.is_recomputed else work(hidden_states)
        return out, None


class RowLayer(TransformerLayer):  # type: ignore[misc]
    """megatron-core's layer, which hands what is known of the micro-batch on to its experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLayer's."""
        self.mlp.routing_of_batch = kwargs["packed_seq_params"].routing
        return super().forward(*args, **kwargs)


class GroupedExperts(nn.Module):
    """The experts of this rank: their matrices in one tensor each, one product for all; a megatron-core `experts`.

    Args:
        num_local_experts: how many are here.
        config: the widths; `expert_tensor_parallel_size` ranks share each matrix.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        here, dtype = current_platform().device, config.params_dtype
        ffn = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size

        def matrices(rows: int, columns: int) -> nn.Parameter:
            weight = nn.Parameter(torch.empty(num_local_experts, rows, columns, dtype=dtype, device=here))
            weight.allreduce = False  # type: ignore[attr-defined]  # megatron-core's mark of an expert's weight
            return weight

        self.weight1 = matrices(2 * ffn, config.hidden_size)  # gate over up
        self.weight2 = matrices(config.hidden_size, ffn)  # down

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """SwiGLU of each token by its expert, times the router's weight.

        Args:
            hidden: [tokens, hidden], those of the first expert first.
            tokens_per_expert: how many each has.
            weights: [tokens].

        Returns:
            [tokens, hidden]; under expert-tensor parallelism this rank's summand. No bias.
        """
        counts = tokens_per_expert.tolist()
        is_even = len(hidden) > 0 and len(counts) * max(counts) <= _MOST_PADDING * len(hidden)
        work = partial(_padded_experts if is_even and not hidden.is_cuda else _grouped_experts, counts)
        inputs = (hidden, self.weight1, self.weight2, weights)
        return (_AtOnce.apply(work, *inputs) if torch.is_grad_enabled() else work(*inputs)), None


class _AtOnce(torch.autograd.Function):
    """Does some work so that the gradients of all its inputs come at once.

    How a rank's experts are computed depends on the tokens it gets, and so would the order of their gradients; but
    DeepSpeed adds up the gradients of replicas in the order in which they come.
    """

    @staticmethod
    def forward(ctx: Any, work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.inputs = [value.detach().requires_grad_() for value in inputs]
            ctx.out = work(*ctx.inputs)
        out: Tensor = ctx.out.detach()
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.autograd.grad(ctx.out, ctx.inputs, gradients)
        del ctx.out, ctx.inputs
        return None, *found


def _grouped_experts(counts: list[int], hidden: Tensor, weight1: Tensor, weight2: Tensor, weights: Tensor) -> Tensor:
    ends = torch.tensor(counts).cumsum(0).to(hidden.device, torch.int32)
    gate, up = _grouped(hidden, weight1, ends).chunk(2, -1)
    return _grouped(F.silu(gate) * up, weight2, ends) * weights[:, None].to(hidden.dtype)


def _padded_experts(counts: list[int], hidden: Tensor, weight1: Tensor, weight2: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = _PaddedExperts.apply(hidden, weight1, weight2, weights, counts)
    return out


def _grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows `ends[i - 1]` to `ends[i]` times the transpose of matrix i."""
    is_known = rows.dtype is torch.bfloat16 or (rows.dtype is torch.float32 and not rows.is_cuda)
    is_aligned = all(width * rows.itemsize % 16 == 0 for width in matrices.shape[1:])
    if is_known and is_aligned and len(rows):
        return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
    parts = rows.tensor_split(ends[:-1].cpu().long())  # what the kernel does not take
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, matrices, strict=True)])


class _PaddedExperts(torch.autograd.Function):
    """All experts as batched products over as many rows each: on a CPU twice as fast as one after the other.

    Rows of the experts that have fewer are zeros. Nothing is written that is not used again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight1: Tensor, weight2: Tensor, weights: Tensor, counts: list[int]
    ) -> Tensor:
        """As GroupedExperts.forward."""
        experts, most = len(counts), max(counts)
        places = torch.cat([torch.arange(most * n, most * n + count) for n, count in enumerate(counts)])
        rows = hidden.new_zeros(experts * most, hidden.shape[1]).index_copy_(0, places, hidden).view(experts, most, -1)
        both = torch.bmm(rows, weight1.transpose(1, 2))
        gate, up = both.chunk(2, -1)
        gated = F.silu(gate)
        active = gated * up
        out = torch.bmm(active, weight2.transpose(1, 2)).flatten(0, 1).index_select(0, places)
        ctx.save_for_backward(rows, weight1, weight2, weights, both, gated, active, out, places)
        return out * weights[:, None].to(out.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tokens, the matrices and the router's weights."""
        (of_out,) = gradients
        rows, weight1, weight2, weights, both, gated, active, out, places = ctx.saved_tensors
        experts, most, width = rows.shape
        gate, up = both.chunk(2, -1)
        of_weights = (of_out * out).sum(-1, dtype=weights.dtype)
        weighted = of_out * weights[:, None].to(of_out.dtype)
        padded = of_out.new_zeros(experts * most, width).index_copy_(0, places, weighted).view(experts, most, -1)
        of_active, of_both = torch.bmm(padded, weight2), torch.empty_like(both)
        of_gate, of_up = of_both.chunk(2, -1)
        torch.mul(of_active, gated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_active.mul_(up), gate, grad_input=of_gate)
        of_hidden = torch.bmm(of_both, weight1).flatten(0, 1).index_select(0, places)
        of_weight1, of_weight2 = torch.bmm(of_both.transpose(1, 2), rows), torch.bmm(padded.transpose(1, 2), active)
        return of_hidden, of_weight1, of_weight2, of_weights, None
