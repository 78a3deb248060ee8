"""The PEFT configuration of each method, from a stage's `adapter` settings."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..config.sections import AdapterSettings
from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


def peft_config(settings: AdapterSettings, *, task: str, base: str) -> Any | None:
    """The PEFT configuration of a fresh adapter for `task`, or None for full fine-tuning. Raises ConfigError."""
    if settings.method == "none":
        return None
    targets = settings.target_modules
    named = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
    if not (targets is None or isinstance(targets, str) or named):
        raise ConfigError(f"adapter.target_modules must be {ALL_LINEAR!r} or a list of module names, got {targets!r}")
    if isinstance(targets, str) and targets != ALL_LINEAR:
        targets = targets.split(",")
    common = {"task_type": task, "base_model_name_or_path": base}
    with_layers = {**common, "target_modules": targets, "modules_to_save": settings.modules_to_save}
    everywhere = targets == ALL_LINEAR or (targets is None and settings.method not in _OWN_TARGETS)
    if task == "TOKEN_CLS" and everywhere and settings.method not in ("vera", "ln_tuning"):
        # The head is trained in full; PEFT crashes if it has an adapter too.
        with_layers["exclude_modules"] = ["classifier", "score"]
    return _MAKERS[settings.method](settings, common, with_layers)


def fill_targets(config: Any | None, model: "PreTrainedModel") -> None:
    """Fill in `target_modules` where it depends on the model and PEFT has no default."""
    from torch.nn import Linear

    if config is None or getattr(config, "target_modules", None) not in (None, ALL_LINEAR):
        return
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "LN_TUNING":
        norms = [n for n, m in model.named_modules() if type(m).__name__.endswith(("LayerNorm", "RMSNorm"))]
        config.target_modules = {name.rpartition(".")[2] for name in norms}
    elif kind == "VERA" and config.task_type == "TOKEN_CLS":  # it has no `exclude_modules`
        linear = [n for n, m in model.named_modules() if isinstance(m, Linear) and n not in ("classifier", "score")]
        config.target_modules = set(linear)


# Methods with default targets per model type, PEFT's or ours; the others adapt every linear layer.
_OWN_TARGETS = ("ia3", "ln_tuning", "bottleneck")


def _everywhere(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "target_modules": options["target_modules"] or ALL_LINEAR}


def _lora(**special: Any) -> Callable[..., Any]:
    def make(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
        from peft import LoraConfig

        alpha = int(s.alpha) if float(s.alpha).is_integer() else s.alpha
        return LoraConfig(r=s.r, lora_alpha=alpha, lora_dropout=s.dropout, **_everywhere(with_layers), **special)

    return make


def _adalora(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    """Starts with ranks of 1.5 x `r` and ends with `r` on average, as in the paper's experiments.

    The schedule's length is set when training begins (`adapters/adalora.py`); `total_step` is a placeholder.
    """
    from peft import AdaLoraConfig

    alpha = int(s.alpha) if float(s.alpha).is_integer() else s.alpha
    return AdaLoraConfig(
        init_r=s.r + (s.r + 1) // 2, target_r=s.r, lora_alpha=alpha, lora_dropout=s.dropout, total_step=2**31,
        **_everywhere(with_layers),
    )  # fmt: skip


def _ia3(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from peft import IA3Config

    if with_layers["target_modules"] is None:
        return IA3Config(**with_layers)  # keys, values and the feed-forward block, as PEFT knows them by model type
    targets = with_layers["target_modules"]
    inner = [] if targets == ALL_LINEAR else [t for t in targets if t.endswith(_FEED_FORWARD)]
    return IA3Config(**with_layers, feedforward_modules=inner)


_FEED_FORWARD = ("down_proj", "output.dense", "fc2", "c_proj", "wo", "dense_4h_to_h")


def _vera(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from peft import VeraConfig

    return VeraConfig(r=s.r, vera_dropout=s.dropout, **_everywhere(with_layers))


def _oft(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from peft import OFTConfig

    return OFTConfig(r=0, oft_block_size=s.block_size, **_everywhere(with_layers))


def _boft(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from peft import BOFTConfig

    return BOFTConfig(boft_block_size=s.block_size, **_everywhere(with_layers))


def _loha(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(r=s.r, alpha=s.alpha, **_everywhere(with_layers))


def _lokr(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(r=s.r, alpha=s.alpha, **_everywhere(with_layers))


def _ln_tuning(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from peft import LNTuningConfig

    return LNTuningConfig(**with_layers)


def _bottleneck(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from .bottleneck import BottleneckConfig

    return BottleneckConfig(reduction_factor=s.reduction_factor, **with_layers)


def _prompt_tuning(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(num_virtual_tokens=s.num_virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB", **common)


def _p_tuning(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(
        num_virtual_tokens=s.num_virtual_tokens, encoder_hidden_size=s.encoder_hidden_size, **common
    )


def _prefix(projection: bool) -> Callable[..., Any]:
    def make(s: AdapterSettings, common: Mapping[str, Any], with_layers: Mapping[str, Any]) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            num_virtual_tokens=s.num_virtual_tokens, prefix_projection=projection,
            encoder_hidden_size=s.encoder_hidden_size if projection else None, **common,
        )  # fmt: skip

    return make


_MAKERS: dict[str, Callable[[AdapterSettings, Mapping[str, Any], Mapping[str, Any]], Any]] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "olora": _lora(init_lora_weights="olora"),
    "adalora": _adalora,
    "ia3": _ia3,
    "vera": _vera,
    "oft": _oft,
    "boft": _boft,
    "loha": _loha,
    "lokr": _lokr,
    "ln_tuning": _ln_tuning,
    "prompt_tuning": _prompt_tuning,
    "p_tuning": _p_tuning,
    "prefix_tuning": _prefix(projection=True),
    "p_tuning_v2": _prefix(projection=False),
    "bottleneck": _bottleneck,
}
