"""The model card of every result: `README.md` in the hub's format, made from the lineage alone.

The card is not part of a result's digest: people add to it, and an edited sentence must not make an adapter "altered".
Its metadata name the base only if it is a hub id, and no licence: the base's applies, which a lineage does not know.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.peft_methods import METHODS
from ..config.recipes import RECIPES
from ..fileio import write_atomically
from ..intervals import Share, percent
from ..redact import clean, redact_values
from .headline import headline
from .lineage import Lineage
from .paths import CARD

# task -> (transformers' class, the hub's pipeline)
_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
}

_HYPERPARAMETERS = (
    "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "beta", "loss_type", "kl_coef", "clip_range", "num_ppo_epochs",
    "verifier",
)  # fmt: skip


def write_card(folder: Path, lineage: Lineage, *, merged: bool = False) -> None:
    """Write the card of a result into its folder; `merged`: the folder has an adapter merged into its base."""
    from huggingface_hub import ModelCard

    card = ModelCard(f"---\n{card_data(lineage, merged=merged).to_yaml()}\n---\n\n{body(lineage, merged=merged)}")
    write_atomically(folder / CARD, str(card))


def card_data(lineage: Lineage, *, merged: bool = False) -> Any:
    """The card's metadata, as the hub reads it."""
    from huggingface_hub import ModelCardData

    config, is_adapter = lineage.config, lineage.kind == "adapter" and not merged
    method = _method(lineage)
    results = _results(lineage)
    base = base_id(lineage)
    return ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if is_adapter else "merge" if merged else "finetune") if base else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=_TASKS[lineage.task or "CAUSAL_LM"][1],
        tags=[
            "posttrain",
            lineage.recipe,
            *(["trl"] if RECIPES[lineage.recipe].by_trl else []),
            *([method] if method else []),
        ],
        datasets=[config["dataset_name"]] if config.get("dataset_name") else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=_title(lineage) if results else None,
        eval_results=results or None,
    )


def _results(lineage: Lineage) -> list[Any]:
    """The measures of the finished stage, as the hub's model index has them."""
    from huggingface_hub import EvalResult

    found: list[Any] = []
    task = _TASKS[lineage.task or "CAUSAL_LM"][1]

    def add(metric: str, name: str, value: float, split: str) -> None:
        source = (
            lineage.config.get(f"{split}_file") or lineage.config.get("dataset_name") or f"the stage's {split} rows"
        )
        hub = source == lineage.config.get("dataset_name")
        where = source if hub else Path(source).name if isinstance(source, str) else f"{split} files"
        revision = (lineage.data.get(split) or {}).get("fingerprint")
        found.append(
            EvalResult(
                task_type=task, dataset_type=where if hub else "local",
                dataset_name=clean(where), metric_type=metric, metric_value=value,
                metric_name=name, dataset_split=split, dataset_revision=revision,
            )
        )  # fmt: skip

    for measure in headline(lineage, details=True):
        if measure.about.hub:
            value = measure.after.mean if isinstance(measure.after, Share) else measure.after
            add(measure.about.hub, measure.name, value, measure.split)
    return found


def body(lineage: Lineage, *, merged: bool = False) -> str:
    """The card's text, in Markdown."""
    sections = (
        f"# {escape(_title(lineage))}", _summary(lineage, merged), "## Use", _use(lineage, merged),
        "## Results", _measured(lineage), "## Training", _training(lineage), "## Lineage", _lineage(lineage),
    )  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _title(lineage: Lineage) -> str:
    return clean(f"{lineage.stage}: {base_name(lineage)} by {RECIPES[lineage.recipe].title}")


def _summary(lineage: Lineage, merged: bool) -> str:
    method, base = _method(lineage), escape(base_name(lineage))
    if merged:
        what = f"A plain model: the {method} adapter of the stage {escape(lineage.stage)} merged into {base}"
    elif lineage.kind == "adapter":
        what = f"A PEFT adapter ({method}) on {base}"
    else:
        what = f"{base}, all of its parameters trained"
    trained = lineage.cost.get("trained_parameters")
    share = f" {trained:,} of {lineage.cost['parameters']:,} parameters were trained." if trained else ""
    return f"{what}: {RECIPES[lineage.recipe].title}.{share} Made by posttrain. The base's licence applies."


