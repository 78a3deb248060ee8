"""What the recipe `ner` adds: loading and encoding sentences, the tagger, its trainer, entity scores at the end."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..adapters import start_model
from ..config.peft_methods import METHODS
from ..config.sections import NerDataSettings, NerGates, NerSettings
from ..errors import ConfigError, DataError
from ..fileio import write_atomically
from ..log import log_line
from ..models import cpu, is_prompt_learning
from ..models.loading import describe_base
from ..ner.alignment import IGNORED, Encoded, check_tokenizer, encode, predict, probe_logits
from ..ner.metrics import as_lines, entity_scores, mistakes
from ..ner.reading import check_against_train, load_hub_sentences, load_sentences
from ..ner.sentences import Sentences
from ..runs.paths import ANSWERS
from ..tracking.trainers import trained_model
from . import gates
from .policy import model_settings, reload_gate
from .stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

PROBE_TOKENS = 48
KEYS = ("train_file", "validation_file", "test_file")


def load(stage: Stage) -> tuple[Sentences, Sentences | None, Sentences | None]:
    """(train, validation, test) sentences. Raises DataError, also for entity types that only the latter two have."""
    if find_spec("seqeval") is None:
        raise ConfigError("the recipe ner scores entities with seqeval: pip install 'posttrain[ner]'")
    train, *others = (_load(stage, key) for key in KEYS)
    if train is None:
        raise DataError("no training data: set train_file or dataset_name")
    limit = stage.config.part(NerSettings).max_train_rows
    if limit is not None:
        train = train.first(limit)
    settings = stage.config.part(NerDataSettings)
    for key, other in zip(KEYS[1:], others, strict=True):
        if other is not None and (
            count := check_against_train(train, other, key=key, on_unseen_tag=settings.on_unseen_tag)
        ):
            log_line(f"{key}: {count} entities of types that train_file never has are read as O")
    if stage.config.part(NerGates).f1 is not None and not any(others):
        raise ConfigError("gates.f1 needs sentences to measure on: set test_file or validation_file")
    for name, found in zip(("train", "validation", "test"), (train, *others), strict=True):
        if found is not None:
            stage.data[name] = {"rows": len(found), "format": found.scheme, "fingerprint": found.fingerprint}
            extra = "".join(
                f", {n} {what}" for n, what in ((found.repaired, "repaired"), (found.skipped, "skipped")) if n
            )
            log_line(f"{name}: {len(found)} sentences, {found.scheme}{extra}")
    log_line(f"types: {', '.join(train.labels())}")
    return train, others[0], others[1]


def _load(stage: Stage, key: str) -> Sentences | None:
    where, how = stage.config.part(NerSettings), stage.config.part(NerDataSettings)
    source = getattr(where, key)
    split = getattr(where, f"dataset_{key.removesuffix('_file')}_split")
    if source is not None:
        return load_sentences(source, how, key=key)
    if where.dataset_name and split:
        return load_hub_sentences(where.dataset_name, where.dataset_config, split, how, key=key)
    return None


def trainer_args(stage: Stage, validation: Sentences | None) -> Any:
    """transformers' TrainingArguments, without evaluation during training if there are no validation sentences."""
    if validation is None and stage.config.values["eval_strategy"] == "epoch":
        return stage.trainer_args(eval_strategy="no")
    return stage.trainer_args()


def check_positions(stage: Stage, base: str) -> None:
    """Raise ConfigError if a window and the virtual tokens exceed the model's number of positions."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1  # their positions start after the pad id
    adapter = stage.config.adapter
    virtual = adapter.num_virtual_tokens if METHODS[adapter.method].prompt_learning else 0
    asked = stage.config.part(NerSettings).max_length
    if asked + virtual > positions:
        raise ConfigError(
            f"max_length is {asked}" + (f" and num_virtual_tokens {virtual}" if virtual else "") + f", and {base} has "
            f"{positions} positions; set max_length to {positions - virtual} or less"
        )


def encode_all(
    stage: Stage, tokenizer: "PreTrainedTokenizerBase", sets: dict[str, Sentences | None], base: str
) -> dict[str, Encoded]:
    """Each set's sentences as windows of tokens, with a line on those that did not fit. Raises a PosttrainError."""
    check_tokenizer(tokenizer)
    check_positions(stage, base)
    settings = stage.config.part(NerSettings)
    encoded: dict[str, Encoded] = {}
    for name, found in sets.items():
        if found is not None:
            encoded[name] = encode(
                [s.tokens for s in found.sentences], tokenizer, max_length=settings.max_length,
                overlap=settings.window_overlap, cut=settings.long_sentences == "cut",
            )  # fmt: skip
            log_line(f"{name}: {encoded[name].describe()}")
    return encoded


def start(stage: Stage, base: str, labels: list[str]) -> Any:
    """The tagger to train: the base with one output per label, and its adapter."""
    from peft import get_peft_model
    from transformers import set_seed

    cpu.install()
    set_seed(int(stage.config.values["seed"]))
    model, peft_config, _ = start_model(
        base, model_settings(stage), stage.config.adapter, None, task="TOKEN_CLS", labels=labels
    )
    return model if peft_config is None else get_peft_model(model, peft_config)


