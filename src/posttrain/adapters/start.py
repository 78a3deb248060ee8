"""How a stage starts from another stage's adapter (`adapter.start`), and how a run's model is loaded again.

    continue  the same adapter is trained further; DPO's reference is a frozen copy of it (TRL's "ref" adapter)
    merge     the adapter is merged into the base and a fresh one is trained; the reference has no adapter

`config/peft_methods.py` says which method can do which. Adapter files are ordinary PEFT directories. A run that merged
its parent needs the parent when it is loaded; `load_policy` follows the lineage.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.peft_methods import METHODS, check_takeover, method_of
from ..config.sections import AdapterSettings, ModelSettings
from ..errors import ArtifactError, ConfigError
from ..models.loading import load_base
from ..runs.lineage import Lineage, read_lineage, resolve_parent, verify
from ..runs.paths import ADAPTER, MODEL
from .configs import fill_targets, peft_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_policy(
    run_dir: Path,
    *,
    trainable: bool = False,
    dequantize: bool = False,
    model_settings: ModelSettings | None = None,
) -> Any:
    """A run's model, verified: base, merged ancestors, and the run's adapter as "default".

    `dequantize` turns a 4-bit base into plain weights before the adapter is attached.
    Raises ArtifactError when the run or an ancestor is missing, altered or on another base.
    """
    lineage = verify(run_dir)
    settings = model_settings or _settings(lineage)
    task = lineage.task or "CAUSAL_LM"
    labels = lineage.metrics.get("labels", ())
    if lineage.kind == "model":
        return load_base(str(run_dir / MODEL), settings, task=task, labels=labels)
    if lineage.kind != "adapter":
        raise ArtifactError(f"{run_dir} contains {lineage.kind}, not a model; choose the run of a training stage")
    model = _load_adapter_base_of(run_dir, lineage, settings, task)
    if dequantize and getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize()
    model.config.pad_token_id = lineage.base["pad_token_id"]
    return attach(model, run_dir / ADAPTER, trainable=trainable)


def _load_adapter_base_of(run_dir: Path, lineage: Lineage, settings: ModelSettings, task: str) -> Any:
    """The model under a run's adapter."""
    parent = lineage.parents.get("policy")
    policy_dir = resolve_parent(run_dir, parent["path"]) if parent else None
    labels = lineage.metrics.get("labels", ())
    return load_adapter_base(lineage.base["name"], settings, policy_dir, lineage.start, task=task, labels=labels)


def load_adapter_base(
    base: str,
    settings: ModelSettings,
    policy_dir: Path | None,
    start: str | None,
    *,
    task: str,
    labels: Sequence[str] = (),
) -> Any:
    """The model under an adapter: the base, alone or with a merged policy, or a policy that was trained in full."""
    if policy_dir is not None and start == "merge":
        return merged_onto(policy_dir, settings, task=task)
    if policy_dir is not None and start == "full":
        return load_base(str(policy_dir / MODEL), settings, task=task)
    return load_base(base, settings, task=task, labels=labels)


def attach(model: "PreTrainedModel", adapter_dir: Path, *, trainable: bool) -> Any:
    """`model` with the adapter of a directory. Raises ArtifactError when it does not fit."""
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(adapter_dir))
        if trainable and config.is_prompt_learning:
            return _reload_trainable(model, adapter_dir, task=config.task_type)
        return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable)
    except (RuntimeError, ValueError, OSError) as error:
        raise ArtifactError(f"{adapter_dir} does not fit its base: {str(error).splitlines()[0]}") from error


