"""What the recipe `ppo` adds: its rewards, and gates on policy, reference and reward model before the first step."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import load_policy
from ..config.peft_methods import METHODS
from ..config.sections import PPOSettings
from ..data.conversation import text_of
from ..data.rows import Rows
from ..errors import ArtifactError, ConfigError
from ..log import log_line
from ..models.scoring import score
from ..models.verifiers import find_verifier
from ..runs.lineage import Lineage
from ..runs.paths import ADAPTER
from . import gates
from .gates import Gate
from .stage import Stage

if TYPE_CHECKING:
    from transformers import Trainer


def check_rewards(stage: Stage, prompts: Rows) -> None:
    """Raise a PosttrainError if there is no reward, or it cannot score these rows. Reads no weights."""
    verifier = stage.config.part(PPOSettings).verifier
    if verifier is None and "reward" not in stage.inputs:
        raise ConfigError(
            "set a reward: inputs.reward (a reward stage), verifier (exact_match, regex:PATTERN, module:function), "
            "or both"
        )
    if verifier is not None:
        find_verifier(verifier)
        if verifier == "exact_match" and prompts.format != "prompt_completion":
            raise ConfigError(f"verifier: exact_match needs prompt-completion rows, got {prompts.format}")
    if "reward" in stage.inputs and stage.parents["reward"].task != "SEQ_CLS":
        lineage = stage.parents["reward"]
        raise ArtifactError(f"inputs.reward: {stage.inputs['reward']} is no reward model (task {lineage.task})")


def rewards(stage: Stage, start: str | None) -> tuple[list[Any], list[Any]]:
    """(reward_funcs, their tokenizers) for the trainer: the reward model, and the verifier as a function."""
    funcs: list[Any] = []
    tokenizers: list[Any] = []
    if "reward" in stage.inputs:
        folder = stage.inputs["reward"]
        has_adapter = stage.config.adapter.method != "none"
        if has_adapter and shares_base(stage.parents["reward"], stage.policy, start):
            log_line(f"reward: the adapter of {folder}, on the policy's base")
            funcs.append(folder / ADAPTER)
            tokenizers.append(None)
        else:
            log_line(
                f"reward: {folder}, loaded as a separate model: its adapter is not on the weights under the policy's"
            )
            funcs.append(load_policy(folder))
            tokenizers.append(_tokenizer(folder, stage.parents["reward"]))
    name = stage.config.part(PPOSettings).verifier
    if name is not None:
        funcs.append(as_reward_function(name))
        tokenizers.append(None)
    return funcs, tokenizers


def shares_base(reward: Lineage, policy: Lineage | None, start: str | None) -> bool:
    """Whether the reward model's adapter and the policy's adapter are on the same weights.

    A stage that merged its parent is on the merged weights; two such stages share them if they have the same parent. A
    fully fine-tuned reward model shares nothing.
    """
    if reward.kind != "adapter" or policy is None or policy.kind != "adapter":
        return False
    if reward.base.get("fingerprint") != policy.base.get("fingerprint"):
        return False
    if METHODS[reward.config["adapter"]["method"]].mutates_base:  # it would rewrite the policy's
        return False
    kinds = [METHODS[lineage.config["adapter"]["method"]].peft_type for lineage in (reward, policy)]
    if kinds[0] != kinds[1]:  # PEFT keeps adapters of one type on a model
        return False
    if start == "merge":
        merged = reward.parents.get("policy", {})
        return reward.start == "merge" and merged.get("digest") == policy.digest and policy.start != "merge"
    return start == "continue" and reward.start in (None, "continue")


def _tokenizer(folder: Path, lineage: Lineage) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder / lineage.kind))


def as_reward_function(name: str) -> Any:
    """A verifier as a reward function like TRL's, which gets each row's other columns."""
    verifier = find_verifier(name)

    def judged(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Sequence[Any]
    ) -> list[float]:
        rows = [{"prompt": prompt, **{k: v[i] for k, v in columns.items()}} for i, prompt in enumerate(prompts)]
        return [
            verifier(row["prompt"], text_of(completion), row) for row, completion in zip(rows, completions, strict=True)
        ]

    judged.__name__ = name.partition(":")[0]
    return judged


def prove_roles(stage: Stage, trainer: "Trainer") -> list[Gate]:
    """Gates before the first step: policy and reference equal the input policy, the reward model reproduces its
    scores."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    found: list[Gate] = []
    probe = stage.policy.metrics.get("probe") if stage.policy else None
    dtype = gates.dtype_of(model.policy)
    if probe:
        ids, expected = probe["input_ids"], probe["logprobs"]
        advice = "PPO's reference or start is not the input policy."
        policy_now = gates.probe_logprobs(model.policy, ids)
        found.append(gates.same_outputs("step0 policy", policy_now, expected, dtype=dtype, advice=advice))
        reference_now = model.as_reference(lambda m: gates.probe_logprobs(m, ids))
        found.append(gates.same_outputs("step0 reference", reference_now, expected, dtype=dtype, advice=advice))
    if "reward" in stage.inputs:
        probe = stage.parents["reward"].metrics["probe"]
        reward = trainer.rewards[0]
        again = score(reward.model, reward.tokenizer, probe["input_ids"], pooled=reward.pooled)
        found.append(gates.same_outputs("reward reload", again, probe["scores"], dtype=dtype))
    stage.gates += found
    return found
