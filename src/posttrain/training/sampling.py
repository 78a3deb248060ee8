"""What `sample` and `evaluate` share: loading the policy; drawing, scoring and ranking completions; measuring."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import log
from ..adapters import fold_for_generation, load_policy
from ..config.sections import DataSettings, EvaluationSettings, GenerationSettings, ModelSettings, SampleSettings
from ..data.conversation import Row, as_turn, render
from ..data.rows import Rows, load_rows
from ..errors import ConfigError, DataError, GateError
from ..fileio import write_atomically
from ..intervals import percent, read_share
from ..launch.stop import stop_if_asked
from ..log import log_line
from ..models.generation import Completion, generate
from ..models.loading import check_base, check_tokenizer, load_base, load_tokenizer
from ..models.verifiers import find_verifier
from ..runs.answers import exact_match, write_answers
from ..runs.lineage import verify
from ..runs.paths import DATA, DRAWN, EVALUATION
from .evaluation import answer
from .gates import dtype_of, same_outputs
from .stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Judge = Callable[[Any, Sequence[Row], Sequence[Sequence[Completion]]], list[list[float]]]


def load_policy_and_tokenizer(stage: Stage) -> tuple[Any, Any]:
    """The policy of `inputs.policy`, or the base model, with its tokenizer, verified. Raises a PosttrainError.

    With GPUs, each process uses its own.
    """
    import torch

    stage.meet()
    if torch.cuda.is_available():
        torch.cuda.set_device(log.local_rank())
    policy, tokenizer = _load_policy_and_tokenizer(stage)
    if torch.cuda.is_available() and not getattr(policy, "is_quantized", False):
        policy.to(torch.cuda.current_device())
    return policy, tokenizer


def _load_policy_and_tokenizer(stage: Stage) -> tuple[Any, Any]:
    settings = stage.config.part(ModelSettings)
    base = check_base(settings, stage.policy)
    tokenizer = load_tokenizer(base, settings)
    if stage.policy is None:
        return load_base(base, settings, task="CAUSAL_LM"), tokenizer
    check_tokenizer(tokenizer, stage.policy, stage.inputs["policy"])
    policy = load_policy(stage.inputs["policy"])
    fold_for_generation(policy)
    return policy, tokenizer


def load_test(stage: Stage) -> Rows:
    """The rows of `test_file`. Raises DataError when there are none."""
    source = stage.config.values.get("test_file")
    if source is None:
        raise DataError("test_file is missing; set it to prompt-completion rows to measure on")
    rows = load_rows(source, "evaluate", DataSettings(), key="test_file")
    stage.data["test"] = {"rows": len(rows), "format": rows.format, "fingerprint": rows.fingerprint}
    return rows


def evaluate(stage: Stage, policy: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", test: Rows) -> None:
    """Measure exact match, write `evaluation/metrics.json` and `evaluation/answers.jsonl`, close the stage."""
    settings, generation = stage.config.part(EvaluationSettings), stage.config.part(GenerationSettings)
    answers = answer(
        policy,
        tokenizer,
        test.rows[: settings.test_rows],
        max_new_tokens=generation.max_new_tokens,
        batch_size=generation.generation_batch_size,
        num_samples=settings.test_samples,
        seed=generation.seed,
        progress=lambda done, total: log_line(f"step {done}/{total}  prompts answered"),
    )
    stage.metrics["after"] = metrics = exact_match(answers)
    out = stage.run_dir / EVALUATION
    out.mkdir(exist_ok=True)
    write_answers(out / "answers.jsonl", answers)
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for name in ("greedy", "sampled"):
        if share := read_share(metrics, f"{name}_exact", len(answers)):
            log_line(f"{name} exact match: {percent(share)} on {len(answers)} rows")
    stage.close(kind=EVALUATION, result=EVALUATION)


# Sampling


def find_judge(stage: Stage, prompts: Rows) -> Judge:
    """A verifier or a reward model, exactly one of them. Raises ConfigError."""
    name = stage.config.part(SampleSettings).verifier
    if (name is None) == ("reward" not in stage.inputs):
        raise ConfigError("set one judge: verifier (exact_match, regex:PATTERN, module:function) or inputs.reward")
    if name is None:
        return _reward_judge(stage)
    verifier = find_verifier(name)
    if name == "exact_match" and prompts.format != "prompt_completion":
        raise ConfigError(f"verifier: exact_match needs prompt-completion rows, got {prompts.format}")

    def judge(
        tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], drawn: Sequence[Sequence[Completion]]
    ) -> list[list[float]]:
        return [[verifier(row["prompt"], c.text, row) for c in cs] for row, cs in zip(rows, drawn, strict=True)]

    return judge


def _reward_judge(stage: Stage) -> Judge:
    lineage = verify(stage.inputs["reward"])
    if lineage.task != "SEQ_CLS":
        raise ConfigError(f"inputs.reward: {stage.inputs['reward']} is no reward model (task {lineage.task})")

    def judge(
        tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], drawn: Sequence[Sequence[Completion]]
    ) -> list[list[float]]:
        import torch

        from ..models.scoring import score

        model = load_policy(stage.inputs["reward"])
        if torch.cuda.is_available() and not getattr(model, "is_quantized", False):
            model.to(torch.cuda.current_device())
        probe = lineage.metrics["probe"]
        again = score(model, tokenizer, probe["input_ids"])
        gate = same_outputs("reward reload", again, probe["scores"], dtype=dtype_of(model))
        if not gate.passed:
            raise GateError(f"{stage.inputs['reward']} does not give its own scores again: off by {gate.value:.4g}")
        sides = [
            render(row["prompt"] + as_turn(row["prompt"], c.text), tokenizer, eos=True)
            for row, cs in zip(rows, drawn, strict=True)
            for c in cs
        ]
        flat = iter(score(model, tokenizer, sides))
        return [[next(flat) for _ in cs] for cs in drawn]

    return judge


def draw(
    stage: Stage, policy: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Rows
) -> list[list[Completion]]:
    """Completions of every prompt. Each batch is saved when drawn, and a resumed run reads it back.

    Several processes divide the batches and wait for each other's files. A batch is seeded by its place, so the number
    of processes does not change the result. Raises StoppedError between two batches if the run was asked to stop.
    """
    settings, generation = stage.config.part(SampleSettings), stage.config.part(GenerationSettings)
    rank, processes = log.rank(), log.world_size()
    folder = stage.run_dir / DRAWN
    folder.mkdir(exist_ok=True)
    drawn: list[list[Completion]] = []
    size = max(1, generation.generation_batch_size // settings.num_samples)
    starts = range(0, len(prompts), size)
    for start in starts[rank::processes]:
        path = folder / f"{start:07d}.json"
        if not path.is_file():
            stop_if_asked(f"with {start} of {len(prompts)} prompts drawn")
            batch = generate(
                policy,
                tokenizer,
                [row["prompt"] for row in prompts.rows[start : start + size]],
                max_new_tokens=generation.max_new_tokens,
                batch_size=generation.generation_batch_size,
                temperatures=[settings.temperature] * settings.num_samples,
                top_p=settings.top_p,
                seed=generation.seed + start,
            )
            write_atomically(path, json.dumps([[asdict(c) for c in cs] for cs in batch]))
            log_line(f"step {min(start + size, len(prompts))}/{len(prompts)}  prompts drawn")
    for start in starts:
        path = folder / f"{start:07d}.json"
        while not path.is_file():  # another process is drawing it; if it dies, the launcher ends this one
            time.sleep(0.2)
        drawn += [[Completion(**c) for c in cs] for cs in json.loads(path.read_text(encoding="utf-8"))]
    return drawn


def rank(
    stage: Stage,
    judge: Judge,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Rows,
    drawn: Sequence[Sequence[Completion]],
) -> list[Row]:
    """Preference rows, at most `pairs_per_prompt` per prompt. Sets the stage's metrics."""
    settings = stage.config.part(SampleSettings)
    scores = judge(tokenizer, prompts.rows, drawn)
    pairs: list[Row] = []
    for row, completions, row_scores in zip(prompts.rows, drawn, scores, strict=True):
        for chosen, rejected in best_against_worst(completions, row_scores)[: settings.pairs_per_prompt]:
            pairs.append(
                {
                    "prompt": row["prompt"],
                    "chosen": as_turn(row["prompt"], chosen),
                    "rejected": as_turn(row["prompt"], rejected),
                }
            )
    flat = [value for row_scores in scores for value in row_scores]
    stage.metrics |= {
        "prompts": len(prompts),
        "completions": len(flat),
        "mean_score": sum(flat) / len(flat),
        "stopped": sum(c.stopped for cs in drawn for c in cs) / len(flat),
        "pairs": len(pairs),
    }
    return pairs


