"""Counts what a rank asks of torch: FLOPs, messages of collectives, and memory, on real tensors and on fake ones."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

HOST = "host"  # what the CPU's memory holds, wherever the rank computes
CONTROL = "control"  # the group of small messages, which are not counted

aten = torch.ops.aten


def _pairs_share(query: Sequence[int], is_causal: bool) -> float:
    """Compute the share of all pairs of positions that attention takes."""
    return (1 + 1 / query[-2]) / 2 if is_causal else 1.0


def _attention(query: Tensor, key: Tensor, value: Tensor, _dropout: float = 0.0, is_causal: bool = False) -> float:
    """Count the FLOPs of attention, forward."""
    whole: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return whole * _pairs_share(query.shape, is_causal)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, _out: Tensor, _sums: Tensor, _dropout: float,
    is_causal: bool,
) -> float:  # fmt: skip
    """Count the FLOPs of attention, backward."""
    whole: int = sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)
    return whole * _pairs_share(query.shape, is_causal)


# Attention, in FLOPs of what it computes; torch's own counter takes causal attention for a full square.
ATTENTION: dict[Any, Callable[..., float]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
# What torch's counter does not know: rows of experts times their matrices, or the gradient of those.
GROUPED: dict[Any, Callable[..., float]] = {aten._grouped_mm: lambda a, b, *_: 2 * a.numel() * b.shape[-1]}

REDUCED = ("data", "expert_data")  # groups that ZeRO reduces gradients in

# The collectives of c10d: what they are, and which argument is the whole message.
COLLECTIVES = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "reduce_": ("reduce-scatter", 0),  # one to each rank, as gradients are reduced: together they are one
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "alltoall_": ("all-to-all", 1),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}


@dataclass
class Allocation:
    """Memory that tensors share.

    Attributes:
        nbytes: its size.
        part: what it is for.
        born, died: when, in allocations and releases of the rank; `died` is None while it lives.
    """

    nbytes: int
    part: str
    born: int
    died: int | None = None


class Recorder(TorchDispatchMode):
    """Counts what is asked of torch: FLOPs, collectives, memory. Works on real tensors as on fake ones.

    Args:
        groups: process groups by the name they are counted under; those of one rank are left out.
        fake: of the fake tensors, where there are some; then reads of numbers that nobody has are answered.

    Attributes:
        part: what memory that is asked for now is for.
        flops: of matrix products and convolutions, and of attention.
        collectives: (group, kind) to how many there were, and the bytes of their messages: the whole input of a
            reduce-scatter, what this rank gives to an all-to-all, the whole output of an all-gather, else the tensor.
    """

    def __init__(self, groups: Mapping[str, Any], fake: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "other"
        self.fake = fake
        self.flops: dict[str, float] = {}
        self.collectives: dict[tuple[str, str], tuple[int, int]] = {}
        self._names = {group.group_name: name for name, group in groups.items() if group is not None}
        self._clock = self._start = 0
        self._blocks: list[Allocation] = []
        self._live: dict[int, Allocation] = {}
        self.begin()

    def begin(self) -> None:
        """Count from here; memory that is there already stays."""
        self.flops = {"matrices": 0.0, "attention": 0.0}
        self.collectives = {}
        self._start = self._clock
        self._blocks = list(self._live.values())

    @contextmanager
    def memory_for(self, part: str) -> Iterator[None]:
        """Say that memory which is asked for inside is for this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def name(self, part: str, *tensors: Tensor) -> None:
        """Say what the memory of some tensors is for."""
        for tensor in tensors:
            self._track(tensor)
            self._live[tensor.untyped_storage()._cdata].part = part

    def peak(self) -> dict[str, int]:
        """Give the bytes by part when most was held since `begin`, the host's left out."""
        return max(self._held_since(self._start), key=lambda now: sum(now.values()), default={})

    @contextmanager
    def rise(self) -> Iterator[list[int]]:
        """Measure how many bytes more than before are held inside at most: afterwards the list's only number."""
        found: list[int] = []
        start = self._clock
        before = sum(block.nbytes for block in self._live.values() if block.part != HOST)
        yield found
        found.append(max((sum(now.values()) for now in self._held_since(start)), default=before) - before)

    def _held_since(self, start: int) -> Iterator[dict[str, int]]:
        """Give the bytes by part after each moment from `start` on, the host's left out."""
        changes = defaultdict[int, list[tuple[int, str]]](list)
        for block in self._blocks:
            if block.part != HOST and (block.died is None or block.died >= start):
                changes[max(block.born, start)].append((block.nbytes, block.part))
                if block.died is not None:
                    changes[block.died].append((-block.nbytes, block.part))
        now = dict[str, int]()
        for moment in sorted(changes):
            for nbytes, part in changes[moment]:
                now[part] = now.get(part, 0) + nbytes
            yield dict(now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._note(func, args)
        out = func(*args, **kwargs) if self.fake is None else self._compute(func, types, args, kwargs)
        packet = func._overloadpacket
        if packet in ATTENTION:
            self.flops["attention"] += ATTENTION[packet](*args, **{k: v for k, v in kwargs.items() if k == "is_causal"})
        elif packet in GROUPED:
            self.flops["matrices"] += GROUPED[packet](*args)
        elif packet in flop_registry:
            self.flops["matrices"] += flop_registry[packet](*args, **kwargs, out_val=out)
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        return out

    def _compute(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Compute real results of real tensors, else fake ones; integers made of no tensor are real too."""
        if FakeTensor in types:
            return self._answer(func, args, kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            made = func(*args, **kwargs)
            if not isinstance(made, Tensor) or made.is_floating_point():
                return made
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer what depends on numbers that nobody has.

        A number is finite, a search finds nothing, and a mask, which is real, selects as many as it says.
        """
        packet, first = func._overloadpacket, args[0]
        if packet is aten._local_scalar_dense:
            return 1.0 if first.is_floating_point() else False if first.dtype is torch.bool else 0
        with unset_fake_temporarily():
            if packet is aten.nonzero:
                return torch.empty(0, first.ndim, dtype=torch.int64)
            if packet is aten.masked_select:
                count = int(args[1].sum())
        return first.new_empty(count) if packet is aten.masked_select else func(*args, **kwargs)

    def _note(self, func: Any, args: Any) -> None:
        """Count a collective; what ZeRO reduces in and was not named yet is memory for reduction."""
        name = func._overloadpacket.__name__
        if name == "barrier":
            return
        kind, message = COLLECTIVES[name]
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(boxed)
        if group.size() == 1 or self._names[group.group_name] == CONTROL:
            return
        nbytes = sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(args[message]))
        key = (self._names[group.group_name], kind)
        for leaf in tree_leaves(args[message]) if key[0] in REDUCED else ():
            if self._live[leaf.untyped_storage()._cdata].part == self.part:
                self.name("reduction", leaf)
        count, total = self.collectives.get(key, (0, 0))
        self.collectives[key] = (count + 1, total + nbytes)

    def _track(self, tensor: Tensor) -> None:
        """Follow the memory of a tensor from now on until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or tensor.device.type == "meta":  # that is a shape, also in a real run
            return
        self._clock += 1
        block = Allocation(storage.nbytes(), self.part, self._clock)
        self._live[key] = block
        self._blocks.append(block)
        finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        """Note that memory is freed."""
        self._clock += 1
        self._live.pop(key).died = self._clock
