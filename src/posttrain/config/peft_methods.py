"""The one table of PEFT methods: what each can do, and what is refused before a model is loaded.

`resolve` checks every recipe's configuration. `check_takeover` checks each start from another stage's adapter; a chain
calls it before its first stage. What cannot work is an error with the reason and the nearest method that works. What
can be corrected (no checkpointing with a prefix, merging if a method cannot continue) is corrected, with a note.

The facts were measured on peft 0.21; `tests/adapters/test_cells.py` tests every cell. Imports no torch.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .recipes import RECIPES
from .sections import AdapterSettings

COMMAND_LINE = "the command line"  # in messages: the place where a key was written
SFT, REWARD, DPO, PPO, NER = "sft", "reward", "dpo", "ppo", "ner"
_LOW_RANK = frozenset({"r", "alpha", "target_modules", "modules_to_save"})
_ALWAYS = frozenset({"method", "start"})


@dataclass(frozen=True)
class Method:
    """One method's facts.

    Attributes:
        title: its name and source.
        peft_type: PEFT's type; adapters of one type can share a model.
        reads: the fields of `adapter` that it uses.
        mergeable: it can be merged into the base's weights.
        identity: a fresh adapter changes no output, so the model without it is the policy that training starts from.
        mutates_base: creating it rewrites the base's weights: without the adapter, the model is not the base.
        prompt_learning: it adds virtual tokens and changes no layer.
        checkpointing: it trains with gradient checkpointing.
        copied_by_trl: TRL's own copy of the adapter, DPO's reference, is complete from the start (`copied_reference`).
        continues: the next stage may train the same adapter further, with a frozen copy as its reference.
        four_bit: it trains on a 4-bit base.
        refused: recipe -> (why it cannot train that recipe, the nearest method that works).
    """

    title: str
    peft_type: str
    reads: frozenset[str]
    mergeable: bool = True
    identity: bool = True
    mutates_base: bool = False
    prompt_learning: bool = False
    checkpointing: bool = True
    copied_by_trl: bool = True
    continues: bool = True
    four_bit: bool = True
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The recipes that it can train."""
        return tuple(
            name for name, recipe in RECIPES.items() if "adapter" in recipe.groups and name not in self.refused
        )


_REFERENCE = (
    "PPO's reference is the policy without its adapter, and this method rewrites the base that remains",
    "lora",
)

_NO_LAYERS = ("PPO's roles are adapters on layers, and virtual tokens are not in layers", "lora")

_POOLED = (
    "its virtual tokens are passed as embeddings, in which transformers cannot see padding: it takes the score at the "
    "last position, pad or not, and five pads moved a score by up to 1.7",
    "p_tuning_v2",
)

_LOST_ENCODER = (
    "only its final embeddings are saved, not the encoder that is trained: it cannot continue from a policy, and a "
    "fresh one is not the same policy as the reference",
)

_VIRTUAL: dict[str, Any] = {
    "mergeable": False, "identity": False, "prompt_learning": True,
}  # fmt: skip

