"""Hardware: its files, the published runs that it was fitted to or predicts, and the measurement of this machine."""

import json
from dataclasses import replace

import pytest
import yaml

from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import VisionConfig, VisualExpertConfig
from megatron_sphinx.sizing import hardware, published
from megatron_sphinx.sizing.sizes import expert_cost
from megatron_sphinx.sizing.step_time import full_batches, view_seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold keys such as"),
        ("base: a100", "base=a100: unknown hardware; did you mean a100-"),
        ("{base: a100-80g, memory: 3}", "memory: unknown key"),
        ("{base: a100-80g, memory_bytes: 0}", "memory_bytes=0.0: must be above 0"),
        ("{", "not YAML"),
    ],
)
def test_hardware_files(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        hardware.load(str(file))


def test_a_hardware_file_changes_what_it_says(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": "h100-80g", "network_bandwidth": 12.5e9}))
    mine = hardware.load(str(file))
    assert mine == replace(hardware.load("h100-80g"), network_bandwidth=12.5e9)
    with pytest.raises(ConfigError, match=r"training\.precision=fp8: .* has no such matrix products"):
        hardware.load("a100-80g").matmul_flops("fp8")


@pytest.mark.parametrize("kind", hardware.kinds())
def test_every_hardware_names_its_source(kind):
    assert hardware.load(kind).source


def test_published_runs(capsys):
    """The model is what README prints of it: of the runs that nothing was fitted to, most within 15 %."""
    assert main(["plan", "--published"]) == 0
    assert "predictions within 15 %" in capsys.readouterr().out
    rows = list(published.rows())
    assert all(row["source"] for row in rows)
    assert all(0.9 < row["ratio"] < 1.1 for row in rows if row["is_fitted"])
    near = [abs(row["ratio"] - 1) <= 0.15 for row in rows if not row["is_fitted"]]
    assert sum(near) >= 0.8 * len(near)


@pytest.mark.slow
def test_calibration_writes_hardware_that_plans(tiny, tmp_path, capsys):
    path, target = tiny.write(tmp_path / "run.yaml", {"training.precision": "fp32"}), tmp_path / "here" / "mine.yaml"
    assert main(["plan", str(path), "--ranks", "2", "--calibrate", str(target)]) == 0
    found = hardware.load(str(target))
    assert "2 ranks" in found.source
    assert not found.is_cuda
    assert min(found.kernel_seconds, found.latency_seconds, found.shares.encoders, found.shares.attention) > 0
    assert found.memory_bytes > found.process_bytes > 50e6
    capsys.readouterr()
    args = ["--nodes", "1", "--gpus-per-node", "2", "--gpu", str(target), "--as-configured", "--json"]
    assert main(["plan", str(path), *args]) == 0
    seconds = json.loads(capsys.readouterr().out)["best"][0]["seconds"]
    assert min(seconds[name] for name in ("matrices", "kernels", "features", "reduction")) > 0


MEASURED = {  # milliseconds a view on one H100 80 GB SXM, torch 2.11, bf16: views at once and expert
    (8, "blip2_qformer"): 2.524, (32, "blip2_qformer"): 1.165, (128, "blip2_qformer"): 1.144,
    (8, "clip_vit_l14"): 0.836, (32, "clip_vit_l14"): 0.462, (128, "clip_vit_l14"): 0.449,
    (8, "clip_convnext_xxl"): 1.233, (32, "clip_convnext_xxl"): 1.082,
}  # fmt: skip


@pytest.mark.parametrize(("views", "name"), MEASURED)
def test_visual_experts_take_what_was_measured(views, name):
    vision = VisionConfig(
        experts=(VisualExpertConfig(name=name, weights="x"), VisualExpertConfig(name="dinov2_small", weights="x")),
        batch_views=views,
    )
    seconds = view_seconds(vision, expert_cost(name), hardware.load("h100-80g"))
    assert 1000 * seconds == pytest.approx(MEASURED[views, name], rel=0.01)


@pytest.mark.parametrize(
    ("views", "size", "ahead", "encoded"), [(5, 8, 1, 8), (20, 32, 1, 32), (20, 32, 4, 64 / 3), (64, 32, 4, 64)]
)
def test_batches_are_filled_up(views, size, ahead, encoded):
    assert full_batches(views, size, ahead) == pytest.approx(encoded)