def make_trainer(
    model: "PreTrainedModel",
    args: "TrainingArguments",
    tokenizer: "PreTrainedTokenizerBase",
    encoded: dict[str, Encoded],
    sets: dict[str, Sentences | None],
    labels: list[str],
) -> Any:
    """transformers' Trainer, which computes entity scores on the validation sentences during training."""
    from transformers import DataCollatorForTokenClassification, Trainer

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_eval_sampler(self, eval_dataset: Any) -> None:
            """None: in order, as predictions are joined to sentences by position. Length grouping would shuffle."""

    train, validation = sets["train"], sets["validation"]
    assert train is not None
    trainer = InOrder(
        model,
        args=args,
        train_dataset=to_dataset(encoded["train"], train, labels).filter(
            lambda classes: any(c != IGNORED for c in classes), input_columns="labels"
        ),  # a batch without any tag would have a loss of 0 / 0
        eval_dataset=to_dataset(encoded["validation"], validation, labels) if validation else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_loss_func=behind_virtual_tokens if is_prompt_learning(model) else None,
        **(metrics_while_training(encoded["validation"], validation, labels) if validation else {}),
    )
    # BERT's forward takes any keyword, so the trainer would assume a loss divided by num_items_in_batch; it is a mean.
    trainer.model_accepts_loss_kwargs = trainer.compute_loss_func is not None
    return trainer


def behind_virtual_tokens(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """The loss without virtual tokens, for which PEFT 0.21 gives a tagger logits but no labels."""
    import torch

    logits = outputs.logits[:, -labels.shape[1] :].flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def to_dataset(encoded: Encoded, found: Sentences, labels: list[str]) -> Any:
    """A dataset of token ids and classes, for the trainer."""
    number = {label: i for i, label in enumerate(labels)}
    return encoded.to_dataset([[number[tag] for tag in s.tags] for s in found.sentences])


def metrics_while_training(encoded: Encoded, found: Sentences, labels: list[str]) -> dict[str, Callable[..., Any]]:
    """The trainer's `compute_metrics`, entity scores on the validation sentences, and the preprocessing of logits."""

    def best_class(logits: Any, targets: Any) -> Any:
        return logits[:, -targets.shape[1] :].argmax(-1)

    def compute(prediction: Any) -> dict[str, float]:
        tags = [[labels[max(c, 0)] for c in s] for s in encoded.gather(prediction.predictions.tolist(), 0)]
        scores = entity_scores([s.tags for s in found.sentences], tags)
        flat = dict(scores.pop("micro"))
        return flat | {f"f1_{name}": s["f1"] for name, s in scores.items()}

    return {"compute_metrics": compute, "preprocess_logits_for_metrics": best_class}


def finish(
    stage: Stage,
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    base: str,
    labels: list[str],
    encoded: dict[str, Encoded],
    sets: dict[str, Sentences | None],
) -> None:
    """Save the tagger, measure it on the test (else validation) sentences, check the gates, write the lineage."""
    model = trained_model(trainer)
    result = stage.save(trainer, tokenizer)
    stage.metrics |= stage.last_logs(trainer)
    stage.metrics["labels"] = labels

    probe = encoded["train"].windows[0].input_ids[:PROBE_TOKENS]

    def forward(m: Any) -> list[float]:
        return probe_logits(m, probe)

    stage.metrics["probe"] = {"input_ids": probe, "logits": forward(model)}
    if result == "adapter":
        stage.gates.append(reload_gate(stage, model, forward, base=base, start=None, task="TOKEN_CLS", labels=labels))
    name = "test" if sets["test"] is not None else "validation"
    if sets[name] is not None:
        scores = measure(stage, model, tokenizer, encoded[name], sets[name], labels, name)
        floor = stage.config.part(NerGates).f1
        if floor is not None:
            stage.gates.append(gates.f1(scores["micro"]["f1"], floor))
    stage.close(
        kind=result, result=result, task="TOKEN_CLS", tokenizer=tokenizer,
        base=describe_base(base, model_settings(stage), model),
    )  # fmt: skip


def measure(
    stage: Stage,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    encoded: Encoded,
    found: Any,
    labels: list[str],
    name: str,
) -> dict[str, dict[str, float]]:
    """Print and save entity scores and the most frequent mistakes: `answers/<set>.json`, `answers/<set>.jsonl`."""
    classes, _ = predict(model, tokenizer, encoded)
    tags = [[labels[c] for c in sentence] for sentence in classes]
    true, words = [s.tags for s in found.sentences], [s.tokens for s in found.sentences]
    scores = entity_scores(true, tags)
    commonest = mistakes(words, true, tags, [s.origin for s in found.sentences])

    out = stage.run_dir / ANSWERS
    out.mkdir(exist_ok=True)
    rows = zip(words, true, tags, strict=True)
    lines = (json.dumps({"tokens": w, "tags": t, "found": f}, ensure_ascii=False) for w, t, f in rows)
    write_atomically(out / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    summary = {"scores": scores, "mistakes": [vars(m) for m in commonest]}
    write_atomically(out / f"{name}.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    stage.metrics |= {k: scores["micro"][k] for k in ("precision", "recall", "f1")}
    stage.metrics |= {"sentences": len(found), "measured_on": name}
    stage.metrics["f1_by_type"] = {label: s["f1"] for label, s in scores.items() if label != "micro"}
    for line in as_lines(scores):
        log_line(f"{name}: {line}")
    for m in commonest:
        log_line(f"{name}: {m.count} x {m.kind}, as {m.example!r} in {m.origin}")
    return scores
