"""InternLM2's checkpoints: files and configuration of transformers, attention in one matrix."""

from pathlib import Path

from megatron_sphinx.checkpoint.encoders import Encoders
from megatron_sphinx.checkpoint.formats import huggingface
from megatron_sphinx.checkpoint.formats.format import Format, SourceCheckpoint, WriteOptions, WritePlan
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.checkpoint.mapping.rules import Rule
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.settings.huggingface import INTERNLM2

# Source: internlm/internlm2-7b, modeling_internlm2.py.
INTERNLM2_RULES = (
    Rule("model.tok_embeddings.weight", "vocabulary hidden", ("embedding",)),
    Rule("model.layers.{layer}.attention_norm.weight", "hidden", ("attention_norm",)),
    Rule("model.layers.{layer}.attention.wqkv.weight", "(group * half pair) hidden", ("q", "k", "v")),
    Rule("model.layers.{layer}.attention.wo.weight", "hidden (group query half pair)", ("o",)),
    Rule("model.layers.{layer}.ffn_norm.weight", "hidden", ("ffn_norm",)),
    Rule("model.layers.{layer}.feed_forward.w1.weight", "ffn hidden", ("gate",)),
    Rule("model.layers.{layer}.feed_forward.w3.weight", "ffn hidden", ("up",)),
    Rule("model.layers.{layer}.feed_forward.w2.weight", "hidden ffn", ("down",)),
    Rule("model.norm.weight", "hidden", ("norm",)),
    Rule("output.weight", "vocabulary hidden", ("output",)),
)


def _is_here(folder: Path) -> bool:
    return huggingface.is_here(folder) and huggingface.architecture_of(folder) == INTERNLM2


def _open(folder: Path, _: LanguageConfig | None) -> SourceCheckpoint:
    return huggingface.open_by_rules(folder, "internlm2", INTERNLM2_RULES)


def _plan(model: Model, options: WriteOptions, _: Encoders) -> WritePlan:
    if model.language.experts:
        raise CheckpointError("--to internlm2: has no experts; use hf")
    config = huggingface.config_of(model.language, INTERNLM2)
    return huggingface.plan_by_rules(model, options, INTERNLM2_RULES, config)


FORMAT = Format(
    name="internlm2",
    is_here=_is_here,
    open=_open,
    plan=_plan,
    settings=huggingface.settings,
    finish=huggingface.finish,
    keeps_settings=True,
    options=frozenset({"shard_bytes"}),
)
