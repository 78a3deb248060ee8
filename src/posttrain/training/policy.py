"""What SFT, DPO and PPO share: how a policy starts, its measurement on test rows, its gates."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..adapters import fold_for_generation, load_adapter_base, start_model, without_adapter
from ..config.sections import EvaluationSettings, GenerationSettings, ModelSettings, PolicyGates
from ..data.conversation import render
from ..data.rows import Rows
from ..data.tokens import Lengths
from ..log import log_line
from ..models import cpu
from ..models.generation import generate
from ..models.loading import check_tokenizer, describe_base
from ..models.precision import without_autocast
from ..runs.answers import Answer, change, comparable, exact_match, read_answers, write_answers
from ..runs.paths import ADAPTER, ANSWERS
from ..tracking.trainers import trained_model
from . import gates
from .evaluation import answer
from .gates import Gate
from .stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

PROBE_TOKENS = 48
STOPS_FLOOR = 0.5  # share of completions that must end by EOS, if gates.stops is not set


def model_settings(stage: Stage) -> ModelSettings:
    return stage.config.part(ModelSettings)


def check_inputs(stage: Stage, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ArtifactError if the input policy was trained with another tokenizer or chat template."""
    if stage.policy is not None:
        check_tokenizer(tokenizer, stage.policy, stage.inputs["policy"])


def log_lengths(lengths: Lengths, max_length: int | None) -> None:
    cut = (
        f"; {lengths.too_long} of {lengths.total} rows are longer than max_length={max_length}"
        if lengths.too_long
        else ""
    )
    log_line(f"tokens per row: mean {lengths.mean_tokens:.1f}, longest {lengths.longest_tokens}{cut}")


def start(stage: Stage, base: str, *, task: str) -> tuple[Any, Any, str | None]:
    """The model to train, the configuration of the adapter to create, and how the input policy was taken over.

    A policy must first reproduce the log-probabilities in its parent's lineage (gate `takeover`). Raises GateError.
    """
    from transformers import set_seed

    cpu.install()
    # The score head and a fresh adapter are initialised here, before the trainer sets its seed.
    set_seed(int(stage.config.values["seed"]))
    model, peft_config, how = start_model(
        base, model_settings(stage), stage.config.adapter, stage.inputs.get("policy"), task=task
    )
    probe = stage.policy.metrics.get("probe") if stage.policy else None
    if probe and task == "CAUSAL_LM":
        got = gates.probe_logprobs(model, probe["input_ids"])
        gate = gates.same_outputs(
            "takeover",
            got,
            probe["logprobs"],
            dtype=gates.dtype_of(model),
            advice="The model does not reproduce inputs.policy.",
        )
        gates.require([gate], stage.run_dir)
        stage.gates.append(gate)
    return model, peft_config, how


def before_dpo(stage: Stage, trainer: "Trainer") -> list[Gate]:
    """Gates before DPO's first step: policy and reference equal the input policy, loss is ln 2, margins are 0."""
    found = gates.dpo_step_zero(trainer, beta_loss=list(trainer.args.loss_type) == ["sigmoid"])
    probe = stage.policy.metrics.get("probe") if stage.policy else None
    if probe:
        model = trainer.accelerator.unwrap_model(trainer.model)
        ids, expected, dtype = probe["input_ids"], probe["logprobs"], gates.dtype_of(model)
        advice = "DPO's reference or start is not the input policy; use adapter.start: merge."
        with without_autocast(model):
            policy_now = gates.probe_logprobs(model, ids)
            if hasattr(model, "peft_config"):
                reference = gates.probe_logprobs(model, ids, adapter="ref" if "ref" in model.peft_config else None)
            else:
                reference = gates.probe_logprobs(trainer.ref_model, ids)
        found.append(gates.same_outputs("step0 policy", policy_now, expected, dtype=dtype, advice=advice))
        found.append(gates.same_outputs("step0 reference", reference, expected, dtype=dtype, advice=advice))
    stage.gates += found
    return found


