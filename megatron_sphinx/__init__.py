"""Pretraining of SPHINX: language models that look through frozen vision encoders."""

import logging
import warnings

__version__ = "0.1.0"

# Said at import, of optional packages that this package does without: by megatron-core, and by torch of a missing CUDA.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|modelopt|pynvml|full scope is deprecated).*")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
