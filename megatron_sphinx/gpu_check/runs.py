"""Checks whole runs of `train`: a GPU against the CPU, resume to the last bit, kernels, start-up, a demo's steps."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from megatron_sphinx import config as configuration
from megatron_sphinx.benchmark import synthetic
from megatron_sphinx.config import Config
from megatron_sphinx.gpu_check.findings import Finding, Values
from megatron_sphinx.gpu_check.processes import Clock, Process, TimeIsUpError
from megatron_sphinx.gpu_check.scales import Scale, is_judged
from megatron_sphinx.run import start_clock
from megatron_sphinx.training import metrics
from megatron_sphinx.values import build

DEVICE_BOUND = 1e-5  # relative, of losses and gradient norms of a GPU against the CPU's in fp32
KERNEL_BOUND = 1e-2  # relative, of losses in bf16 with other kernels
JUDGED = ("loss", "loss_pairs", "loss_text", "gradient_norm")
KERNELS = {"liger": "liger_kernel", "transformer_engine": "transformer_engine"}  # by model.kernels, the module
STARTUP_SECONDS, DEMO_SECONDS, WORST_STEP = 60.0, 0.05, 2.0  # bounds
DEMO_DATA = Path("data/demo")  # where `make demo` leaves it
FP32 = ("training.precision=fp32", "vision.precision=fp32")
_SETTLED = 10  # steps of a run after which its speed is judged


@dataclass
class Runs:
    """Runs of the check on one device.

    Attributes:
        scale: sizes.
        device: cpu or cuda.
        folder: where data is made and runs are kept.
        clock: how much time is left.
        configs: files of the configurations, by name.
    """

    scale: Scale
    device: str
    folder: Path
    clock: Clock
    configs: dict[str, Path] = field(default_factory=dict)

    def path_of(self, name: str) -> Path:
        """Write the configuration of a demo-like run, dense or moe, with its data; the path of the file."""
        if name not in self.configs:
            config = prepared(self.scale, self.folder, has_experts=name == "moe")
            self.configs[name] = self.folder / f"{name}.yaml"
            self.configs[name].write_text(config.to_yaml())
        return self.configs[name]

    def folder_of(self, name: str) -> Path:
        """Name the run folder of a run."""
        return self.folder / "runs" / name.replace(" ", "_")

    def start(self, config: Path, name: str, device: str, overrides: Sequence[str] = (), *, beside: int = 1) -> Process:
        """Start a run in a folder of its own.

        Args:
            config: the file of its configuration.
            name: what the run is called; its folder is emptied.
            device: cpu or cuda.
            overrides: values that differ from the file's.
            beside: how many runs share the machine's cores.

        Raises:
            TimeIsUpError: the check has no time left.
        """
        target = self.folder_of(name)
        shutil.rmtree(target, ignore_errors=True)
        words = ["-m", "megatron_sphinx", "train", config, f"run.folder={target}", f"run.device={device}", *overrides]
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // beside))}
        return self.clock.start(words, self.folder / "logs" / f"train_{target.name}.txt", ALONE | threads)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read the metrics of a run; none where it has not come to its first step."""
        path = self.folder_of(name) / "metrics.jsonl"
        return metrics.read(path) if path.exists() else []


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # whatever has started the check


def prepared(scale: Scale, folder: Path, *, has_experts: bool) -> Config:
    """Configure a run like the demo's, on the demo's data where that is there, else on data that is made up."""
    text, hidden = scale.right_text, scale.right_hidden
    values: Values = {
        "run": {"folder": str(folder / "run"), "seed": 1, "print_interval": 99_999_999},
        "model": {
            "layers": scale.right_layers, "hidden": hidden, "ffn": 11 * hidden // 4, "heads": hidden // 32,
            "groups": hidden // 32, "vocabulary": 1024,
        },
        "vision": {
            "grid": 4,
            "experts": [{"name": name, "weights": "random"} for name in ("efficientnet_lite0", "dinov2_small")],
        },
        "data": {
            "pairs": "synthetic", "text": "synthetic", "tokenizer": "synthetic", "pairs_per_step": scale.right_pairs,
            "text_tokens_per_step": text, "sequence_length": min(text, 256), "row_multiple": 1, "micro_batch_rows": 4,
        },
        "loss": {"text_weight": 0.25},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 1, "weight_decay": 0.1},
        "training": {"steps": scale.right_steps},
        "checkpoint": {"interval": scale.right_steps // 2},
    }  # fmt: skip
    if has_experts:
        values["model"] |= {"experts": 8, "experts_per_token": 2, "balance_loss_coefficient": 0.01}
    if scale.name == "full" and (DEMO_DATA / "tokenizer.model").exists():
        there = DEMO_DATA.resolve()
        values["data"] |= {
            "pairs": str(there / "pairs"), "text": str(there / "text"), "tokenizer": str(there / "tokenizer.model"),
        }  # fmt: skip
        return build(Config, values)
    return synthetic.prepared(build(Config, values), folder / "synthetic")


