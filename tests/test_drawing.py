"""Weights drawn in pieces and by threads: the bits of one draw of the whole, on one thread, as libraries draw them."""

import random
import threading

import pytest
import torch
from released_experts import SMALL
from safetensors.torch import save_file
from torch import Tensor

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model import drawing, expert_files
from megatron_sphinx.model.architecture import VISUAL_EXPERTS, VisualExpertConfig
from megatron_sphinx.model.drawing import DrawingFrom, draw_normal, in_threads
from megatron_sphinx.model.expert_files import load_experts
from megatron_sphinx.model.shards import Block, _blocks_of_rank
from megatron_sphinx.model.visual_experts import build_expert
from megatron_sphinx.parallel.seeding import generator, stream_seed

CPU = torch.device("cpu")


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def whole_of(shape: tuple[int, ...]) -> Tensor:
    """The matrix as one call of torch draws it."""
    return torch.empty(shape).normal_(0.0, 0.1, generator=stream())


SHAPES = [(1, 1), (3, 5), (5, 3), (16, 16), (70, 33), (2047, 31), (16_385, 2), (32_767, 1), (32_753, 1), (65_521, 1),
          (9, 5_000), (7, 40_001), (3, 32_752), (300, 1_024)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_drawn_in_pieces_is_the_one_drawn_at_once(shape, dtype):
    own = torch.empty(shape, dtype=dtype)
    draw_normal(own, shape, [Block((0, 0), shape)], 0.1, stream())
    assert torch.equal(own, whole_of(shape).to(dtype))


@pytest.mark.parametrize("seed", range(20))
def test_each_rank_gets_its_boxes_of_the_whole(seed):
    rng = random.Random(seed)
    rows, columns, ranks = rng.randint(1, 900), rng.randint(1, 300), rng.choice([2, 4])
    for dim, stride in ((0, 1), (1, 1), (0, 2)):
        shape = (rows * stride, columns)
        for rank in range(ranks):
            whole, blocks = _blocks_of_rank(shape, dim, stride, ranks, rank)
            own = torch.empty(shape)
            draw_normal(own, whole, blocks, 0.1, stream())
            boxes = [tuple(slice(o, o + n) for o, n in zip(b.offset, b.shape, strict=True)) for b in blocks]
            wanted = torch.cat([whole_of(whole)[box].flatten() for box in boxes])
            assert torch.equal(own.flatten(), wanted), f"seed {seed}: {whole} cut along {dim}, {stride} stacked"


def test_no_more_than_two_pieces_of_a_matrix_are_held_at_once(monkeypatch):
    sizes, empty = [], torch.empty
    monkeypatch.setattr(drawing.torch, "empty", lambda *size, **kind: sizes.append(size) or empty(*size, **kind))
    own = empty(5_000, 1_000)
    draw_normal(own, own.shape, [Block((0, 0), (5_000, 1_000))], 0.1, stream())
    assert [rows * columns <= 2**16 for rows, columns in sizes] == [True]


@pytest.mark.parametrize("name", [*SMALL, "efficientnet_lite0"])
def test_an_expert_draws_what_its_library_draws_after_manual_seed(name):
    before = torch.get_rng_state()
    with DrawingFrom(generator(3, f"expert {name}")):
        drawn = build_expert(VISUAL_EXPERTS[name]).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(stream_seed(3, f"expert {name}"))
    seeded = build_expert(VISUAL_EXPERTS[name]).state_dict()
    torch.set_rng_state(before)
    assert drawn.keys() == seeded.keys()
    assert all(torch.equal(value, seeded[key]) for key, value in drawn.items())


def test_experts_loaded_at_once_are_those_loaded_alone():
    items = [VisualExpertConfig(name=name, weights="random") for name in SMALL]
    together = load_experts(items, 3, "antialiased", device=CPU, dtype=torch.bfloat16)
    for item, one in zip(items, together, strict=True):
        [alone] = load_experts([item], 3, "antialiased", device=CPU, dtype=torch.bfloat16)
        assert one.mark == alone.mark == "random 3"
        assert not one.model.training
        ours, theirs = one.model.state_dict(), alone.model.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        weights = list(one.model.parameters())
        assert {weight.dtype for weight in weights} == {torch.bfloat16}
        assert not any(weight.requires_grad for weight in weights)


def test_a_file_of_two_experts_is_digested_once_and_beside_them(tmp_path, monkeypatch):
    state = build_expert(VISUAL_EXPERTS["dinov2_small"]).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    item = VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "w.safetensors"))
    digested = []

    def digest(path: str) -> str:
        digested.append(threading.current_thread().name)
        return f"digest of {path}"

    monkeypatch.setattr(expert_files, "_digest", digest)
    loaded = load_experts([item, item], 3, "antialiased", device=CPU, dtype=torch.float32)
    assert [one.mark for one in loaded] == [f"digest of {item.weights}"] * 2
    assert len(digested) == 1
    assert digested[0].startswith("digests")


def test_of_several_experts_without_weights_the_first_is_told():
    items = [VisualExpertConfig(name=name, weights=f"nowhere/{name}.pth") for name in ("clip_vit_small", *SMALL[1:3])]
    with pytest.raises(ConfigError, match=r"vision\.experts: clip_vit_small: nowhere/clip_vit_small\.pth: no such"):
        load_experts(items, 3, "antialiased", device=CPU, dtype=torch.float32)


def test_on_meta_experts_have_shapes_and_no_numbers():
    items = [VisualExpertConfig(name=name, weights="random") for name in SMALL]
    loaded = load_experts(items, 3, "antialiased", device=torch.device("meta"), dtype=torch.bfloat16)
    assert {weight.device.type for one in loaded for weight in one.model.parameters()} == {"meta"}


def test_threads_work_at_once_without_gradients_and_tell_in_order():
    barrier = threading.Barrier(3, timeout=20)

    def work(number: int) -> tuple[int, bool]:
        barrier.wait()
        return number * number, torch.is_grad_enabled()

    assert in_threads(work, range(3), threads=3) == [(0, False), (1, False), (4, False)]
    assert torch.is_grad_enabled()


def test_the_first_of_several_failures_is_raised():
    def work(number: int) -> int:
        if number:
            raise ValueError(f"item {number}")
        return number

    with pytest.raises(ValueError, match="item 1"):
        in_threads(work, range(4), threads=4)
