"""What a measurement was made with, as far as the process that starts it can tell."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "megatron-core", "deepspeed", "liger-kernel", "transformer-engine", "flash-attn", "timm", "numpy")
_VARIABLES = ("OMP_", "NCCL_", "GLOO_", "TORCH_", "CUDA_", "SLURM_JOB_", "SLURM_NNODES", "SLURM_NTASKS")  # prefixes


def environment() -> dict[str, Any]:
    """Collect command line, versions, revision of the code, and the variables that change how fast things are."""
    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    if torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in ("megatron-sphinx", *PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(sys.orig_argv),
        "versions": versions,
        "revision": _revision(),
        "system": platform.platform(),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)},
    }


def _revision() -> str | None:
    """Ask git for the revision of this package, `-dirty` where files have been changed; None without a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
