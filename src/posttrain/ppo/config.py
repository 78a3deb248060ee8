"""PPO's settings on top of transformers'. Each default names where it comes from."""

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

    A rollout is `per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches` prompts a process. It is
    gone through `num_ppo_epochs` times; each mini-batch is one optimizer step.

    Sources: [O] Ouyang et al., 2022; [Z] Ziegler et al., 2019; [H] Huang et al., 2024, "The N+ implementation details
    of RLHF with PPO"; [S] Schulman et al., 2017; [A] Andrychowicz et al., 2021.
    """

    # As in TRL's trainers
    logging_steps: float = field(default=10, metadata={"help": "Log every x steps; below 1, every share of them."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Compute activations again in the backward pass rather than keep them."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "Compute in bf16; None: unless fp16 is set."})

    learning_rate: float = field(
        default=1e-5, metadata={"help": "Of the policy. LoRA wants about ten times [H]'s 3e-6."}
    )
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Adam's epsilon, PPO's customary one [A, H]."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts are refused before training; None: any length."}
    )

    # Rollout
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in one pass over a rollout [H: 1]."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout [S, H: 4]."})
    max_completion_length: int = field(default=64, metadata={"help": "Tokens drawn at most, EOS included [H: 53]."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of the draws, and of every log-probability [H: 0.7; 1 keeps PPO on-policy]."}
    )
    num_logged_completions: int = field(
        default=4, metadata={"help": "Completions of a rollout that are kept to be read, with their scores."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Prompts in a new order each epoch."})

    # Rollouts by vLLM; the names and defaults are those of TRL's online trainers.
    use_vllm: bool = field(default=False, metadata={"help": "Draw with vLLM; needs CUDA and the package vllm."})
    vllm_mode: Literal["colocate", "server"] = field(
        default="colocate", metadata={"help": "In this process, or in a `trl vllm-serve` of its own."}
    )
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Of the server, http://host:8000."})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "Share of the GPU that vLLM takes."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share vLLM's weights."})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Tokens of prompt and completion."})
    vllm_enable_sleep_mode: bool = field(default=False, metadata={"help": "Leave the GPU's memory to the update."})

    # Reward
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight a reward; None: all 1."})
    reward_clip: float | None = field(default=None, metadata={"help": "Scores are cut to [-x, x] (OpenRLHF: 10)."})
    reward_normalization: bool = field(
        default=False,
        metadata={"help": "Divide scores by their running standard deviation, around their running mean [Z]."},
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
        default=None, metadata={"help": "Nats a completion to steer KL to by changing its weight [Z]; None: fixed."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Completions over which the weight moves [Z: 10,000]."})
    kl_stop: float | None = field(
        default=None, metadata={"help": "Leave a rollout when its policy is that far from itself (nats a token)."}
    )

    # Objective
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards [Z, H: 1]."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda [Z, H: 0.95]."})
    clip_range: float = field(default=0.2, metadata={"help": "The ratio is cut below 1 - x [S: 0.2]."})
    clip_range_high: float | None = field(
        default=None, metadata={"help": "And above 1 + x; None: clip_range (DAPO: 0.28)."}
    )
    dual_clip: float | None = field(default=None, metadata={"help": "Bound for bad actions (Ye et al., 2020: 3)."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Zero mean, unit variance over the rollout [Z, H]."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss [Z, H: 0.1]."})
    value_clip: float | None = field(default=0.2, metadata={"help": "Values are cut around the old ones [Z, H: 0.2]."})

    # Critic
    value_mode: Literal["head", "adapter", "model"] = field(
        default="head", metadata={"help": "head on the policy's trunk | adapter of its own | model of its own."}
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "None: learning_rate (OpenRLHF: 9e-6)."})
    critic_warmup_steps: int = field(default=0, metadata={"help": "First optimizer steps that train the critic only."})

    on_unhealthy: Literal["warn", "stop", "rollback"] = field(
        default="warn",
        metadata={"help": "What to do when health.py finds something: go on, stop, or stop at the last good."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model's folder brings along."})

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
        # Every column reaches the reward functions.
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
        """Completions of one rollout, a process."""
        return int(self.per_device_train_batch_size * self.micro_batches)

    @property
    def recomputes(self) -> bool:
        """Whether a rollout's log-probabilities are computed again, in an update's precision."""
        return bool(self.use_vllm or self.bf16 or self.fp16)
