"""PPO on transformers' own training loop.

The loop asks `_prepare_inputs` for each micro-batch and `compute_loss` for its loss; all else - accumulation,
clipping, schedules, checkpoints, callbacks - is transformers'. So a rollout is made when its first
micro-batch is asked for, kept, shuffled anew for each pass, and handed out piece by piece:

    rollout = num_ppo_epochs passes
    pass    = num_mini_batches optimizer steps
    step    = gradient_accumulation_steps micro-batches of per_device_train_batch_size

The rollout and the state of the controllers are saved with a checkpoint: a resumed run is the same run.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.trainer import SCHEDULER_NAME
from trl.trainer.base_trainer import _BaseTrainer

from ..generation import Drawn, check_generation_settings, end_tokens, generate_ids
from ..lm_head import use_dense_lm_head
from ..lora import use_accumulated_lora
from ..sampling import as_turn
from ..tokens import render
from ..zero import is_split, load_whole, whole
from . import checkpoint, objective
from .actor_critic import POLICY, ActorCritic
from .config import PPOConfig
from .health import HealthWatch
from .objective import KLController, RunningMoments
from .rewards import ModelReward, as_reward, check_templates
from .rollout import Rollout, RolloutSampler, micro_batches, pad_left, pad_right, uniforms
from .vllm import VLLMSampler

# Of an update, each the mean over tokens and processes.
TOKEN_METRICS = (
    "loss/policy", "loss/value", "policy/approx_kl", "policy/clip_fraction", "policy/ratio", "value/clip_fraction",
)  # fmt: skip


class PPOTrainer(_BaseTrainer):  # type: ignore[misc]
    """Proximal policy optimisation of a language model, used like TRL's online trainers.

    Args:
        model: a causal language model, a folder or hub id of one, or a PeftModel. A PeftModel's reference is a frozen
            copy of its adapter; with `peft_config`, it is the model without adapter. Its dropout is switched off.
        reward_funcs: one or several of: the folder of a reward adapter that was trained on this policy's base; a
            sequence-classification model with one label; a function `f(prompts=, completions=, <column>=..., **_)` that
            returns a number for each completion, or None where it has no opinion.
        args: the settings.
        train_dataset: rows with a `prompt`, plain or conversational; their other columns reach the functions.
        eval_dataset: the same, to measure on.
        processing_class: the policy's tokenizer.
        reward_processing_classes: one tokenizer a reward, None where it has none of its own.
        peft_config: makes a fresh adapter.

    Raises ValueError for what does not fit together, before anything is drawn.
    """

    _tag_names: ClassVar = ["trl", "ppo"]
    _name = "PPO"
    _paper: ClassVar = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}
    # `compute_loss` divides by the tokens of the whole optimizer step itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
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
        from trl.trainer.utils import disable_dropout_in_model

        args = args or PPOConfig("ppo")
        set_seed(args.seed)
        load_whole()
        use_dense_lm_head()
        use_accumulated_lora()
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=args.trust_remote_code)
        if any(map(is_split, model.parameters())):
            raise ValueError("ZeRO-3 has split the model already: load it before PPOConfig is made, or pass its name")
        tokenizer = processing_class or AutoTokenizer.from_pretrained(model.config._name_or_path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        continued = hasattr(model, "peft_config")
        if continued and peft_config is not None:
            raise ValueError("peft_config is for a model without adapter; this one has one, which is trained on")
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        _check_dataset(train_dataset, "train_dataset", args, tokenizer)
        if eval_dataset is not None:
            _check_dataset(eval_dataset, "eval_dataset", args, tokenizer)
        check_generation_settings(model)
        actor_critic = ActorCritic(
            model, value_mode=args.value_mode, copy_reference=continued, temperature=args.temperature
        )
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        tokenizers = reward_processing_classes
        if not isinstance(tokenizers, (list, tuple)):
            tokenizers = [tokenizers] * len(funcs)
        if len(tokenizers) != len(funcs):
            raise ValueError(f"reward_processing_classes has {len(tokenizers)} tokenizers for {len(funcs)} rewards")
        self.rewards = [as_reward(f, t, actor_critic, tokenizer) for f, t in zip(funcs, tokenizers, strict=True)]
        check_templates(self.rewards, train_dataset)
        self.reward_weights = args.reward_weights or [1.0] * len(funcs)
        if len(self.reward_weights) != len(funcs):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} numbers for {len(funcs)} rewards")
        if args.value_mode == "adapter":
            actor_critic.add_value_adapter()
        # With dropout the ratio of the first step would not be 1, and values would be compared with noise.
        disable_dropout_in_model(actor_critic)

        self.optimizer: Any
        self.tokenizer = tokenizer
        self.ends = end_tokens(model, tokenizer)
        self.kl = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.score_moments = RunningMoments()
        self.rollout: Rollout | None = None
        self.rollouts = 0  # made so far
        self.evaluated = 0  # batches of evaluation prompts, in this evaluation
        self.accounted = 0.0  # seconds of the micro-batch in hand that have a name already
        self.batches: list[Tensor] = []
        self.tokens_a_step: list[float] = []
        self.abandoned = False  # past kl_stop, the rest of a rollout is not trained on
        self._step = 0  # micro-batches so far
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.drawn: list[dict[str, Any]] = []  # a few completions of the last rollout, for people to read
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
        self.vllm = VLLMSampler(actor_critic, self.accelerator, tokenizer, self.ends, args) if args.use_vllm else None
        self.add_callback(self.health)
        nothing = torch.zeros(len(TOKEN_METRICS) + 1, dtype=torch.float64, device=self.accelerator.device)
        self.sums = {"train": nothing, "eval": nothing.clone()}  # since the last log; the tokens' number is the last
        for reward in self.rewards:
            if isinstance(reward, ModelReward) and not getattr(reward.model, "is_quantized", False):
                reward.model.to(self.accelerator.device)
        self._check_strategy()
        if args.kl_stop is not None and args.fp16:
            raise ValueError(
                "kl_stop: fp16's gradient scaler cannot leave out an optimizer step; use bf16, or kl_target"
            )
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end: PPO's checkpoints are to resume from; use on_unhealthy: rollback")

    def _check_strategy(self) -> None:
        if self.is_fsdp_enabled:
            raise ValueError(
                "PPO's checkpoints do not gather what FSDP splits: use an accelerate config with DDP, or with "
                "DeepSpeed's ZeRO-2 or ZeRO-3"
            )
        if not self.is_deepspeed_enabled:
            return
        # DeepSpeed takes its step within the backward pass, before a gradient could be dropped.
        if self.args.kl_stop is not None:
            raise ValueError("kl_stop cannot leave out an optimizer step of DeepSpeed's; use kl_target, or DDP")
        if self.args.critic_warmup_steps:
            raise ValueError(
                "critic_warmup_steps cannot keep DeepSpeed from moving the policy; set it to 0, or use DDP"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `train`, from a new rollout on; a checkpoint brings its own back."""
        self._step, self.rollout, self.batches, self.abandoned = 0, None, [], False
        return super().train(*args, **kwargs)

    # Data

    def get_train_dataloader(self) -> Any:
        """Batches of a whole rollout, each as often as the rollout has micro-steps."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.rollout_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Any = None) -> RolloutSampler:
        return RolloutSampler(
            len(self.train_dataset),
            self.args.rollout_size * self.args.world_size,
            self.micro_steps,
            seed=self.args.seed,
            shuffle=self.args.shuffle_dataset,
        )

    @property
    def micro_steps(self) -> int:
        """Micro-batches of one rollout, over all its passes."""
        steps: int = self.args.micro_batches * self.args.num_ppo_epochs
        return steps

    @property
    def within_rollout(self) -> bool:
        """Whether the rollout in hand has micro-batches left."""
        return bool(self._step % self.micro_steps)

    @property
    def warming(self) -> bool:
        """Whether this optimizer step is one of the critic's alone."""
        return bool(self.state.global_step < self.args.critic_warmup_steps)

    def describe_work(self) -> str:
        """What a run amounts to, in one line."""
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
        """The micro-batch that is due; at a rollout's first one, the rollout."""
        if not self.model.training:
            rollout = self._make_rollout(inputs, "eval")
            everything = rollout.completion_mask.sum() * self.args.world_size  # this process's own mean
            return self._micro_batch(rollout, torch.arange(len(rollout)), everything)
        at = self._step % self.micro_steps
        if at == 0:
            begun = time.perf_counter()
            self.rollout = self._make_rollout(inputs, "train")
            self.accounted += time.perf_counter() - begun
            self.rollouts += 1
            self.abandoned = False
        assert self.rollout is not None
        epoch, number = divmod(at, self.args.micro_batches)
        if number == 0 or not self.batches:
            self._deal(epoch)
        step = number // self.args.gradient_accumulation_steps
        return self._micro_batch(self.rollout, self.batches[number], self.tokens_a_step[step])

    def _deal(self, epoch: int) -> None:
        """Shuffle the rollout into micro-batches, and count each optimizer step's tokens over all processes."""
        assert self.rollout is not None
        lengths = self.rollout.completion_mask.sum(1)
        self.batches = micro_batches(
            self.args.seed + self.args.process_index, self.rollouts, epoch, lengths.tolist(),
            self.args.num_mini_batches, self.args.per_device_train_batch_size,
        )  # fmt: skip
        accumulated = self.args.gradient_accumulation_steps
        mine = torch.stack([lengths[rows].sum() for rows in self.batches]).view(-1, accumulated).sum(1)
        self.tokens_a_step = self.accelerator.reduce(mine.float(), "sum").tolist()

    def _micro_batch(self, rollout: Rollout, rows: Tensor, tokens: Any) -> dict[str, Any]:
        return {**rollout.select(rows), "tokens": float(tokens)}

    @torch.no_grad()
    def _make_rollout(self, rows: Sequence[dict[str, Any]], mode: str) -> Rollout:
        """Under ZeRO-3 weights are gathered once for all of it, and not once a token."""
        from trl.models.utils import unwrap_model_for_generation

        was_training = self.model.training
        self.model.eval()
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator):
            rollout = self._draw_and_score(rows, mode)
        self.model.train(was_training)
        return rollout

    def _draw_and_score(self, rows: Sequence[dict[str, Any]], mode: str) -> Rollout:
        args, device = self.args, self.accelerator.device
        clock = time.perf_counter()

        prompts = [row["prompt"] for row in rows]
        prompt_rows = [render(p, self.tokenizer, add_generation_prompt=not isinstance(p, str)) for p in prompts]
        prompt_ids, prompt_mask = (t.to(device) for t in pad_left(prompt_rows, self.tokenizer.pad_token_id))
        first = args.process_index * len(rows)
        if mode == "eval":
            self.evaluated += 1
        numbers = uniforms(
            args.seed, self.rollouts if mode == "train" else -self.evaluated, range(first, first + len(rows)),
            args.max_completion_length,
        )  # fmt: skip
        noted: list[Tensor] = []
        if self.vllm is not None:
            seed = hash((args.seed, self.rollouts, self.evaluated, args.process_index)) % 2**31
            drawn = Drawn(self.vllm.draw(prompt_rows, seed), None, None)
        else:
            drawn, noted = self._draw(prompt_ids, prompt_mask, numbers)
        completion_ids, completion_mask = (t.to(device) for t in pad_right(drawn.ids, self.tokenizer.pad_token_id))
        clock = self._lap(mode, "time/rollout", clock)

        # Scores
        texts = self.tokenizer.batch_decode(drawn.ids, skip_special_tokens=True)
        completions = [as_turn(p, text) for p, text in zip(prompts, texts, strict=True)]
        columns = {k: [row[k] for row in rows] for k in rows[0] if k != "prompt"}
        by_reward = torch.tensor(
            [reward(prompts, completions, completion_ids=drawn.ids, **columns) for reward in self.rewards],
            device=device,
        )
        unscored = int(by_reward.isnan().all(0).sum())
        if unscored:
            raise ValueError(f"{unscored} of {len(rows)} completions got no score from any reward: return a number")
        weights = torch.tensor(self.reward_weights, device=device)
        raw = (by_reward * weights[:, None]).nansum(0)
        stopped = torch.tensor([ids[-1] in self.ends for ids in drawn.ids], device=device)
        scores = self._shape_scores(raw, stopped, mode)
        clock = self._lap(mode, "time/scoring", clock)

        # Log-probabilities and values
        ids, attended = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
        old, entropies, values, ref = self._logprobs_and_values(ids, attended, completion_mask, drawn, noted)
        clock = self._lap(mode, "time/evaluating", clock)

        mask = completion_mask.float()
        kl = objective.kl_per_token(old, ref, args.kl_estimator)
        rewards = objective.token_rewards(scores, kl, mask, self.kl.coef)
        advantages = objective.generalized_advantages(rewards, values, mask, args.gamma, args.lam)
        returns = advantages + values * mask
        if args.whiten_advantages:
            total = self.accelerator.reduce(objective.moments(advantages, mask), "sum")
            advantages = objective.whiten(advantages, mask, total)
        rollout = Rollout(
            prompt_ids, prompt_mask, completion_ids, completion_mask, old, values, advantages, returns,
        )  # fmt: skip

        spread = self._std(returns, mask)
        kl_sum = self._mean(((old - ref) * mask).sum(1))
        for number, reward in enumerate(self.rewards):
            scored = by_reward[number][~by_reward[number].isnan()]  # a function may leave rows to another
            self._log(mode, f"rewards/{reward.name}", self._mean(scored))
        metrics = {
            "objective/scores": self._mean(raw),
            "objective/scores_std": self._std(raw, torch.ones_like(raw)),
            "objective/kl": kl_sum,
            "objective/kl_coef": self.kl.coef,
            "objective/entropy": self._mean((entropies * mask).sum(1) / mask.sum(1)),
            "objective/rlhf_reward": self._mean(rewards.sum(1)),
            "value/explained_variance": (
                1 - (self._std(returns - values, mask) / spread) ** 2 if spread else float("nan")
            ),
            "completions/mean_length": self._mean(mask.sum(1)),
            "completions/stopped": self._mean(stopped.float()),
        }
        for name, value in metrics.items():
            self._log(mode, name, value)
        texts = self.tokenizer.batch_decode(drawn.ids[: args.num_logged_completions])
        self.drawn = [
            {
                "prompt": prompts[row], "completion": text, "score": round(float(raw[row]), 4),
                **{f"rewards/{r.name}": float(by_reward[number, row]) for number, r in enumerate(self.rewards)},
                "kl": round(float(((old - ref) * mask)[row].sum()), 4),
            }
            for row, text in enumerate(texts)
        ]  # fmt: skip
        if mode == "train":
            self.kl.update(kl_sum, len(rows) * args.world_size)
            self.health.look(self.state.global_step, metrics, self.model)
        return rollout

    def _draw(self, prompt_ids: Tensor, prompt_mask: Tensor, numbers: Tensor) -> tuple[Drawn, list[Tensor]]:
        """The completions, and with a head on the policy's trunk the values before each of their tokens."""
        noting = self.args.value_mode == "head"
        with self.model.noted_values() if noting else nullcontext([]) as noted:
            drawn = generate_ids(
                self.model.policy, self.tokenizer, prompt_ids, prompt_mask, temperature=self.args.temperature,
                max_new_tokens=self.args.max_completion_length, uniforms=numbers,
            )  # fmt: skip
        return drawn, noted

    def _shape_scores(self, raw: Tensor, stopped: Tensor, mode: str) -> Tensor:
        """Normalised by what was seen so far, cut, and lowered where EOS is missing: (B,)."""
        args, scores = self.args, raw.double()
        if args.reward_normalization:
            if mode == "train":
                ones = torch.ones_like(scores)
                self.score_moments.update(*self.accelerator.reduce(objective.moments(scores, ones), "sum").tolist())
            scores = (scores - self.score_moments.mean) / self.score_moments.std
        if args.reward_clip is not None:
            scores = scores.clamp(-args.reward_clip, args.reward_clip)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * (~stopped).double()
        return scores.float()

    def _logprobs_and_values(
        self, ids: Tensor, attended: Tensor, completion_mask: Tensor, drawn: Drawn, noted: list[Tensor]
    ) -> list[Tensor]:
        """Log-probabilities, entropies and values of the policy, log-probabilities of the reference: each (B, C).

        The policy's are those that the tokens were drawn by. Under autocast, or after vLLM, they are computed again:
        a rollout then computes in another precision than the update, and the first ratio must be 1.
        """
        width, model = completion_mask.shape[1], self.model
        parts: list[tuple[Tensor, ...]] = []
        for rows in torch.split(torch.arange(len(ids)), self.args.per_device_train_batch_size):
            batch = ids[rows], attended[rows], completion_mask[rows]
            # The roles are called past accelerate's wrapper: without this they would compute in another precision.
            with self.accelerator.autocast():
                if drawn.logprobs is None or drawn.entropies is None or self.args.bf16 or self.args.fp16:
                    policy = model(*batch)
                else:
                    values = torch.stack(noted[:width], 1)[rows] if noted else model.values(*batch)
                    policy = drawn.logprobs[rows], drawn.entropies[rows], values
                parts.append((*policy, model.reference_logprobs(*batch)))
        return [torch.cat(part).float() * completion_mask for part in zip(*parts, strict=True)]

    # Update

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the optimizer step's loss: token losses over the step's tokens, everywhere."""
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
        # DDP and DeepSpeed average gradients over processes; the sum is wanted.
        scale = args.world_size / inputs["tokens"]
        loss = scale * ((0.0 if warming else 1.0) * policy.loss.sum() + args.vf_coef * value.loss.sum())

        with torch.no_grad():
            mode = "train" if self.model.training else "eval"
            log_ratio = (logprobs - inputs["old_logprobs"]) * mask
            approx_kl = torch.expm1(log_ratio) - log_ratio
            a_token = (policy.loss, value.loss, approx_kl, policy.clipped, policy.ratio * mask, value.clipped, mask)
            self.sums[mode] += torch.stack([t.sum() for t in a_token]).double()
            if mode == "train" and args.kl_stop is not None:
                total, tokens = self.accelerator.reduce(torch.stack([approx_kl.sum(), mask.sum()]), "sum").tolist()
                self.abandoned = self.abandoned or total / tokens > args.kl_stop
        ended = self._lap(mode, "time/forward", begun)
        if mode == "train":
            self.accounted += ended - begun
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. Past `kl_stop` the rest of the rollout leaves no gradient, and so no step."""
        clock = time.perf_counter()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.abandoned:
            model.zero_grad(set_to_none=True)
        elif self.warming:  # no gradient, rather than one of zero: Adam leaves the parameter and its own state alone
            for name, parameter in self.accelerator.unwrap_model(model).trainable().items():
                if not self.model.is_critic(name):
                    parameter.grad = None
        self._step += 1
        self._lap("train", "time/backward", clock + self.accounted)
        self.accounted = 0.0
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `evaluate`, each time with the same draws."""
        self.evaluated = 0
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Draw, score and measure one batch of evaluation prompts."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def create_optimizer(self, model: Any = None) -> Any:
        """Two groups: the policy's parameters, and the critic's with a learning rate of their own."""
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

    def _log(self, mode: str, name: str, value: float) -> None:
        self._metrics[mode][name].append(value)

    def _lap(self, mode: str, name: str, since: float) -> float:
        now = time.perf_counter()
        self._log(mode, name, now - since)
        return now

    def _mean(self, values: Tensor) -> float:
        """Mean over all processes of values (B,)."""
        pair = torch.stack([values.double().sum(), torch.tensor(float(len(values)), device=values.device).double()])
        total, count = self.accelerator.reduce(pair, "sum").tolist()
        return total / count if count else float("nan")

    def _std(self, values: Tensor, mask: Tensor) -> float:
        """Standard deviation over all processes of the values where `mask` is 1."""
        count, first, second = self.accelerator.reduce(objective.moments(values, mask), "sum").tolist()
        return float(max(0.0, second / count - (first / count) ** 2) ** 0.5)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        for name, values in self._metrics[mode].items():
            known = [v for v in values if v == v]
            if known:  # seconds add up, to those since the last log
                logs[prefix + name] = sum(known) / (1 if name.startswith("time/") else len(known))
        self._metrics[mode].clear()
        *totals, tokens = self.accelerator.reduce(self.sums[mode], "sum").tolist()
        if tokens:
            logs |= {prefix + name: total / tokens for name, total in zip(TOKEN_METRICS, totals, strict=True)}
        self.sums[mode] = torch.zeros_like(self.sums[mode])
        super().log(logs, start_time)

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' `save_model`, which under DeepSpeed would gather all roles; here the policy is, and saved."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        model = self.model
        with whole(p for n, p in model.named_parameters() if n in model.trainable() and not model.is_critic(n)):
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy, as an adapter or a model that loads anywhere."""
        if not self.args.should_save:
            return
        policy = self.accelerator.unwrap_model(self.model).policy
        options = {"selected_adapters": [POLICY]} if hasattr(policy, "peft_config") else {}
        policy.save_pretrained(output_dir or self.args.output_dir, **options)
        self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """transformers' own; under DeepSpeed without the weights that are not trained."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """transformers' own; under DeepSpeed a checkpoint is read without the weights that are not trained."""
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_weights(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_dir)
        if checkpoint_dir is not None:
            checkpoint.load_state(self, Path(checkpoint_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Before transformers writes its state, whose presence says that a checkpoint is whole."""
        checkpoint.save(self, Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)


def _as_they_are(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


def _check_dataset(dataset: Any, name: str, args: PPOConfig, tokenizer: Any) -> None:
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
