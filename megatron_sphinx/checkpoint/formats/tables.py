"""The tables of rules, one for each format. See keymap for the axes."""

from megatron_sphinx.checkpoint.keymap import Rule, WEIGHTS


def _under(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(prefix + rule.name, rule.axes, rule.weights, rule.shard) for rule in rules)


# Source: transformers, models/llama/modeling_llama.py.
_HF_COMMON = (
    Rule("model.embed_tokens.weight", "v i", ("embedding",)),
    Rule("model.layers.{l}.input_layernorm.weight", "i", ("attention_norm",)),
    Rule("model.layers.{l}.self_attn.q_proj.weight", "(g p r h) i", ("q",)),
    Rule("model.layers.{l}.self_attn.k_proj.weight", "(g r h) i", ("k",)),
    Rule("model.layers.{l}.self_attn.v_proj.weight", "(g r h) i", ("v",)),
    Rule("model.layers.{l}.self_attn.o_proj.weight", "i (g p r h)", ("o",)),
    Rule("model.layers.{l}.post_attention_layernorm.weight", "i", ("ffn_norm",)),
    Rule("model.norm.weight", "i", ("norm",)),
    Rule("lm_head.weight", "v i", ("output",)),
)
HF_LLAMA = (
    *_HF_COMMON,
    Rule("model.layers.{l}.mlp.gate_proj.weight", "f i", ("gate",)),
    Rule("model.layers.{l}.mlp.up_proj.weight", "f i", ("up",)),
    Rule("model.layers.{l}.mlp.down_proj.weight", "i f", ("down",)),
)
# Source: transformers, models/mixtral: the names that its released checkpoints have.
HF_MIXTRAL = (
    *_HF_COMMON,
    Rule("model.layers.{l}.block_sparse_moe.gate.weight", "e i", ("router",)),
    Rule("model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "f i", ("gate",)),
    Rule("model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "f i", ("up",)),
    Rule("model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "i f", ("down",)),
)
# Source: internlm/internlm2-7b, modeling_internlm2.py.
HF_INTERNLM2 = (
    Rule("model.tok_embeddings.weight", "v i", ("embedding",)),
    Rule("model.layers.{l}.attention_norm.weight", "i", ("attention_norm",)),
    Rule("model.layers.{l}.attention.wqkv.weight", "(g * r h) i", ("q", "k", "v")),
    Rule("model.layers.{l}.attention.wo.weight", "i (g p r h)", ("o",)),
    Rule("model.layers.{l}.ffn_norm.weight", "i", ("ffn_norm",)),
    Rule("model.layers.{l}.feed_forward.w1.weight", "f i", ("gate",)),
    Rule("model.layers.{l}.feed_forward.w3.weight", "f i", ("up",)),
    Rule("model.layers.{l}.feed_forward.w2.weight", "i f", ("down",)),
    Rule("model.norm.weight", "i", ("norm",)),
    Rule("output.weight", "v i", ("output",)),
)
# What SPHINX has beside a language model, in a file of its own beside a Hugging Face checkpoint.
SPHINX = tuple(
    Rule(name, WEIGHTS[name], (name,)) for name in WEIGHTS if name.startswith(("visual", "qformer", "start", "end", "skip"))
)

# Source: LLaMA 2's released llama/model.py (fairscale: the embedding is shared along its width). Rotary halves lie interleaved.
_META_COMMON = (
    Rule("tok_embeddings.weight", "v i", ("embedding",), "i"),
    Rule("layers.{l}.attention_norm.weight", "i", ("attention_norm",)),
    Rule("layers.{l}.attention.wq.weight", "(g p h r) i", ("q",), "g"),
    Rule("layers.{l}.attention.wk.weight", "(g h r) i", ("k",), "g"),
    Rule("layers.{l}.attention.wv.weight", "(g r h) i", ("v",), "g"),
    Rule("layers.{l}.attention.wo.weight", "i (g p r h)", ("o",), "g"),
    Rule("layers.{l}.ffn_norm.weight", "i", ("ffn_norm",)),
    Rule("norm.weight", "i", ("norm",)),
    Rule("output.weight", "v i", ("output",), "v"),
)
META = (
    *_META_COMMON,
    Rule("layers.{l}.feed_forward.w1.weight", "f i", ("gate",), "f"),
    Rule("layers.{l}.feed_forward.w3.weight", "f i", ("up",), "f"),
    Rule("layers.{l}.feed_forward.w2.weight", "i f", ("down",), "f"),
)
# Source: mistralai's consolidated.00.pth of Mixtral-8x7B-v0.1.
META_MIXTRAL = (
    *_META_COMMON,
    Rule("layers.{l}.block_sparse_moe.gate.weight", "e i", ("router",)),
    Rule("layers.{l}.block_sparse_moe.w1", "(e f) i", ("gate",)),
    Rule("layers.{l}.block_sparse_moe.w3", "(e f) i", ("up",)),
    Rule("layers.{l}.block_sparse_moe.w2", "(e f) i", ("down",)),
)
# Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens.py.
_ACCESSORY_EXTRAS = (
    Rule("visual_proj.0.weight", "i c", ("visual_proj.0.weight",)),
    Rule("visual_proj.0.bias", "i", ("visual_proj.0.bias",)),
    Rule("visual_proj.1.weight", "i", ("visual_proj.1.weight",)),
    Rule("visual_proj.1.bias", "i", ("visual_proj.1.bias",)),
    Rule("qformer_proj.0.weight", "i d", ("qformer_proj.0.weight",)),
    Rule("qformer_proj.0.bias", "i", ("qformer_proj.0.bias",)),
    Rule("qformer_proj.1.weight", "i", ("qformer_proj.1.weight",)),
    Rule("qformer_proj.1.bias", "i", ("qformer_proj.1.bias",)),
    Rule("start_img", "o u i", ("start_tag",)),
    Rule("end_img", "o u i", ("end_tag",)),
)
ACCESSORY = _under("llma.", META + _ACCESSORY_EXTRAS)
# Source: accessory/model/LLM/mixtral.py: whole experts, each on one rank.
ACCESSORY_BASE = _under("llma.", (
    *_META_COMMON,
    *_ACCESSORY_EXTRAS,
    Rule("layers.{l}.feed_forward.gate.weight", "e i", ("router",)),
    Rule("layers.{l}.feed_forward.experts.{e}.w1.weight", "f i", ("gate",), "e"),
    Rule("layers.{l}.feed_forward.experts.{e}.w3.weight", "f i", ("up",), "e"),
    Rule("layers.{l}.feed_forward.experts.{e}.w2.weight", "i f", ("down",), "e"),
))  # fmt: skip
# Source: accessory/model/LLM/mixtral_sparse.py: a slice of every expert on each rank, w2 transposed.
ACCESSORY_SPARSE = _under("llma.", (
    *_META_COMMON,
    *_ACCESSORY_EXTRAS,
    Rule("layers.{l}.feed_forward.gate.weight", "e i", ("router",)),
    Rule("layers.{l}.feed_forward.w1", "(e f) i", ("gate",), "f"),
    Rule("layers.{l}.feed_forward.w3", "(e f) i", ("up",), "f"),
    Rule("layers.{l}.feed_forward.w2", "(e f) i", ("down",), "f"),
))  # fmt: skip

# Ours: the whole weights of megatron-core's layers (model/language.py), the tags and projections of model/vision.py.
_LAYER = "master/language.decoder.layers.{l}."
_MEGATRON_COMMON = (
    Rule("master/language.embedding.word_embeddings.weight", "v i", ("embedding",)),
    Rule(f"{_LAYER}input_layernorm.weight", "i", ("attention_norm",)),
    Rule(f"{_LAYER}self_attention.linear_qkv.weight", "(g * r h) i", ("q", "k", "v")),
    Rule(f"{_LAYER}self_attention.linear_proj.weight", "i (g p r h)", ("o",)),
    Rule(f"{_LAYER}pre_mlp_layernorm.weight", "i", ("ffn_norm",)),
    Rule("master/language.decoder.final_layernorm.weight", "i", ("norm",)),
    Rule("master/language.output_layer.weight", "v i", ("output",)),
    *_under("master/vision.", SPHINX),
)
MEGATRON = (
    *_MEGATRON_COMMON,
    Rule(f"{_LAYER}mlp.linear_fc1.weight", "(* f) i", ("gate", "up")),
    Rule(f"{_LAYER}mlp.linear_fc2.weight", "i f", ("down",)),
)
MEGATRON_MOE = (
    *_MEGATRON_COMMON,
    Rule(f"{_LAYER}mlp.router.weight", "e i", ("router",)),
    Rule(f"{_LAYER}mlp.experts.weight1", "e (* f) i", ("gate", "up")),
    Rule(f"{_LAYER}mlp.experts.weight2", "e i f", ("down",)),
)
# As Megatron-LM writes a GPT model by megatron.core.dist_checkpointing: layers stacked in one tensor.
_TORCH_DIST_COMMON = (
    Rule("embedding.word_embeddings.weight", "v i", ("embedding",)),
    Rule("decoder.layers.self_attention.linear_qkv.weight", "l (g * r h) i", ("q", "k", "v")),
    Rule("decoder.layers.self_attention.linear_proj.weight", "l i (g p r h)", ("o",)),
    Rule("decoder.final_layernorm.weight", "i", ("norm",)),
    Rule("output_layer.weight", "v i", ("output",)),
)
