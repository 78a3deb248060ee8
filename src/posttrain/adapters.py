"""Adapters: made fresh, taken over from the stage before, merged away.

How a stage starts from another stage's adapter (`adapter.start`):

    continue  the same adapter is trained on; DPO's reference is a frozen copy of it (TRL's "ref" adapter)
    merge     the adapter is added into the base, a fresh one is trained on that; the reference is "adapters off"

Adapter files are ordinary PEFT directories. A run that merged needs its parent to be loaded; `load_policy` follows the
lineage. LoRA: Hu et al., 2021 (B starts at zero); rsLoRA: Kalajdzievski, 2023; DoRA: Liu et al., 2024.
"""

from pathlib import Path
from typing import Any

from .artifacts import Lineage, read_lineage, resolve_parent, verify
from .errors import ArtifactError, ConfigError
from .models import load_base
from .settings import AdapterSettings, ModelSettings

ADAPTER = "adapter"  # the folder of a run's adapter
MODEL = "model"  # the folder of a run's full weights, when adapter.method is none


def peft_config(settings: AdapterSettings, *, task: str, base: str) -> Any | None:
    """The PEFT configuration of a fresh adapter for `task`, or None for full fine-tuning."""
    if settings.method == "none":
        return None
    from peft import LoraConfig

    targets = settings.target_modules
    if not (isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(t, str) for t in targets))):
        raise ConfigError(f"adapter.target_modules must be 'all-linear' or a list of module names, got {targets!r}")
    if targets != "all-linear" and isinstance(targets, str):
        targets = targets.split(",")
    return LoraConfig(
        task_type=task,
        r=settings.r,
        lora_alpha=int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=settings.modules_to_save,
        use_rslora=settings.method == "rslora",
        use_dora=settings.method == "dora",
        base_model_name_or_path=base,
    )


def load_policy(
    run_dir: Path,
    *,
    trainable: bool = False,
    dequantize: bool = False,
    model_settings: ModelSettings | None = None,
) -> Any:
    """The model that a run made, verified: base, merged ancestors, and the run's adapter as "default".

    `dequantize` turns a 4-bit base into plain weights before the adapter is attached.
    Raises ArtifactError when anything on the way is missing, altered or on another base.
    """
    lineage = verify(run_dir)
    settings = model_settings or _settings(lineage)
    task = lineage.task or "CAUSAL_LM"
    if lineage.kind == "model":
        return load_base(str(run_dir / MODEL), settings, task=task)
    if lineage.kind != "adapter":
        raise ArtifactError(f"{run_dir} holds {lineage.kind}, not a model; choose the run of a training stage")
    model = _foundation(run_dir, lineage, settings, task)
    if dequantize and getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize()
    model.config.pad_token_id = lineage.base["pad_token_id"]
    return _attach(model, run_dir / ADAPTER, trainable=trainable)


def _foundation(run_dir: Path, lineage: Lineage, settings: ModelSettings, task: str) -> Any:
    """What a run's adapter sits on: the base, or the parent's policy merged."""
    parent = lineage.parents.get("policy")
    if parent and lineage.start == "merge":
        return merged_onto(resolve_parent(run_dir, parent["path"]), settings, task=task)
    if parent and lineage.start == "full":
        return load_base(str(resolve_parent(run_dir, parent["path"]) / MODEL), settings, task=task)
    return load_base(lineage.base["name"], settings, task=task)


def _attach(model: Any, adapter_dir: Path, *, trainable: bool) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable)
    except (RuntimeError, ValueError, OSError) as error:
        raise ArtifactError(f"{adapter_dir} does not fit its base: {str(error).splitlines()[0]}") from error


def merged_onto(run_dir: Path, settings: ModelSettings, *, task: str) -> Any:
    """The policy of `run_dir` as a plain model with the head of `task`.

    A score head keeps its fresh weights: an SFT policy has none to give.
    """
    if settings.load_in_4bit:
        raise ConfigError(
            "adapter.start: merge cannot merge into 4-bit weights without losing quality (huggingface/peft#2321); use "
            "adapter.start: continue, or `posttrain merge` first and train on the merged model"
        )
    merged = load_policy(run_dir, model_settings=settings)
    if hasattr(merged, "merge_and_unload"):
        merged = merged.merge_and_unload()
    if task == "CAUSAL_LM":
        return merged
    target = load_base(read_lineage(run_dir).base["name"], settings, task=task)
    _copy_trunk(merged, target)
    return target


