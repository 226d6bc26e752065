"""The sizes that are checked: full ones for a GPU, and tiny ones, which only prove that all of it runs."""

from dataclasses import dataclass

SECTIONS = ("right", "fast", "profile")
KINDS = ("mixed", "captions", "text")  # what a step of the table is made of


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything that is measured.

    Attributes:
        name: how the command line calls it.
        layers, hidden, ffn, heads, vocabulary: of the language model of the table.
        length: positions of a row.
        pairs: of a mixed step; a step of captions has twice as many.
        text_rows: full rows of text in a mixed step; a step of text has four times as many.
        micro_batch_rows: rows that are computed at once: all of these in mixed steps, the last in all steps.
        warmup, steps: steps of each turn before those that count, and those.
        turns: how often we and the peer are measured, one after the other.
        peer_pairs, peer_rows: how many samples at once the peer is tried with, of captions and of text.
        experts: the visual experts whose speed is measured.
        views: views that they encode at once, beside the default.
        moe_hidden, moe_ffn, moe_tokens: sizes of the MoE experts, and of their batches.
        grid: side of the square of feature tokens of the table's pictures.
        right_pairs, right_text, right_layers, right_hidden: sizes of the runs that are compared.
        right_steps: their length; they are resumed in the middle.
        demo_steps: steps of the demo-like run whose speed is measured.
        startup: the preset whose start-up is measured; empty for none.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    length: int
    pairs: int
    text_rows: int
    micro_batch_rows: tuple[int, ...]
    warmup: int
    steps: int
    turns: int
    peer_pairs: tuple[int, ...]
    peer_rows: tuple[int, ...]
    experts: tuple[str, ...]
    views: tuple[int, ...]
    moe_hidden: int
    moe_ffn: int
    moe_tokens: tuple[int, ...]
    grid: int
    right_pairs: int
    right_text: int
    right_layers: int
    right_hidden: int
    right_steps: int
    demo_steps: int
    startup: str


FULL = Scale(
    name="full", layers=8, hidden=4096, ffn=11008, heads=32, vocabulary=32000, length=2048, pairs=80, text_rows=4,
    micro_batch_rows=(4, 8), warmup=3, steps=4, turns=2, peer_pairs=(8, 16, 20, 40), peer_rows=(1, 2, 4),
    experts=("blip2_qformer", "clip_vit_l14", "clip_convnext_xxl", "dinov2_vitg14"), views=(8, 128),
    moe_hidden=4096, moe_ffn=14336, moe_tokens=(4096, 16384), grid=16,
    right_pairs=48, right_text=768, right_layers=4, right_hidden=128, right_steps=12, demo_steps=60,
    startup="sphinx_tiny",
)  # fmt: skip
SMALL = Scale(
    name="small", layers=1, hidden=64, ffn=96, heads=1, vocabulary=256, length=96, pairs=4, text_rows=1,
    micro_batch_rows=(1, 2), warmup=1, steps=2, turns=1, peer_pairs=(4,), peer_rows=(1,),
    experts=("dinov2_small",), views=(2,), moe_hidden=32, moe_ffn=48, moe_tokens=(64,), grid=4,
    right_pairs=4, right_text=96, right_layers=2, right_hidden=32, right_steps=4, demo_steps=3, startup="",
)  # fmt: skip
SCALES = {scale.name: scale for scale in (FULL, SMALL)}


def is_judged(scale: Scale, device: str) -> bool:
    """Tell whether speeds have bounds: those of small sizes, and of a CPU, say nothing."""
    return scale is FULL and device == "cuda"
