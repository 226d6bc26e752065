"""What a rank computes and communicates with: numbers with their source, from hardware.yaml or a file of the user's."""

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from math import log
from pathlib import Path
from typing import Annotated, Any

from megatron_sphinx.errors import ConfigError, nearest
from megatron_sphinx.ranges import Range
from megatron_sphinx.values import build, read_mapping

KINDS = Path(str(resources.files("megatron_sphinx") / "sizing" / "hardware.yaml"))
_PEAK = Range(least=0, most=1e21, why="FLOP/s, 0 where the hardware has none")
_SHARE = Range(above=0, most=4, why="a share of the peak; that of another precision's may be above 1")
_MEASURED = Range(above=0, most=1e6, why="views at once, and a share of the peak")
_SPEED = Range(above=0, most=1e18, why="bytes, or bytes/s")
_SECONDS = Range(least=0, most=100, why="seconds")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Peak FLOP/s of matrix products, by their precision; 0 where the hardware has none."""

    bf16: Annotated[float, _PEAK]
    fp32: Annotated[float, _PEAK]
    fp8: Annotated[float, _PEAK] = 0.0


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Which share of each peak a training step reaches, from 0 to 1: the `shares:` of a hardware file.

    Attributes:
        bf16, fp8, fp32: share of the peak FLOP/s of this precision that large matrix products reach.
        attention: share that attention reaches of the peak FLOP/s of its precision.
        encoders: share that the visual experts reach of the peak FLOP/s of their precision.
        memory: share of the memory's bandwidth that element-wise operations reach.
        link: share of the bandwidth inside a node and between nodes that collectives reach.
        usable: share of the memory that a plan may fill; allocators lose some, and the arithmetic has been up to 10 %
            low.
    """

    bf16: Annotated[float, _SHARE] = 1.0
    fp8: Annotated[float, _SHARE] = 1.0
    fp32: Annotated[float, _SHARE] = 1.0
    attention: Annotated[float, _SHARE] = 1.0
    encoders: Annotated[float, _SHARE] = 0.45
    memory: Annotated[float, _SHARE] = 1.0
    link: Annotated[float, _SHARE] = 1.0
    usable: Annotated[float, _SHARE] = 0.9


