"""Mixture of experts: megatron-core's layer with routers that balance by row, and experts as grouped products."""

from collections.abc import Callable, Sequence
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
from megatron_sphinx.model.expert_choice import ExpertChoice
from megatron_sphinx.model.kernels import Kernels

TEXT, IMAGE, PADDING = 0, 1, 2  # kinds of tokens
_MOST_PADDING = 2.0  # rows with padding over rows without it, up to which batched products are faster


@dataclass
class Routing:
    """What the routers must know of a micro-batch, and what they report about it.

    A row of the plan is computed by one replica at once in every layout, a micro-batch is not: so the balance loss is
    taken over each row, and weighted with the row's share of the step's tokens.

    Attributes:
        row_of_token: int64 [tokens]; the rows are numbered from 0, padding has the last number.
        kind_of_token: int64 [tokens]: TEXT, IMAGE or PADDING.
        row_lengths: int64 [rows], tokens of each row.
        weight: weight of a token in the balance loss: 1 / tokens of the step.
        load: for each layer, how many of this rank's tokens each expert took, int64 [TEXT and IMAGE, experts].
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
        self.active: int | None = None
        self.kept: Tensor | None = None

    def restrict(self, active: int | None, kept: Sequence[int] | None) -> None:
        """Choose among fewer experts, or another number of them, from now on; without gradients.

        Args:
            active: experts of each token; None for as many as in training.
            kept: the experts that may be chosen; None for all.
        """
        self.active = active
        self.kept = None if kept is None else torch.tensor(kept, device=self.weight.device)

    @property
    def experts_per_token(self) -> int:
        """How many experts compute each token."""
        wanted: int = self.active or self.topk
        return wanted if self.kept is None else min(wanted, len(self.kept))

    def gating(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., experts] in fp32 from hidden states [..., hidden]; those of pruned experts are -inf."""
        weight = self.weight if self.kept is None else self.weight[self.kept]
        logits: Tensor = F.linear(hidden.float(), weight.float())
        if self.kept is None:
            return logits
        return logits.new_full((*logits.shape[:-1], self.num_experts), -torch.inf).index_copy(-1, self.kept, logits)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token.

        Args:
            logits: fp32 [tokens, experts].

        Returns:
            int64 [tokens, chosen]: numbers of the experts, that of the largest logit first; and the softmax over their
            logits, of this shape.

        Source: Mixtral, arXiv:2401.04088, section 2.1.
        """
        largest, experts = logits.topk(self.experts_per_token, 1)
        return experts, largest.softmax(-1)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token and their weights, and attach the routers' losses to the weights.

        Args:
            logits: fp32 [tokens, 1, experts], under sequence parallelism this rank's part of the tokens.
            padding_mask: not used; the rows say what is padding.

        Returns:
            Weights [tokens, experts], zero where not chosen, and bool [tokens, experts], which are chosen.
        """
        if self.active is not None or self.kept is not None:
            flat = logits.flatten(0, 1)
            experts, shares = self.choose(flat)
            weights = torch.zeros_like(flat).scatter(1, experts, shares)
            return weights, torch.zeros_like(flat, dtype=torch.bool).scatter(1, experts, True)
        weights, chosen = super().routing(logits)
        if self.routing_of_batch is not None and torch.is_grad_enabled():
            loss = self._losses(logits.flatten(0, 1), chosen, self.routing_of_batch)
            weights = MoEAuxLossAutoScaler.apply(weights, loss)
        return weights, chosen

    def _losses(self, logits: Tensor, chosen: Tensor, batch: Routing) -> Tensor:
        """Compute this rank's part of both losses, and write load and balance into the batch's Routing.

        Args:
            logits: fp32 [tokens of this rank, experts].
            chosen: bool [tokens of this rank, experts].
            batch: the rows and kinds of all tokens.
        """
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
    """megatron-core's MoE layer, which knows the rows; its activations can be computed again in backward.

    Attributes:
        observer: is shown the layer and the hidden states that come in, [tokens, 1, hidden], before they are computed;
            None for nobody.
    """

    routing_of_batch: Routing | None = None  # set before every forward
    observer: "Callable[[RowMoE, Tensor], None] | None" = None

    def __init__(self, *args: Any, collection: ProcessGroupCollection, is_recomputed: bool, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"pg_collection": collection}))  # 0.16 hands it to its own class only
        self.is_recomputed = is_recomputed

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Send each token through its chosen experts: [tokens, 1, hidden] to a tensor of this shape, and no bias."""
        if self.observer is not None:
            self.observer(self, hidden_states)
        batch = self.routing_of_batch

        def work(hidden: Tensor) -> Tensor:
            self.router.routing_of_batch = batch  # by now another micro-batch may have come by
            return super(RowMoE, self).forward(hidden)[0]  # type: ignore[no-any-return]

        out = checkpoint(work, False, hidden_states) if self.is_recomputed else work(hidden_states)
        return out, None


def restrict_experts(model: nn.Module, choice: ExpertChoice) -> None:
    """Let a rank's part of a model answer with the experts of a choice from now on.

    Args:
        model: this rank's part.
        choice: the experts, as `ExpertChoice.fitting` gives them for the whole model.
    """
    for layer in model.modules():
        if isinstance(layer, RowMoE):
            kept = choice.kept.layers[layer.layer_number - 1] if choice.kept is not None else None
            layer.router.restrict(choice.active, kept)


class RowLayer(TransformerLayer):  # type: ignore[misc]
    """megatron-core's decoder layer, which hands what is known of the micro-batch on to its MoE experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer; arguments and result are those of TransformerLayer."""
        self.mlp.routing_of_batch = kwargs["packed_seq_params"].routing
        return super().forward(*args, **kwargs)


