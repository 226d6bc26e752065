"""Pretraining of SPHINX: language models that look through frozen vision encoders.

import megatron_sphinx

with megatron_sphinx.load("runs/x") as model:
    (answer,) = model.generate(["What is in the picture?"], ["picture.jpg"])
"""

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sphinx.serving.model import load as load

__version__ = "0.1.0"

# Said at import, of optional packages that this package does without: by megatron-core, and by torch of a missing CUDA.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|modelopt|pynvml|full scope is deprecated).*")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

# Read when CUDA is first asked for anything, by other libraries' imports too. The first lets megatron-core overlap the
# all-reduce of gradients; with the second, torch looks for GPUs without initialising CUDA, so that they can be hidden.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def __getattr__(name: str) -> Any:
    """Import `serving.model.load`, with torch and all else, once it is asked for: importing the package is quick."""
    if name == "load":
        from megatron_sphinx.serving.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
