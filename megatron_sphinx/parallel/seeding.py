"""Random streams: what is drawn depends on the run's seed and on a name, never on the layout."""

import hashlib

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_sphinx.device import current_platform
from megatron_sphinx.parallel.layout import Seat


def stream_seed(seed: int, name: str) -> int:
    """Derive the 63-bit seed of the random stream `name` from the run's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def generator(seed: int, name: str) -> torch.Generator:
    """Make a CPU generator of the random stream `name`: it draws the same numbers on every rank of every layout."""
    return torch.Generator().manual_seed(stream_seed(seed, name))


def seed_rank(seed: int, seat: Seat) -> None:
    """Seed this rank's default generators; tensor ranks share one stream and have one each beside it."""
    torch.manual_seed(stream_seed(seed, f"data {seat.data}"))
    model_parallel_cuda_manual_seed(
        seed + 100 * seat.pipeline, tp_rank=seat.tensor, ep_rank=seat.expert, etp_rank=seat.expert_tensor
    )


def random_state() -> dict[str, Tensor]:
    """Collect the state of every generator that a step may draw from, to be saved."""
    states = {"cpu": torch.get_rng_state()} | dict(get_cuda_rng_tracker().get_states())
    return states | ({"cuda": torch.cuda.get_rng_state()} if current_platform().is_cuda else {})


def restore_random_state(states: dict[str, Tensor]) -> None:
    """Set the generators to what `random_state` returned; without the device's where that was of another kind."""
    torch.set_rng_state(states["cpu"])
    if ("cuda" in states) != current_platform().is_cuda:
        return
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states({name: states[name] for name in states if name not in ("cpu", "cuda")})