class GroupedExperts(nn.Module):
    """The MoE experts of this rank: one tensor for each of their matrices, one product for all; megatron-core's API.

    Args:
        num_local_experts: how many experts this rank has.
        config: the widths; `expert_tensor_parallel_size` ranks share each matrix.
        kernels: what SwiGLU is computed with.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, *, kernels: Kernels, **_: Any) -> None:
        super().__init__()
        self.kernels = kernels
        device, dtype = current_platform().device, config.params_dtype
        ffn = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size

        def matrices(rows: int, columns: int) -> nn.Parameter:
            weight = nn.Parameter(torch.empty(num_local_experts, rows, columns, dtype=dtype, device=device))
            weight.allreduce = False  # type: ignore[attr-defined]  # megatron-core's mark of an expert's weight
            return weight

        self.weight1 = matrices(2 * ffn, config.hidden_size)  # gate over up
        self.weight2 = matrices(config.hidden_size, ffn)  # down

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Compute SwiGLU of each token by its expert, times the router's weight.

        Args:
            hidden: [tokens, hidden], those of the first expert first.
            tokens_per_expert: int64 [local experts], how many tokens each has.
            weights: the router's weight of each token, [tokens].

        Returns:
            [tokens, hidden], under expert-tensor parallelism this rank's summand; and no bias.
        """
        counts = tokens_per_expert.tolist()
        is_even = len(hidden) > 0 and len(counts) * max(counts) <= _MOST_PADDING * len(hidden)
        is_padded = is_even and current_platform().has_fast_batches
        work = partial(_padded_experts, counts) if is_padded else partial(_grouped_experts, self.kernels.swiglu, counts)
        inputs = (hidden, self.weight1, self.weight2, weights)
        return (_AtOnce.apply(work, *inputs) if torch.is_grad_enabled() else work(*inputs)), None