def merged_onto(run_dir: Path, settings: ModelSettings, *, task: str) -> Any:
    """The policy of `run_dir`, its adapter merged, as a plain model with the head of `task`.

    A score head is freshly initialised, since a policy has none.
    """
    if settings.load_in_4bit:
        raise ConfigError(
            "adapter.start: merge cannot merge into 4-bit weights without losing quality (huggingface/peft#2321); use "
            "adapter.start: continue, or `posttrain merge` first and train on the merged model"
        )
    merged = load_policy(run_dir, model_settings=settings)
    if hasattr(merged, "peft_config"):
        merged = unload_merged(merged)
    if task == "CAUSAL_LM":
        return merged
    target = load_base(read_lineage(run_dir).base["name"], settings, task=task)
    _copy_trunk(merged, target)
    return target


def unload_merged(model: "PreTrainedModel") -> Any:
    """A PeftModel as a plain model: adapter merged into the weights, trained head in place of the original one.

    PEFT 0.21 leaves the trained head of LayerNorm tuning in its wrapper, and saves it under the wrapper's names.
    """
    from peft.utils import ModulesToSaveWrapper

    merged = model.merge_and_unload()
    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, own = name.rpartition(".")
            setattr(merged.get_submodule(parent), own, module.modules_to_save[module.active_adapter])
    return merged


def _copy_trunk(source: Any, target: Any) -> None:
    """Copy every weight of the trunk; only the heads differ."""
    prefix = f"{target.base_model_prefix}."
    trunk = {k: v for k, v in source.state_dict().items() if k.startswith(prefix)}
    missing, unexpected = target.load_state_dict(trunk, strict=False)
    left = [k for k in missing if k.startswith(prefix)]
    if left or unexpected:
        raise ArtifactError(f"the policy's trunk does not fit the reward model's: {[*left, *unexpected][:3]}")


def start_model(
    name: str,
    settings: ModelSettings,
    adapter: AdapterSettings,
    policy_dir: Path | None,
    *,
    task: str,
    labels: Sequence[str] = (),
) -> tuple[Any, Any | None, str | None]:
    """(model, PEFT configuration of the adapter to create, how the policy was taken over) for a training stage.

    When an adapter is continued, the model is a PeftModel and the PEFT configuration is None.
    """
    settings = _trainable(settings, adapter)
    fresh = peft_config(adapter, task=task, base=name)
    if policy_dir is None:
        return *_fresh(load_base(name, settings, task=task, labels=labels), fresh), None
    lineage = verify(policy_dir)
    if lineage.task != "CAUSAL_LM":
        raise ArtifactError(f"inputs.policy: {policy_dir} is no policy (task {lineage.task}, {lineage.kind})")
    if lineage.kind == "model":
        return *_fresh(load_base(str(policy_dir / MODEL), settings, task=task), fresh), "full"
    made_with = lineage.config["adapter"]
    check_takeover(str(policy_dir), made_with, adapter)
    if adapter.start == "merge" or adapter.method == "none":
        return *_fresh(merged_onto(policy_dir, settings, task=task), fresh), "merge"
    if lineage.start == "merge":
        raise ArtifactError(
            f"adapter.start: continue cannot follow {policy_dir}, which merged its own parent; use adapter.start: merge"
        )
    if task == "CAUSAL_LM":
        return attach(load_base(name, settings, task=task), policy_dir / ADAPTER, trainable=True), None, "continue"
    return _reload_trainable(load_base(name, settings, task=task), policy_dir / ADAPTER, task=task), None, "continue"


def _trainable(settings: ModelSettings, adapter: AdapterSettings) -> ModelSettings:
    """Settings with fp32 weights for full fine-tuning with `dtype: auto`: bf16 would round small updates away.

    Not under DeepSpeed, which keeps fp32 copies of bf16 weights.
    """
    under_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if adapter.method == "none" and settings.dtype == "auto" and not under_deepspeed:
        return dataclasses.replace(settings, dtype="float32")
    return settings


def _fresh(model: "PreTrainedModel", config: Any | None) -> tuple[Any, Any | None]:
    """The model, and the PEFT configuration for the trainer; an adapter that rewrites the base is created here.

    If the trainer created it, there would be no moment at which DPO's reference could be copied.
    """
    fill_targets(config, model)
    if config is None or not METHODS[method_of(config)].mutates_base:
        return model, config
    from peft import get_peft_model

    return get_peft_model(model, config), None


