"""CPU or CUDA: the device, its backend, what is fast on it, and the adaptation of megatron-core to the CPU."""

import logging
import os
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from platform import machine
from threading import Lock
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.errors import ConfigError


@dataclass(frozen=True)
class Platform:
    """What this rank computes on.

    Attributes:
        device: where tensors live.
        backend: the torch.distributed backend of every group.
        is_bf16_fast: whether bf16 matrix products beat fp32 ones on it.
        has_fast_batches: whether batched matrix products over padded rows beat products one by one: on CPUs with AMX a
            layer of MoE experts took 1/1.71 of the time, on an AMD EPYC without it 1/0.91.
    """

    device: torch.device
    backend: str
    is_bf16_fast: bool
    has_fast_batches: bool = False

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def model(self) -> str:
        """The name that the GPU or the CPU is sold under."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.device)
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else machine()

    def enter_thread(self) -> None:
        """Let the thread that calls this compute on the device; CUDA starts every thread on the first GPU.

        torch sets a thread up when it first computes something that threads could share, and threads that are set up at
        the same moment race for torch's pools: hence one after the other, before they compute.
        """
        with _ENTERING:
            torch.get_num_threads()
        if self.is_cuda:
            torch.cuda.set_device(self.device)

    def encoder_dtype(self, precision: str) -> torch.dtype:
        """The type that frozen encoders compute in: of `vision.precision`, where auto is bf16 if that is fast here."""
        is_bf16 = self.is_bf16_fast if precision == "auto" else precision == "bf16"
        return torch.bfloat16 if is_bf16 else torch.float32

    def free_memory_bytes(self) -> int:
        """Bytes of memory that nobody has taken yet, of the GPU or of the machine."""
        if self.is_cuda:
            return int(torch.cuda.mem_get_info(self.device)[0])
        return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"), self.memory_bytes())

    def memory_bytes(self) -> int:
        """Bytes of memory of the GPU, or of the machine as far as this process may use it."""
        if self.is_cuda:
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
        given = [int(text) for limit in limits if limit.exists() and (text := limit.read_text().strip()).isdigit()]
        return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *given])

    def synchronize(self) -> None:
        """Wait until the device has computed everything that was started on it."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def synchronize_stream(self) -> None:
        """Wait until the device has computed what was started on this thread's stream, and for nothing else."""
        if self.is_cuda:
            torch.cuda.current_stream().synchronize()

    def new_stream(self) -> torch.cuda.Stream | None:
        """Make a stream beside the current one; None on the CPU, which has none."""
        return torch.cuda.Stream(self.device) if self.is_cuda else None

    def on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
        """Put what is started inside on a stream that `new_stream` has made."""
        return torch.cuda.stream(stream) if stream is not None else nullcontext()

    def mark(self) -> torch.cuda.Event | None:
        """Mark how far the current stream has been filled, to wait for it later; None on the CPU, which is there."""
        return torch.cuda.current_stream().record_event() if self.is_cuda else None

    def peak_memory_bytes(self) -> int:
        """The most bytes that this rank has held so far: device memory on CUDA, resident memory on the CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def measure_peak_flops(self, dtype: torch.dtype) -> float:
        """Measure the FLOP/s of a large matrix product of this type on this rank, the best of a few."""
        size = 8192 if self.is_cuda else 512
        return 2 * size**3 / self._product_seconds(size, dtype, times=4)

    def probe_seconds(self) -> float:
        """Measure the seconds of a small matrix product, the best of a few, which say how fast the rank is just now."""
        size, dtype = (4096, torch.bfloat16) if self.is_cuda else (128, torch.float32)
        return self._product_seconds(size, dtype, times=10)

    def _product_seconds(self, size: int, dtype: torch.dtype, times: int) -> float:
        """Measure the seconds of a product of two square matrices, the best of several times."""
        a = torch.ones(size, size, dtype=dtype, device=self.device)
        best = float("inf")
        for _ in range(times):
            self.synchronize()
            start = time.perf_counter()
            a @ a
            self.synchronize()
            best = min(best, time.perf_counter() - start)
        return best


class Stopwatch:
    """Adds up the seconds that `with` blocks take: on CUDA as its stream sees it, read only when asked."""

    def __init__(self, platform: Platform) -> None:
        self._platform, self._seconds = platform, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._platform.is_cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._platform.is_cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._start

    @property
    def seconds(self) -> float:
        """The sum of the seconds so far; waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


_chosen: Platform | None = None  # of this process
_ENTERING = Lock()


def local_rank() -> int:
    """Number of this process among the ranks of its machine, as torchrun or srun gives it.

    Raises:
        ConfigError: what they give is no such number.
    """
    text = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            f"LOCAL_RANK={text}: is no number of a rank; it is what a launcher such as torchrun or srun sets"
        )
    return int(text)


