"""Which attention a micro-batch goes through, and that each gives what attention inside each document is."""

import os
import random

import pytest
import torch
from test_plan import real_planner
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp

from megatron_sphinx.device import be_deterministic
from megatron_sphinx.model import attention
from megatron_sphinx.model.attention import (
    PackedAttention,
    PackedRows,
    Path,
    attend_at_once,
    attend_by_runs,
    attend_to_whole,
    attention_path,
    rotation,
)
from megatron_sphinx.model.kernels import torch_kernels

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture
def without_cudnn():
    """Forbid attention by cuDNN, as it is on a GPU."""
    was_enabled = cudnn_sdp_enabled()
    enable_cudnn_sdp(False)
    yield
    assert not cudnn_sdp_enabled(), "it is forbidden again behind every use"
    enable_cudnn_sdp(was_enabled)


@pytest.mark.parametrize(
    ("lengths", "changed", "path"),
    [
        ([5, 9, 9], {}, Path.VARLEN),
        ([2048], {}, Path.WHOLE),
        ([2048] * 3, {}, Path.WHOLE),
        ([2048] * 3, {"head_width": 64}, Path.WHOLE),
        ([7, 2048, 2048], {}, Path.VARLEN),  # of several lengths
        ([2048, 2048, 6], {}, Path.VARLEN),  # padding behind full rows
        ([1024, 1024], {}, Path.VARLEN),  # of one length, but not of the longest
        ([1024, 1024], {"longest": 1024}, Path.VARLEN),  # too short for cuDNN to be faster
        ([2048], {"head_width": 256}, Path.VARLEN),  # too wide for cuDNN
        ([2048], {"head_width": 264}, Path.RUNS),  # for flash attention too
        ([5, 9], {"head_width": 12}, Path.RUNS),  # no multiple of 8
        ([2048], {"dtype": torch.float32}, Path.RUNS),
        ([5, 9], {"dtype": torch.float32}, Path.RUNS),
        ([2048], {"is_cuda": False}, Path.RUNS),
    ],
)
def test_path(lengths, changed, path):
    known = {"longest": 2048, "is_cuda": True, "dtype": BF16, "head_width": 128} | changed
    assert attention_path(PackedRows.of(lengths, CPU).runs, known.pop("longest"), **known) is path


def planned_lengths(steps: int) -> list[list[int]]:
    """Lengths of the documents of micro-batches of some steps on real data, and of some that are full rows."""
    planner = real_planner(2048, row_multiple=1, replicas=1)
    found = []
    for step in range(steps):
        for replicas in planner.step(step).micro_batches[:8]:
            lengths = sorted(segment.length for row in replicas[0] for segment in row)
            found.append(lengths + [-sum(lengths) % 4] * (sum(lengths) % 4 > 0))
    return found + [[2048] * documents for documents in (4, 4, 1, 3, 2)]


@pytest.mark.usefixtures("without_cudnn")
def test_fifty_steps_of_a_run_set_up_one_kernel_at_most(run_ranks):
    """On a GPU, by its fakes: cuDNN is given documents of one shape, all others go through one call of varlen."""
    run_ranks(1, check_fifty_steps)  # a process in which there were fakes of a GPU cannot fork any more


def check_fifty_steps() -> None:
    cudnn_keys, other_calls, varlen_calls = set(), [], []

    def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        key = tuple((x.shape, x.stride()) for x in (q, k, v)), *sorted(options.items())
        cudnn_keys.add(key) if cudnn_sdp_enabled() else other_calls.append(key)
        return torch.empty_like(q)

    def varlen_attn(q: Tensor, *_: object, **__: object) -> Tensor:
        varlen_calls.append(len(q))
        return torch.empty_like(q)

    attention.F.scaled_dot_product_attention = scaled_dot_product_attention
    attention._varlen_attention = lambda: (varlen_attn, True)
    module, batches = PackedAttention(kernels=torch_kernels(), longest=2048), planned_lengths(50)
    with FakeTensorMode():
        for lengths in batches:
            q = torch.empty(sum(lengths), 4, 64, device="cuda", dtype=BF16)
            kv = torch.empty(sum(lengths), 2, 128, device="cuda", dtype=BF16)
            rows = PackedRows.of(lengths, torch.device("cuda"))
            assert module(q, *kv.chunk(2, -1), None, packed_seq_params=rows).shape == (sum(lengths), 256)
    assert len({tuple(lengths) for lengths in batches}) > 50, "the lengths vary"
    assert len(cudnn_keys) == 1
    assert not other_calls
    assert len(varlen_calls) == sum(set(lengths) != {2048} for lengths in batches)


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's varlen_attn says of its arguments, by one explicit mask."""
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    assert all(x.stride(-1) == 1 for x in (query, key, value)), "flash attention asks for it"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q[-1] == len(query)
    assert cu_seq_k[-1] == len(key)
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    place = torch.arange(len(query))
    document = torch.bucketize(place, cu_seq_q, right=True)
    far, ahead = (len(query) if side < 0 else side for side in window_size)
    distance = place[:, None] - place
    allowed = (document[:, None] == document) & (distance <= far) & (-distance <= ahead)
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), value)