def right(runs: Runs) -> list[Finding]:
    """Compare runs: a GPU's with the CPU's, a resumed one with one in one go, kernels with torch's; all at once."""
    variants = {f"{model} resume": runs.path_of(model) for model in ("dense", "moe")}
    overrides: dict[str, tuple[str, ...]] = {}
    devices = dict.fromkeys(variants, runs.device)
    if runs.device == "cuda":
        for model in ("dense", "moe"):
            for device in ("cpu", "cuda"):
                name = f"{model} fp32 {device}"
                gently = (
                    f"optimizer.warmup_steps={runs.scale.right_steps}"  # large steps would make small differences large
                )
                variants[name], overrides[name], devices[name] = runs.path_of(model), (*FP32, gently), device
        for kernels in _installed_kernels():
            variants[kernels], devices[kernels] = runs.path_of("dense"), "cuda"
            overrides[kernels] = (f"model.kernels={kernels}",)
        if _installed_kernels():
            variants["torch"], devices["torch"] = runs.path_of("dense"), "cuda"
            overrides["torch"] = ("model.kernels=torch",)
    faults = _run_all(runs, {name: (path, devices[name], overrides.get(name, ())) for name, path in variants.items()})
    half = runs.scale.right_steps // 2
    going_on: dict[str, tuple[Path, str, Sequence[str]]] = {}
    for model in ("dense", "moe"):
        saved = runs.folder_of(f"{model} resume") / "checkpoints" / f"step_{half:08d}"
        going_on[f"{model} resumed"] = (runs.path_of(model), runs.device, (f"checkpoint.resume={saved}",))
    faults |= _run_all(runs, going_on)
    return [*_resumed(runs, faults, half), *_on_devices(runs, faults), *_with_kernels(runs, faults)]


def _installed_kernels() -> list[str]:
    """List the values of model.kernels whose library is installed."""
    return [name for name, module in KERNELS.items() if find_spec(module) is not None]


def _run_all(runs: Runs, wanted: Mapping[str, tuple[Path, str, Sequence[str]]]) -> dict[str, str]:
    """Run some configurations at once; by name, why a run has not ended well, empty where it has."""
    started: dict[str, Process] = {}
    faults: dict[str, str] = {}
    for name, (path, device, overrides) in wanted.items():
        try:
            started[name] = runs.start(path, name, device, overrides, beside=len(wanted))
        except TimeIsUpError as error:
            faults[name] = str(error)
    return faults | {name: runs.clock.wait(process) for name, process in started.items()}


def _missing(name: str, faults: Mapping[str, str], wanted: Sequence[str]) -> Finding | None:
    """Make the finding that a comparison lacks a run, if it does."""
    for run in wanted:
        if fault := faults.get(run, ""):
            return Finding(section="right", name=name, absent=f"run '{run}': {fault}", is_required=True)
    return None


def _resumed(runs: Runs, faults: Mapping[str, str], half: int) -> list[Finding]:
    """Compare resumed runs with those in one go: every judged number of every later step, to the last bit."""
    found = []
    for model in ("dense", "moe"):
        name, wanted = f"{model}, resumed after step {half}", (f"{model} resume", f"{model} resumed")
        if absent := _missing(name, faults, wanted):
            found.append(absent)
            continue
        whole, later = (runs.lines(run) for run in wanted)
        values, is_right = compare_bits(whole[half:], later)
        found.append(Finding(section="right", name=name, values=values, is_right=is_right, is_required=True))
    return found


def compare_bits(whole: Sequence[Mapping[str, Any]], later: Sequence[Mapping[str, Any]]) -> tuple[Values, bool]:
    """Compare the steps of two runs, whose judged numbers must be equal to the last bit.

    Returns:
        How many steps there are and which are the first to differ; and whether all are equal.
    """
    one, other = ([[line["step"], *(line[key] for key in JUDGED)] for line in lines] for lines in (whole, later))
    differ = [first[0] for first, second in zip(one, other, strict=False) if first != second]
    is_right = bool(one) and one == other
    return {"steps": len(other), "first_to_differ": differ[0] if differ else "none"}, is_right


def _on_devices(runs: Runs, faults: Mapping[str, str]) -> list[Finding]:
    """Compare the GPU's runs in fp32 with the CPU's."""
    found = []
    for model in ("dense", "moe"):
        name, wanted = f"{model}, GPU against CPU in fp32", (f"{model} fp32 cpu", f"{model} fp32 cuda")
        if runs.device == "cpu":
            found.append(Finding(section="right", name=name, absent="this device is the CPU itself"))
        elif absent := _missing(name, faults, wanted):
            found.append(absent)
        else:
            found.append(_near(name, runs.lines(wanted[0]), runs.lines(wanted[1]), JUDGED, DEVICE_BOUND))
    return found


