"""What the policy recipes (SFT, DPO) share: how a policy begins, and what it must show at its end."""

from typing import Any

from . import gates
from .adapters import fold_for_generation, start_model
from .config import EvaluationSettings, ModelSettings
from .data import Rows
from .evaluation import exact_match, generate
from .gates import Gate
from .lm_head import use_dense_lm_head
from .models import check_tokenizer, describe_base
from .stage import Stage, say
from .tokens import Lengths, render

PROBE_TOKENS = 48
STOPS_FLOOR = 0.5  # of completions that end by EOS, when gates.stops does not say


def model_settings(stage: Stage) -> ModelSettings:
    return stage.config.part(ModelSettings)


def check_inputs(stage: Stage, tokenizer: Any) -> None:
    """The policy input was trained with this tokenizer and this chat template. Raises ArtifactError."""
    if stage.policy is not None:
        check_tokenizer(tokenizer, stage.policy, stage.inputs["policy"])


def say_lengths(lengths: Lengths, max_length: int | None) -> None:
    cut = (
        f"; {lengths.too_long} of {lengths.total} rows are longer than max_length={max_length}"
        if lengths.too_long
        else ""
    )
    say(f"tokens a row: mean {lengths.mean_tokens:.1f}, longest {lengths.longest_tokens}{cut}")


def start(stage: Stage, base: str, *, task: str) -> tuple[Any, Any, str | None]:
    """The model to train, the adapter configuration to make, and how the input policy was taken over.

    A policy that continues is proven to be its parent's policy: the parent's lineage holds what it answered.
    """
    from transformers import set_seed

    use_dense_lm_head()
    # The score head and a fresh adapter are drawn here, before the trainer seeds.
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
            advice="inputs.policy was not taken over whole.",
        )
        gates.require([gate], stage.run_dir)
        stage.gates.append(gate)
    return model, peft_config, how


def before_dpo(stage: Stage, trainer: Any) -> list[Gate]:
    """At step 0 the policy and the reference are the input policy, the loss is ln 2, the margins are 0."""
    found = gates.dpo_step_zero(trainer, beta_loss=list(trainer.args.loss_type) == ["sigmoid"])
    probe = stage.policy.metrics.get("probe") if stage.policy else None
    if probe:
        model = trainer.accelerator.unwrap_model(trainer.model)
        ids, expected, dtype = probe["input_ids"], probe["logprobs"], gates.dtype_of(model)
        advice = "DPO would be measured against another policy than the one it starts from; use adapter.start: merge."
        policy_now = gates.probe_logprobs(model, ids)
        found.append(gates.same_outputs("step0 policy", policy_now, expected, dtype=dtype, advice=advice))
        if hasattr(model, "peft_config"):
            reference = gates.probe_logprobs(model, ids, adapter="ref" if "ref" in model.peft_config else None)
        else:
            reference = gates.probe_logprobs(trainer.ref_model, ids)
        found.append(gates.same_outputs("step0 reference", reference, expected, dtype=dtype, advice=advice))
    stage.gates += found
    return found


def finish(
    stage: Stage, trainer: Any, tokenizer: Any, *, base: str, start: str | None, train: Rows, test: Rows | None
) -> None:
    """Save the policy, measure it on the test rows, pass the gates, write the lineage."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    result = stage.save(trainer, tokenizer)
    stage.metrics |= stage.last_logs(trainer)

    probe_ids = _probe_ids(train, tokenizer)

    def forward(m: Any) -> list[float]:
        return gates.probe_logprobs(m, probe_ids)

    stage.metrics["probe"] = {"input_ids": probe_ids, "logprobs": forward(model)}
    if result == "adapter":
        stage.gates.append(gates.reloads(model, stage.run_dir / result, forward, dtype=gates.dtype_of(model)))

    settings = stage.config.part(EvaluationSettings)
    if test is not None:
        measure(stage, model, tokenizer, test, settings)
    share = _stop_share(stage, model, tokenizer, train, settings)
    if share is not None:
        floor = stage.config.gates.stops
        stage.gates.append(gates.stops(share, STOPS_FLOOR if floor is None else floor))

    stage.close(
        kind=result, result=result, task="CAUSAL_LM", start=start, tokenizer=tokenizer, model=model,
        base=describe_base(base, model_settings(stage), model),
    )  # fmt: skip


def measure(stage: Stage, model: Any, tokenizer: Any, test: Rows, settings: EvaluationSettings) -> None:
    """Exact match on the test rows, after the stage and, where no parent has measured it, before."""
    rows = test.rows[: settings.test_rows]
    options: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.generation_batch_size,
        "num_samples": settings.test_samples,
        "seed": settings.seed,
    }
    if stage.policy is None and hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            stage.metrics["before"] = exact_match(model, tokenizer, rows, **options)
    elif stage.policy is not None and "after" in stage.policy.metrics:
        stage.metrics["before"] = stage.policy.metrics["after"]
    fold_for_generation(model)
    stage.metrics["after"] = after = exact_match(model, tokenizer, rows, **options)
    for when in ("before", "after"):
        if when in stage.metrics:
            m = stage.metrics[when]
            sampled = f", sampled {m['sampled_exact']:.1%}" if "sampled_exact" in m else ""
            say(f"exact match {when}: greedy {m['greedy_exact']:.1%}{sampled} on {m['rows']} rows")
    stage.metrics["stops"] = after["stops"]


def _stop_share(stage: Stage, model: Any, tokenizer: Any, train: Rows, settings: EvaluationSettings) -> float | None:
    """Share of greedy completions that end by EOS; None for plain text, which has no prompt to answer."""
    if "stops" in stage.metrics:
        return float(stage.metrics["stops"])
    prompts = [row["prompt"] for row in train.rows if "prompt" in row][:16]
    if not prompts:
        return None
    drawn = generate(
        model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.generation_batch_size
    )
    share = sum(c[0].stopped for c in drawn) / len(drawn)
    stage.metrics["stops"] = share
    return share


def _probe_ids(train: Rows, tokenizer: Any) -> list[int]:
    """The token ids of the first training row: prompt and completion, cut to a handful."""
    row = train.rows[0]
    for name in ("completion", "chosen"):
        if name in row and "prompt" in row:
            return render(row["prompt"] + row[name], tokenizer, eos=True)[:PROBE_TOKENS]
    return render(next(iter(row.values())), tokenizer)[:PROBE_TOKENS]
