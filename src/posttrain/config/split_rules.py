"""What can be trained with a model split over processes, checked on the configuration alone. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .sections import AdapterSettings

MODELS = ("llama", "mistral", "qwen2")  # tested in tests/distributed
METHODS = ("lora", "rslora", "none")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")  # elementwise: no update depends on the rest of a parameter

# Losses per pair: the mean over a batch is the mean of the means over its micro-batches.
PAIR_LOSSES = frozenset({
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm",
})  # fmt: skip

TOKEN_LOSSES = frozenset({"sft"})  # a mean over tokens: micro-batches are weighted by their number of tokens


def is_split(values: Mapping[str, Any]) -> bool:
    """Whether a configuration splits the model over processes."""
    return int(values.get("tensor_parallel_size") or 1) > 1 or int(values.get("pipeline_parallel_size") or 1) > 1


def check_settings(recipe: str, values: Mapping[str, Any], adapter: AdapterSettings) -> None:
    """Refuse settings that do not work with a split model. Raises ConfigError."""
    if not is_split(values):
        return
    where = "tensor_parallel_size, pipeline_parallel_size"

    def refuse(key: str, why: str, instead: str) -> None:
        raise ConfigError(f"{key} does not go with {where}: {why}; {instead}")

    if adapter.method not in METHODS:
        refuse(f"adapter.method: {adapter.method}", "it is not tested on a split model", f"use {', '.join(METHODS)}")
    if adapter.dropout:
        refuse(f"adapter.dropout: {adapter.dropout}", "dropout would differ from that on one process", "set it to 0")
    if adapter.modules_to_save:
        refuse("adapter.modules_to_save", "copies of whole modules are not split", "leave it out, or use method: none")
    targets = adapter.target_modules or []
    ends = [t for t in ([targets] if isinstance(targets, str) else targets) if "lm_head" in t or "embed" in t]
    if ends:
        refuse(
            f"adapter.target_modules: {ends[0]}",
            "head and embeddings are split over the vocabulary",
            "target the layers",
        )
    if values.get("load_in_4bit"):
        refuse("load_in_4bit: true", "quantised weights cannot be split", "use accelerate_configs/ddp.yaml")
    for key, why in (
        ("fp16", "processes would skip different steps"),
        ("packing", "packed rows need masks, which pipeline stages do not pass on"),
        ("eval_packing", "packed rows need masks, which pipeline stages do not pass on"),
        ("padding_free", "packed rows need masks, which pipeline stages do not pass on"),
        ("activation_offloading", "it is not tested on a split model"),
        ("torch_compile", "it is not tested on a split model"),
        ("use_liger_kernel", "its kernels need whole layers"),
        ("neftune_noise_alpha", "noise would differ from that on one process"),
        ("label_smoothing_factor", "it needs all logits, which no process has"),
        ("auto_find_batch_size", "processes would find different sizes"),
        ("precompute_ref_log_probs", "it is not tested on a split model"),
        ("sync_ref_model", "it copies whole parameters"),
        ("use_weighting", "it is not tested on a split model"),
    ):
        if values.get(key):
            refuse(f"{key}: {values[key]}", why, "leave it out")
    if str(values.get("eval_strategy") or "no") != "no":
        refuse(
            f"eval_strategy: {values['eval_strategy']}", "a split model is measured at the end, when it is whole again",
            "set it to no; test_file is measured at the end",
        )  # fmt: skip
    optimizer = str(values.get("optim") or OPTIMIZERS[0])
    if optimizer not in OPTIMIZERS:
        refuse(f"optim: {optimizer}", "it needs whole parameters", f"use {' or '.join(OPTIMIZERS)}")
    _check_losses(recipe, values, refuse)
    if int(values["pipeline_parallel_size"]) > 1:
        _check_micro_batches(values)


def _check_losses(recipe: str, values: Mapping[str, Any], refuse: Any) -> None:
    losses = values.get("loss_type") or []
    losses = [losses] if isinstance(losses, str) else losses
    known = PAIR_LOSSES | TOKEN_LOSSES if recipe == "dpo" else {"nll"}
    for loss in losses:
        if loss not in known:
            refuse(f"loss_type: {loss}", "it is not tested on a split model", f"use {', '.join(sorted(known))}")


def _check_micro_batches(values: Mapping[str, Any]) -> None:
    stages, count = int(values["pipeline_parallel_size"]), int(values["pipeline_micro_batches"])
    rows = int(values.get("per_device_train_batch_size") or 8)
    if rows % count:
        raise ConfigError(
            f"pipeline_micro_batches: {count} does not divide per_device_train_batch_size: {rows}; change either"
        )
    if values["pipeline_schedule"] == "1f1b" and count < stages:
        raise ConfigError(
            f"pipeline_schedule: 1f1b needs as many micro-batches as stages: pipeline_micro_batches is {count}, "
            f"pipeline_parallel_size {stages}; raise the former, or use gpipe"
        )
