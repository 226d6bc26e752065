"""GPUs that torch seems to count, without any: a plugin of tests."""

import os

import pytest
import torch

from megatron_sphinx import device
from megatron_sphinx.parallel import devices


@pytest.fixture
def fake_gpus(monkeypatch):
    """`fake_gpus("a", "b")` lets torch count GPUs of these UUIDs until they are hidden; it returns what is taken."""

    def fake(*uuids: str) -> list[int]:
        taken: list[int] = []

        def count() -> int:
            return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else len(uuids)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr(device, "_chosen", None)
        monkeypatch.setattr(torch.cuda, "device_count", count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count() > 0)
        monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("CUDA was initialised"))
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(devices, "_visible_to_another_process", lambda: (list(uuids), ""))
        return taken

    return fake
