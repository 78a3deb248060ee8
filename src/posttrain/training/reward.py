"""What the recipe `reward` adds: a pad token that is not EOS, accuracy on held-out pairs, its gates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config.sections import RewardGates
from ..data.conversation import Row, render
from ..data.rows import Rows
from ..errors import ConfigError
from ..log import log_line
from ..models.loading import describe_base
from ..models.scoring import score
from . import gates
from .policy import model_settings, reload_gate
from .stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

PROBE_PAIRS = 8


def check_gate(stage: Stage, validation: Rows | None) -> None:
    """Raise ConfigError if there is a floor on accuracy, but no pairs to measure it on."""
    if stage.config.part(RewardGates).reward_accuracy is not None and validation is None:
        raise ConfigError(
            "gates.reward_accuracy needs held-out pairs: set validation_file, or an inputs.data with some"
        )


def separate_pad_token(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give the tokenizer a pad token that is not EOS. Raises ConfigError when it has no spare special token.

    transformers reads the score at the last token that is not the pad id. If pad is EOS, that is the token before EOS,
    and a completion that ended could not be told from one that did not.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    spare = [t for t in tokenizer.all_special_tokens if t not in (tokenizer.eos_token, tokenizer.bos_token)]
    if not spare:
        raise ConfigError(f"pad_token: pad and EOS are both {tokenizer.eos_token!r}; name another token as pad_token")
    tokenizer.pad_token = spare[0]


def sides_of(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[list[int], list[int]]]:
    """Token ids of (chosen, rejected) for each preference row, as RewardTrainer renders them."""
    pairs = []
    for row in rows:
        chosen, rejected = (
            row.get("prompt", [] if isinstance(row[s], list) else "") + row[s] for s in ("chosen", "rejected")
        )
        pairs.append((render(chosen, tokenizer, eos=True), render(rejected, tokenizer, eos=True)))
    return pairs


def finish(
    stage: Stage,
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    base: str,
    start: str | None,
    train: Rows,
    validation: Rows | None,
) -> None:
    """Save the reward model, measure it on the held-out pairs, check the gates, write the lineage."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    result = stage.save(trainer, tokenizer)
    stage.metrics |= stage.last_logs(trainer)

    probe = [ids for pair in sides_of(train.rows[:PROBE_PAIRS], tokenizer) for ids in pair]

    def forward(m: Any) -> list[float]:
        return score(m, tokenizer, probe)

    stage.metrics["probe"] = {"input_ids": probe, "scores": forward(model)}
    if result == "adapter":
        stage.gates.append(reload_gate(stage, model, forward, base=base, start=start, task="SEQ_CLS"))
    if validation is not None:
        pairs = sides_of(validation.rows, tokenizer)
        chosen = score(model, tokenizer, [c for c, _ in pairs])
        rejected = score(model, tokenizer, [r for _, r in pairs])
        right = sum(c > r for c, r in zip(chosen, rejected, strict=True))
        accuracy = right / len(pairs)
        stage.metrics |= {"held_out_accuracy": accuracy, "held_out_pairs": len(pairs)}
        log_line(f"reward accuracy: {accuracy:.1%} on {len(pairs)} held-out pairs")
        floor = stage.config.part(RewardGates).reward_accuracy
        if floor is not None:
            stage.gates.append(gates.accuracy(accuracy, floor))
    stage.close(
        kind=result, result=result, task="SEQ_CLS", start=start, tokenizer=tokenizer,
        base=describe_base(base, model_settings(stage), model),
    )  # fmt: skip
