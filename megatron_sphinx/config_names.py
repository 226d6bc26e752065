"""What other programs call our keys: who writes one of those names is told ours."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

_OTHERS = {
    "optimizer.learning_rate": "lr base_lr max_lr peak_lr",
    "optimizer.minimum_learning_rate": "min_lr minimum_lr lr_min eta_min final_lr end_lr minimum_rate",
    "optimizer.warmup_steps": "warmup lr_warmup_steps lr_warmup_iters warmup_iters num_warmup_steps warmup_ratio",
    "optimizer.weight_decay": "wd decay",
    "optimizer.beta1": "adam_beta1 betas beta",
    "optimizer.beta2": "adam_beta2",
    "optimizer.epsilon": "eps adam_epsilon adam_eps",
    "optimizer.gradient_clip": "clip clip_grad grad_clip max_grad_norm gradient_clipping clip_grad_norm max_norm",
    "training.steps": "max_steps num_steps total_steps train_steps train_iters max_iters iterations iters",
    "training.epochs": "max_epochs num_epochs num_train_epochs epoch",
    "training.precision": "dtype torch_dtype bf16 fp16 mixed_precision amp",
    "training.activation_checkpointing": "gradient_checkpointing recompute recompute_granularity checkpointing",
    "training.train": "freeze trainable",
    "model.layers": "num_layers n_layers n_layer num_hidden_layers depth",
    "model.hidden": "hidden_size dim d_model n_embd embed_dim width",
    "model.ffn": "ffn_hidden_size intermediate_size ffn_dim mlp_dim ffn_size",
    "model.heads": "num_heads n_heads n_head num_attention_heads attention_heads",
    "model.groups": "num_key_value_heads n_kv_heads kv_heads num_query_groups query_groups",
    "model.vocabulary": "vocab vocab_size padded_vocab_size",
    "model.experts": "num_experts num_local_experts n_experts",
    "model.experts_per_token": "topk top_k moe_router_topk num_experts_per_tok",
    "model.balance_loss_coefficient": "aux_loss_coef moe_aux_loss_coeff router_aux_loss_coef balance_loss",
    "model.z_loss_coefficient": "z_loss moe_z_loss_coeff z_loss_coef",
    "model.rope_theta": "rotary_base rope_base theta rotary_theta",
    "model.norm_epsilon": "rms_norm_eps norm_eps layernorm_epsilon layer_norm_eps",
    "model.init_std": "init_method_std initializer_range std",
    "model.weights": "load init_from pretrained checkpoint_path model_name_or_path",
    "vision.experts": "encoders vision_tower visual_experts",
    "vision.views": "crops sub_images tiles",
    "data.pairs": "image_pairs captions images",
    "data.text": "train_data data_path documents corpus",
    "data.tokenizer": "tokenizer_model tokenizer_path",
    "data.pairs_per_step": "batch_size global_batch_size train_batch_size",
    "data.text_tokens_per_step": "tokens_per_step text_tokens batch_tokens",
    "data.sequence_length": "seq_length seq_len max_seq_len max_length context_length block_size max_words",
    "data.micro_batch_rows": "micro_batch_size micro_batch per_device_train_batch_size",
    "data.workers": "num_workers dataloader_num_workers",
    "parallel.tensor": "tp tensor_parallel tensor_model_parallel_size tensor_parallel_size tp_size",
    "parallel.pipeline": "pp pipeline_parallel pipeline_model_parallel_size pp_size",
    "parallel.sequence": "sp sequence_parallel",
    "parallel.expert": "ep expert_parallel expert_model_parallel_size ep_size",
    "parallel.encoder": "encoder_ranks encoders_ranks",
    "stage.lookahead": "prefetch ahead",
    "checkpoint.interval": "save_interval save_steps save_every checkpoint_interval save_freq",
    "checkpoint.keep": "save_total_limit keep_last max_to_keep",
    "checkpoint.resume": "resume_from_checkpoint auto_resume resume_from",
    "run.folder": "output_dir out_dir output save_dir work_dir outdir output_folder dir",
    "run.print_interval": "log_interval logging_steps log_every print_freq log_freq",
    "run.timeout": "distributed_timeout timeout_minutes",
    "loss.text_weight": "text_loss_weight",
}
_OURS = {other: key for key, names in _OTHERS.items() for other in names.split()}


def keys_below(cls: type, path: str = "") -> Iterator[str]:
    """Yield the dotted name of every key below a dataclass of sections, lists not entered."""
    types = get_type_hints(cls)
    for item in fields(cls):
        if is_dataclass(kind := types[item.name]):
            yield from keys_below(kind, f"{path}{item.name}.")  # type: ignore[arg-type]
        else:
            yield f"{path}{item.name}"


def meant(cls: type, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Find the first key of a configuration that is not known, but whose meaning is.

    Args:
        cls: the whole configuration's class.
        values: plain values, section by section.

    Returns:
        The key as it was given, and what it is called here; None where no key's meaning is clearer than its spelling.
    """
    known = list(keys_below(cls))
    sections = {key.partition(".")[0] for key in known}
    for section, given in values.items():
        inner = given if isinstance(given, Mapping) and section in sections else {"": given}
        for name in inner:
            key = f"{section}.{name}".rstrip(".")
            is_section = not name and section in sections
            if key not in known and not is_section and (ours := _meant(section, name, known)):
                return key, ours
    return None


def _meant(section: str, name: str, known: list[str]) -> str | None:
    """Name the key of ours that a name stands for; None where it is nearer to a key by its spelling."""
    leaf = (name or section).lower().replace("-", "_")
    if leaf in _OURS:
        return _OURS[leaf]
    siblings = [key.partition(".")[2] for key in known if key.startswith(f"{section}.")]
    elsewhere = [key for key in known if key.partition(".")[2] == leaf]
    return elsewhere[0] if elsewhere and not get_close_matches(leaf, siblings, n=1) else None
