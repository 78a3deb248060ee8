"""One rollout: sample completions, score them, compute advantages.

draw        completions from the policy as it is now
score       by every reward: weighted sum, normalised, clipped
evaluate    log-probabilities of policy and reference, values of the critic
weigh       rewards per token from KL and scores; advantages and returns
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.conversation import as_turn, render
from ..models.cpu.lora import folded
from ..models.generation import Generation, end_tokens, generate_ids
from . import objective
from .actor_critic import ActorCritic
from .config import PPOConfig
from .metrics import Metrics
from .objective import KLController, RunningMoments
from .rollout import Rollout, pad_left, pad_right, uniforms

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from .vllm import VLLMSampler


class Collector:
    """Makes the rollouts of `PPOTrainer`, and holds the state that changes from one to the next.

    Args:
        model: policy, reference, critic and reward adapters.
        rewards: made by `rewards.as_reward`.
        metrics: where the rollout's numbers are recorded.
    """

    def __init__(
        self,
        model: ActorCritic,
        rewards: Sequence[Any],
        args: PPOConfig,
        tokenizer: "PreTrainedTokenizerBase",
        accelerator: "Accelerator",
        metrics: Metrics,
    ) -> None:
        self.model, self.rewards, self.args, self.tokenizer = model, rewards, args, tokenizer
        self.accelerator, self.metrics = accelerator, metrics
        self.ends = end_tokens(model.policy, tokenizer)
        weights = [1.0] * len(rewards) if args.reward_weights is None else args.reward_weights
        self.weights = torch.tensor(weights, device=accelerator.device)
        self.kl = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.score_moments = RunningMoments()
        self.rollouts = 0  # training rollouts made so far
        self.evaluated = 0  # batches of evaluation prompts, in this evaluation
        self.drawn: list[dict[str, Any]] = []  # a few completions of the last rollout, for people to read
        self.vllm: VLLMSampler | None = None
        if args.use_vllm:
            from . import vllm

            self.vllm = vllm.VLLMSampler(model, accelerator, tokenizer, self.ends, args)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"rollouts": self.rollouts, "kl_coef": self.kl.coef, "score_moments": vars(self.score_moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollouts, self.kl.coef = state["rollouts"], state["kl_coef"]
        vars(self.score_moments).update(state["score_moments"])

    @torch.no_grad()
    def collect(self, rows: Sequence[dict[str, Any]], mode: str) -> tuple[Rollout, dict[str, float]]:
        """One completion per prompt, with all that an update needs, and the rollout's metrics.

        `mode` is `train` or `eval`; an evaluation changes neither the KL controller nor the running moments.
        """
        device, metrics = self.accelerator.device, self.metrics
        clock = time.perf_counter()
        prompts = [row["prompt"] for row in rows]
        prompt_rows = [render(p, self.tokenizer, add_generation_prompt=not isinstance(p, str)) for p in prompts]
        prompt_ids, prompt_mask = (t.to(device) for t in pad_left(prompt_rows, self.tokenizer.pad_token_id))
        drawn, recorded = self._draw(prompt_rows, prompt_ids, prompt_mask, mode)
        completion_ids, completion_mask = (t.to(device) for t in pad_right(drawn.ids, self.tokenizer.pad_token_id))
        clock = metrics.lap(mode, "time/generation", clock)

        by_reward = self._score(rows, drawn.ids)
        raw = (by_reward * self.weights[:, None]).nansum(0)
        stopped = torch.tensor([ids[-1] in self.ends for ids in drawn.ids], device=device)
        scores = self.shape_scores(raw, stopped, mode)
        clock = metrics.lap(mode, "time/scoring", clock)

        ids, attended = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
        old, entropies, values, ref = self.logprobs_and_values(ids, attended, completion_mask, drawn, recorded)
        metrics.lap(mode, "time/evaluating", clock)

        mask = completion_mask.float()
        kl_by_row = (objective.kl_per_token(old, ref, "k1") * mask).sum(1)
        kl = objective.kl_per_token(old, ref, self.args.kl_estimator)
        rewards = objective.token_rewards(scores, kl, mask, self.kl.coef)
        advantages = objective.generalized_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        returns = advantages + values * mask
        if self.args.whiten_advantages:
            total = self.accelerator.reduce(objective.moments(advantages, mask), "sum")
            advantages = objective.whiten(advantages, mask, total)
        rollout = Rollout(
            prompt_ids, prompt_mask, completion_ids, completion_mask, old, values, advantages, returns,
        )  # fmt: skip

        spread = metrics.std(returns, mask)
        kl_sum = metrics.mean(kl_by_row)
        seen = {
            "objective/scores": metrics.mean(raw),
            "objective/scores_std": metrics.std(raw, torch.ones_like(raw)),
            "objective/kl": kl_sum,
            "objective/kl_coef": self.kl.coef,
            "objective/entropy": metrics.mean((entropies * mask).sum(1) / mask.sum(1)),
            "objective/rlhf_reward": metrics.mean(rewards.sum(1)),
            "value/explained_variance": 1 - (metrics.std(returns - values, mask) / spread) ** 2
            if spread
            else float("nan"),
            "completions/mean_length": metrics.mean(mask.sum(1)),
            "completions/stopped": metrics.mean(stopped.float()),
        }
        for reward, given in zip(self.rewards, by_reward, strict=True):
            # NaN where a function returned None for a row.
            metrics.add(mode, f"rewards/{reward.name}", metrics.mean(given[~given.isnan()]))
        for name, value in seen.items():
            metrics.add(mode, name, value)
        self._keep_some(prompts, drawn.ids, raw, by_reward, kl_by_row)
        if mode == "train":
            self.kl.update(kl_sum, len(rows) * self.args.world_size)
            self.rollouts += 1
        return rollout, seen

    def _draw(
        self, prompts: Sequence[list[int]], prompt_ids: Tensor, prompt_mask: Tensor, mode: str
    ) -> tuple[Generation, list[Tensor]]:
        """The completions and, with a value head on the policy's trunk, the value before each of their tokens."""
        args = self.args
        if mode == "eval":
            self.evaluated += 1
        if self.vllm is not None:
            seed = hash((args.seed, self.rollouts, self.evaluated, args.process_index)) % 2**31
            return Generation(self.vllm.draw(prompts, seed), None, None), []
        first = args.process_index * len(prompts)
        numbers = uniforms(
            args.seed, self.rollouts if mode == "train" else -self.evaluated, range(first, first + len(prompts)),
            args.max_completion_length,
        )  # fmt: skip
        recording: AbstractContextManager[list[Tensor]] = (
            self.model.recorded_values() if args.value_mode == "head" else nullcontext([])
        )
        with recording as recorded, folded(self.model.policy):
            drawn = generate_ids(
                self.model.policy, self.tokenizer, prompt_ids, prompt_mask, temperature=args.temperature,
                max_new_tokens=args.max_completion_length, uniforms=numbers,
            )  # fmt: skip
        return drawn, recorded

    def _score(self, rows: Sequence[dict[str, Any]], completion_ids: Sequence[list[int]]) -> Tensor:
        """Each reward's score of each completion (R, B); NaN where a function returned None."""
        prompts = [row["prompt"] for row in rows]
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        completions = [as_turn(p, text) for p, text in zip(prompts, texts, strict=True)]
        columns = {k: [row[k] for row in rows] for k in rows[0] if k != "prompt"}
        scores = torch.tensor(
            [reward(prompts, completions, completion_ids=completion_ids, **columns) for reward in self.rewards],
            device=self.accelerator.device,
        )
        unscored = int(scores.isnan().all(0).sum())
        if unscored:
            raise ValueError(f"{unscored} of {len(rows)} completions got no score from any reward: return a number")
        return scores

    def shape_scores(self, raw: Tensor, stopped: Tensor, mode: str) -> Tensor:
        """Scores (B,) after running normalisation, clipping and the penalty for a missing EOS, as `args` ask."""
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

    def logprobs_and_values(
        self, ids: Tensor, attended: Tensor, completion_mask: Tensor, drawn: Generation, recorded: list[Tensor]
    ) -> list[Tensor]:
        """Log-probabilities, entropies and values of the policy, log-probabilities of the reference: each (B, C).

        The policy's log-probabilities are those that the tokens were sampled with. Under autocast or vLLM they are
        recomputed: the rollout's precision then differs from the update's, and the first ratio must be 1.
        """
        width, model = completion_mask.shape[1], self.model
        start = ids.shape[1] - width  # of the completions
        prompts, completions = attended[:, :start].sum(1), completion_mask.sum(1)
        found = [torch.zeros_like(completion_mask, dtype=torch.float32) for _ in range(4)]
        # Without gradients, twice as many rows fit as in an update; rows of similar length share a pass.
        for rows in torch.split((prompts + completions).argsort(), 2 * self.args.per_device_train_batch_size):
            drawn_here = int(completions[rows].max())
            columns = slice(start - int(prompts[rows].max()), start + drawn_here)
            batch = ids[rows, columns], attended[rows, columns], completion_mask[rows, :drawn_here]
            # The roles are not called through accelerate's wrapper, so autocast must be entered here.
            with self.accelerator.autocast():
                if drawn.logprobs is None or drawn.entropies is None or self.args.recomputes:
                    policy = model(*batch)
                else:
                    values = torch.stack(recorded[:drawn_here], 1)[rows] if recorded else model.values(*batch)
                    policy = drawn.logprobs[rows, :drawn_here], drawn.entropies[rows, :drawn_here], values
                for into, part in zip(found, (*policy, model.reference_logprobs(*batch)), strict=True):
                    into[rows, :drawn_here] = part.float()
        return [part * completion_mask for part in found]

    def pop_completions(self) -> list[dict[str, Any]]:
        """A few completions of the last rollout, for people to read; each is returned once."""
        drawn, self.drawn = self.drawn, []
        return drawn

    def _keep_some(
        self, prompts: Sequence[Any], completion_ids: Sequence[list[int]], raw: Tensor, by_reward: Tensor, kl: Tensor
    ) -> None:
        texts = self.tokenizer.batch_decode(completion_ids[: self.args.num_logged_completions])
        self.drawn = [
            {
                "prompt": prompts[row], "completion": text, "score": round(float(raw[row]), 4),
                **{f"rewards/{r.name}": float(given[row]) for r, given in zip(self.rewards, by_reward, strict=True)},
                "kl": round(float(kl[row]), 4),
            }
            for row, text in enumerate(texts)
        ]  # fmt: skip
