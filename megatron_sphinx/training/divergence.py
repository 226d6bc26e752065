"""What to do with a step whose loss or gradient is not finite, or far above that of the steps before it."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, inf, isfinite, sqrt
from typing import Annotated, Any

from megatron_sphinx.errors import ConfigError, DivergedError, nearest
from megatron_sphinx.ranges import Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """Which steps change no weight, and whether the run goes on after one.

    A step that is skipped keeps its number, its samples and its learning rate; its gradient is thrown away.

    Attributes:
        on_nan: what to do where the loss or the gradient is not finite: stop, or skip the step.
        on_spike: what to do where the loss or the gradient's norm spikes: off (train on; in quotes, as YAML takes
            a bare off for false), stop or skip.
        window (steps): number of trained steps that a spike is measured by, at least 4; none is found before half of
            them are done.
        sigma (standard deviations): how far above the mean of the window a spike begins; above 0.
        most_skipped (steps): the most steps skipped in a row after which the run still goes on; at least 1.

    Source: the rule for spikes is that of OLMo-core's SkipStepOptimizer, with its default values.
    """

    on_nan: str = "stop"
    on_spike: str = "off"
    window: Annotated[int, Range(least=4, most=1_000_000, why="a deviation of fewer says nothing")] = 128
    sigma: Annotated[float, Range(above=0, most=1e6, why="half of all steps are above the mean")] = 6.0
    most_skipped: Annotated[int, Range(least=1, most=99_999_999, why="one step may always be skipped")] = 10

    def __post_init__(self) -> None:
        for name, known in (("on_nan", ["stop", "skip"]), ("on_spike", ["off", "stop", "skip"])):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"divergence.{name}={value}: unknown value; {nearest(str(value), known)}")
        check_ranges(self, "divergence.")


class Watch:
    """Judges steps by what came before them; the same on every language rank, since losses and norms are.

    Args:
        config: what to do.
        state: what `state` gave when the checkpoint was made that the run goes on from.

    Attributes:
        skipped: steps of the run that were skipped.
    """

    def __init__(self, config: DivergenceConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"skipped": 0, "in_a_row": 0, "losses": [], "norms": []}
        self.config, self.skipped = config, int(state["skipped"])
        self._in_a_row = int(state["in_a_row"])
        self._losses = deque[float](state["losses"], maxlen=config.window)
        self._norms = deque[float](state["norms"], maxlen=config.window)

    def state(self) -> dict[str, Any]:
        """Give all that later judgements depend on, as plain values."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def fault(self, loss: float, norm: float) -> str:
        """Tell what is wrong with a step of this loss and gradient norm; nothing where it may change the weights."""
        if not isfinite(loss):
            return f"loss is {loss}"
        if not isfinite(norm):
            return f"the gradient's norm is {norm}"
        if self.config.on_spike == "off" or 2 * len(self._losses) < self.config.window:
            return ""
        for name, value, seen in (("loss", loss, self._losses), ("the gradient's norm", norm, self._norms)):
            mean = fsum(seen) / len(seen)
            deviation = sqrt(fsum((other - mean) ** 2 for other in seen) / len(seen))
            if value > mean + self.config.sigma * deviation:
                return (
                    f"{name} is {value:.4g}, {(value - mean) / deviation if deviation else inf:.1f} standard "
                    f"deviations above the mean {mean:.4g} of the last {len(seen)} trained steps"
                )
        return ""

    def settle(self, step: int, loss: float, norm: float, fault: str, samples: tuple[list[int], list[int]]) -> None:
        """Take note of a step that was trained, or of one whose gradient was thrown away for a fault.

        Raises:
            DivergedError: the run may not go on.
        """
        if not fault:
            self._in_a_row = 0
            self._losses.append(loss)
            self._norms.append(norm)
            return
        self.skipped += 1
        self._in_a_row += 1
        key = "on_spike" if isfinite(loss) and isfinite(norm) else "on_nan"
        pairs, documents = samples
        look = f"samples in it: pairs {pairs}, text documents {documents}; look at them, or " if any(samples) else ""
        if getattr(self.config, key) == "stop":
            raise DivergedError(
                f"step={step}: {fault}; weights unchanged; {look}resume with a lower optimizer.learning_rate, "
                f"or with divergence.{key}=skip"
            )
        if self._in_a_row > self.config.most_skipped:
            raise DivergedError(
                f"divergence.most_skipped={self.config.most_skipped}: {self._in_a_row} steps in a row would be "
                f"skipped, the last one step={step}: {fault}; weights unchanged; {look}resume with a lower "
                f"optimizer.learning_rate"
            )