METHODS: dict[str, Method] = {
    "lora": Method("LoRA (Hu et al., 2021)", "LORA", _LOW_RANK | {"dropout"}),
    "rslora": Method("rsLoRA (Kalajdzievski, 2023)", "LORA", _LOW_RANK | {"dropout"}),
    "dora": Method("DoRA (Liu et al., 2024)", "LORA", _LOW_RANK | {"dropout"}),
    "pissa": Method(
        "PiSSA (Meng et al., 2024)", "LORA", _LOW_RANK | {"dropout"},
        mutates_base=True, continues=False, four_bit=False, refused={PPO: _REFERENCE},
    ),
    "olora": Method(
        "OLoRA (Büyükakyüz, 2024)", "LORA", _LOW_RANK | {"dropout"},
        mutates_base=True, continues=False, four_bit=False, refused={PPO: _REFERENCE},
    ),
    "adalora": Method(
        "AdaLoRA (Zhang et al., 2023)", "ADALORA", _LOW_RANK | {"dropout"}, continues=False,
        refused={PPO: ("it distributes ranks by one loss's gradients, and PPO's loss changes per rollout", "lora")},
    ),
    "ia3": Method(
        "(IA)3 (Liu et al., 2022)", "IA3", frozenset({"target_modules", "modules_to_save"}), copied_by_trl=False
    ),
    "vera": Method("VeRA (Kopiczko et al., 2024)", "VERA", _LOW_RANK - {"alpha"} | {"dropout"}, copied_by_trl=False),
    "oft": Method(
        "OFT (Qiu et al., 2023)", "OFT", frozenset({"block_size", "target_modules", "modules_to_save"})
    ),
    "boft": Method(
        "BOFT (Liu et al., 2024)", "BOFT", frozenset({"block_size", "target_modules", "modules_to_save"}),
        four_bit=False, copied_by_trl=False,
    ),
    "loha": Method("LoHa (Hyeon-Woo et al., 2022)", "LOHA", _LOW_RANK, four_bit=False, copied_by_trl=False),
    "lokr": Method("LoKr (Yeh et al., 2024)", "LOKR", _LOW_RANK, four_bit=False, copied_by_trl=False),
    "ln_tuning": Method(
        "LayerNorm tuning (Zhao et al., 2024)", "LN_TUNING", frozenset({"target_modules", "modules_to_save"})
    ),
    "prompt_tuning": Method(
        "Prompt tuning (Lester et al., 2021)", "PROMPT_TUNING", frozenset({"num_virtual_tokens"}), **_VIRTUAL,
        refused={REWARD: _POOLED, PPO: _NO_LAYERS},
    ),
    "p_tuning": Method(
        "P-tuning (Liu et al., 2021)", "P_TUNING", frozenset({"num_virtual_tokens", "encoder_hidden_size"}),
        **_VIRTUAL, continues=False,
        refused={REWARD: _POOLED, DPO: (*_LOST_ENCODER, "prompt_tuning"), PPO: _NO_LAYERS},
    ),
    "prefix_tuning": Method(
        "Prefix tuning (Li and Liang, 2021)", "PREFIX_TUNING",
        frozenset({"num_virtual_tokens", "encoder_hidden_size"}), **_VIRTUAL, checkpointing=False, continues=False,
        refused={DPO: (*_LOST_ENCODER, "p_tuning_v2"), PPO: _NO_LAYERS},
    ),
    "p_tuning_v2": Method(
        "P-tuning v2 (Liu et al., 2022)", "PREFIX_TUNING", frozenset({"num_virtual_tokens"}), **_VIRTUAL,
        checkpointing=False, refused={PPO: _NO_LAYERS},
    ),
    "bottleneck": Method(
        "Bottleneck adapter (Houlsby et al., 2019)", "BOTTLENECK",
        frozenset({"reduction_factor", "target_modules", "modules_to_save"}), mergeable=False,
    ),
    "none": Method("Full fine-tuning", "", frozenset(), mergeable=False, four_bit=False),
}  # fmt: skip


