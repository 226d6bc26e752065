"""The frozen mixture of visual experts: what it concatenates, and bits that do not depend on what is beside a view."""

import hashlib
import os
import random
import shutil
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from released_experts import SMALL
from safetensors.torch import save_file

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.model.architecture import (
    VISUAL_EXPERTS,
    VisionConfig,
    VisualExpertConfig,
)
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.expert_files import load_expert

MIXTURES = [
    ("clip_vit_small", "clip_convnext_small", "dinov2_small"),
    ("blip2_qformer_small", "dinov2_small"),
    ("efficientnet_lite0", "dinov2_small"),
    ("efficientnet_lite0_stride16",),
]


def mixture(*names: str, **more) -> VisionConfig:
    return VisionConfig(experts=tuple(VisualExpertConfig(name=name, weights="random") for name in names), **more)


def encoders(config: VisionConfig, dtype: torch.dtype = torch.float32, seed: int = 5) -> FrozenEncoders:
    return FrozenEncoders(config, device=torch.device("cpu"), dtype=dtype, seed=seed)


def pixels(config: VisionConfig, count: int, seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        side: torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
        for side in config.sides
    }


def test_the_four_experts_of_sphinx_make_5632_channels_and_289_tokens():
    config = mixture("blip2_qformer", "clip_vit_l14", "clip_convnext_xxl", "dinov2_vitg14")
    assert (config.channels, config.tokens_per_view) == (5632, 291)  # start and end tags counted
    assert config.feature_values == 257 * 5632 + 32 * 768
    assert config.sides == (224, 256)


def test_a_mixture_is_its_experts_side_by_side():
    config = mixture("blip2_qformer_small", "clip_vit_small", "clip_convnext_small", "dinov2_small", grid=4)
    views = pixels(config, 3)
    features = encoders(config)(views).float()
    mixed = features[:, : 17 * config.channels].view(3, 17, config.channels)
    at = 0
    for name in SMALL[:3]:
        alone = mixture(name, grid=4)
        out = encoders(alone)({side: views[side] for side in alone.sides}).float().view(3, 17, -1)
        torch.testing.assert_close(mixed[..., at : at + out.shape[-1]], out, rtol=0, atol=0)
        at += out.shape[-1]
    assert features[:, 17 * at :].view(3, 8, 48).isfinite().all()


def test_convnext_patches_are_repeated_and_its_global_token_is_their_mean():
    out = encoders(mixture("clip_convnext_small", grid=4))(pixels(mixture("clip_convnext_small", grid=4), 2)).float()
    whole, patches = out.view(2, 17, 96)[:, 0], out.view(2, 17, 96)[:, 1:].view(2, 4, 4, 96)
    assert torch.equal(patches[:, ::2, ::2], patches[:, 1::2, 1::2])
    torch.testing.assert_close(whole, patches.mean((1, 2)), rtol=0.02, atol=0.02)  # both are rounded to bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", MIXTURES, ids=lambda names: names[0])
def test_the_bits_of_a_feature_do_not_depend_on_its_company(names, dtype):
    config = mixture(*names, grid=VISUAL_EXPERTS[names[-1]].grid, batch_views=5)
    views, count = pixels(config, 23), 23
    model = encoders(config, dtype)
    reference = model(views)
    rng = random.Random(0)
    for _ in range(3):
        some = rng.sample(range(count), rng.randint(1, count))
        again = model({side: stack[some] for side, stack in views.items()})
        assert torch.equal(again, reference[some])


def encode_alone(folder, config, views):
    rank = int(os.environ["RANK"])
    torch.save(
        encoders(config, torch.bfloat16)({side: stack[rank:] for side, stack in views.items()}), folder / f"{rank}"
    )


def test_the_bits_of_a_feature_do_not_depend_on_the_rank(run_ranks, tmp_path):
    config = mixture("clip_convnext_small", "dinov2_small", grid=4)
    views = pixels(config, 6)
    run_ranks(2, lambda: encode_alone(tmp_path, config, views))
    one, other = torch.load(tmp_path / "0"), torch.load(tmp_path / "1")
    assert torch.equal(one[1:], other)


