"""The arguments of Megatron-LM that change what the weights of its checkpoints compute."""

from megatron_sphinx.settings.keys import Fixed

# Megatron-LM's arguments, by which the weights are read, each with the field of our model; it has hundreds of others,
# most of which tell how it trains. Source: Megatron-LM, megatron/training/arguments.py.
HONOURED = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "heads",
    "num_query_groups": "groups",
    "rotary_base": "rope_theta",
    "norm_epsilon": "norm_epsilon",
    "num_experts": "experts",
    "moe_router_topk": "experts_per_token",
}
_SCALED, _BIAS = "positions are not scaled here", "there are no biases here"
FIXED = {
    "position_embedding_type": Fixed(("rope",), "positions are rotary here"),
    "rotary_percent": Fixed((1.0,), "whole heads are rotated here"),
    "rotary_interleaved": Fixed((False,), "the halves of a head are rotated against each other here"),
    "rotary_seq_len_interpolation_factor": Fixed((1,), _SCALED),
    "use_rope_scaling": Fixed((False,), _SCALED),
    "normalization": Fixed(("RMSNorm",), "another norm than RMSNorm"),
    "apply_layernorm_1p": Fixed((False,), "weights of norms are whole here"),
    "qk_layernorm": Fixed((False,), "queries and keys are not normalised here"),
    "swiglu": Fixed((True,), "another activation than SwiGLU's"),
    "add_bias_linear": Fixed((False,), _BIAS),
    "add_qkv_bias": Fixed((False,), _BIAS),
    "untie_embeddings_and_output_weights": Fixed((True,), "the output layer has weights of its own here"),
    "multi_latent_attention": Fixed((False,), "attention has keys and values of its own here"),
    "window_size": Fixed((), "attention is over all positions here"),
    "moe_shared_expert_intermediate_size": Fixed((), "no expert is shared here"),
}
