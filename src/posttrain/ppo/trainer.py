"""PPO on transformers' own training loop.

The loop asks `_prepare_inputs` for each micro-batch and `compute_loss` for its loss; everything else - accumulation,
clipping, schedules, checkpoints, callbacks - is transformers'. So a rollout is made when its first micro-batch is asked
for, kept, reshuffled for each pass, and handed out micro-batch by micro-batch:

    rollout = num_ppo_epochs passes
    pass    = num_mini_batches optimizer steps
    step    = gradient_accumulation_steps micro-batches of per_device_train_batch_size

A checkpoint contains the rollout and the controllers' state, so a resumed run equals an uninterrupted one.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from ..distributed.deepspeed import disable_zero3_init, is_split, whole
from ..models import cpu
from ..models.generation import check_generation_settings
from . import checkpoint, objective
from .actor_critic import POLICY, ActorCritic
from .collector import Collector
from .config import PPOConfig
from .health import Finding, HealthWatch
from .metrics import Metrics
from .rollout import Rollout, RolloutSampler, micro_batches

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class PPOTrainer(Trainer):  # type: ignore[misc]
    """Proximal policy optimisation of a language model, used like TRL's online trainers.

    Args:
        model: a causal language model, a folder or hub id of one, or a PeftModel. A PeftModel's reference is a frozen
            copy of its adapter; with `peft_config`, it is the model without adapter. Dropout is switched off.
        reward_funcs: one or several of: the folder of a reward adapter that was trained on this policy's base; a
            sequence-classification model with one label; a function `f(prompts=, completions=, <column>=..., **_)` that
            returns one score per completion, or None to leave one to the other rewards.
        args: the settings.
        train_dataset: rows with a `prompt`, plain or conversational; their other columns reach the functions.
        eval_dataset: the same, for evaluation.
        processing_class: the policy's tokenizer.
        reward_processing_classes: one tokenizer per reward; None for functions, and for the model's own tokenizer.
        peft_config: the configuration of a fresh adapter to train.

    On a CPU it replaces TRL's language-model head, PEFT's LoRA layer and transformers' attention call for the rest of
    this process (`models/cpu/`): the same numbers, faster.

    Raises ValueError for arguments that do not fit together, before anything is sampled.
    """

    # `compute_loss` divides by the tokens of the whole optimizer step itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: Any,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

        from ..upstream.trl import disable_dropout_in_model
        from .checks import check_dataset, check_settings
        from .rewards import ModelReward, as_reward, check_templates

        args = args or PPOConfig("ppo")
        set_seed(args.seed)
        disable_zero3_init()
        cpu.install()
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=args.trust_remote_code)
        if any(map(is_split, model.parameters())):
            raise ValueError("ZeRO-3 has split the model already: load it before PPOConfig is made, or pass its name")
        tokenizer = processing_class or AutoTokenizer.from_pretrained(model.config.name_or_path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        continued = hasattr(model, "peft_config")
        if continued and peft_config is not None:
            raise ValueError("peft_config is for a model without adapter; this one has one, which is trained on")
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        check_dataset(train_dataset, "train_dataset", args, tokenizer)
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset", args, tokenizer)
        check_generation_settings(model)
        actor_critic = ActorCritic(
            model, value_mode=args.value_mode, copy_reference=continued, temperature=args.temperature,
            entropies=args.recomputes,
        )  # fmt: skip
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        tokenizers = reward_processing_classes
        if not isinstance(tokenizers, (list, tuple)):
            tokenizers = [tokenizers] * len(funcs)
        if len(tokenizers) != len(funcs):
            raise ValueError(f"reward_processing_classes has {len(tokenizers)} tokenizers for {len(funcs)} rewards")
        self.rewards = [as_reward(f, t, actor_critic, tokenizer) for f, t in zip(funcs, tokenizers, strict=True)]
        check_templates(self.rewards, train_dataset)
        if args.reward_weights is not None and len(args.reward_weights) != len(funcs):
            raise ValueError(f"reward_weights has {len(args.reward_weights)} numbers for {len(funcs)} rewards")
        if args.value_mode == "adapter":
            actor_critic.add_value_adapter()
        # With dropout the first step's ratio would not be 1, and values would be noisy.
        disable_dropout_in_model(actor_critic)

        self.optimizer: Any
        self.tokenizer = tokenizer
        self.rollout: Rollout | None = None
        self.accounted = 0.0  # seconds of this micro-batch that are already in another time/ metric
        self.batches: list[Tensor] = []
        self.tokens_per_step: list[float] = []
        self.abandoned = False  # past kl_stop: the rest of the rollout is skipped
        self._step = 0  # micro-batches so far
        self.health = HealthWatch(args.on_unhealthy, args.kl_target)
        super().__init__(
            model=actor_critic,
            args=args,
            data_collator=_as_they_are,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.metrics = Metrics(self.accelerator)
        self.collector = Collector(actor_critic, self.rewards, args, tokenizer, self.accelerator, self.metrics)
        self.add_callback(self.health)
        self.reward_models = [reward for reward in self.rewards if isinstance(reward, ModelReward)]
        for reward in self.reward_models:
            if not getattr(reward.model, "is_quantized", False):
                reward.model.to(self.accelerator.device)
        check_settings(args, is_fsdp=self.is_fsdp_enabled, is_deepspeed=self.is_deepspeed_enabled)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `train`, beginning with a new rollout, or with the one in the checkpoint."""
        self._step, self.rollout, self.batches, self.abandoned = 0, None, [], False
        return super().train(*args, **kwargs)

    # Data

    def get_train_dataloader(self) -> Any:
        """Batches that are rollouts, each repeated once per micro-batch of the rollout."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.rollout_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: "Dataset | None" = None) -> RolloutSampler:
        return RolloutSampler(
            len(self.train_dataset),
            self.args.rollout_size * self.args.world_size,
            self.micro_steps,
            seed=self.args.seed,
            shuffle=self.args.shuffle_dataset,
        )

    @property
    def micro_steps(self) -> int:
        """Micro-batches per rollout, over all its passes."""
        steps: int = self.args.micro_batches * self.args.num_ppo_epochs
        return steps

    @property
    def within_rollout(self) -> bool:
        """Whether the current rollout has micro-batches left."""
        return bool(self._step % self.micro_steps)

    @property
    def warming(self) -> bool:
        """Whether this optimizer step trains the critic only."""
        return bool(self.state.global_step < self.args.critic_warmup_steps)

    # For the record and dashboards

    @property
    def policy(self) -> Any:
        """The language model that is trained, with its adapters, without accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model).policy

    @property
    def findings(self) -> Sequence[Finding]:
        """The health findings so far, each with the step at which it began."""
        return tuple(self.health.findings)

    def pop_completions(self) -> list[dict[str, Any]]:
        """The last rollout's first `num_logged_completions`, each returned once: `prompt`, `completion`, `score`,
        `rewards/<name>` and `kl` to the reference (nats per completion)."""
        return self.collector.pop_completions()

    @property
    def passes_per_token(self) -> float:
        """Forward passes per trained token, without those of the updates.

        A rollout takes one to sample a token, one of the reference, one of each reward model, and one of the policy if
        log-probabilities are recomputed. Each is used for `num_ppo_epochs` updates.
        """
        return float((2 + self.args.recomputes + len(self.reward_models)) / self.args.num_ppo_epochs)

    def describe_work(self) -> str:
        """Rollout size, passes and steps of a run, in one line."""
        args = self.args
        size = args.rollout_size * args.world_size
        rollouts = len(self.train_dataset) // size
        steps = args.num_mini_batches * args.num_ppo_epochs
        total = args.max_steps if args.max_steps > 0 else math.ceil(rollouts * args.num_train_epochs * steps)
        return (
            f"rollout {size} = {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
            f"{args.num_mini_batches} mini-batches x {args.world_size} processes; {args.num_ppo_epochs} passes each; "
            f"{-(-total // steps)} rollouts; {total} steps"
        )

    # Rollout

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """The next micro-batch. Before a rollout's first one, the rollout is made."""
        if not self.model.training:
            rollout = self._make_rollout(inputs, "eval")
            everything = rollout.completion_mask.sum() * self.args.world_size  # makes the loss this process's mean
            return self._micro_batch(rollout, torch.arange(len(rollout)), everything)
        at = self._step % self.micro_steps
        if at == 0:
            begun = time.perf_counter()
            self.rollout = self._make_rollout(inputs, "train")
            self.accounted += time.perf_counter() - begun
            self.abandoned = False
        assert self.rollout is not None
        epoch, number = divmod(at, self.args.micro_batches)
        if number == 0 or not self.batches:
            self._deal(epoch)
        step = number // self.args.gradient_accumulation_steps
        return self._micro_batch(self.rollout, self.batches[number], self.tokens_per_step[step])

    def _deal(self, epoch: int) -> None:
        """Shuffle the rollout into micro-batches, and count the tokens of each optimizer step over all processes."""
        assert self.rollout is not None
        tokens = self.rollout.completion_mask.sum(1)
        lengths = self.rollout.prompt_mask.sum(1) + tokens
        self.batches = micro_batches(
            self.args.seed + self.args.process_index, self.collector.rollouts, epoch, lengths.tolist(),
            self.args.num_mini_batches, self.args.per_device_train_batch_size,
        )  # fmt: skip
        accumulated = self.args.gradient_accumulation_steps
        mine = torch.stack([tokens[rows].sum() for rows in self.batches]).view(-1, accumulated).sum(1)
        self.tokens_per_step = self.accelerator.reduce(mine.float(), "sum").tolist()

    def _micro_batch(self, rollout: Rollout, rows: Tensor, tokens: Any) -> dict[str, Any]:
        return {**rollout.select(rows), "tokens": float(tokens)}

    def _make_rollout(self, rows: Sequence[dict[str, Any]], mode: str) -> Rollout:
        """Make a rollout. Under ZeRO-3 weights are gathered once for it and the health watch, not once per token."""
        from ..upstream.trl import unwrap_model_for_generation

        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), unwrap_model_for_generation(self.model_wrapped, self.accelerator):
            rollout, seen = self.collector.collect(rows, mode)
            if mode == "train":
                self.health.look(self.state.global_step, seen, self.model)
        self.model.train(was_training)
        return rollout

    # Update

    def compute_loss(
        self,
        model: ActorCritic,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The micro-batch's share of the optimizer step's loss: its summed token losses divided by the number of
        tokens of the step, over all micro-batches and processes."""
        args, mask = self.args, inputs["completion_mask"].float()
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        warming, begun = self.warming, time.perf_counter()
        logprobs, _, values = model(ids, attended, inputs["completion_mask"], detach_critic=warming)
        high = args.clip_range if args.clip_range_high is None else args.clip_range_high
        policy = objective.policy_loss(
            logprobs, inputs["old_logprobs"], inputs["advantages"], mask, args.clip_range, high, args.dual_clip
        )
        value = objective.value_loss(values, inputs["old_values"], inputs["returns"], mask, args.value_clip)
        # DDP and DeepSpeed average gradients over processes; this turns the average into a sum.
        scale = args.world_size / inputs["tokens"]
        loss = scale * ((0.0 if warming else 1.0) * policy.loss.sum() + args.vf_coef * value.loss.sum())

        with torch.no_grad():
            mode = "train" if self.model.training else "eval"
            approx_kl = objective.kl_per_token(inputs["old_logprobs"] * mask, logprobs * mask, "k3")
            per_token = (policy.loss, value.loss, approx_kl, policy.clipped, policy.ratio * mask, value.clipped)
            self.metrics.add_tokens(mode, per_token, mask)
            if mode == "train" and args.kl_stop is not None:
                total, tokens = self.accelerator.reduce(torch.stack([approx_kl.sum(), mask.sum()]), "sum").tolist()
                self.abandoned = self.abandoned or total / tokens > args.kl_stop
        ended = self.metrics.lap(mode, "time/forward", begun)
        if mode == "train":
            self.accounted += ended - begun
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: ActorCritic, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. Past `kl_stop`, gradients are dropped until the next rollout, so no step is taken."""
        clock = time.perf_counter()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.abandoned:
            model.zero_grad(set_to_none=True)
        elif self.warming:  # None, not zero: Adam would move a parameter, and its own state, on a zero gradient
            for name, parameter in self.accelerator.unwrap_model(model).trainable().items():
                if not self.model.is_critic(name):
                    parameter.grad = None
        self._step += 1
        self.metrics.lap("train", "time/backward", clock + self.accounted)
        self.accounted = 0.0
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `evaluate`, each time with the same draws."""
        self.collector.evaluated = 0
        return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: ActorCritic, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Sample, score and measure one batch of evaluation prompts."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def create_optimizer(self, model: ActorCritic | None = None) -> Any:
        """One optimizer for the policy's parameters and the critic's, which have their own learning rate."""
        if self.optimizer is None:  # transformers sets it
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            named = self.model.trainable()
            critic_lr = self.args.critic_learning_rate or self.args.learning_rate
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = []
            for critic, rate in ((False, self.args.learning_rate), (True, critic_lr)):
                for decays, weight_decay in ((True, self.args.weight_decay), (False, 0.0)):
                    chosen = [
                        p for n, p in named.items() if self.model.is_critic(n) == critic and (n in decayed) == decays
                    ]
                    groups.append({"params": chosen, "lr": rate, "weight_decay": weight_decay})
            self.optimizer = cls([g for g in groups if g["params"]], **options)
        return self.optimizer

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        logs |= {prefix + name: value for name, value in self.metrics.take(mode).items()}
        super().log(logs, start_time)

    # Checkpoints

    def create_model_card(self, *, tags: str | Sequence[str] | None = None, **about: Any) -> None:
        """transformers' draft of a model card, with tags as in TRL's trainers."""
        given = [tags] if isinstance(tags, str) else list(tags or ())
        super().create_model_card(tags=[*given, "trl", "ppo"], **about)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' `save_model`; under DeepSpeed, which would gather all roles, only the policy is gathered."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        model = self.model
        with whole(p for n, p in model.named_parameters() if n in model.trainable() and not model.is_critic(n)):
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the policy as an ordinary PEFT adapter or transformers model."""
        if not self.args.should_save:
            return
        policy = self.policy
        options = {"selected_adapters": [POLICY]} if hasattr(policy, "peft_config") else {}
        policy.save_pretrained(output_dir or self.args.output_dir, **options)
        self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in transformers; under DeepSpeed without frozen weights."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As in transformers; under DeepSpeed a checkpoint is read without frozen weights."""
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: ActorCritic | None = None) -> None:
        checkpoint.load_weights(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_dir)
        if checkpoint_dir is not None:
            checkpoint.load_state(self, Path(checkpoint_dir))

    def _save_checkpoint(self, model: ActorCritic, trial: Any) -> None:
        """Write PPO's files before transformers writes its state, whose presence marks a checkpoint as complete."""
        checkpoint.save(self, Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)


def _as_they_are(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows
