"""The language model: what SPHINX asks of megatron-core's GPT."""

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_sphinx import platform
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.attention import PackedAttention, RMSNorm
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.seeding import generator

# Which dimension of a weight the tensor ranks share, and how many matrices are stacked in it (gate and up).
SHARDED = {
    "word_embeddings.weight": (0, 1),
    "linear_qkv.weight": (0, 1),
    "linear_proj.weight": (1, 1),
    "linear_fc1.weight": (0, 2),
    "linear_fc2.weight": (1, 1),
    "output_layer.weight": (0, 1),
}


def block_spec(layers: int) -> ModuleSpec | TransformerBlockSubmodules:
    """Which modules the decoder is made of: transformer-engine's where it imports, else torch's own kernels."""
    if platform.current().is_cuda and platform.is_imported("transformer_engine"):
        return get_gpt_layer_with_transformer_engine_spec()
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def build_language(
    config: LanguageConfig, groups: ProcessGroups, *, dtype: torch.dtype, sequence_length: int, is_checkpointed: bool
) -> GPTModel:
    """This rank's shard of the decoder, its weights not yet set.

    Args:
        config: its shape.
        groups: the groups it computes in.
        dtype: type of weights and activations.
        sequence_length: longest document it will see.
        is_checkpointed: keep each layer's input only and compute the layer again in backward.
    """
    sizes = groups.layout.config
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    transformer = TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden,
        ffn_hidden_size=config.ffn,
        num_attention_heads=config.heads,
        num_query_groups=config.groups,
        kv_channels=config.hidden // config.heads,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        use_cpu_initialization=not platform.current().is_cuda,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        **(recompute if is_checkpointed else {}),
    )
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=block_spec(config.layers),
        vocab_size=config.padded_vocabulary,
        max_sequence_length=sequence_length,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        share_embeddings_and_output_weights=False,
        pg_collection=groups.collection,
    )
    for name, weight in model.named_parameters():
        sharding = SHARDED.get(".".join(name.split(".")[-2:]))
        if sharding and not hasattr(weight, "partition_dim"):  # megatron-core marks only what it draws itself
            set_tensor_model_parallel_attributes(weight, True, *sharding)
    _hide_padding(model, config, groups)
    return model


def _hide_padding(model: GPTModel, config: LanguageConfig, groups: ProcessGroups) -> None:
    """Give the padded rows of the vocabulary no probability, so that the loss does not know of them."""
    shard = config.padded_vocabulary // groups.layout.config.tensor
    first = groups.seat.tensor * shard
    real = min(max(config.vocabulary - first, 0), shard)
    if real == shard:
        return

    def hide(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits, bias = output
        hidden = torch.arange(shard, device=logits.device) >= real
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min), bias

    model.output_layer.register_forward_hook(hide)


@torch.no_grad()
def draw_weights(model: nn.Module, config: LanguageConfig, groups: ProcessGroups, seed: int) -> None:
    """Set every weight from the run's seed and the weight's name: the same whole tensor for every layout.

    Norms start at one, biases at zero, the tags uniform in [0, 1) as released, matrices normal.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
            if name.endswith("_tag"):
                weight.copy_(torch.rand(weight.shape, generator=generator(seed, name)))
            continue
        is_output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = config.init_std / (2 * config.layers) ** 0.5 if is_output else config.init_std
        whole = torch.empty(_whole_shape(weight, groups)).normal_(0.0, std, generator=generator(seed, name))
        weight.copy_(_shard(whole, weight, groups))


def _whole_shape(weight: Tensor, groups: ProcessGroups) -> list[int]:
    shape = list(weight.shape)
    if getattr(weight, "tensor_model_parallel", False):
        shape[weight.partition_dim] *= groups.layout.config.tensor  # type: ignore[attr-defined]
    return shape


def _shard(whole: Tensor, weight: Tensor, groups: ProcessGroups) -> Tensor:
    """This rank's part. A stride of 2 means two matrices, gate and up, each cut among the ranks."""
    if not getattr(weight, "tensor_model_parallel", False):
        return whole
    dim, stride, size = weight.partition_dim, weight.partition_stride, groups.layout.config.tensor  # type: ignore[attr-defined]
    parts = [part.chunk(size, dim)[groups.seat.tensor] for part in whole.chunk(stride, dim)]
    return torch.cat(parts, dim)