def _copy_trunk(source: Any, target: Any) -> None:
    """Copy every weight of the trunk; the heads differ by design."""
    prefix = f"{target.base_model_prefix}."
    trunk = {k: v for k, v in source.state_dict().items() if k.startswith(prefix)}
    missing, unexpected = target.load_state_dict(trunk, strict=False)
    left = [k for k in missing if k.startswith(prefix)]
    if left or unexpected:
        raise ArtifactError(f"the policy's trunk does not fit the reward model's: {[*left, *unexpected][:3]}")


def start_model(
    name: str, settings: ModelSettings, adapter: AdapterSettings, policy_dir: Path | None, *, task: str
) -> tuple[Any, Any | None, str | None]:
    """(model, PEFT configuration to make, how the policy was taken over) for a training stage.

    The model is a PeftModel when an adapter is continued, and then the PEFT configuration is None.
    """
    fresh = peft_config(adapter, task=task, base=name)
    if policy_dir is None:
        return load_base(name, settings, task=task), fresh, None
    lineage = verify(policy_dir)
    if lineage.task != "CAUSAL_LM":
        raise ArtifactError(f"inputs.policy: {policy_dir} is no policy (task {lineage.task}, {lineage.kind})")
    if lineage.kind == "model":
        return load_base(str(policy_dir / MODEL), settings, task=task), fresh, "full"
    if adapter.start == "merge" or adapter.method == "none":
        return merged_onto(policy_dir, settings, task=task), fresh, "merge"
    if lineage.start == "merge":
        raise ArtifactError(
            f"adapter.start: continue cannot follow {policy_dir}, which merged its own parent; use adapter.start: merge"
        )
    _check_continues(adapter, policy_dir)
    if task == "CAUSAL_LM":
        return _attach(load_base(name, settings, task=task), policy_dir / ADAPTER, trainable=True), None, "continue"
    return _retyped(load_base(name, settings, task=task), policy_dir, task=task), None, "continue"


def _check_continues(adapter: AdapterSettings, policy_dir: Path) -> None:
    """A continued adapter keeps its shape: refuse settings that would silently not be followed."""
    from peft import PeftConfig

    saved = PeftConfig.from_pretrained(str(policy_dir / ADAPTER))
    method = "dora" if saved.use_dora else "rslora" if saved.use_rslora else "lora"
    for key, wanted, got in (
        ("method", adapter.method, method),
        ("r", adapter.r, saved.r),
        ("alpha", float(adapter.alpha), float(saved.lora_alpha)),
    ):
        if wanted != got:
            raise ConfigError(
                f"adapter.{key} is {wanted}, but adapter.start: continue trains the adapter of {policy_dir} on, whose "
                f"{key} is {got}; set adapter.{key}: {got}, or adapter.start: merge"
            )


def _retyped(model: Any, policy_dir: Path, *, task: str) -> Any:
    """A policy's adapter on a sequence classifier: the same weights, typed anew, with a trainable score head.

    Loading a CAUSAL_LM adapter straight onto another head raises in PEFT, and without SEQ_CLS the head would stay
    frozen and random without a word.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(policy_dir / ADAPTER))
    config.task_type, config.inference_mode = task, False
    peft_model = get_peft_model(model, config)
    fresh = get_peft_model_state_dict(peft_model)
    saved = load_file(policy_dir / ADAPTER / "adapter_model.safetensors")
    if not saved.keys() <= fresh.keys():
        raise ArtifactError(f"{policy_dir}: adapter weights do not fit: {sorted(saved.keys() - fresh.keys())[:3]}")
    # PEFT wants every key of the new type: the score head comes from the fresh adapter, all else from the saved one.
    set_peft_model_state_dict(peft_model, {**fresh, **saved})
    return peft_model


def _settings(lineage: Lineage) -> ModelSettings:
    """The model settings a run was trained with, for a faithful reload."""
    import dataclasses

    names = {f.name for f in dataclasses.fields(ModelSettings)}
    return ModelSettings(**{k: v for k, v in lineage.config.items() if k in names})


def fold_for_generation(model: Any) -> None:
    """Add an adapter into fp32 weights in place, for good: fewer products a token. For a model that trains no more.

    16-bit and 4-bit weights are left alone, where rounding would make it another policy.
    """
    import torch

    plain = not getattr(model, "is_loaded_in_4bit", False) and not getattr(model, "is_loaded_in_8bit", False)
    if hasattr(model, "merge_adapter") and plain and model.dtype == torch.float32:
        model.merge_adapter()


def count_parameters(model: Any) -> tuple[int, int]:
    """(trained, all) parameters of a model."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
