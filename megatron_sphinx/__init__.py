"""Pretraining of SPHINX: language models that look through frozen vision encoders."""

import logging
import os
import warnings

__version__ = "0.1.0"

# Said at import, of optional packages that this package does without: by megatron-core, and by torch of a missing CUDA.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|modelopt|pynvml|full scope is deprecated).*")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

# Read when CUDA is first asked for anything, by other libraries' imports too. The first lets megatron-core overlap the
# all-reduce of gradients; with the second, torch looks for GPUs without initialising CUDA, so that they can be hidden.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
