"""Rows as token ids, exactly as TRL's trainers make them: counted, and checked against `max_length`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DataError
from .conversation import Row, join, render
from .rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True)
class Lengths:
    """Token counts of the rows."""

    longest_tokens: int
    mean_tokens: float
    too_long: int
    total: int


def check_lengths(
    rows: Rows, tokenizer: "PreTrainedTokenizerBase", *, max_length: int | None, key: str = "train_file"
) -> Lengths:
    """Count tokens, and refuse data in which no token is left to train on. Raises DataError.

    TRL cuts a row at `max_length` (SFT) or drops it (reward, DPO). A run in which no row keeps a completion token
    would train on nothing and still succeed, so it is refused here.
    """
    limit = max_length or 2**31
    counts, lost = [], 0
    for row in rows.rows:
        prompt, total = token_counts(row, tokenizer)
        counts.append(total)
        lost += (
            (prompt >= limit) if rows.format == "prompt_completion" else (total > limit and rows.format == "preference")
        )
    too_long = sum(c > limit for c in counts)
    if lost == len(counts):
        raise DataError(
            f"{key}: 100% of the {len(counts)} rows are longer than max_length={max_length} tokens: no token is "
            f"left to train on (the shortest has {min(counts)}, the longest {max(counts)}); raise max_length"
        )
    return Lengths(max(counts), sum(counts) / len(counts), too_long, len(counts))


def token_counts(row: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int]:
    """(tokens before the completion, all tokens) of one row; for a preference row, those of its longer side."""
    if "text" in row:
        return 0, len(tokenizer(row["text"])["input_ids"]) + 1
    if "messages" in row:
        return 0, len(render(row["messages"], tokenizer))
    prompt = row.get("prompt")
    before = 0 if prompt is None else len(render(prompt, tokenizer, add_generation_prompt=True))
    sides = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    if prompt is None:
        return before, max(len(render(side, tokenizer)) for side in sides)
    return before, max((len(render(join(prompt, side), tokenizer, eos=True)) for side in sides), default=before)


def count_tokens(dataset: "Dataset") -> int:
    """Tokens per epoch of a tokenised dataset; a preference row is two sequences, each with its prompt."""
    lengths = {c: sum(map(len, dataset[c])) for c in dataset.column_names if c.endswith("_ids")}
    return sum(lengths.values()) + (lengths.get("prompt_ids", 0) if "chosen_ids" in lengths else 0)


def pair_lengths(dataset: "Dataset") -> list[int]:
    """Length of each tokenised preference row: tokens of prompt and longer side."""
    prompts = dataset["prompt_ids"] if "prompt_ids" in dataset.column_names else [[]] * len(dataset)
    rows = zip(prompts, dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in rows]


def add_length_column(trainer: "Trainer") -> None:
    """Give preference rows the column that `train_sampling_strategy: group_by_length` sorts by.

    transformers infers lengths from `input_ids` only, and TRL's pairs have none.
    """
    from ..upstream.transformers import keep_column

    dataset = trainer.train_dataset
    if "chosen_ids" not in dataset.column_names:
        return
    name = trainer.args.length_column_name
    trainer.train_dataset = dataset.add_column(name, pair_lengths(dataset))
    keep_column(trainer, name)