def finish(
    stage: Stage,
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    base: str,
    start: str | None,
    train: Rows,
    test: Rows | None,
) -> None:
    """Save the policy, measure it on the test rows, check the gates, write the lineage."""
    model = trained_model(trainer)
    result = stage.save(trainer, tokenizer)
    stage.metrics |= stage.last_logs(trainer)

    probe_ids = _probe_ids(train, tokenizer)

    def forward(m: Any) -> list[float]:
        return gates.probe_logprobs(m, probe_ids)

    stage.metrics["probe"] = {"input_ids": probe_ids, "logprobs": forward(model)}
    if result == "adapter":
        stage.gates.append(reload_gate(stage, model, forward, base=base, start=start, task="CAUSAL_LM"))

    if test is not None:
        measure(stage, model, tokenizer, test, base)
    share = _stop_share(stage, model, tokenizer, train)
    if share is not None:
        floor = stage.config.part(PolicyGates).stops
        stage.gates.append(gates.stops(share, STOPS_FLOOR if floor is None else floor))

    stage.close(
        kind=result, result=result, task="CAUSAL_LM", start=start, tokenizer=tokenizer,
        base=describe_base(base, model_settings(stage), model),
    )  # fmt: skip


def reload_gate(
    stage: Stage,
    model: "PreTrainedModel",
    forward: Callable[[Any], list[float]],
    *,
    base: str,
    start: str | None,
    task: str,
    labels: Sequence[str] = (),
) -> Gate:
    """The gate `reload`: the adapter that was just saved reproduces the outputs of the trained one."""

    def fresh() -> Any:
        loaded = load_adapter_base(
            base, model_settings(stage), stage.inputs.get("policy"), start, task=task, labels=labels
        )
        loaded.config.pad_token_id = model.config.pad_token_id
        return loaded.to(model.device)

    return gates.reloads(model, stage.run_dir / ADAPTER, forward, dtype=gates.dtype_of(model), fresh=fresh)


def measure(
    stage: Stage, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", test: Rows, base: str
) -> None:
    """Exact match on the test rows before and after the stage, and the paired change; answers are saved.

    "Before" is the base model, or the input policy's answers from its own stage if they are to the same rows.
    """
    settings, generation = stage.config.part(EvaluationSettings), stage.config.part(GenerationSettings)
    rows = test.rows[: settings.test_rows]
    options: dict[str, Any] = {
        "max_new_tokens": generation.max_new_tokens,
        "batch_size": generation.generation_batch_size,
        "num_samples": settings.test_samples,
        "seed": generation.seed,
    }
    before: list[Answer] = []
    if stage.policy is None and hasattr(model, "peft_config"):
        with without_adapter(model, base, model_settings(stage)) as plain:
            before = answer(plain, tokenizer, rows, **options)
    elif stage.policy is not None and (parent := stage.inputs["policy"] / ANSWERS / "after.jsonl").is_file():
        before = read_answers(parent)
    fold_for_generation(model)
    after = answer(model, tokenizer, rows, **options)
    if before and not comparable(before, after):
        log_line("exact match before: unknown, the input policy was measured on other rows or with other samples")
        before = []

    (stage.run_dir / ANSWERS).mkdir(exist_ok=True)
    for when, answers in (("before", before), ("after", after)):
        if answers:
            write_answers(stage.run_dir / ANSWERS / f"{when}.jsonl", answers)
            stage.metrics[when] = m = exact_match(answers)
            sampled = f", sampled {m['sampled_exact']:.1%}" if "sampled_exact" in m else ""
            log_line(f"exact match {when}: greedy {m['greedy_exact']:.1%}{sampled} on {m['rows']} rows")
    if before:
        stage.metrics["change"] = change(before, after)
    stage.metrics["stops"] = stage.metrics["after"]["stops"]


def _stop_share(
    stage: Stage, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", train: Rows
) -> float | None:
    """Share of greedy completions that end by EOS; None for plain text, which has no prompt to answer."""
    if "stops" in stage.metrics:
        return float(stage.metrics["stops"])
    prompts = [row["prompt"] for row in train.rows if "prompt" in row][:16]
    if not prompts:
        return None
    settings = stage.config.part(GenerationSettings)
    drawn = generate(
        model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.generation_batch_size
    )
    share = sum(c[0].stopped for c in drawn) / len(drawn)
    stage.metrics["stops"] = share
    return share


def _probe_ids(train: Rows, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The first PROBE_TOKENS token ids of the first training row: prompt and completion."""
    row = train.rows[0]
    for name in ("completion", "chosen"):
        if name in row and "prompt" in row:
            return render(row["prompt"] + row[name], tokenizer, eos=True)[:PROBE_TOKENS]
    return render(next(iter(row.values())), tokenizer)[:PROBE_TOKENS]
