"""PPO's settings on top of transformers'. Each default names its source."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

_CHOICES = {
    "kl_estimator": ("k1", "k2", "k3"),
    "value_mode": ("head", "adapter", "model"),
    "on_unhealthy": ("warn", "stop", "rollback"),
    "vllm_mode": ("colocate", "server"),
}


@dataclass
class PPOConfig(TrainingArguments):  # type: ignore[misc]
    """Settings of `PPOTrainer`.

    A rollout is `per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches` prompts per process.
    Each rollout is trained on for `num_ppo_epochs` passes; each mini-batch is one optimizer step.

    Sources: [O] Ouyang et al., 2022; [Z] Ziegler et al., 2019; [H] Huang et al., 2024, "The N+ implementation details
    of RLHF with PPO"; [S] Schulman et al., 2017; [A] Andrychowicz et al., 2021.
    """

    # As in TRL's trainers
    logging_steps: float = field(default=10, metadata={"help": "Log every x steps; below 1, a share of all steps."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass instead of keeping them."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "Compute in bf16; None: unless fp16 is set."})

    learning_rate: float = field(
        default=1e-5, metadata={"help": "The policy's. LoRA needs about ten times [H]'s 3e-6."}
    )
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Adam's epsilon, as usual in PPO [A, H]."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts (in tokens) are refused before training; None: any length."}
    )

    # Rollout
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in one pass over a rollout [H: 1]."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout [S, H: 4]."})
    max_completion_length: int = field(default=64, metadata={"help": "Most tokens per completion, with EOS [H: 53]."})
    temperature: float = field(
        default=1.0, metadata={"help": "For sampling and for every log-probability [H: 0.7; 1 keeps PPO on-policy]."}
    )
    num_logged_completions: int = field(
        default=4, metadata={"help": "Completions per rollout that are logged with their scores."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts in each epoch."})

    # Rollouts by vLLM; the names and defaults are those of TRL's online trainers.
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM; needs CUDA and the package vllm."})
    vllm_mode: Literal["colocate", "server"] = field(
        default="colocate", metadata={"help": "In this process (colocate), or in a separate `trl vllm-serve` (server)."}
    )
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "As in http://host:8000."})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "Share of the GPU that vLLM takes."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share vLLM's weights."})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Most tokens per prompt and completion."})
    vllm_enable_sleep_mode: bool = field(default=False, metadata={"help": "Free vLLM's GPU memory during updates."})

    # Reward
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight per reward; None: all 1."})
    reward_clip: float | None = field(default=None, metadata={"help": "Clip scores to [-x, x] (OpenRLHF: 10)."})
    reward_normalization: bool = field(
        default=False,
        metadata={"help": "Subtract the scores' running mean and divide by their running standard deviation [Z]."},
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion that did not end by EOS [H: 1]."}
    )

    # KL to the reference
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of KL in the reward [H: 0.05]."})
    kl_estimator: Literal["k1", "k2", "k3"] = field(
        default="k1", metadata={"help": "k1, k2 or k3 (Schulman, 2020); k1 is unbiased [Z, H]."}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Adapt kl_coef towards this KL, in nats per completion [Z]; None: fixed."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Completions over which kl_coef adapts [Z: 10,000]."})
    kl_stop: float | None = field(
        default=None,
        metadata={
            "help": "Skip the rest of a rollout once approximate KL to the sampling policy exceeds this (nats per "
            "token)."
        },
    )

    # Objective
    gamma: float = field(default=1.0, metadata={"help": "Discount factor [Z, H: 1]."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda [Z, H: 0.95]."})
    clip_range: float = field(default=0.2, metadata={"help": "The ratio is clipped below 1 - x [S: 0.2]."})
    clip_range_high: float | None = field(
        default=None, metadata={"help": "The ratio is clipped above 1 + x; None: clip_range (DAPO: 0.28)."}
    )
    dual_clip: float | None = field(default=None, metadata={"help": "Clip ratio of bad actions (Ye et al., 2020: 3)."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Advantages to zero mean and unit variance over the rollout [Z, H]."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss [Z, H: 0.1]."})
    value_clip: float | None = field(default=0.2, metadata={"help": "Clip values to old ± x; None: no [Z, H: 0.2]."})

    # Critic
    value_mode: Literal["head", "adapter", "model"] = field(
        default="head", metadata={"help": "The critic: head on the policy's trunk | separate adapter | separate model."}
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "None: learning_rate (OpenRLHF: 9e-6)."})
    critic_warmup_steps: int = field(default=0, metadata={"help": "Train only the critic in this many first steps."})

    on_unhealthy: Literal["warn", "stop", "rollback"] = field(
        default="warn",
        metadata={"help": "On a health finding: go on, stop, or stop with the last healthy rollout's weights."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from a model's folder or repository."})

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
        # Reward functions get every column.
        self.remove_unused_columns = False
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one pass over a rollout."""
        return int(self.gradient_accumulation_steps * self.num_mini_batches)

    @property
    def rollout_size(self) -> int:
        """Completions per rollout and process."""
        return int(self.per_device_train_batch_size * self.micro_batches)

    @property
    def recomputes(self) -> bool:
        """Whether a rollout's log-probabilities are recomputed in the update's precision."""
        return bool(self.use_vllm or self.bf16 or self.fp16)
