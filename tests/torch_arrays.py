"""Tensors of torch as arrays of numpy and back, to the bit, for tests of what knows no torch."""

import ml_dtypes
import numpy as np
import torch


def type_of(dtype: torch.dtype) -> np.dtype:
    name = str(dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name, name))


def as_array(value: torch.Tensor) -> np.ndarray:
    value = value.detach().contiguous()
    return value.view(-1).view(torch.uint8).numpy().view(type_of(value.dtype)).reshape(tuple(value.shape))


def as_tensor(value: np.ndarray) -> torch.Tensor:
    """A copy, of the same type."""
    content = torch.from_numpy(np.array(value).reshape(-1).view(np.uint8))
    return content.view(getattr(torch, value.dtype.name)).view(value.shape)
