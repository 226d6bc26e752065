"""Shapes of everything a SPHINX is made of. Arithmetic only: imports no torch, so a login node can plan with it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from megatron_sphinx.errors import ConfigError, nearest
from megatron_sphinx.ranges import Range, check_ranges

_WIDTH = Range(least=1, most=2**24, why="a model has at least one, and no released one has more")
_COEFFICIENT = Range(least=0, most=1000, why="0 is for none")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
LEAST_BATCH_VIEWS, MOST_BATCH_VIEWS = 8, 32  # what vision.batch_views=auto takes on a CPU, and at most on a GPU
KERNELS = ["auto", "torch", "liger", "transformer_engine"]
PARTS = {1: 1, 5: 2, 10: 3}  # how many parts each side of the square is cut in, by the number of views


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Shape of the decoder, a LLaMA or a Mixtral: RMSNorm, SwiGLU, RoPE, grouped queries, untied output, no biases.

    Attributes:
        preset: name of a model of the papers, a file of presets/, whose values fill what the files do not give; null
            for a model that the files describe themselves.
        weights: path of the checkpoint whose weights this run begins with, in any format that
            `megatron-sphinx convert` reads, or another run's folder for its newest checkpoint; null for weights drawn
            from run.seed.
        layers (layers): number of decoder layers; at least 1.
        hidden (channels): width of the residual stream; a multiple of twice model.heads.
        ffn (channels): width inside a feed-forward layer, or inside each expert.
        heads (heads): number of query heads in each layer.
        groups (heads): number of key-value heads in each layer; must divide model.heads, and is that number where it
            is 0.
        vocabulary (tokens): number of tokens of the tokenizer, without padding.
        experts (experts): feed-forward experts of every layer, as Mixtral has them; 0 for the one feed-forward layer of
            a LLaMA.
        experts_per_token (experts): how many of the experts compute a token, from 2 to model.experts; the softmax is
            over their logits only.
        balance_loss_coefficient: factor of the load-balancing loss of each layer; 0 for none.
        z_loss_coefficient: factor of the squared log-sum-exp of each layer's router logits; 0 for none.
        rope_theta: base of the frequencies of rotary position embeddings.
        norm_epsilon: number added to the mean square in RMSNorm.
        init_std: standard deviation of new weights; output projections get it over sqrt(2 layers).
        kernels: what the layers compute with beside matrix products and attention: auto (liger where liger_kernel
            imports on a GPU, else torch), torch, liger (SwiGLU, RoPE, RMSNorm and cross entropy in Triton; GPUs only),
            or transformer_engine (its layers, attention among them; GPUs only, and not yet proven). A run that goes on
            may change it.

    Source: LLaMA 2, arXiv:2307.09288, section 2.2; Mixtral, arXiv:2401.04088, section 2.
    """

    preset: str | None = None
    weights: str | None = None
    layers: Annotated[int, Range(least=1, most=10_000, why="a decoder has at least one, and no released one has more")]
    hidden: Annotated[int, _WIDTH]
    ffn: Annotated[int, _WIDTH]
    heads: Annotated[int, _WIDTH]
    groups: Annotated[int, Range(least=0, most=2**24, why="0 is for as many as model.heads")] = 0
    vocabulary: Annotated[int, _WIDTH]
    experts: Annotated[int, Range(least=0, most=10_000, why="0 is for a model without")] = 0
    experts_per_token: Annotated[int, Range(least=1, most=10_000, why="each token goes to one")] = 2
    balance_loss_coefficient: Annotated[float, _COEFFICIENT] = 0.0
    z_loss_coefficient: Annotated[float, _COEFFICIENT] = 0.0
    rope_theta: Annotated[float, Range(least=1, most=1e12, why="frequencies fall with its powers")] = 10000.0
    norm_epsilon: Annotated[float, Range(above=0, most=0.1, why="it keeps a row of zeros from a division by 0")] = 1e-5
    init_std: Annotated[float, Range(above=0, most=100, why="weights of 0 get no gradient")] = 0.02
    kernels: str = "auto"

    def __post_init__(self) -> None:
        check_ranges(self, "model.")
        if not self.groups:
            object.__setattr__(self, "groups", self.heads)  # so that whoever reads it finds the number
        if self.kernels not in KERNELS:
            raise ConfigError(f"model.kernels={self.kernels}: unknown value; {nearest(self.kernels, KERNELS)}")
        if self.hidden % (2 * self.heads):
            raise ConfigError(
                f"model.heads={self.heads}: each head needs an even share of model.hidden={self.hidden}; "
                f"use a number whose double divides it"
            )
        if self.heads % self.groups:
            raise ConfigError(f"model.groups={self.groups}: must divide model.heads={self.heads}")
        if self.experts and not 2 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"model.experts_per_token={self.experts_per_token}: must be between 2 (a softmax over one logit "
                f"teaches the router nothing) and model.experts={self.experts}"
            )

    @property
    def shape(self) -> dict[str, Any]:
        """The fields that say whether weights fit this model; others may differ."""
        free = ("preset", "weights", "init_std", "balance_loss_coefficient", "z_loss_coefficient", "kernels")
        return {name: value for name, value in asdict(self).items() if name not in free}

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding: the vocabulary up to a multiple of 128, the same for every layout."""
        return -(-self.vocabulary // 128) * 128

    @property
    def attention_matrices(self) -> int:
        """Weights in the matrices of one layer's attention."""
        return 2 * self.hidden * self.hidden + 2 * self.hidden * self.groups * (self.hidden // self.heads)

    @property
    def expert_matrices(self) -> int:
        """Weights in the matrices of one MoE expert, or of a LLaMA's feed-forward layer."""
        return 3 * self.hidden * self.ffn

    @property
    def active_matrices(self) -> int:
        """Weights in those matrices of one layer that compute a token: not in the experts it is not sent to."""
        feed_forward = self.expert_matrices * (self.experts_per_token if self.experts else 1)
        return self.attention_matrices + feed_forward + self.experts * self.hidden

    @property
    def layer_matrices(self) -> int:
        """Weights in the matrices of one decoder layer."""
        return self.attention_matrices + self.expert_matrices * max(self.experts, 1) + self.experts * self.hidden

    @property
    def parameters(self) -> int:
        """Weights of the language model, vocabulary unpadded."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer_matrices + norms + 2 * self.vocabulary * self.hidden

    @property
    def active_parameters(self) -> int:
        """Weights of the language model that compute a token: without the experts it is not sent to."""
        return self.parameters - self.layers * (self.layer_matrices - self.active_matrices)

    def train_flops(self, lengths: Sequence[int], targets: int) -> float:
        """Count the FLOPs of forward and backward over documents, attention causal and inside each.

        Counts the matrix products that are needed: 6 for each weight that computes a token, those of the output layer
        only at target positions, and 12 hidden for each layer and pair of positions attended.

        Args:
            lengths: tokens of each document.
            targets: positions whose loss is computed.
        """
        return self.flops_of(sum(lengths), sum(n * (n + 1) / 2 for n in lengths), targets)

    def flops_of(self, tokens: float, attended: float, targets: float) -> float:
        """Count the FLOPs of forward and backward as `train_flops` does, from totals or means of all documents.

        Args:
            tokens: tokens of all documents.
            attended: pairs of tokens of which one sees the other.
            targets: positions whose loss is computed.
        """
        layer = 6 * self.active_matrices * tokens + 12 * self.hidden * attended
        return self.layers * layer + 6 * self.vocabulary * self.hidden * targets


@dataclass(frozen=True, kw_only=True)
class VisualExpert:
    """A frozen visual expert: how it is built and what comes out of it.

    Attributes:
        family: which feature contract it follows (visual_experts.py): clip, dinov2, convnext, cnn, cnn_stride16,
            qformer.
        model: the timm model, empty for the Q-Former.
        pixels: side of its square input.
        channels: width of each feature token.
        grid: side of the square of patch tokens it gives before any repetition; 0 for the Q-Former.
        queries: tokens of a Q-Former.
        nearest_from: side of the view that the released code repeats pixels of to make this input; 0 where it resizes.
        mean, std: normalisation of its input.
        options: keyword arguments of the timm model, or fields of the Q-Former's configuration.
    """

    family: str
    model: str = ""
    pixels: int
    channels: int
    grid: int = 0
    queries: int = 0
    nearest_from: int = 0
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    options: dict[str, object] = field(default_factory=dict)


def _vit(width: int, depth: int, heads: int, pixels: int) -> dict[str, object]:
    """The options of timm's vision transformers that make one of this shape."""
    return {"embed_dim": width, "depth": depth, "num_heads": heads, "img_size": pixels}


# Source: SPHINX, arXiv:2311.07575, section 3.2; shapes as in the released accessory/model/LLM/llama_ens.py.
VISUAL_EXPERTS: dict[str, VisualExpert] = {
    "clip_vit_l14": VisualExpert(
        family="clip", model="vit_large_patch14_clip_quickgelu_224", pixels=224, channels=1024, grid=16
    ),
    "clip_convnext_xxl": VisualExpert(
        family="convnext", model="convnext_xxlarge", pixels=256, channels=3072, grid=8, nearest_from=224
    ),
    "clip_convnext_xxl_512": VisualExpert(
        family="convnext", model="convnext_xxlarge", pixels=512, channels=3072, grid=16
    ),
    "dinov2_vitg14": VisualExpert(
        family="dinov2", model="vit_giant_patch14_dinov2", pixels=224, channels=1536, grid=16,
        mean=IMAGENET_MEAN, std=IMAGENET_STD, options={"img_size": 224},
    ),
    "blip2_qformer": VisualExpert(
        family="qformer", pixels=224, channels=768, queries=32
    ),
    "efficientnet_lite0": VisualExpert(
        family="cnn", model="tf_efficientnet_lite0", pixels=112, channels=1280, grid=4, mean=HALF, std=HALF
    ),
    "efficientnet_lite0_stride16": VisualExpert(
        family="cnn_stride16", model="tf_efficientnet_lite0", pixels=112, channels=112, grid=7, mean=HALF, std=HALF
    ),
    # The same architectures, small: for tests and for a laptop.
    "clip_vit_small": VisualExpert(
        family="clip", model="vit_large_patch14_clip_quickgelu_224", pixels=56, channels=64, grid=4,
        options=_vit(64, 2, 2, 56),
    ),
    "clip_convnext_small": VisualExpert(
        family="convnext", model="convnext_xxlarge", pixels=64, channels=96, grid=2, nearest_from=56,
        options={"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 96)},
    ),
    "dinov2_small": VisualExpert(
        family="dinov2", model="vit_giant_patch14_dinov2", pixels=56, channels=96, grid=4,
        mean=IMAGENET_MEAN, std=IMAGENET_STD, options=_vit(96, 3, 3, 56),
    ),
    "blip2_qformer_small": VisualExpert(
        family="qformer", pixels=56, channels=48, queries=8,
        options={"vision": (64, 2, 2, 128), "qformer": (48, 2, 2, 96)},
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VisualExpertConfig:
    """One visual expert of a mixture, and where its weights are.

    Attributes:
        name: name of the visual expert: clip_vit_l14, clip_convnext_xxl, clip_convnext_xxl_512, dinov2_vitg14,
            blip2_qformer, efficientnet_lite0, efficientnet_lite0_stride16; or, for tests and laptops, clip_vit_small,
            clip_convnext_small, dinov2_small, blip2_qformer_small.
        weights: path of a local .safetensors or torch file, or `random` for weights drawn from run.seed.
    """

    name: str
    weights: str

    def __post_init__(self) -> None:
        if self.name not in VISUAL_EXPERTS:
            raise ConfigError(
                f"vision.experts: {self.name}: unknown expert; {nearest(self.name, list(VISUAL_EXPERTS))}"
            )

    @property
    def expert(self) -> VisualExpert:
        """The expert that the name stands for."""
        return VISUAL_EXPERTS[self.name]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The mixture of visual experts, and how a picture becomes tokens.

    Attributes:
        experts: list of the frozen visual experts; their features are concatenated by channel in this order, and the
            tokens of a Q-Former stand before them.
        grid (patches): side of the square of patch tokens of a view; a multiple of what each expert gives natively.
        views (views): how many views of a picture the model sees: 1, the whole square; 5 or 10, also its 2 x 2 or 3 x 3
            parts, row by row.
        padding: where a picture sits in the square that it is padded to: centre (SPHINX) or corner (SPHINX-X).
        skip_padding_views: whether a part that holds no pixel of the picture is one learned token, and not encoded.
        resize: how pictures are resized: antialiased; or accessory, as the released code resizes, for its weights; that
            also leaves them as they are stored, not turned upright.
        batch_views (views): how many views are encoded at once; the shape is always full, so that a feature's bits
            never depend on its company. With auto a run takes 32 on a GPU, or as many of them as fit into memory, and 8
            on a CPU, and keeps them when it goes on.
        precision: what the experts compute in: bf16; fp32; or auto, bf16 where that is fast. A run keeps what it took
            when it goes on, on whatever machine.
        compile: whether torch.compile compiles the experts' forward for the one shape;
            what it takes at the start is printed.
    """

    experts: tuple[VisualExpertConfig, ...]
    grid: Annotated[int, Range(least=1, most=1024, why="a view has at least one patch")] = 16
    views: Annotated[int, Range(least=1, most=10)] = 1
    padding: str = "centre"
    skip_padding_views: bool = False
    resize: str = "antialiased"
    batch_views: Annotated[int | Literal["auto"], Range(least=1, most=100_000, why="encoders take whole views")] = (
        "auto"
    )
    precision: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        choices = {
            "padding": ("centre", "corner"), "resize": ("antialiased", "accessory"),
            "precision": ("auto", "bf16", "fp32"),
        }  # fmt: skip
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"vision.{name}={value}: must be {' or '.join(known)}")
        check_ranges(self, "vision.")
        if self.views not in PARTS:
            raise ConfigError(f"vision.views={self.views}: must be 1, 5 or 10")
        if not self.channels:
            raise ConfigError("vision.experts: needs at least one expert beside a Q-Former")
        names = [item.name for item in self.experts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"vision.experts: {twice[0]} stands in the mixture twice; name each expert once")
        if sum(item.expert.family == "qformer" for item in self.experts) > 1:
            raise ConfigError("vision.experts: at most one Q-Former can stand before the patch tokens")
        for item in self.experts:
            native = item.expert.grid
            if native and self.grid % native:
                raise ConfigError(
                    f"vision.grid={self.grid}: {item.name} gives {native}x{native} patches, which cannot be repeated "
                    f"to it; use a multiple of {native}"
                )

    @property
    def views_at_once(self) -> int:
        """The number of `batch_views`; of auto that no run has settled, the least that one takes."""
        return LEAST_BATCH_VIEWS if self.batch_views == "auto" else self.batch_views

    @property
    def channels(self) -> int:
        """Width of a mixed token: the channels of all experts but the Q-Former."""
        return sum(item.expert.channels for item in self.experts if item.expert.grid)

    @property
    def qformer(self) -> VisualExpert | None:
        """The Q-Former of the mixture, if it has one."""
        return next((item.expert for item in self.experts if item.expert.family == "qformer"), None)

    @property
    def mixed_tokens(self) -> int:
        """Tokens of a view that carry the channels of all experts: a global one, then the patches."""
        return 1 + self.grid * self.grid

    @property
    def tokens_per_view(self) -> int:
        """Positions a view takes in the sequence, its start and end tags counted."""
        return 2 + self.mixed_tokens + (self.qformer.queries if self.qformer else 0)

    @property
    def has_skip_token(self) -> bool:
        """Whether a view of a picture may be skipped, so that a learned token stands for it."""
        return self.skip_padding_views and self.views > 1

    @property
    def parts(self) -> int:
        """How many parts each side of the square is cut in by the views after the global one; 1 without such views."""
        return PARTS[self.views]

    @property
    def visual_tokens_per_image(self) -> int:
        """Tokens of an image with all its views, tags not counted, as the papers count them."""
        return self.views * (self.tokens_per_view - 2)

    @property
    def most_image_positions(self) -> int:
        """Positions that an image takes where no view is skipped."""
        return self.views * self.tokens_per_view

    @property
    def released_pixels(self) -> int:
        """Side that the released code resizes the square to on the CPU, before it makes the views."""
        return self.parts * max(item.expert.nearest_from or item.expert.pixels for item in self.experts)

    @property
    def feature_values(self) -> int:
        """How many numbers the encoders give for one view; they go to the language ranks in bf16."""
        queries = self.qformer.queries * self.qformer.channels if self.qformer else 0
        return self.mixed_tokens * self.channels + queries

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the square inputs that the experts need, in pixels, each once, ascending."""
        return tuple(sorted({item.expert.pixels for item in self.experts}))
