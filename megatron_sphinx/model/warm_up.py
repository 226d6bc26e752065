"""Sets a GPU's kernels up before the first step: some are compiled or planned when they first meet a kind of shape."""

import torch

from megatron_sphinx.model.attention import PackedRows, Path, attention_path
from megatron_sphinx.model.language import TargetGPT

# Triton compiles a kernel anew for a whole number that is 1, for those that are divisible by 16, and for others.
_UNIT = 16


def kinds_of_tokens(processors: int) -> list[int]:
    """List numbers of tokens that together are all kinds of numbers that Triton's kernels tell apart.

    liger's kernels know two: the tokens, and in the norm's backward the tokens of each of the GPU's processors, rounded
    up.

    Args:
        processors: how many multiprocessors the GPU has, more than 17.
    """
    counts = [1, _UNIT, _UNIT + 1]
    for tokens_each in (2, _UNIT):
        most = tokens_each * processors // _UNIT * _UNIT
        counts += [most, most - 1]
    return counts


def warm_up(model: TargetGPT, *, longest: int, processors: int, is_cuda: bool = True) -> None:
    """Take every kind of micro-batch through one layer of this stage, forward and backward.

    Without this a step in the middle of a run may be the first to meet a kind, and takes a second longer. Weights and
    random streams stay as they are; all ranks that share the layer call this, together.

    Args:
        model: this rank's shard, its weights set and no hook on its gradients yet.
        longest: tokens of the longest document that there can be.
        processors: how many multiprocessors the GPU has.
        is_cuda: whether attention is computed as on a GPU.
    """
    layers, config = model.decoder.layers, model.config
    if not len(layers) or model.kernels.is_transformer_engine:
        return
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    device, dtype = model.frequencies.device, config.params_dtype
    counts = [tokens * ranks for tokens in kinds_of_tokens(processors)] if model.kernels.name == "liger" else []
    whole = attention_path(((1, longest),), longest, is_cuda=is_cuda, dtype=dtype, head_width=config.kv_channels)
    if whole is Path.WHOLE and not longest % ranks:
        counts.append(longest)  # the one length for which cuDNN makes a plan
    for tokens in counts:
        hidden = torch.zeros(tokens // ranks, 1, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
        rows = PackedRows.of([tokens], device, rotation=model.rotation([tokens]))
        out, _ = layers[0](hidden_states=hidden, attention_mask=None, packed_seq_params=rows)
        out.sum().backward()
    for weight in layers[0].parameters():
        weight.grad = None
