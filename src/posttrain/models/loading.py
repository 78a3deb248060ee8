"""Base models and tokenizers: found and checked before weights are read, then loaded.

A stage names its base by `model_name_or_path`, or inherits it from `inputs.policy`; naming another one is an error.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.sections import ModelSettings
from ..distributed.environment import launch_of
from ..errors import ArtifactError, ConfigError
from ..fileio import digest, sha256_text
from ..runs.fingerprints import check_safetensors, fingerprint_base
from ..runs.lineage import Lineage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def check_base(settings: ModelSettings, inherited: Lineage | None) -> str:
    """The base model's name, after all checks that do not need the weights.

    Raises ConfigError when none is named; ArtifactError when it is not the base of the stage's input, or a local folder
    is not a model or has a truncated file.
    """
    name = settings.model_name_or_path or (inherited.base["name"] if inherited else "")
    if not name:
        raise ConfigError("model_name_or_path is missing; set it, or inputs.policy to inherit a stage's base")
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ArtifactError(f"model_name_or_path: {path} has no config.json: not a model's folder")
        weights = sorted(path.glob("*.safetensors"))
        if not weights:
            raise ArtifactError(f"model_name_or_path: {path} has no .safetensors file (pickled weights are not read)")
        for file in weights:
            check_safetensors(file)
    elif path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ArtifactError(f"model_name_or_path: {name} is not a folder (looked in {Path.cwd()})")
    if inherited and settings.model_name_or_path and not _same_base(name, inherited):
        raise ArtifactError(
            f"model_name_or_path is {name}, but inputs.policy was trained on {inherited.base['name']}: an adapter "
            "fits its own base only; leave model_name_or_path out to inherit it"
        )
    return name


def _same_base(name: str, lineage: Lineage) -> bool:
    if Path(name).is_dir():
        return bool(fingerprint_base(Path(name)) == lineage.base["fingerprint"])
    return bool(name == lineage.base["name"])


def describe_base(name: str, settings: ModelSettings, model: "PreTrainedModel") -> dict[str, Any]:
    """What a lineage records of the base."""
    from ..upstream.transformers import commit_of

    path, commit = Path(name), commit_of(model.config)
    return {
        "name": str(path.resolve()) if path.is_dir() else name,
        "revision": settings.model_revision or commit,
        "fingerprint": fingerprint_base(path) if path.is_dir() else str(commit),
        "dtype": str(model.dtype).removeprefix("torch."),
        "pad_token_id": model.config.pad_token_id,
        "quantization": settings.bnb_4bit_quant_type if settings.load_in_4bit else None,
    }


def load_tokenizer(
    name: str, settings: ModelSettings, *, task: str = "CAUSAL_LM", trust_remote_code: bool = False
) -> Any:
    """The tokenizer, with its own pad token or else EOS. Raises ArtifactError when it cannot be loaded or has no EOS.

    A tagger needs no EOS. It reads separate words, to which a byte-level tokenizer must add the space before.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=settings.model_revision or "main", trust_remote_code=trust_remote_code,
            **({"add_prefix_space": True} if task == "TOKEN_CLS" else {}),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ArtifactError(_unreachable(name, error)) from error
    if task == "TOKEN_CLS":
        tokenizer.padding_side = "right"  # words are located from the left
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise ArtifactError(f"{name}: the tokenizer has no EOS token, so a policy could never learn to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    name: str, settings: ModelSettings, *, task: str, labels: Sequence[str] = (), trust_remote_code: bool = False
) -> Any:
    """The base model with the head of `task`, quantised to 4 bits if the settings say so.

    CAUSAL_LM, SEQ_CLS with one score, or TOKEN_CLS with one output per label in `labels`.

    `dtype: auto` is bf16 on a GPU with bf16 in hardware, else fp32.
    """
    import torch
    import transformers

    head = getattr(transformers, HEADS[task])
    kwargs: dict[str, Any] = {
        "revision": settings.model_revision or "main",
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "dtype": _dtype(settings),
    }
    if settings.attn_implementation:
        kwargs["attn_implementation"] = settings.attn_implementation
    if settings.load_in_4bit:
        kwargs["quantization_config"] = _nf4(settings, kwargs["dtype"])
        if torch.cuda.is_available():
            kwargs["device_map"] = {"": torch.cuda.current_device()}
    if task == "SEQ_CLS":
        kwargs["num_labels"] = 1
    if task == "TOKEN_CLS":
        kwargs["id2label"] = dict(enumerate(labels))
        kwargs["label2id"] = {label: i for i, label in enumerate(labels)}
        kwargs["ignore_mismatched_sizes"] = True  # replaces the head of a published tagger, which has other labels
    try:
        model = head.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ArtifactError(_unreachable(name, error)) from error
    return model


def _dtype(settings: ModelSettings) -> Any:
    import torch

    from .precision import has_bf16

    if settings.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and has_bf16() else torch.float32
    return getattr(torch, settings.dtype)


def _nf4(settings: ModelSettings, dtype: Any) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_4bit: true needs bitsandbytes: pip install 'posttrain[bitsandbytes]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=["lm_head", "classifier", "score"],  # transformers' default misses BERT's head
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        # FSDP shards floating-point storage only; accelerate keeps full bytes on every process.
        bnb_4bit_quant_storage=dtype if launch_of(os.environ).strategy == "fsdp2" else "uint8",
    )


def _unreachable(name: str, error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"model_name_or_path: cannot load {name!r}: {first.strip()} Accepted: a model's folder, or a hub id."


def template_sha256(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    template = tokenizer.chat_template
    return sha256_text(template if isinstance(template, str) or template is None else repr(template))


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of all that decides the ids (vocabulary, merges, normalisation), without padding, which use changes."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return digest(tokenizer.get_vocab())
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest({k: v for k, v in backend.items() if k not in ("padding", "truncation")})


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", lineage: Lineage, run_dir: Path) -> None:
    """Raise ArtifactError if the tokenizer or chat template is not the one that a stage was trained with."""
    for what, now, then in (
        ("chat template", template_sha256(tokenizer), lineage.chat_template_sha256),
        ("tokenizer", tokenizer_sha256(tokenizer), lineage.tokenizer_sha256),
    ):
        if now != then:
            raise ArtifactError(
                f"{run_dir} was trained with another {what} ({(then or 'none')[:12]}, now {(now or 'none')[:12]}); "
                f"restore it in {lineage.base['name']}, or run the chain again with the new one"
            )