def _reload_trainable(model: "PreTrainedModel", adapter_dir: Path, *, task: str) -> Any:
    """A new trainable adapter for `task` with a saved adapter's weights.

    PEFT cannot load virtual tokens for training, and raises for a CAUSAL_LM adapter on a model with another head;
    without the task SEQ_CLS the score head would silently stay frozen and random.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(adapter_dir))
    config.task_type, config.inference_mode = task, False
    peft_model = get_peft_model(model, config)
    fresh = get_peft_model_state_dict(peft_model)
    saved = load_file(adapter_dir / "adapter_model.safetensors")
    if not saved.keys() <= fresh.keys():
        raise ArtifactError(f"{adapter_dir}: weights do not fit: {sorted(saved.keys() - fresh.keys())[:3]}")
    # PEFT needs every key of the new adapter: the score head is the fresh one's, everything else the saved one's.
    set_peft_model_state_dict(peft_model, {**fresh, **saved})
    return peft_model


@contextmanager
def copied_reference(model: "PreTrainedModel") -> Iterator[None]:
    """Make TRL's DPOTrainer within the block; its reference is then an exact, frozen copy of `model`'s adapter.

    TRL adds an adapter "ref" with the same configuration, and copies the parameters whose name contains `.default.`
    (trl 1.16, `trl/trainer/dpo_trainer.py`). For IA3, VeRA, BOFT, LoHa and LoKr it copies nothing, since their names
    end in `.default`: the reference would be the base. For PiSSA and OLoRA a second adapter would rewrite the base
    again: the policy would change, while its first loss would still be ln 2.
    """
    if not hasattr(model, "peft_config"):
        yield
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = model.peft_config["default"]
    made = getattr(config, "init_lora_weights", None)
    if METHODS[method_of(config)].mutates_base:
        config.init_lora_weights = True
    try:
        yield
    finally:
        if made is not None:
            config.init_lora_weights = made
    weights = get_peft_model_state_dict(model, adapter_name="default")
    set_peft_model_state_dict(model, {k: v.clone() for k, v in weights.items()}, adapter_name="ref")
    for name, parameter in model.named_parameters():
        if "ref" in name.split("."):
            parameter.requires_grad_(False)


def _settings(lineage: Lineage) -> ModelSettings:
    """The model settings that a run was trained with."""
    names = {f.name for f in dataclasses.fields(ModelSettings)}
    return ModelSettings(**{k: v for k, v in lineage.config.items() if k in names})


@contextmanager
def without_adapter(model: "PreTrainedModel", base: str, settings: ModelSettings) -> Iterator[Any]:
    """The base of a run without parents: `model` with its adapter off, or loaded again if the method rewrote it."""
    method = METHODS[method_of(model.peft_config["default"])]
    if method.mutates_base:
        yield load_base(base, settings, task="CAUSAL_LM").to(model.device)
    elif method.prompt_learning:
        yield model.get_base_model()
    else:
        with model.disable_adapter():
            yield model


def fold_for_generation(model: "PreTrainedModel") -> None:
    """Merge an adapter into fp32 weights in place and for good, so that generation takes fewer matrix products.

    For a model that is not trained any further. 16-bit and 4-bit weights are left alone: rounding would change the
    policy.
    """
    import torch

    if not hasattr(model, "peft_config") or not METHODS[method_of(model.peft_config["default"])].mergeable:
        return
    plain = not getattr(model, "is_loaded_in_4bit", False) and not getattr(model, "is_loaded_in_8bit", False)
    if plain and model.dtype == torch.float32:
        model.merge_adapter()


def count_parameters(model: "PreTrainedModel") -> tuple[int, int]:
    """(trained, all) parameters of a model."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
