"""Layouts of tensors, types of elements, and copies of ranges of files."""

import errno
import os
import random

import numpy as np
import pytest
import torch
from torch_arrays import as_array

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.tensors.copying import OpenFiles, copy_range, read_into
from megatron_sphinx.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32, convert, converted, promoted
from megatron_sphinx.tensors.layout import Layout, places, runs

FLOAT64 = np.dtype(np.float64)


def drawn(rng: random.Random) -> tuple[np.ndarray, Layout]:
    """A view of numbers in memory, made by cutting, ordering and dividing, and the layout that is cut alike."""
    shape = [rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randint(1, 4))]
    memory = np.arange(np.prod(shape))
    view, layout = memory.reshape(shape), Layout.contiguous(shape)
    for _ in range(rng.randint(0, 4)):
        axis = rng.randrange(view.ndim)
        match rng.randrange(3):
            case 0:
                first = rng.randrange(view.shape[axis])
                size = rng.randint(1, view.shape[axis] - first)
                view, layout = view.take(range(first, first + size), axis), layout.narrowed(axis, first, size)
            case 1:
                axes = rng.sample(range(view.ndim), view.ndim)
                view, layout = view.transpose(axes), layout.ordered(axes)
            case _:
                sizes = [[2, size // 2] if size % 2 == 0 else [size] for size in view.shape]
                view, layout = view.reshape([one for part in sizes for one in part]), layout.divided(sizes)
    return view, layout


@pytest.mark.parametrize("seed", range(40))
def test_a_layout_is_cut_as_numpy_cuts(seed):
    view, layout = drawn(random.Random(seed))
    memory = np.arange(1000)
    assert np.array_equal(layout.view(memory), view)
    assert layout.extent == view.max() - view.min() + 1
    wider = layout.ordered([None, *range(view.ndim)])
    assert np.array_equal(wider.view(memory), view[None])


@pytest.mark.parametrize("seed", range(60))
def test_runs_copy_every_element_to_its_place(seed):
    rng = random.Random(seed)
    view, one = drawn(rng)
    order = rng.sample(range(view.ndim), view.ndim)
    back = sorted(range(view.ndim), key=order.__getitem__)
    other = Layout.contiguous([view.shape[axis] for axis in order]).ordered(back)
    memory, copied = np.arange(1000), np.full(view.size, -1)
    number, count = runs(one, other)
    found = list(places(one, other))
    assert len(found) == number
    assert number * count == view.size
    for first, second in found:
        copied[second : second + count] = memory[first : first + count]
    assert np.array_equal(copied.reshape([view.shape[axis] for axis in order]), view.transpose(order))


def test_what_lies_alike_is_one_run():
    matrix = Layout.contiguous([4, 6])
    assert runs(matrix, matrix) == (1, 24)
    assert runs(matrix.narrowed(0, 1, 2), matrix.narrowed(0, 2, 2)) == (1, 12)
    assert runs(matrix.narrowed(1, 0, 3), matrix.narrowed(1, 3, 3)) == (4, 3)
    assert runs(matrix.ordered([1, 0]), Layout.contiguous([6, 4])) == (24, 1)
    assert runs(Layout.contiguous([1, 1]), Layout.contiguous([1, 1])) == (1, 1)


# elements


def test_all_of_bf16_becomes_fp32_and_back():
    every = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)
    wide = converted(every, FLOAT32)
    assert np.array_equal(wide.view(np.uint32), np.arange(2**16, dtype=np.uint32) << 16)
    back, is_number = converted(wide, BFLOAT16), ~np.isnan(wide)
    assert np.array_equal(back.view(np.uint16)[is_number], every.view(np.uint16)[is_number])
    assert (back.view(np.uint16)[~is_number] == 0xFFFF).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_is_rounded_as_torch_rounds(dtype):
    """Any bits: subnormal, infinite, halfway between two, and no numbers."""
    rng = np.random.default_rng(1)
    drawn_bits = rng.integers(0, 2**32, 2**16, np.uint32)
    drawn_bits[: 2**14] = drawn_bits[: 2**14] & 0xFFFF0000 | 0x8000
    drawn_bits[2**14 : 2**15] = drawn_bits[2**14 : 2**15] & 0x87FFFFFF | 0x38000000  # about the least of fp16
    values = drawn_bits.view(np.float32)
    wanted = as_array(torch.from_numpy(values).to(dtype))
    found = converted(values, wanted.dtype)
    is_number = ~np.isnan(values)
    assert np.array_equal(found.view(np.uint16)[is_number], wanted.view(np.uint16)[is_number])
    assert np.isnan(found[~is_number].astype(np.float32)).all()


def test_any_strides_are_converted():
    values = np.arange(48, dtype=np.float32).reshape(6, 8)
    out = np.zeros((8, 12), BFLOAT16)
    convert(values.T, out[:, ::2])
    assert np.array_equal(out[:, ::2].astype(np.float32), values.T)
    assert not out[:, 1::2].any()


def test_a_type_that_holds_several():
    assert promoted([BFLOAT16, BFLOAT16]) == BFLOAT16
    assert promoted([FLOAT16, BFLOAT16]) == FLOAT32
    assert promoted([BFLOAT16, FLOAT64]) == FLOAT64


# ranges of files


@pytest.fixture
def files(tmp_path):
    content = os.urandom(5000)
    (tmp_path / "source").write_bytes(content)
    source, target = os.open(tmp_path / "source", os.O_RDONLY), os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield content, source, target
    os.close(source)
    os.close(target)


def test_the_kernel_copies_a_range(files):
    content, source, target = files
    assert copy_range(source, 100, target, 7, 900) == 900
    assert os.pread(target, 10_000, 0) == bytes(7) + content[100:1000]
    assert copy_range(source, 4900, target, 0, 900) == 100, "there is no more"


@pytest.mark.parametrize("fault", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP])
def test_where_the_kernel_cannot_copy_it_says_so(files, monkeypatch, fault):
    def refuse(*_):
        raise OSError(fault, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert copy_range(files[1], 0, files[2], 0, 10) == 0


def test_a_full_disk_is_an_error(files, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    with pytest.raises(OSError, match="full"):
        copy_range(files[1], 0, files[2], 0, 10)


def test_a_file_that_ends_too_early_is_named(tmp_path):
    (tmp_path / "short").write_bytes(b"12345")
    with OpenFiles() as opened:
        number = opened.opened(tmp_path / "short")
        assert opened.opened(tmp_path / "short") == number
        with pytest.raises(CheckpointError, match="short: is cut off while it is read; give a whole checkpoint"):
            read_into(number, memoryview(bytearray(9)), 0, tmp_path / "short")


@pytest.mark.parametrize("seed", range(8))
def test_what_is_turned_is_the_same_in_tiles(seed):
    """Large enough for tiles, of any number of dimensions, in order and not."""
    rng = random.Random(seed)
    shape = rng.choice([(700, 300), (3, 500, 260), (260, 2, 300), (290, 1, 270, 1)])
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    order = rng.sample(range(len(shape)), len(shape))
    view = values.transpose(order)
    for dtype in (FLOAT32, BFLOAT16):
        out = np.empty(view.shape, dtype)
        convert(view, out)
        assert np.array_equal(out, view.astype(dtype))
