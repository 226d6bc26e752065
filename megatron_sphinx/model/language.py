"""The language model: megatron-core's GPT, composed and configured for SPHINX."""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_sphinx.device import current_platform
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.attention import PackedAttention, PackedRows, RMSNorm, rotation
from megatron_sphinx.model.drawing import draw_normal, in_threads
from megatron_sphinx.model.experts import GroupedExperts, RowLayer, RowMoE, RowRouter
from megatron_sphinx.model.kernels import Kernels, choose
from megatron_sphinx.model.shards import Block, shards_of
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig
from megatron_sphinx.parallel.seeding import generator


class TargetGPT(GPTModel):  # type: ignore[misc]
    """megatron-core's GPT, whose last stage computes logits and losses only where `PackedRows` has a target.

    Our own layers take RoPE from `PackedRows` too: megatron-core computes it for each document in each layer.
    Under sequence parallelism the hidden states are gathered before they are chosen from, so the output layer must not
    gather again; the gather's backward sums what each tensor rank's part of the vocabulary gives, so nor must it sum.
    """

    def __init__(self, *args: Any, kernels: Kernels, rotary_base: float, **kwargs: Any) -> None:
        self.kernels = kernels
        embedding = "rope" if kernels.is_transformer_engine else "none"
        super().__init__(*args, position_embedding_type=embedding, rotary_base=rotary_base, **kwargs)
        width = self.config.kv_channels
        channels = torch.arange(0, width, 2, dtype=torch.float32, device=current_platform().device)
        self.frequencies = rotary_base ** (-channels / width)
        if self.post_process and self.config.sequence_parallel:
            self.output_layer.sequence_parallel = False
            self.output_layer.disable_grad_reduce = True

    def rotation(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Compute cosine and sine of each token of documents of these lengths, [tokens, 1, head width / 2] each.

        None where transformer-engine's layers rotate by themselves.
        """
        if self.kernels.is_transformer_engine:
            return None
        return rotation(lengths, self.frequencies, self.config.params_dtype)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Compute the losses of right tokens [1, targets] by logits [targets, 1, own vocabulary]: fp32 [1, targets]."""
        if self.kernels.cross_entropy is None:
            return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]
        return self.kernels.cross_entropy(logits, labels.t(), self.pg_collection.tp).t()

    def _postprocess(self, hidden_states: Tensor, *args: Any, packed_seq_params: PackedRows, **kwargs: Any) -> Tensor:
        """Choose the positions with a target before the output layer, the private hook that is nearest before it."""
        positions = packed_seq_params.target_positions
        if self.post_process:
            if self.config.sequence_parallel:
                hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
            if positions is not None:
                hidden_states = hidden_states.index_select(0, positions)
        out: Tensor = super()._postprocess(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        return out


class GatedMLP(MLP):  # type: ignore[misc]
    """megatron-core's feed-forward layer of a LLaMA: SwiGLU between two matrices, nothing else.

    megatron-core's own forward adds an offset to the gated half, 0 in a LLaMA, which is one more tensor of this width.

    Args:
        config: the widths.
        submodules: the two matrices.
        kernels: what SwiGLU is computed with.
        collection: the groups that the matrices are divided over.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        kernels: Kernels,
        collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=collection.tp)
        self.kernels = kernels

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """Compute the layer: [tokens, 1, hidden] to a tensor of this shape, and no bias."""
        both, _bias = self.linear_fc1(hidden_states)
        out: tuple[Tensor, Tensor | None] = self.linear_fc2(self.kernels.swiglu(both))
        return out


def block_spec(
    config: LanguageConfig, groups: ProcessGroups, kernels: Kernels, *, longest: int, is_recomputed: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """Choose the modules that the decoder is made of: our own, or transformer-engine's where the kernels are.

    Args:
        config: the shape of the model.
        groups: the groups it computes in.
        kernels: what it computes with.
        longest: tokens of the longest document that there can be.
        is_recomputed: whether MoE experts are computed again in backward.
    """
    experts = _experts_spec(config, groups, kernels, is_recomputed=is_recomputed)
    if kernels.is_transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts=config.experts or None)
        if config.experts:
            spec.module, spec.submodules.mlp = RowLayer, experts
        return spec
    norm = ModuleSpec(module=RMSNorm, params={"kernels": kernels})
    dense = ModuleSpec(
        module=GatedMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        params={"kernels": kernels, "collection": groups.collection},
    )
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=ModuleSpec(module=PackedAttention, params={"kernels": kernels, "longest": longest}),
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    layer = ModuleSpec(
        module=RowLayer if config.experts else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=experts if config.experts else dense,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    layers = groups.layout.config.stage_layers(config.layers)[groups.seat.pipeline]
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def _experts_spec(
    config: LanguageConfig, groups: ProcessGroups, kernels: Kernels, *, is_recomputed: bool
) -> ModuleSpec:
    """Choose the modules of a layer of MoE experts."""
    router = partial(RowRouter, balance=config.balance_loss_coefficient, z_loss=config.z_loss_coefficient)
    return ModuleSpec(
        module=RowMoE,
        submodules=MoESubmodules(experts=ModuleSpec(module=GroupedExperts, params={"kernels": kernels}), router=router),
        params={"collection": groups.collection, "is_recomputed": is_recomputed},
    )


def build_language(
    config: LanguageConfig,
    groups: ProcessGroups,
    *,
    dtype: torch.dtype,
    sequence_length: int,
    recompute: str = "none",
    recompute_layers: int | None = None,
) -> TargetGPT:
    """Build this rank's shard of the decoder, its weights not yet set.

    Args:
        config: the shape of the decoder.
        groups: the groups it computes in.
        dtype: type of weights and activations.
        sequence_length: tokens of the longest document it will see.
        recompute: what backward computes again: none, selective (feed-forward layers and experts), or full (layers).
        recompute_layers: with `full`, how many layers of each stage are computed again; None for all.
    """
    kernels = choose(config.kernels, current_platform())
    transformer = _transformer_config(config, groups.layout.config, dtype, **_recompute(recompute, recompute_layers))
    model = TargetGPT(
        config=transformer,
        transformer_layer_spec=block_spec(
            config, groups, kernels, longest=sequence_length, is_recomputed=recompute == "selective"
        ),
        kernels=kernels,
        vocab_size=config.padded_vocabulary,
        max_sequence_length=sequence_length,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        rotary_base=config.rope_theta,
        share_embeddings_and_output_weights=False,
        scatter_embedding_sequence_parallel=False,  # pictures are placed among the tokens first
        pg_collection=groups.collection,
    )
    if current_platform().is_cuda and torch.get_default_device().type != "meta":
        model.to(current_platform().device)  # megatron-core makes routers on the CPU
    if groups.is_last_stage:
        _hide_padding(model, config, groups)
    _sum_over_sequence(model, groups)
    return model


def _recompute(recompute: str, layers: int | None) -> dict[str, Any]:
    """Make the options of megatron-core that say what backward computes again; of MoE experts RowMoE decides that."""
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    method = "uniform" if layers is None else "block"
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers or 1}


def _transformer_config(
    config: LanguageConfig, sizes: ParallelConfig, dtype: torch.dtype, **recompute: Any
) -> TransformerConfig:
    """Say the shape and the layout of the model in megatron-core's options."""
    stages = [["decoder"] * layers for layers in sizes.stage_layers(config.layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    pipeline = {
        "pipeline_model_parallel_layout": stages,
        "pipeline_dtype": dtype,
        "variable_seq_lengths": True,
        "deallocate_pipeline_outputs": True,
        "calculate_per_token_loss": True,  # the schedule must not scale the loss: it is divided by the step's tokens
        "batch_p2p_sync": False,
    }
    experts = {
        "num_moe_experts": config.experts,
        "moe_router_topk": config.experts_per_token,
        "moe_ffn_hidden_size": config.ffn,
        "moe_router_load_balancing_type": "none",  # RowRouter's own
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": sizes.expert,
        "expert_tensor_parallel_size": sizes.expert_tensor,
    }
    return TransformerConfig(
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
        moe_token_dispatcher_type="alltoall",  # variable lengths ask for it, experts or not
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        sequence_parallel=sizes.sequence,
        use_cpu_initialization=not current_platform().is_cuda,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        **(pipeline if sizes.pipeline > 1 else {}),
        **(experts if config.experts else {}),
        **recompute,
    )


def _sum_over_sequence(model: nn.Module, groups: ProcessGroups) -> None:
    """Let tensor ranks sum the gradients of the weights that each applies to its own tokens only: norms and routers.

    megatron-core marks those weights with `sequence_parallel`, and sums them in its own optimizer, which is not used.
    """

    def sum_up(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=groups.tensor)
        return gradient

    for weight in model.parameters():
        if getattr(weight, "sequence_parallel", False):
            weight.register_hook(sum_up)


def _hide_padding(model: GPTModel, config: LanguageConfig, groups: ProcessGroups) -> None:
    """Give the padded rows of the vocabulary no probability, so that the loss does not depend on them."""
    own_rows = config.padded_vocabulary // groups.layout.config.tensor
    first = groups.seat.tensor * own_rows
    used = min(max(config.vocabulary - first, 0), own_rows)
    if used == own_rows:
        return

    def hide(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits, bias = output
        if logits.shape[-1] != own_rows:  # gathered: who asked for that cuts the padding off
            return output
        is_padding = torch.arange(own_rows, device=logits.device) >= used
        return logits.masked_fill(is_padding, torch.finfo(logits.dtype).min), bias

    model.output_layer.register_forward_hook(hide)


def draw_weights(model: nn.Module, config: LanguageConfig, groups: ProcessGroups, seed: int) -> None:
    """Set every weight from the run's seed and the weight's name: the same whole tensor for every layout and device.

    Norms start at one, biases at zero, tags and skip token uniform in [0, 1) as the released tags, matrices normal.
    The matrices are drawn on the CPU, by as many threads as this process has cores.
    """
    shards = shards_of(model, config, groups)
    matrices = []
    for own_name, weight in model.named_parameters():
        shard, values = shards[own_name], weight.detach()
        name, blocks = shard.name, shard.blocks
        if weight.ndim == 1:
            values.fill_(1.0 if name.endswith("weight") else 0.0)
            if name.endswith(("_tag", "skip_token")):
                values.copy_(torch.rand(weight.shape, generator=generator(seed, name)))
            continue
        is_output = name.endswith(("linear_proj.weight", "linear_fc2.weight", "experts.weight2"))
        std = config.init_std / (2 * config.layers) ** 0.5 if is_output else config.init_std
        if not shard.is_expert:
            matrices.append((values, shard.whole, blocks, std, generator(seed, name)))
            continue
        for expert, part in enumerate(values, start=blocks[0].offset[0]):
            regions = [b for b in blocks if b.offset[0] <= expert < b.offset[0] + b.shape[0]]
            own = tuple(Block(region.offset[1:], region.shape[1:]) for region in regions)
            matrices.append((part, shard.whole[1:], own, std, generator(seed, f"{name}.{expert}")))
    matrices.sort(key=lambda matrix: prod(matrix[1]), reverse=True)  # so that none that takes long is begun last
    in_threads(lambda matrix: draw_normal(*matrix), matrices)