def best_against_worst(completions: Sequence[Completion], scores: Sequence[float]) -> list[tuple[str, str]]:
    """(chosen, rejected) texts of one prompt: the largest score difference first, then those drawn most often.

    A mistake that the policy makes often teaches it more than one that it made once. Only a completion that ended by
    EOS may be chosen: preferring truncated ones would teach the policy not to stop.
    """
    score: dict[str, float] = {}
    stopped: dict[str, bool] = {}
    count = Counter(c.text for c in completions)
    for completion, value in zip(completions, scores, strict=True):
        if completion.text.strip():
            score.setdefault(completion.text, value)
            stopped.setdefault(completion.text, completion.stopped)
    pairs = [(a, b) for a in score for b in score if stopped[a] and score[a] > score[b]]
    return sorted(pairs, key=lambda p: (score[p[1]] - score[p[0]], -count[p[0]] - count[p[1]], p))


def finish(stage: Stage, pairs: list[Row]) -> None:
    """Write train.jsonl and validation.jsonl (split by prompt), close the stage. Raises DataError without pairs."""
    settings = stage.config.part(SampleSettings)
    m = stage.metrics
    if not pairs:
        raise DataError(
            f"no pair among {m['completions']} completions of {m['prompts']} prompts: all completions of a prompt got "
            "the same score; raise num_samples or temperature, or use other prompts"
        )
    prompts = list(dict.fromkeys(json.dumps(p["prompt"]) for p in pairs))
    random.Random(stage.config.part(GenerationSettings).seed).shuffle(prompts)
    held_out = set(prompts[: round(len(prompts) * settings.validation_share)])
    out = stage.run_dir / DATA
    for name, keep in (("train", False), ("validation", True)):
        rows = [p for p in pairs if (json.dumps(p["prompt"]) in held_out) == keep]
        if rows and log.is_main():
            out.mkdir(exist_ok=True)
            _write_jsonl(out / f"{name}.jsonl", rows)
    log_line(
        f"{len(pairs)} pairs from {m['prompts']} prompts; mean score {m['mean_score']:.3f}; {m['stopped']:.1%} stopped"
    )
    stage.close(kind=DATA, result=DATA)


def _write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
