"""How one model is distributed over processes: data x pipeline x tensor.

Process r is at (r // (pipeline * tensor), r // tensor % pipeline, r % tensor): the tensor shards of a layer, which
communicate most, are neighbours, and copies of the model are furthest apart (Narayanan et al., 2021, section 3).
Whatever cannot be split, or is not proven to train as one process does, is refused here, before weights are read.
Imports no torch at the top, so that a configuration can be checked on a login node.
"""

import os
from dataclasses import dataclass
from typing import Any

from ...config.sections import ParallelSettings
from ...config.split_rules import MODELS
from ...errors import ConfigError, LaunchError
from ...log import world_size


@dataclass(frozen=True)
class Layout:
    """Sizes of the three dimensions, the pipeline's schedule, and its micro-batches per batch."""

    data: int
    pipeline: int
    tensor: int
    schedule: str
    micro_batches: int

    def __str__(self) -> str:
        return f"{self.data} data x {self.pipeline} pipeline x {self.tensor} tensor"


def read_layout(config: Any, base: str) -> Layout | None:
    """The layout in a run's StageConfig, checked against the launch and the model's configuration.

    None when nothing is split. Raises LaunchError for a launch that does not fit, ConfigError for a model that cannot
    be split that way.
    """
    settings = config.part(ParallelSettings)
    tensor, pipeline = settings.tensor_parallel_size, settings.pipeline_parallel_size
    if tensor * pipeline == 1:
        return None
    asked = f"tensor_parallel_size: {tensor} x pipeline_parallel_size: {pipeline}"
    for flag, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(flag) == "true":
            raise LaunchError(
                f"{asked} splits the model itself, and {name} would split it again: launch with "
                "accelerate_configs/hybrid_3d.yaml or its like, or leave both keys out"
            )
    processes = world_size()
    if processes % (tensor * pipeline):
        raise LaunchError(
            f"{asked} needs a multiple of {tensor * pipeline} processes, {processes} were launched: change "
            "num_processes of the accelerate config, or these keys"
        )
    revision, remote = config.values.get("model_revision") or "main", bool(config.values.get("trust_remote_code"))
    _check_model(base, tensor, pipeline, revision=revision, trust_remote_code=remote)
    return Layout(
        processes // (tensor * pipeline), pipeline, tensor, settings.pipeline_schedule, settings.pipeline_micro_batches
    )


def _check_model(base: str, tensor: int, pipeline: int, **options: Any) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, **options)
    if config.model_type not in MODELS:
        raise ConfigError(
            f"model_name_or_path: a {config.model_type} is not proven to train when split as it does unsplit; use one "
            f"of {', '.join(MODELS)}, or zero3.yaml without tensor_parallel_size and pipeline_parallel_size"
        )
    if getattr(config, "attention_dropout", 0):
        raise ConfigError(
            f"model_name_or_path: {base} has attention_dropout: {config.attention_dropout} in its config.json, and "
            "dropout on several processes differs from one process; set it to 0 there, or do not split the model"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % tensor:
            raise ConfigError(
                f"tensor_parallel_size: {tensor} does not divide {name}, which is {getattr(config, name)} in {base}; "
                f"{_divisors(config)} do, or use pipeline_parallel_size"
            )
    if config.num_hidden_layers < pipeline:
        raise ConfigError(
            f"pipeline_parallel_size: {pipeline} stages, and {base} has {config.num_hidden_layers} layers; use fewer"
        )


def _divisors(config: Any) -> str:
    from math import gcd

    common = gcd(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    return ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
