"""Say on one page what there is here and which path a run will take: to paste into a report of a problem.

    megatron-sphinx doctor [CONFIG] [key=value ...]

Versions, devices, optional packages, the launcher's variables and the room on the disk; with CONFIG for the device and
the run folder that it names. Exits with 1, and says what it is, where something that every run needs is broken.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module, metadata
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sphinx import __version__
from megatron_sphinx.cli.command import add_configuration
from megatron_sphinx.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sphinx.config import Config
    from megatron_sphinx.device import Platform

# Distributions that must be there, each with the module that is imported of it.
REQUIRED = {
    "torch": "torch", "torchvision": "torchvision", "megatron-core": "megatron.core", "deepspeed": "deepspeed",
    "timm": "timm", "einops": "einops", "fsspec": "fsspec", "ijson": "ijson",
    "matplotlib": "matplotlib", "ml_dtypes": "ml_dtypes", "numpy": "numpy", "pillow": "PIL", "pyarrow": "pyarrow",
    "pyyaml": "yaml", "safetensors": "safetensors",
    "sentencepiece": "sentencepiece", "tensorboard": "tensorboard", "tokenizers": "tokenizers", "tqdm": "tqdm",
    "webdataset": "webdataset", "xxhash": "xxhash", "zstandard": "zstandard",
}  # fmt: skip
# Distributions that a run does without, each with its module and what it is for.
OPTIONAL = {
    "liger-kernel": ("liger_kernel", "the language model's kernels on GPUs; pip install 'megatron-sphinx[cuda]'"),
    "transformer-engine": ("transformer_engine", "model.kernels=transformer_engine on GPUs"),
    "flash-attn": ("flash_attn", "transformer-engine's attention"),
    "apex": ("apex", "megatron-core's fused kernels"),
    "transformers": ("transformers", "the Q-Former; pip install 'megatron-sphinx[qformer]'"),
    "pymupdf": ("pymupdf", "prepare ocr; pip install 'megatron-sphinx[ocr]'"),
    "gguf": ("gguf", "examples/smol.py; pip install 'megatron-sphinx[smol]'"),
    "fastapi": ("fastapi", "serve; pip install 'megatron-sphinx[serve]'"),
    "gradio": ("gradio", "the web page; pip install 'megatron-sphinx[page]'"),
    "openai": ("openai", "judge, and the web page; pip install 'megatron-sphinx[evaluation]'"),
    "openpyxl": ("openpyxl", "tables for VLMEvalKit; pip install 'megatron-sphinx[evaluation]'"),
    "universal-pathlib": ("upath", "checkpoints behind URLs; pip install 'megatron-sphinx[remote]'"),
    "opencv-python-headless": ("cv2", "cascades; pip install 'megatron-sphinx[cascades]'"),
    "scikit-image": ("skimage", "cascades; pip install 'megatron-sphinx[cascades]'"),
    "av": ("av", "videos; pip install 'megatron-sphinx[video]'"),
    "shtab": ("shtab", "--print-completion; pip install 'megatron-sphinx[completion]'"),
}
VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_GPUS_ON_NODE", "OMP_", "NCCL_", "GLOO_", "TORCH_",
    "CUDA_", "DS_ACCELERATOR",
)  # fmt: skip
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass
class Page:
    """What has been found out so far.

    Attributes:
        lines: of the page.
        broken: what every run needs and is not as it must be, a text each.
    """

    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def section(self, title: str, rows: Mapping[str, str]) -> None:
        """Add a title and a line for each name and value."""
        width = max(map(len, rows), default=0)
        self.lines += [title, *(f"  {name:{width}}  {value}" for name, value in rows.items())]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_configuration(parser, is_optional=True)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status: 1 where something required is broken."""
    page = Page()
    config = _configuration(args)
    variables = {name: os.environ[name] or "(empty)" for name in sorted(os.environ) if name.startswith(VARIABLES)}
    required = {"torch": _package("torch", "torch", page.broken)}
    # Where no GPU is used, other libraries must not look for one when they are imported: the device is chosen first.
    device = _device(config, page) if not page.broken else None
    required |= {name: _package(name, module, page.broken) for name, module in REQUIRED.items() if name != "torch"}
    page.broken += [f"{name}: {problem}" for name, problem in _wrong_versions()]
    page.lines.insert(0, _title())
    page.section("required packages", required)
    page.section("optional packages", {name: _optional(name, *known) for name, known in OPTIONAL.items()})
    if device is not None and not page.broken:
        page.section("what a run will use", _paths(device, config, page.broken))
    page.section("variables", variables or {"none": "no launcher has set any"})
    page.section("run folder", _folder(Path(config.run.folder if config else "."), page.broken))
    print("\n".join([*page.lines, *(f"broken: {text}" for text in page.broken)]))
    if not page.broken:
        print("all that every run needs is there")
    return 1 if page.broken else 0