def own_cores() -> int:
    """How many of the cores that this process may run on are its own: torchrun's ranks of a machine share them."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def chosen_platform() -> Platform | None:
    """The platform of this process; None where it has not been chosen yet."""
    return _chosen


def use_platform(gpu: int | None) -> Platform:
    """Let this process compute on one device for good, and return it.

    On the CPU the GPUs are hidden from other libraries, which would take one where they see one.

    Args:
        gpu: number of the GPU among the visible ones, or None for the CPU.
    """
    global _chosen
    if _chosen is None:
        # megatron-core knows its own MLPs only
        logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
        _chosen = _on_cpu() if gpu is None else _on_cuda(gpu)
    assert _chosen.device.index == gpu, f"this process computes on {_chosen.device} already"
    return _chosen


def be_deterministic() -> None:
    """Let torch compute by kernels that give equal bits each time, where it has them; before CUDA is initialised.

    Operations without such a kernel warn, and go on.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # a defence against bugs, which costs time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def current_platform() -> Platform:
    """The platform of this process; where none was chosen, the one that a process takes that is the only rank."""
    return _chosen or use_platform(local_rank() % torch.cuda.device_count() if torch.cuda.is_available() else None)


def _on_cuda(gpu: int) -> Platform:
    """Make the visible GPU with this number the device of this process."""
    # cuDNN's attention is set up anew for each length of documents, which made a step 3.2 times as long on an H100.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # By default torch rounds the inputs of fp32 convolutions (never of matrix products) to TF32's ten bits, so that
    # encoders in fp32 would differ from the CPU's in the fourth digit.
    torch.backends.cudnn.allow_tf32 = False
    torch.cuda.set_device(gpu)
    return Platform(torch.device("cuda", gpu), "nccl", torch.cuda.is_bf16_supported())


def _on_cpu() -> Platform:
    """Make the CPU the device of this process, and hide GPUs from libraries that are loaded later."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    _adapt_megatron_to_cpu()
    capability = torch.cpu.get_capabilities()
    has_amx = bool(capability.get("amx_tile"))
    return Platform(torch.device("cpu"), "gloo", has_amx or bool(capability.get("avx512_bf16")), has_amx)


def _adapt_megatron_to_cpu() -> None:
    """Let megatron-core place its tensors on the CPU; called only where no accelerator is used.

    megatron-core has no CPU path. It asks `torch.cuda` for the current device and for the generator's state; here both
    are the CPU's. Its pipeline schedule names the device "cuda", its expert dispatch copies split sizes off the device
    on a stream, and gathers uneven parts, which gloo cannot. None of that can be set from outside: hence the private
    names below. They change in this process only, and only while it has no GPU.
    """
    cpu = torch.device("cpu")

    def do_nothing(*_: Any, **__: Any) -> None:
        return None

    def current_device() -> torch.device:
        return cpu

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    def set_state(state: Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    def get_rng_state(device: Any = None) -> Tensor:
        return torch.get_rng_state()

    torch.cuda.current_device = current_device  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = get_rng_state
    torch.cuda.synchronize = do_nothing
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def settle_splits(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        if point == self.cuda_dtoh_point and self.input_splits is not None:  # gloo's all-to-all takes lists
            self.input_splits, self.output_splits = self.input_splits.tolist(), self.output_splits.tolist()
        return tokens_per_expert

    # The tracker of random streams forks the default generator by these two.
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # The schedule makes its counter of tokens by torch.zeros(..., device="cuda").
    schedules.torch = _TorchOnCpu("torch")
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()  # never used, but looked for: without it a stream is made
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = settle_splits
    # Behind the autograd functions of the expert-tensor gather and scatter, which take no backend of ours.
    mappings._gather_along_first_dim = partial(_gather_uneven, mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = partial(_scatter_uneven, mappings._reduce_scatter_along_first_dim)


def _gather_uneven(
    gather_even: Callable[..., Tensor], part: Tensor, group: Any, sizes: list[int] | None = None, *rest: Any
) -> Tensor:
    """Gather the parts of a group's ranks along the first dimension; uneven ones are padded on the way.

    Args:
        gather_even: megatron-core's own gather, for parts of one size.
        part: [own rows, ...].
        group: the ranks that gather.
        sizes: rows of each rank's part; None where all have as many.
        rest: further arguments of megatron-core's gather.

    Returns:
        [sum of `sizes`, ...].
    """
    if sizes is None or group.size() == 1:
        return gather_even(part, group, None, *rest)
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([gathered[:size] for gathered, size in zip(parts, sizes, strict=True)])


def _scatter_uneven(
    scatter_even: Callable[..., Tensor], whole: Tensor, group: Any, sizes: list[int] | None = None, *rest: Any
) -> Tensor:
    """Sum over a group's ranks and leave each its part along the first dimension; for uneven parts all is summed.

    Args:
        scatter_even: megatron-core's own reduce-scatter, for parts of one size.
        whole: [sum of `sizes`, ...], this rank's summand.
        group: the ranks that share the sum.
        sizes: rows of each rank's part; None where all have as many.
        rest: further arguments of megatron-core's reduce-scatter.

    Returns:
        [own rows, ...].
    """
    if sizes is None or group.size() == 1:
        return scatter_even(whole, group, None, *rest)
    total = whole.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    own: Tensor = total.split(sizes)[group.rank()]
    return own.clone()


class _TorchOnCpu(ModuleType):
    """The torch module, for code that names the device "cuda"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> Tensor:
        """Make zeros on the CPU, whatever device is named."""
        return torch.zeros(*size, **options)


def is_imported(package: str) -> bool:
    """Whether an optional package can be imported, found out by importing it."""
    try:
        __import__(package)
    except ImportError:
        return False
    return True
