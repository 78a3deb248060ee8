"""Rollouts with vLLM through `trl.generation`: optional, on CUDA.

vLLM's kernels, and often its precision, differ from the trainer's. So a rollout's log-probabilities are recomputed by
the policy (collector.py), and the first ratio is 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .actor_critic import POLICY, ActorCritic
from .config import PPOConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class VLLMSampler:
    """Samples completions from the policy as it is at each call.

    Raises ValueError without CUDA or without the package vllm.
    """

    def __init__(
        self,
        actor_critic: ActorCritic,
        accelerator: "Accelerator",
        tokenizer: "PreTrainedTokenizerBase",
        ends: set[int],
        args: PPOConfig,
    ):
        from ..upstream.trl import is_vllm_available, make_vllm_generation

        if not torch.cuda.is_available() or not is_vllm_available():
            missing = "the package vllm (pip install trl[vllm])" if torch.cuda.is_available() else "a CUDA device"
            raise ValueError(f"use_vllm: it needs {missing}; leave use_vllm out to draw with transformers")
        self.actor_critic, self.args = actor_critic, args
        self.generation = make_vllm_generation(
            actor_critic.policy, accelerator, tokenizer, mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url, tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization, max_model_length=args.vllm_max_model_length,
            enable_sleep_mode=args.vllm_enable_sleep_mode, temperature=args.temperature,
            max_completion_length=args.max_completion_length, trust_remote_code=args.trust_remote_code,
            generation_kwargs={"stop_token_ids": sorted(ends)},
        )  # fmt: skip

    def draw(self, prompts: Sequence[list[int]], seed: int) -> list[list[int]]:
        """Token ids of one completion per prompt, EOS included."""
        with self.actor_critic.role(POLICY), kept_base_weights(self.actor_critic.policy):
            self.generation.sync_weights()
        self.generation.generation_kwargs["seed"] = seed
        _, ids, _, _ = self.generation.generate([list(p) for p in prompts], images=None, num_generations=1)
        return [list(row) for row in ids]


@contextmanager
def kept_base_weights(policy: "PreTrainedModel") -> Iterator[None]:
    """Restore the base weights exactly after the block.

    To hand the weights to vLLM, TRL merges the adapter and unmerges it again. In bf16 rounding errors stay behind:
    after some twenty rollouts the frozen base is another model.
    """
    layers = [m for m in policy.modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    kept = [layer.base_layer.weight.detach().clone() for layer in layers]
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.base_layer.weight.copy_(weight)
