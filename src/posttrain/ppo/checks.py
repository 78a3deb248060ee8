"""What `PPOTrainer` refuses, before anything is drawn."""

from typing import TYPE_CHECKING

from ..data.conversation import render
from .config import PPOConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def check_dataset(dataset: "Dataset", name: str, args: PPOConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError unless there are enough prompts for a rollout and none is too long.

    `name` is the trainer's argument that the dataset was passed as.
    """
    if dataset is None or not len(dataset):
        raise ValueError(f"{name} is empty; PPO needs rows with a prompt")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{name} has no column 'prompt'; it has {', '.join(dataset.column_names)}")
    needed = args.rollout_size * args.world_size
    if name == "train_dataset" and len(dataset) < needed:
        raise ValueError(
            f"{name} has {len(dataset)} prompts, one rollout takes {needed}; lower per_device_train_batch_size, "
            "gradient_accumulation_steps or num_mini_batches, or add rows"
        )
    if args.max_prompt_length is not None:
        prompts = dataset["prompt"]
        lengths = [len(render(p, tokenizer, add_generation_prompt=not isinstance(p, str))) for p in prompts]
        longer = [number for number, length in enumerate(lengths, 1) if length > args.max_prompt_length]
        if longer:
            raise ValueError(
                f"{name}: {len(longer)} of {len(lengths)} prompts are longer than max_prompt_length="
                f"{args.max_prompt_length} tokens (row {longer[0]} has {lengths[longer[0] - 1]}); raise it, or cut them"
            )


def check_settings(args: PPOConfig, *, is_fsdp: bool, is_deepspeed: bool) -> None:
    """Raise ValueError for settings that contradict each other or the launched strategy."""
    if is_fsdp:
        raise ValueError(
            "PPO's checkpoints do not gather what FSDP splits: use an accelerate config with DDP, or with "
            "DeepSpeed's ZeRO-2 or ZeRO-3"
        )
    # DeepSpeed takes the optimizer step inside the backward pass, before a gradient could be dropped.
    if is_deepspeed and args.kl_stop is not None:
        raise ValueError("kl_stop cannot leave out an optimizer step of DeepSpeed's; use kl_target, or DDP")
    if is_deepspeed and args.critic_warmup_steps:
        raise ValueError("critic_warmup_steps cannot keep DeepSpeed from moving the policy; set it to 0, or use DDP")
    if args.kl_stop is not None and args.fp16:
        raise ValueError("kl_stop: fp16's gradient scaler cannot leave out an optimizer step; use bf16, or kl_target")
    if args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end: PPO's checkpoints are to resume from; use on_unhealthy: rollback")