def test_experts_stay_in_eval_mode_and_give_no_gradient():
    config = mixture("blip2_qformer_small", "dinov2_small", grid=4)
    model = encoders(config)
    model.train()
    assert not any(module.training for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model(pixels(config, 1)).grad_fn is None


def test_random_weights_follow_from_the_seed():
    config = mixture("dinov2_small", grid=4)
    views = pixels(config, 1)
    torch.manual_seed(1)
    one = encoders(config)(views)
    torch.manual_seed(2)
    assert torch.equal(one, encoders(config)(views))
    assert not torch.equal(one, encoders(config, seed=6)(views))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_come_from_local_files(tmp_path, name, ending):
    source, _ = load_expert(VisualExpertConfig(name=name, weights="random"), seed=9)
    path = tmp_path / f"w.{ending}"
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    model, mark = load_expert(VisualExpertConfig(name=name, weights=str(path)), seed=1)
    assert mark == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    other, _ = load_expert(VisualExpertConfig(name="clip_vit_small", weights="random"), seed=1)
    torch.save(other.state_dict(), tmp_path / "clip.pth")
    message = (
        r"dinov2_small: .*clip\.pth holds weights of another architecture: by timm's names, tensors \d+ absent "
        r"\(blocks\.\S+\), \d+ unknown \(\S+\), \d+ of another shape \(\S+\); give weights of vit_giant_patch14_dinov2"
    )
    with pytest.raises(ConfigError, match=message):
        load_expert(VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "clip.pth")), seed=1)
    with pytest.raises(ConfigError, match=r"nowhere\.pth: no such file; give a weights file, or random"):
        load_expert(VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "nowhere.pth")), seed=1)
    (tmp_path / "bad.pth").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"bad\.pth cannot be read as weights"):
        load_expert(VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "bad.pth")), seed=1)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=r"list\.pth holds a list, not tensors by name; give a state dict"):
        load_expert(VisualExpertConfig(name="dinov2_small", weights=str(tmp_path / "list.pth")), seed=1)


def test_views_may_lie_in_pieces():
    config = mixture("clip_convnext_small", "dinov2_small", grid=4, batch_views=4)
    views = pixels(config, 11)
    model = encoders(config)
    whole = model(views)
    for cuts in ([0, 3, 4, 11], [0, 1, 1, 9, 11], [0, 11]):
        pieces = [{side: stack[a:b] for side, stack in views.items()} for a, b in pairwise(cuts)]
        assert torch.equal(model(*pieces), whole)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile on a CPU needs a C++ compiler, c++")
def test_compiled_experts_give_the_same_features(run_ranks):
    """To fp32 rounding; and bits that do not depend on their company, as without compilation."""
    config = mixture("blip2_qformer_small", "dinov2_small", grid=4, batch_views=3)

    def check() -> None:
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1  # a pool of processes would outlive this one
        views, model = pixels(config, 7), encoders(config)
        plain = model(views).float()
        assert model.compile_experts() > 0
        compiled = model(views)
        torch.testing.assert_close(compiled.float(), plain, rtol=0.01, atol=0.01)  # both are rounded to bf16
        assert torch.equal(model({side: stack[[5, 2]] for side, stack in views.items()}), compiled[[5, 2]])

    run_ranks(1, check, seconds=300)


def test_a_run_says_how_long_it_compiled(train, monkeypatch):
    monkeypatch.setattr(FrozenEncoders, "compile_experts", lambda _: 12.34)
    said = "vision.compile=true: compiling 2 experts took 12.3 s\n"
    for world, encoder, rank in ((2, 1, 1), (2, 0, 0)):
        overrides = {"vision.compile": True, "training.steps": 1, "parallel.encoder": encoder}
        ranks = train(world, overrides, name=str(encoder)).ranks
        assert [ranks.text(each).count(said) for each in range(2)] == [int(each == rank) for each in range(2)]


class Stream:
    """Stands for a CUDA stream: it notes in a list of all streams what is asked of it."""

    def __init__(self, name: str, done: list) -> None:
        self.name, self.done = name, done

    def wait_stream(self, other: "Stream") -> None:
        self.done.append((self.name, "waits for", other.name))


def test_uploads_are_on_a_stream_of_their_own(monkeypatch):
    """The encoding stream waits for each batch; the uploads wait for nothing, so the next batch is made ready early."""
    done: list = []
    main, side, current = Stream("main", done), Stream("uploads", done), []
    config = mixture("clip_convnext_small", "dinov2_small", grid=4, batch_views=4)
    model = encoders(config)
    views = pixels(config, 6)
    wanted = model(views)

    @contextmanager
    def stream(chosen):
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[-1] if current else main)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, of: done.append((of.name, "keeps", tuple(tensor.shape)))
    )
    inputs, encode = type(model)._inputs, type(model)._encode

    def notes(name, work):
        def noted(self, argument):
            done.append((torch.cuda.current_stream().name, name))
            return work(self, argument)

        return noted

    monkeypatch.setattr(type(model), "_inputs", notes("normalises", inputs))
    monkeypatch.setattr(type(model), "_encode", notes("encodes", encode))
    model._uploads = side
    assert torch.equal(model(views), wanted)
    batch = [
        ("uploads", "normalises"), ("main", "waits for", "uploads"), ("main", "keeps", (4, 3, 64, 64)),
        ("main", "keeps", (4, 3, 56, 56)), ("main", "encodes"),
    ]  # fmt: skip
    assert done == batch * 2


def test_the_qformer_attends_by_the_fused_kernels():
    """Which are what torch's scaled_dot_product_attention has; eager attention would keep all probabilities."""
    model = encoders(mixture("blip2_qformer_small", "dinov2_small", grid=4)).experts[0]
    assert {part.config._attn_implementation for part in (model.vision_model, model.qformer)} == {"sdpa"}
