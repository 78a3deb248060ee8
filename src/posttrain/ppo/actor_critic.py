"""Policy, reference, value and reward as roles on one base model.

    role        with an adapter                       full fine-tuning
    policy      adapter "default", trained            the model, trained
    reference   a frozen copy of the adapter if it    a frozen copy of the model
                was trained before, else the base
    value       a head on the policy's trunk;         a head on the policy's trunk,
                an adapter and a head; or a model     or a model
    reward      an adapter and its score head         a separate model (rewards.py)

Roles are switched by `upstream.peft.switched` and not by PEFT's `set_adapter` and `disable_adapter`: those change
`requires_grad` of the adapters that they leave and enter, in the middle of an update.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.trainer_utils import unwrap_peft_model

from ..models.cpu.lora import NotSideBySide, all_plain, side_by_side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLICY, REFERENCE, VALUE, REWARD = "default", "ppo_reference", "ppo_value", "ppo_reward_{number}"
NO_ADAPTER = None
T = TypeVar("T")


class ActorCritic(nn.Module):
    """The policy and its critic in one module, because DDP needs one forward and one backward pass for both.

    Args:
        policy: a causal language model, or a PeftModel whose adapter `default` is trained.
        value_mode: `head` (on the policy's trunk), `adapter` (a separate adapter) or `model` (a separate trunk).
        copy_reference: whether the reference is a frozen copy of the policy as it is now. False for a fresh adapter,
            which changes nothing yet: the base without the adapter is then the reference, and nothing is copied.
        temperature: logits are divided by it in every log-probability.
        entropies: whether `forward` returns them. Updates do not use them.
    """

    def __init__(
        self,
        policy: "PreTrainedModel",
        *,
        value_mode: str,
        copy_reference: bool,
        temperature: float,
        entropies: bool = False,
    ) -> None:
        from ..upstream.trl import add_fused_lm_head

        super().__init__()
        self.is_peft = hasattr(policy, "peft_config")
        if value_mode == "adapter" and not self.is_peft:
            raise ValueError("value_mode: adapter needs a policy with an adapter; use head or model")
        self.value_mode = value_mode
        self.policy = policy
        self.reference_model: Any = None
        self.value_model: Any = None
        self.score_heads = nn.ModuleDict()  # of the reward adapters, by adapter
        self.reference: str | None = NO_ADAPTER
        self.checkpointing: tuple[dict[str, Any], dict[str, Any]] | None = None
        self.in_one_pass = value_mode == "adapter"  # off for good once a layer is given rows other than the batch's
        if not self.is_peft:
            self.reference_model = copy.deepcopy(policy).eval().requires_grad_(False)
            add_fused_lm_head(self.reference_model, temperature=temperature)
        elif copy_reference:
            self._copy_adapter(POLICY, REFERENCE)
            self.reference = REFERENCE
        if value_mode == "model":
            whole = copy.deepcopy(policy)
            self.value_model = trunk_of(whole.merge_and_unload() if self.is_peft else whole).requires_grad_(True)
        outputs = ("log_probs", "entropy") if entropies else ("log_probs",)
        add_fused_lm_head(unwrap_peft_model(policy), temperature=temperature, outputs=outputs)
        # Zero, so that an untrained critic predicts a value of 0.
        self.value_head = Head(policy.config.get_text_config().hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.set_trainable()
        self.eval()  # all of it, as transformers hands a model out

    # What transformers' Trainer asks of a model

    @property
    def config(self) -> Any:
        return self.policy.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.policy.device
        return device

    def train(self, mode: bool = True) -> "ActorCritic":
        """As in any module, but skipped if all children are in this mode already: transformers calls it for every
        micro-batch, and visiting every submodule takes time."""
        return self if all(m.training == mode for m in (self, *self.children())) else super().train(mode)

    def add_model_tags(self, tags: Any) -> None:
        self.policy.add_model_tags(tags)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(m, "gradient_checkpointing", False) for m in self.policy.modules())

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **placement: Any
    ) -> None:
        """Checkpoint the trunk. With a value adapter, a block is recomputed with the adapter of its forward pass.

        Otherwise the policy's backward pass would recompute its activations with the value adapter.
        """
        if gradient_checkpointing_kwargs is None and self.checkpointing is not None:
            options, placement = self.checkpointing  # TRL switches it off for a rollout, and on again without options
        else:
            options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if self.value_mode == "adapter":
            if options["use_reentrant"]:
                raise ValueError(
                    "gradient_checkpointing_kwargs: use_reentrant must be false with value_mode: adapter, or the "
                    "activations of one role are recomputed in the other; use value_mode: head where it must be true"
                )
            options["context_fn"] = self._recompute_in_role
        for model in (unwrap_peft_model(self.policy), self.value_model):
            if model is not None:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **placement)
        if self.is_peft and self.checkpointing is None:  # the first block's input must have a gradient
            unwrap_peft_model(self.policy).enable_input_require_grads()
        self.checkpointing = (options, placement)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **placement: Any
    ) -> None:
        """The same, by its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **placement)

    def gradient_checkpointing_disable(self) -> None:
        unwrap_peft_model(self.policy).gradient_checkpointing_disable()

    # Roles

    def set_trainable(self) -> None:
        """Find the layers that have adapters, and make only the policy's and the critic's parameters trainable."""
        from ..upstream.peft import adapter_layers

        self.adapter_layers = adapter_layers(self.policy)
        if not self.is_peft:
            return
        for name, parameter in self.policy.named_parameters():
            parameter.requires_grad_(not {POLICY, VALUE}.isdisjoint(name.split(".")))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, the policy's and the critic's."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def is_critic(self, name: str) -> bool:
        """Whether a parameter's name belongs to the critic."""
        return name.startswith(("value_head.", "value_model.")) or VALUE in name.split(".")

    def role(self, adapter: str | None) -> AbstractContextManager[None]:
        """A context in which the policy's layers compute with this adapter, or with none."""
        from ..upstream.peft import switched

        return switched(self.adapter_layers, adapter)

    def _recompute_in_role(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        active = self.adapter_layers[0].active_adapters[0]
        return nullcontext(), self.role(active)

    def _copy_adapter(self, source: str, target: str) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        self.policy.add_adapter(target, copy.deepcopy(self.policy.peft_config[source]))
        weights = get_peft_model_state_dict(self.policy, adapter_name=source)
        set_peft_model_state_dict(self.policy, {k: v.clone() for k, v in weights.items()}, adapter_name=target)

    def add_reward_adapter(self, folder: Path) -> str:
        """Load a reward model's adapter and score head beside the policy, frozen; return the adapter's name.

        The head is read separately: loading a SEQ_CLS adapter onto a causal model, PEFT silently drops it.
        """
        from peft import PeftConfig, set_peft_model_state_dict
        from safetensors.torch import load_file

        if not self.is_peft:
            raise ValueError(f"{folder}: a reward adapter stands beside a policy's adapter; pass a model of its own")
        config = PeftConfig.from_pretrained(str(folder))
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
        weights = load_file(folder / "adapter_model.safetensors")
        heads = [name for name in weights if ".score." in name]
        if len(heads) != 1:
            raise ValueError(f"{folder} has {len(heads)} score heads; a reward model has one")
        name, head = REWARD.format(number=len(self.score_heads)), weights.pop(heads[0])
        if head.shape[0] != 1:
            raise ValueError(f"{folder} has a head of {head.shape[0]} labels; a reward model has one")
        self.policy.add_adapter(name, config)
        result = set_peft_model_state_dict(self.policy, weights, adapter_name=name)
        if result.unexpected_keys:
            raise ValueError(f"{folder} does not fit the policy's base: {result.unexpected_keys[:3]}")
        scores = Head(head.shape[1], 1, bias=False, device=self.device)
        scores.weight.data.copy_(head)
        self.score_heads[name] = scores.requires_grad_(False)
        self.set_trainable()
        return name

    def add_value_adapter(self) -> None:
        """Add the critic's adapter: a copy of the first reward model's if there is one (Ouyang et al., 2022,
        appendix C), else a fresh one."""
        if not self.score_heads:
            self.policy.add_adapter(VALUE, copy.deepcopy(self.policy.peft_config[POLICY]))
        else:
            name = REWARD.format(number=0)
            self._copy_adapter(name, VALUE)
            self.value_head.load_state_dict({**self.value_head.state_dict(), **self.score_heads[name].state_dict()})
        self.set_trainable()
        if self.is_gradient_checkpointing:  # switched on with the policy, before there were roles
            self.gradient_checkpointing_enable()

    # Computing

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, detach_critic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probabilities, entropies (if asked for) and values of completion tokens, each (B, C).

        `input_ids` and `attention_mask` are (B, P + C), prompts padded on the left and completions on the right;
        `completion_mask` is (B, C). A token's value is that of the state before it. Results are zero on padding.
        `detach_critic` keeps the value's gradient out of the policy's trunk.
        """
        # A checkpointed block would be recomputed with one adapter for all rows.
        if self.in_one_pass and self.checkpointing is None and all_plain(self.adapter_layers, (POLICY, VALUE)):
            try:
                return self._forward_side_by_side(input_ids, attention_mask, completion_mask)
            except NotSideBySide:
                self.in_one_pass = False
        with self.role(POLICY), kept_hidden_states(trunk_of(self.policy)) as kept:
            logprobs, entropies = self._logprobs(self.policy, input_ids, attention_mask, completion_mask)
        if self.value_mode == "head":
            width = completion_mask.shape[1]
            hidden = kept[-1].detach() if detach_critic else kept[-1]
            return logprobs, entropies, self.value_head(hidden[:, -width - 1 : -1])[..., 0] * completion_mask
        return logprobs, entropies, self.values(input_ids, attention_mask, completion_mask)

    def _forward_side_by_side(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """`forward` with a value adapter in one pass: each row twice, first for the policy, then for the critic."""
        rows, width = completion_mask.shape
        ids, attended = input_ids.repeat(2, 1), attention_mask.repeat(2, 1)
        scored = torch.cat([completion_mask, torch.zeros_like(completion_mask)])
        with (
            side_by_side(self.adapter_layers, (POLICY, VALUE), ids.shape),
            kept_hidden_states(trunk_of(self.policy)) as kept,
        ):
            logprobs, entropies = self._logprobs(self.policy, ids, attended, scored)
        values = self.value_head(kept[-1][rows:, -width - 1 : -1])[..., 0] * completion_mask
        return logprobs[:rows], None if entropies is None else entropies[:rows], values

    def values(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """Values (B, C) by the critic's own trunk, without a forward pass of the policy."""
        trunk = self.value_model if self.value_mode == "model" else trunk_of(self.policy)
        with self.role(VALUE if self.value_mode == "adapter" else POLICY):
            hidden = trunk(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask),
                use_cache=False,
            ).last_hidden_state  # fmt: skip
        width = completion_mask.shape[1]
        values: Tensor = self.value_head(hidden[:, -width - 1 : -1])[..., 0] * completion_mask
        return values

    @contextmanager
    def recorded_values(self) -> Iterator[list[Tensor]]:
        """With a value head on the policy's trunk: the value (B,) before each token that is drawn in the block."""
        recorded: list[Tensor] = []

        def note(module: Any, args: Any, output: Any) -> None:
            recorded.append(self.value_head(output[0][:, -1])[..., 0])

        handle = trunk_of(self.policy).register_forward_hook(note)
        try:
            yield recorded
        finally:
            handle.remove()

    @torch.no_grad()
    def reference_logprobs(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """The reference's log-probabilities of completion tokens (B, C)."""
        return self.as_reference(lambda model: self._logprobs(model, input_ids, attention_mask, completion_mask)[0])

    def as_reference(self, compute: Callable[[Any], T]) -> T:
        """The result of `compute(model)`, where the model is the reference."""
        if self.reference_model is not None:
            return compute(self.reference_model)
        with self.role(self.reference):
            return compute(self.policy)

    def _logprobs(
        self, model: "PreTrainedModel", input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        width = completion_mask.shape[1]
        labels = torch.full_like(input_ids, -100)
        labels[:, -width:] = input_ids[:, -width:].masked_fill(completion_mask == 0, -100)
        out = unwrap_peft_model(model)(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask), labels=labels,
            fused_lm_head=True,
        )  # fmt: skip
        entropies = None if out.entropy is None else out.entropy[:, -width:].float()
        return out.log_probs[:, -width:].float(), entropies

    @torch.no_grad()
    def reward_scores(self, input_ids: Tensor, attention_mask: Tensor, name: str) -> Tensor:
        """A reward adapter's score (B,) of right-padded rows (B, T), at each row's last token."""
        from ..models.scoring import last_attended

        with self.role(name):
            hidden = trunk_of(self.policy)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        scores: Tensor = self.score_heads[name](last_attended(hidden, attention_mask))[:, 0]
        return scores


class Head(nn.Linear):
    """A linear layer that computes in fp32, whatever the precision of its input and weights.

    In bf16 a value near 8 could change only in steps of 1/16.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def trunk_of(model: "PreTrainedModel") -> Any:
    """A causal language model without its head."""
    base = unwrap_peft_model(model)
    return getattr(base, base.base_model_prefix)


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that begin at the first attended token, whatever the padding: (B, T)."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


@contextmanager
def kept_hidden_states(trunk: Any) -> Iterator[list[Tensor]]:
    """The last hidden states (B, T, H) of each forward pass of `trunk` in the block: the critic's head and the
    language-model head need the same ones, and one pass gives both."""
    kept: list[Tensor] = []
    handle = trunk.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    try:
        yield kept
    finally:
        handle.remove()