def resolve(
    recipe: str, settings: AdapterSettings, values: dict[str, Any], *, given: Mapping[str, str], has_policy: bool
) -> tuple[AdapterSettings, list[str]]:
    """The adapter settings that a stage will use, and notes of what was changed; `values` is changed in place.

    `given` says where each key was written. A key that was written together with the method, and that the method cannot
    use, is an error. A default is replaced, with a note; so is a file's key if the command line names another method.
    Raises ConfigError.
    """
    method, name = METHODS[settings.method], settings.method
    notes: list[str] = []
    if recipe in method.refused:
        why, nearest = method.refused[recipe]
        raise ConfigError(f"adapter.method: {name} cannot train {recipe}: {why}; use {nearest}")

    unread = [
        f.name for f in dataclasses.fields(AdapterSettings)
        if f"adapter.{f.name}" in given and f.name not in method.reads | _ALWAYS
    ]  # fmt: skip
    for key in unread:
        if not _gives_way(f"adapter.{key}", given):
            reads = ", ".join(sorted(method.reads)) or "nothing"
            raise ConfigError(
                f"{given[f'adapter.{key}']}: {name} does not use adapter.{key}, only {reads}; leave it out"
            )
        notes.append(f"adapter.{key} of {given[f'adapter.{key}']} is left out: {name} does not use it")
    defaults = AdapterSettings()
    settings = dataclasses.replace(settings, **{key: getattr(defaults, key) for key in unread})

    if not method.checkpointing:
        why = "the prefix is in the key-value cache, which checkpointing does not use"
        for key in ("gradient_checkpointing", "activation_checkpointing"):
            if values.get(key):
                raise ConfigError(f"{given[key]}: {key}: true does not work with {name}: {why}; set it to false")
        if recipe != NER and "gradient_checkpointing" not in given:  # TRL's trainers have it on
            values["gradient_checkpointing"] = False
            notes.append(f"gradient_checkpointing is off: {why}")
    if values.get("load_best_model_at_end") and method.prompt_learning:
        raise ConfigError(
            f"load_best_model_at_end: PEFT reads a checkpoint of {name} into the wrong weights; set it to false"
        )
    goes_on = has_policy and settings.start == "continue" and method.continues
    if recipe == DPO and values.get("precompute_ref_log_probs") and goes_on and not method.copied_by_trl:
        raise ConfigError(
            f"precompute_ref_log_probs: TRL computes them before the reference of {name} is complete (adapter.start: "
            "continue); use adapter.start: merge, or set it to false"
        )
    if values.get("load_in_4bit") and not method.four_bit:
        raise ConfigError(f"adapter.method: {name} does not train on 4-bit weights; use lora, or load_in_4bit: false")

    if values.get("use_vllm") and not method.mergeable and name != "none":
        raise ConfigError(
            f"use_vllm: vLLM gets the policy merged into its base, and {name} cannot be merged; set it to false"
        )

    if has_policy and settings.start == "continue" and not method.continues and method.mergeable:
        if values.get("load_in_4bit"):
            raise ConfigError(f"adapter.method: {name} cannot continue from a policy on 4-bit weights; use lora")
        why = (
            "a second adapter beside it would rewrite the base again"
            if method.mutates_base
            else "PEFT trains one such adapter per model"
        )
        if "adapter.start" in given and not _gives_way("adapter.start", given):
            raise ConfigError(
                f"{given['adapter.start']}: adapter.start: continue is wrong for {name}: {why}; use merge"
            )
        settings = dataclasses.replace(settings, start="merge")
        notes.append(f"adapter.start is merge, not continue, for {name}: {why}")
    if recipe == DPO and not method.identity and not (has_policy and settings.start == "continue"):
        raise ConfigError(
            f"adapter.method: a fresh {name} adapter changes the policy, and DPO's reference would be the model "
            "without it; continue from an inputs.policy of the same method (adapter.start: continue), or use lora"
        )
    return settings, notes


def _gives_way(key: str, given: Mapping[str, str]) -> bool:
    """Whether a key was written for another method: it is in a file, and the command line names the method."""
    method_at = given.get("adapter.method")
    return method_at == COMMAND_LINE and given[key] != method_at


def check_takeover(source: str, parent: Mapping[str, Any], child: AdapterSettings) -> None:
    """Check that a stage with `child` can start from a policy with `parent`. Raises ConfigError.

    `parent` is the `adapter` group of the configuration that made the policy; `source` names that run in the message.
    """
    name = parent["method"]
    method = METHODS[name]
    if name == "none":
        return
    if child.start == "merge" or child.method == "none":
        if not method.mergeable:
            go_on = f"continue with adapter: {{method: {name}, start: continue}}, or " if method.continues else ""
            raise ConfigError(
                f"{source} was made with {name}, which cannot be merged into its base; {go_on}train it with lora"
            )
        return
    if not method.continues:
        instead = "use adapter.start: merge" if method.mergeable else "and it cannot be merged: train it with lora"
        raise ConfigError(f"{source} was made with {name}, which another stage cannot continue; {instead}")
    for key in ("method", *sorted(method.reads - {"dropout"})):
        wanted, got = getattr(child, key), parent[key]
        if wanted != got and wanted is not None:
            other = ", or adapter.start: merge" if method.mergeable else ""
            raise ConfigError(
                f"adapter.{key} is {wanted}, but adapter.start: continue trains the adapter of {source} further, whose "
                f"{key} is {got}; set adapter.{key}: {got}{other}"
            )


def method_of(peft_config: Any) -> str:
    """The name of a PEFT configuration's method in the table."""
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    if kind == "LORA":
        made = peft_config.init_lora_weights
        if isinstance(made, str) and made.startswith(("pissa", "olora")):
            return made[:5]
        return "dora" if peft_config.use_dora else "rslora" if peft_config.use_rslora else "lora"
    if kind == "PREFIX_TUNING":
        return "prefix_tuning" if peft_config.prefix_projection else "p_tuning_v2"
    found = [name for name, method in METHODS.items() if method.peft_type == kind]
    if len(found) != 1:
        raise ConfigError(f"a PEFT adapter of type {kind} is not one of {', '.join(METHODS)}")
    return found[0]