def _configuration(args: argparse.Namespace) -> Config | None:
    """The configuration, if one is given and what reads it imports; where it does not, that is reported later."""
    if args.config is None:
        return None
    try:
        from megatron_sphinx import config as configuration
    except ImportError:
        return None
    return configuration.load(args.config, args.overrides)


def _title() -> str:
    place = Path(__file__).parents[1]
    python = f"Python {platform.python_version()} ({sys.executable})"
    return f"megatron-sphinx {__version__} in {place}, {python}, {platform.platform()}"


def _package(distribution: str, module: str, broken: list[str]) -> str:
    """The version of a package that must import; what is wrong goes to `broken` too."""
    problem = _import_problem(module)
    if problem:
        broken.append(f"{distribution}: {problem}")
        return problem
    return _version(distribution)


def _optional(distribution: str, module: str, use: str) -> str:
    """The version of a package that need not import, or what it would be for."""
    problem = _import_problem(module)
    return f"{problem} (for {use})" if problem else _version(distribution)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _import_problem(module: str) -> str:
    """Why a module cannot be imported, in a line; empty where it can. What it prints meanwhile is dropped."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return "not installed"
        return f"does not import: {error}"
    except Exception as error:  # a package that was built for another torch or CUDA fails in many ways
        return f"does not import: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _wrong_versions() -> Iterator[tuple[str, str]]:
    """Packages of another version than this package asks for, each with a text; none where that is not known."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in metadata.requires("megatron-sphinx") or ()]
    except (ImportError, metadata.PackageNotFoundError):  # run from its source, without an installation
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # reported as a package that does not import
        if not requirement.specifier.contains(version, prereleases=True):
            yield requirement.name, f"{version} is installed, {requirement.specifier} is needed"


def _device(config: Config | None, page: Page) -> Platform | None:
    """What this process would compute on as the only rank of a run; None where it can compute on nothing."""
    import torch

    from megatron_sphinx.device import chosen_platform, use_platform
    from megatron_sphinx.parallel import devices

    asked = config.run.device if config else "auto"
    sight = devices.look(asked, is_alone=True)
    rows = {"CPU": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory() / 1e9:.0f} GB"}
    for number in range(len(sight.gpus)):
        gpu = torch.cuda.get_device_properties(number)
        rows[f"GPU {number}"] = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute {gpu.major}.{gpu.minor}"
    if not sight.gpus:
        rows["GPU"] = "not looked for" if asked == "cpu" else f"none{f': {sight.reason}' if sight.reason else ''}"
    if _DRIVER.exists():
        rows["driver"] = _DRIVER.read_text().partition("\n")[0].removeprefix("NVRM version: ")
    rows["CUDA of torch"] = str(torch.version.cuda)
    if torch.distributed.is_nccl_available():
        rows["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        (chosen,), note = devices.assign(asked, [sight])
    except ConfigError as error:
        page.broken.append(str(error))
        page.section("devices", rows)
        return None
    page.section("devices", rows | ({"note": note} if note else {}))
    return chosen_platform() or use_platform(chosen)


def _processor() -> str:
    import torch

    from megatron_sphinx.device import Platform

    return Platform(torch.device("cpu"), "gloo", is_bf16_fast=False).model


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _paths(device: Platform, config: Config | None, broken: list[str]) -> dict[str, str]:
    """The libraries that a run takes for its parts, on a device; kernels that it cannot have go to `broken`."""
    from megatron_sphinx.model.kernels import describe

    choice, precision = (config.model.kernels, config.training.precision) if config else ("auto", "bf16")
    try:
        kernels, attention = describe(choice, device, precision)
    except ConfigError as error:
        broken.append(str(error))
        kernels = attention = "none"
    return {
        "device": str(device.device),
        "collectives": device.backend,
        "kernels": kernels,
        "attention": attention,
        "MoE experts": "padded, in batches" if device.has_fast_batches else "grouped products",
        "encoders": f"timm, in {'bf16' if device.is_bf16_fast else 'fp32'}",
        "optimizer": "torch's fused AdamW, divided by DeepSpeed's ZeRO-2",
    }


def _folder(folder: Path, broken: list[str]) -> dict[str, str]:
    """Where a run writes and how much room there is; what forbids to write goes to `broken`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        broken.append(f"run.folder={folder}: {existing} cannot be written; give another folder")
    return {str(folder.absolute()): f"{shutil.disk_usage(existing).free / 1e9:,.1f} GB free"}
