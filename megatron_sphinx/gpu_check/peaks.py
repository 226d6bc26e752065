"""What a device could reach at best: its datasheet's numbers where it is known, else a measured matrix product."""

from typing import NamedTuple

import torch

from megatron_sphinx.device import Platform
from megatron_sphinx.sizing import hardware
from megatron_sphinx.sizing.hardware import Hardware

# Beginnings of the names that drivers give to what hardware.yaml knows; other forms of these cards have other peaks.
KINDS = {
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H200": "h200-141g",
    "NVIDIA H800": "h800-80g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A800-SXM4-80GB": "a800-80g",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
}
OTHER_FORMS = ("NVL", "PCIe")


class Peak(NamedTuple):
    """The most FLOP/s of bf16 matrix products, and where the number is from.

    Attributes:
        flops: dense, in bf16.
        source: the name in hardware.yaml, or that it was measured.
        hardware: what the planner knows of the device; None where that is nothing.
    """

    flops: float
    source: str
    hardware: Hardware | None


def kind_of(name: str) -> str | None:
    """Find the name in hardware.yaml of a device that its driver calls `name`; None where it is not known."""
    if any(form in name for form in OTHER_FORMS):
        return None
    return next((kind for beginning, kind in KINDS.items() if name.startswith(beginning)), None)


def peak_of(platform: Platform) -> Peak:
    """Find the peak of this process's device."""
    kind = kind_of(platform.model) if platform.is_cuda else None
    if kind is None:
        return Peak(platform.measure_peak_flops(torch.bfloat16), "a measured matrix product", None)
    known = hardware.load(kind)
    return Peak(known.flops.bf16, f"the datasheet of {kind}", known)