@dataclass(frozen=True, kw_only=True)
class EncoderShares:
    """Which share of the bf16 peak visual experts were measured to reach, as pairs of views at once and share.

    Attributes:
        clip, convnext, dinov2, qformer: by the experts' family, ascending in views; a family that was not measured
            reaches `Efficiency.encoders`.
    """

    clip: Annotated[tuple[tuple[float, ...], ...], _MEASURED] = ()
    convnext: Annotated[tuple[tuple[float, ...], ...], _MEASURED] = ()
    dinov2: Annotated[tuple[tuple[float, ...], ...], _MEASURED] = ()
    qformer: Annotated[tuple[tuple[float, ...], ...], _MEASURED] = ()


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One rank's share of a machine: the keys of a hardware file.

    Attributes:
        source: where the numbers are from.
        memory_bytes: bytes of memory that the rank has.
        process_bytes: bytes of it that are gone before a model is built: on CUDA the context and NCCL's buffers, on a
            CPU the interpreter with its libraries.
        memory_bandwidth: bytes/s of the memory.
        node_bandwidth: bytes/s to ranks of the same node, in one direction.
        network_bandwidth: bytes/s to ranks of other nodes, in one direction.
        latency_seconds: seconds of an empty message between two ranks.
        kernel_seconds: seconds to start an operation, the program around it included; where kernels are queued ahead
            of the device, only what the device waits.
        flops: peak FLOP/s of matrix products.
        shares: which share of all these a training step reaches.
        encoder_shares: shares of the bf16 peak that visual experts reach, where they were measured.
        is_cuda: whether the rank has a GPU; else it computes on a CPU.
    """

    source: str
    memory_bytes: Annotated[float, _SPEED]
    memory_bandwidth: Annotated[float, _SPEED]
    node_bandwidth: Annotated[float, _SPEED]
    network_bandwidth: Annotated[float, _SPEED]
    flops: Flops
    shares: Efficiency
    encoder_shares: EncoderShares = field(default_factory=EncoderShares)
    process_bytes: Annotated[float, Range(least=0, most=1e18)] = 2.5e9
    latency_seconds: Annotated[float, _SECONDS] = 10.0e-6
    kernel_seconds: Annotated[float, _SECONDS] = 0.0
    is_cuda: bool = True

    @property
    def usable_bytes(self) -> float:
        """Bytes of memory that a plan may fill."""
        return self.memory_bytes * self.shares.usable

    def matmul_flops(self, precision: str) -> float:
        """FLOP/s that large matrix products of this precision reach.

        Raises:
            ConfigError: the hardware has no matrix products of it.
        """
        peak: float = getattr(self.flops, precision)
        if not peak:
            raise ConfigError(f"training.precision={precision}: {self.source}: has no such matrix products")
        share: float = getattr(self.shares, precision)
        return peak * share

    def encoder_precision(self, precision: str) -> str:
        """What encoders of this `vision.precision` compute in: with auto bf16 on a GPU, or where a CPU is faster so."""
        if precision != "auto":
            return precision
        return "bf16" if self.is_cuda or self.flops.bf16 > self.flops.fp32 else "fp32"

    def encoder_flops(self, precision: str, family: str, views: int) -> float:
        """FLOP/s that a visual expert reaches.

        Args:
            precision: what it computes in, bf16 or fp32.
            family: of the expert.
            views: how many it encodes at once.
        """
        measured: tuple[tuple[float, ...], ...] = ()
        if precision == "bf16":
            measured = getattr(self.encoder_shares, family, ())
        share = _between(measured, views) if measured else self.shares.encoders
        peak: float = getattr(self.flops, precision)
        return peak * share

    def attention_flops(self, precision: str) -> float:
        """FLOP/s that attention reaches in a model of this precision; fp8 models attend in bf16."""
        peak: float = getattr(self.flops, "fp32" if precision == "fp32" else "bf16")
        return peak * self.shares.attention


def _between(measured: tuple[tuple[float, ...], ...], views: int) -> float:
    """Interpolate a share between numbers of views, by their logarithm; beyond them it is the nearest one's."""
    after = bisect_left([known for known, _ in measured], views)
    if after in (0, len(measured)):
        return measured[min(after, len(measured) - 1)][1]
    (low, share), (high, other) = measured[after - 1 : after + 1]
    return share + (other - share) * log(views / low) / log(high / low)


def kinds() -> list[str]:
    """List the names of the hardware that hardware.yaml knows."""
    return sorted(_read(KINDS))


@cache
def load(kind: str) -> Hardware:
    """Read the hardware of a name of hardware.yaml, or of a file of the same keys.

    Args:
        kind: a name, such as a100-80g; or the path of a YAML file, which may say `base: a100-80g` and what differs.

    Raises:
        ConfigError: no such name or file, an unknown key, a value of the wrong type.
    """
    known = _read(KINDS)
    if kind in known:
        return build(Hardware, _with_base(known[kind], known))
    if not Path(kind).suffix:
        raise ConfigError(f"--gpu={kind}: unknown; {nearest(kind, sorted(known))}, or give the path of a YAML file")
    return build(Hardware, _with_base(_read(Path(kind)), known), f"{kind}: ")


def _read(path: Path) -> dict[str, Any]:
    """Read a YAML file of hardware, ours or the user's, as it stands.

    Raises:
        ConfigError: no such file, or one that holds no keys.
    """
    known = f"give one of {', '.join(kinds())}" if path != KINDS else ""
    return read_mapping(path, f"--gpu={path}", otherwise=known, holds="keys such as memory_bytes and flops")


def _with_base(values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Fill in what `values` leaves out from the hardware that its `base` names, if it names one."""
    if (base := values.get("base")) is None:
        return values
    if base not in known:
        raise ConfigError(f"base={base}: unknown hardware; {nearest(str(base), sorted(known))}")
    return _with_base(known[base], known) | {name: value for name, value in values.items() if name != "base"}