def parts_of(mixed: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as megatron-core takes them out of one tensor [tokens, groups, width]: strided views."""
    width = mixed.shape[-1] // (heads // groups + 2)
    query, key, value = mixed.split([heads // groups * width, width, width], -1)
    return query.reshape(len(mixed), heads, width), key, value


def compare(attend, lengths: list[int], heads: int, groups: int, width: int, scale: float | None) -> None:
    """Compare outputs and gradients with those of attention by runs of one length."""
    mixed = torch.randn(sum(lengths), groups, (heads // groups + 2) * width, dtype=torch.float64, requires_grad=True)
    rows, gradient = PackedRows.of(lengths, CPU), torch.randn(sum(lengths), heads, width, dtype=torch.float64)
    found, wanted = (way(*parts_of(mixed, heads, groups), rows, scale) for way in (attend, attend_by_runs))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(out, mixed, gradient)[0] for out in (found, wanted)))


@pytest.mark.parametrize("knows_groups", [True, False], ids=["groups", "no_groups"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_varlen_is_called_so_that_it_gives_attention_inside_each_document(
    monkeypatch, heads, groups, width, knows_groups
):
    """With padding behind the documents, and with whole rows that are not isolated: a row is one length then."""

    def called(*args, **options):
        assert knows_groups or "enable_gqa" not in options
        return reference_varlen(*args, **options)

    monkeypatch.setattr(attention, "_varlen_attention", lambda: (called, knows_groups))
    rng = random.Random(heads * width)
    documents = sorted(rng.randint(1, 40) for _ in range(5))
    for lengths, scale in ((documents, None), ([*documents, 3], 0.3), ([50, 50], None), ([1], None)):
        compare(attend_at_once, lengths, heads, groups, width, scale)


@pytest.mark.usefixtures("without_cudnn")
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_whole_documents_one_by_one_give_attention_inside_each(heads, groups):
    compare(attend_to_whole, [32] * 3, heads, groups, 64, None)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_torchs_varlen_takes_what_it_is_given(run_ranks, heads, groups):
    """By its own account of shapes, on tensors without data: no GPU is there to compute it."""
    run_ranks(1, lambda: check_varlen_on_tensors_without_data(heads, groups))  # autograd starts a thread for them


def check_varlen_on_tensors_without_data(heads: int, groups: int) -> None:
    mixed = torch.empty(30, groups, (heads // groups + 2) * 64, dtype=BF16, device="meta", requires_grad=True)
    rows = PackedRows.of([7, 9, 14], torch.device("meta"))
    out = attend_at_once(*parts_of(mixed, heads, groups), rows, None)
    assert (out.shape, out.dtype) == ((30, heads, 64), BF16)
    (gradient,) = torch.autograd.grad(out, mixed, torch.empty_like(out))
    assert gradient.shape == mixed.shape


def test_rotation_comes_before_attention(monkeypatch):
    monkeypatch.setattr(attention, "attention_path", lambda *_, **__: Path.VARLEN)
    monkeypatch.setattr(attention, "_varlen_attention", lambda: (reference_varlen, True))
    lengths = [3, 8]
    q, k, v = (torch.randn(11, 2, 8) for _ in range(3))
    cos, sin = rotation(lengths, 100.0 ** (-torch.arange(0, 8, 2) / 8), torch.float32)
    module, rows = PackedAttention(kernels=torch_kernels(), longest=8), PackedRows.of(lengths, CPU)
    turned = [torch.cat([x[..., :4] * cos - x[..., 4:] * sin, x[..., 4:] * cos + x[..., :4] * sin], -1) for x in (q, k)]
    wanted = attend_by_runs(*turned, v, rows, None).flatten(1)
    rows.rotation = (cos, sin)
    torch.testing.assert_close(module(q, k, v, None, packed_seq_params=rows), wanted)


def test_where_bits_must_repeat_cudnns_kernel_is_not_taken(run_ranks):
    def check() -> None:
        be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        known = {"is_cuda": True, "dtype": torch.bfloat16, "head_width": 64}
        assert attention_path(((2, 4096),), 4096, **known) is Path.VARLEN

    run_ranks(1, check)


def test_only_the_backward_of_attention_is_strict_where_a_run_is_deterministic(run_ranks, monkeypatch):
    seen = []

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, query, _key, _value):
            return query.clone()

        @staticmethod
        def backward(_ctx, gradient):
            seen.append(("attention", torch.is_deterministic_algorithms_warn_only_enabled()))
            return gradient, gradient, gradient

    def check():
        be_deterministic()
        monkeypatch.setattr(attention, "attend_by_runs", lambda q, k, v, *_: Attend.apply(q, k, v))
        inputs = torch.ones(4, 1, 8, requires_grad=True)
        query, key, value = (inputs * factor for factor in (1.0, 2.0, 3.0))
        rows = PackedRows.of([4], CPU)
        out = PackedAttention(kernels=torch_kernels(), longest=4)(query, key, value, None, packed_seq_params=rows)
        out.register_hook(lambda _: seen.append(("above", torch.is_deterministic_algorithms_warn_only_enabled())))
        inputs.register_hook(lambda _: seen.append(("below", torch.is_deterministic_algorithms_warn_only_enabled())))
        out.sum().backward()
        assert seen == [("above", True), ("attention", False), ("below", True)]

    run_ranks(1, check)