def _with_kernels(runs: Runs, faults: Mapping[str, str]) -> list[Finding]:
    """Compare runs with other kernels with torch's; each must be near it, but it is no fault if a library lacks."""
    found = []
    for kernels, module in KERNELS.items():
        name = f"{kernels} kernels against torch's in bf16"
        if runs.device == "cpu":
            found.append(Finding(section="right", name=name, absent="runs on CUDA only"))
        elif kernels not in _installed_kernels():
            found.append(Finding(section="right", name=name, absent=f"{module} is not installed"))
        elif absent := _missing(name, faults, (kernels, "torch")):
            found.append(absent)
        else:
            found.append(_near(name, runs.lines("torch"), runs.lines(kernels), JUDGED[:-1], KERNEL_BOUND))
    return found


def _near(
    name: str,
    right: Sequence[Mapping[str, Any]],
    got: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    bound: float,
) -> Finding:
    """Judge whether two runs agree within a relative bound."""
    values = {key: furthest(right, got, key) for key in keys} | {"steps": len(got), "bound": bound}
    is_right = len(right) == len(got) > 0 and all(values[key] <= bound for key in keys)
    return Finding(section="right", name=name, values=values, is_right=is_right, is_required=True)


def furthest(right: Sequence[Mapping[str, Any]], got: Sequence[Mapping[str, Any]], key: str) -> float:
    """Find the largest relative difference of a number over the steps of two runs; infinite where one has none."""
    worst = 0.0
    for one, other in zip(right, got, strict=False):
        if one[key] is None or other[key] is None:
            worst = max(worst, 0.0 if one[key] is other[key] else float("inf"))
        else:
            worst = max(worst, abs(one[key] - other[key]) / max(abs(one[key]), 1e-30))
    return worst


def demo(runs: Runs) -> Finding:
    """Measure the steps of a run like the demo's."""
    steps = runs.scale.demo_steps
    name = "demo-like run, seconds a step"
    try:
        process = runs.start(runs.path_of("dense"), "demo", runs.device, [f"training.steps={steps}"])
    except TimeIsUpError as error:
        return Finding(section="fast", name=name, absent=str(error))
    if fault := runs.clock.wait(process):
        return Finding(section="fast", name=name, absent=fault)
    lines = runs.lines("demo")
    taken = [line["step_seconds"] for line in lines[min(_SETTLED, steps // 2) :]]
    values = {"seconds": median(taken), "worst_over_median": max(taken) / median(taken), "steps": len(taken)}
    if not is_judged(runs.scale, runs.device):
        return Finding(section="fast", name=name, values=values)
    return Finding(
        section="fast", name=name, values=values | {"bound": DEMO_SECONDS}, is_right=values["seconds"] <= DEMO_SECONDS
    )


def startup(runs: Runs) -> Finding:
    """Measure the seconds from the start of a process to its first step, and what they were spent on; then end it."""
    preset = runs.scale.startup or "dense"
    name = f"start-up of {preset}, seconds to the first step"
    try:
        path = _startup_config(runs)
        process = runs.start(path, "startup", runs.device, ["training.steps=3"])
    except TimeIsUpError as error:
        return Finding(section="fast", name=name, absent=str(error))
    target = runs.folder_of("startup")
    first = target / "metrics.jsonl"
    fault = runs.clock.wait(process, until=lambda: first.exists() and first.stat().st_size > 0)
    seconds = time_since(process)
    phases = start_clock.read(target)["ranks"][0] if (target / start_clock.FILE).exists() else {}
    shutil.rmtree(target, ignore_errors=True)
    if fault:
        return Finding(section="fast", name=name, absent=f"after {seconds:.0f} s: {fault}")
    values = {"seconds": seconds} | {f"phase_{key}": value for key, value in phases.items()}
    if not is_judged(runs.scale, runs.device):
        return Finding(section="fast", name=name, values=values)
    return Finding(
        section="fast", name=name, values=values | {"bound": STARTUP_SECONDS}, is_right=seconds <= STARTUP_SECONDS
    )


def time_since(process: Process) -> float:
    """Seconds since a process was started."""
    return time.monotonic() - process.began


def _startup_config(runs: Runs) -> Path:
    """Write the configuration whose start-up is measured: a preset with drawn weights and few samples a step."""
    if not runs.scale.startup:
        return runs.path_of("dense")
    given = [*synthetic.PATHS, "parallel.encoder=0", "training.steps=3", "training.epochs=0"]
    config = configuration.load(Path(runs.scale.startup), [*given, f"run.folder={runs.folder / 'run'}"])
    path = runs.folder / "startup.yaml"
    path.write_text(synthetic.prepared(_with_few_samples(config), runs.folder / "synthetic").to_yaml())
    return path


def _with_few_samples(config: Config) -> Config:
    """Let a step take few samples: it is the start that is measured."""
    data = config.data
    few: dict[str, Any] = {"text_tokens_per_step": min(data.text_tokens_per_step, 4096), "row_multiple": 1}
    for name in ("pairs_per_step", "conversations_per_step"):
        few[name] = min(getattr(data, name), 8)
    return replace(config, data=replace(data, **few))