class _AtOnce(torch.autograd.Function):
    """Does some work in such a way that backward gives the gradients of all its inputs at once.

    How a rank's experts are computed depends on the tokens it gets, and so would the order of their gradients; but
    DeepSpeed adds up the gradients of replicas in the order in which they come.
    """

    @staticmethod
    def forward(ctx: Any, work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Do `work(*inputs)` in a graph of its own."""
        with torch.enable_grad():
            ctx.inputs = [value.detach().requires_grad_() for value in inputs]
            ctx.out = work(*ctx.inputs)
        out: Tensor = ctx.out.detach()
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Go back through that graph at once."""
        of_inputs = torch.autograd.grad(ctx.out, ctx.inputs, gradients)
        del ctx.out, ctx.inputs
        return None, *of_inputs


def _grouped_experts(
    swiglu: Callable[[Tensor], Tensor],
    counts: list[int],
    hidden: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weights: Tensor,
) -> Tensor:
    """Compute all experts by torch's grouped products; see GroupedExperts.forward."""
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(hidden.device, non_blocking=True)
    active = swiglu(_grouped(hidden, weight1, ends))
    return _grouped(active, weight2, ends) * weights[:, None].to(hidden.dtype)


def _padded_experts(counts: list[int], hidden: Tensor, weight1: Tensor, weight2: Tensor, weights: Tensor) -> Tensor:
    """Compute all experts by batched products, their tokens padded to one number; see GroupedExperts.forward."""
    out: Tensor = _PaddedExperts.apply(hidden, weight1, weight2, weights, counts)
    return out


def _grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply groups of rows by a matrix each.

    Args:
        rows: [tokens, columns].
        matrices: [groups, outputs, columns].
        ends: int32 [groups], where each group of rows ends.

    Returns:
        [tokens, outputs]: the rows of group i times the transpose of matrix i.
    """
    is_known = rows.dtype is torch.bfloat16 or (rows.dtype is torch.float32 and not rows.is_cuda)
    is_aligned = all(width * rows.itemsize % 16 == 0 for width in matrices.shape[1:])
    if is_known and is_aligned and len(rows):
        return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
    parts = rows.tensor_split(ends[:-1].cpu().long())  # for types and widths that the kernel does not take
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, matrices, strict=True)])


class _PaddedExperts(torch.autograd.Function):
    """Computes all experts as batched products over as many rows each: faster than one by one on a CPU with AMX.

    Experts with fewer tokens get rows of zeros. Its backward is written out so that it reuses buffers.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight1: Tensor, weight2: Tensor, weights: Tensor, counts: list[int]
    ) -> Tensor:
        """Compute what GroupedExperts.forward does; `counts` are the tokens of each expert."""
        experts, rows_each = len(counts), max(counts)
        starts = range(0, experts * rows_each, rows_each)
        places = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
        rows = hidden.new_zeros(experts * rows_each, hidden.shape[1]).index_copy_(0, places, hidden)
        rows = rows.view(experts, rows_each, -1)
        both = torch.bmm(rows, weight1.transpose(1, 2))
        gate, up = both.chunk(2, -1)
        gated = F.silu(gate)
        active = gated * up
        out = torch.bmm(active, weight2.transpose(1, 2)).flatten(0, 1).index_select(0, places)
        ctx.save_for_backward(rows, weight1, weight2, weights, both, gated, active, out, places)
        return out * weights[:, None].to(out.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the tokens, the matrices and the router's weights."""
        (of_out,) = gradients
        rows, weight1, weight2, weights, both, gated, active, out, places = ctx.saved_tensors
        experts, rows_each, width = rows.shape
        gate, up = both.chunk(2, -1)
        of_weights = (of_out * out).sum(-1, dtype=weights.dtype)
        weighted = of_out * weights[:, None].to(of_out.dtype)
        padded = of_out.new_zeros(experts * rows_each, width).index_copy_(0, places, weighted)
        padded = padded.view(experts, rows_each, -1)
        of_active, of_both = torch.bmm(padded, weight2), torch.empty_like(both)
        of_gate, of_up = of_both.chunk(2, -1)
        torch.mul(of_active, gated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_active.mul_(up), gate, grad_input=of_gate)
        of_hidden = torch.bmm(of_both, weight1).flatten(0, 1).index_select(0, places)
        of_weight1, of_weight2 = torch.bmm(of_both.transpose(1, 2), rows), torch.bmm(padded.transpose(1, 2), active)
        return of_hidden, of_weight1, of_weight2, of_weights, None