def _use(lineage: Lineage, merged: bool) -> str:
    if lineage.kind == "adapter" and not merged and lineage.start == "merge":
        return (
            "This adapter was trained on the base with its parent's adapter merged in: PEFT alone cannot load it.\n\n"
            "```python\nfrom pathlib import Path\n\nfrom posttrain.adapters import load_policy\n\n"
            'model = load_policy(Path("RUN"))  # the run directory that holds this folder\n```\n\n'
            "`posttrain merge RUN OUTPUT` writes a plain model."
        )
    auto = _TASKS[lineage.task or "CAUSAL_LM"][0]
    labels = f"id2label=dict(enumerate({lineage.metrics.get('labels', [])}))"
    option = {"SEQ_CLS": ", num_labels=1", "TOKEN_CLS": f", {labels}"}.get(lineage.task or "", "")
    if lineage.kind != "adapter" or merged:
        load = [f'model = {auto}.from_pretrained("THIS_FOLDER")']
        imports = [f"from transformers import {auto}, AutoTokenizer"]
    else:
        base = base_id(lineage) or "BASE"
        load = [
            f'base = {auto}.from_pretrained("{base}"{option})',
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ]
        imports = ["from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer"]
        if _method(lineage) == "bottleneck":
            imports.insert(0, "import posttrain.adapters.bottleneck  # registers the method with PEFT")
    if lineage.task == "SEQ_CLS":
        load.append(f"model.config.pad_token_id = {lineage.base.get('pad_token_id')}")
    lines = [*imports, "", *load, 'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")']
    text = "```python\n" + "\n".join(lines) + "\n```"
    if lineage.kind == "adapter" and not merged and base_id(lineage) is None:
        text += f"\n\nBASE is {escape(base_name(lineage))}, whose fingerprint is `{_fingerprint(lineage)}`."
    if lineage.task == "TOKEN_CLS":
        text += "\n\n`posttrain tag RUN TEXT` prints entities."
    return text


def _measured(lineage: Lineage) -> str:
    rows = [
        (measure.title, percent(measure.before), measure.value, percent(measure.change, "+"))
        for measure in headline(lineage, details=True)
    ]
    rows += [
        (f"entity F1, {label}", "", f"{f1:.1%}", "") for label, f1 in lineage.metrics.get("f1_by_type", {}).items()
    ]
    if not rows:
        return "Nothing was measured: the stage had no test rows."
    table = ["| measure | before | after | change |", "|---|---|---|---|"]
    table += [f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows]
    return "\n".join([*table, "", "Brackets are 95% intervals; changes are paired by row."])


def _training(lineage: Lineage) -> str:
    config = redact_values(lineage.config)
    lines = [
        f"- data, {escape(name)}: {described['rows']:,} rows ({escape(str(described['format']))}), "
        f"fingerprint `{str(described.get('fingerprint') or '')[:16]}`"
        for name, described in lineage.data.items()
    ]
    lines += [
        f"- {key}: {escape(str(config[key]))}"
        for key in _HYPERPARAMETERS
        if config.get(key) not in (None, "", []) and not (key == "max_steps" and config[key] <= 0)
    ]
    if _method(lineage):
        reads = METHODS[config["adapter"]["method"]].reads | {"method", "start"}
        adapter = {k: v for k, v in config["adapter"].items() if k in reads and v is not None}
        lines.append(f"- adapter: {escape(', '.join(f'{k} {v}' for k, v in adapter.items()))}")
    lines.append(f"- seed {lineage.seed}, {lineage.world_size} {'process' if lineage.world_size == 1 else 'processes'}")
    if lineage.cost:
        lines.append(f"- {lineage.cost['wall_s']:,.0f} s, peak memory {lineage.cost['peak_rss_bytes'] / 2**30:.2f} GiB")
    for finding in lineage.metrics.get("health", []):
        lines.append(f"- health, step {finding['step']}: {escape(finding['name'])} ({finding['value']:.4g})")
    return "\n".join(lines)


def _lineage(lineage: Lineage) -> str:
    lines = [f"- key `{lineage.key}`", f"- digest `{lineage.digest}`", f"- base fingerprint `{_fingerprint(lineage)}`"]
    lines += [
        f"- {escape(role)}: `{escape(Path(parent['path']).name)}`, key `{parent['key']}`"
        for role, parent in lineage.parents.items()
    ]
    if lineage.git_commit:
        lines.append(f"- commit `{lineage.git_commit}`")
    lines.append(f"- {', '.join(f'{name} {version}' for name, version in lineage.versions.items())}")
    return "\n".join(lines)


def base_name(lineage: Lineage) -> str:
    """The base's name; for a folder, its last part."""
    name = str(lineage.base.get("name") or "the base model")
    return name if base_id(lineage) else Path(name).name


def base_id(lineage: Lineage) -> str | None:
    """The base's id on the hub; None for a folder."""
    name = str(lineage.base.get("name") or "")
    return name if re.fullmatch(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?", name) and not Path(name).exists() else None


def _fingerprint(lineage: Lineage) -> str:
    return str(lineage.base.get("fingerprint") or "")[:16]


def _method(lineage: Lineage) -> str | None:
    adapter: Mapping[str, Any] = lineage.config.get("adapter") or {}
    method = adapter.get("method")
    return str(method) if method not in (None, "none") else None


def escape(text: str) -> str:
    """Text escaped for Markdown, also in a table; on one line and without secrets."""
    return re.sub(r"([\\`*_\[\]<>#|~$])", r"\\\1", " ".join(clean(text).split())).replace("&", "&amp;")
