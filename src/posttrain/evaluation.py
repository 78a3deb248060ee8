"""Exact match of a policy on held-out rows: greedy, and as the mean over samples at temperature 1.

Intervals are 95%: Wilson for the greedy share, a normal interval over the rows' means for the sampled one, and for a
change the same over the rows' differences. Draws are seeded by batch, so that the same policy and seed give the same
numbers, and two policies are drawn from with the same random numbers.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .artifacts import lines_of, write_atomically
from .methods import pads_left

Z95 = 1.959964


@dataclass(frozen=True)
class Share:
    """A mean with its 95% interval over `count` rows: a share, or the difference of two."""

    mean: float
    low: float
    high: float
    count: int


def wilson(successes: float, count: int) -> Share:
    """Wilson's score interval of a binomial share (Wilson, 1927)."""
    p, z2 = successes / count, Z95**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Share(p, max(0.0, centre - half), min(1.0, centre + half), count)


def mean_interval(values: Sequence[float], *, lowest: float = 0.0) -> Share:
    """The mean of per-row scores in [`lowest`, 1], with a normal interval over the rows."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((v - mean) ** 2 for v in values) / max(1, count - 1)
    half = Z95 * math.sqrt(variance / count)
    return Share(mean, max(lowest, mean - half), min(1.0, mean + half), count)


@dataclass(frozen=True)
class Completion:
    """One generated completion: its text without special tokens, its length, and whether it ended by EOS."""

    text: str
    num_tokens: int
    stopped: bool


def text_of(turns: Any) -> str:
    """The text of a completion, plain or as messages."""
    return turns if isinstance(turns, str) else "\n".join(m["content"] for m in turns)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    temperatures: Sequence[float] = (0.0,),
    max_new_tokens: int,
    batch_size: int,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """One completion of each prompt for each of `temperatures` (0 is greedy), in the prompts' order.

    Prompts are rendered as in training (`tokens.render`), sorted by length and padded on the left; where virtual tokens
    stand before the padding, a batch has prompts of one length. A model's own repetition penalty and n-gram ban are
    switched off. Each batch is seeded by its own first row, so that a run resumed at a batch draws what an
    uninterrupted one does.
    """
    import torch
    from transformers import LogitsProcessorList

    from .generation import Draw, end_tokens, fresh_uniforms, settings
    from .lm_head import in_slices
    from .tokens import render

    ids = [render(p, tokenizer, add_generation_prompt=not isinstance(p, str)) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    results: list[list[Completion]] = [[] for _ in prompts]
    copies = len(temperatures)
    per_batch = max(1, batch_size // copies)
    mixed = pads_left(model)
    ends = end_tokens(model, tokenizer)
    was_training = model.training
    model.eval()
    for start, batch in _batches(order, per_batch, lengths=None if mixed else [len(row) for row in ids]):
        width = max(len(ids[i]) for i in batch)
        input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids[i])) + ids[i] for i in batch])
        attention_mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch])
        input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
        with torch.random.fork_rng(devices=_cuda_devices()), torch.no_grad(), in_slices(model):
            torch.manual_seed(seed * 1_000_003 + start)
            shared = copies > 1 and width > 1 and mixed
            warm = [*temperatures] * len(batch)
            draw = Draw(warm, top_p, partial(fresh_uniforms, len(warm), model.device))
            out = model.generate(
                input_ids=input_ids.repeat_interleave(copies, 0),
                attention_mask=attention_mask.repeat_interleave(copies, 0),
                past_key_values=_shared_prefill(model, input_ids, attention_mask, copies) if shared else None,
                logits_processor=LogitsProcessorList([draw] if any(temperatures) else []),
                generation_config=settings(model, tokenizer, max_new_tokens),
            )
        for j, row in enumerate(out[:, width:].tolist()):
            end = next((t for t, token in enumerate(row) if token in ends), None)
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            length = len(row) if end is None else end + 1
            results[batch[j // copies]].append(Completion(text, length, end is not None))
        if progress:
            progress(start + len(batch), len(order))
    model.train(was_training)
    return results


def _batches(order: Sequence[int], size: int, *, lengths: Sequence[int] | None) -> Iterator[tuple[int, list[int]]]:
    """(place in `order`, the next rows), `size` at most; with `lengths`, of one length each."""
    start = 0
    while start < len(order):
        batch = list(order[start : start + size])
        if lengths is not None:
            batch = [i for i in batch if lengths[i] == lengths[batch[0]]]
        yield start, batch
        start += len(batch)


def _shared_prefill(model: Any, input_ids: Any, attention_mask: Any, copies: int) -> Any:
    """The cache of prompts (B, T) less their last token, repeated for each completion: (B x copies).

    `generate(num_return_sequences=n)` repeats the prompts first and computes each n times; for short completions
    that is most of the work.
    """
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=input_ids[:, :-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=position_ids[:, :-1],
        use_cache=True,
        logits_to_keep=1,
    )
    out.past_key_values.batch_repeat_interleave(copies)
    return out.past_key_values


def _cuda_devices() -> list[int]:
    import torch

    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def is_exact(completion: str, expected: Any) -> bool:
    """Equal after surrounding white space is removed."""
    return completion.strip() == text_of(expected).strip()


@dataclass(frozen=True)
class Answer:
    """What a policy answered to one test row: greedily, and in each sample."""

    prompt: Any
    expected: Any
    greedy: str
    stopped: bool  # the greedy completion ended by EOS
    sampled: list[str]

    @property
    def greedy_score(self) -> float:
        return float(is_exact(self.greedy, self.expected))

    @property
    def sampled_score(self) -> float:
        return sum(is_exact(text, self.expected) for text in self.sampled) / len(self.sampled)


def answer(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], *, max_new_tokens: int, batch_size: int,
    num_samples: int, seed: int, progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:  # fmt: skip
    """A greedy completion and `num_samples` at temperature 1 for each of the prompt-completion `rows`."""
    completions = generate(
        model, tokenizer, [row["prompt"] for row in rows], temperatures=[0.0] + [1.0] * num_samples,
        max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    return [
        Answer(row["prompt"], row["completion"], cs[0].text, cs[0].stopped, [c.text for c in cs[1:]])
        for row, cs in zip(rows, completions, strict=True)
    ]


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """One JSON object a row."""
    write_atomically(path, "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers))


def read_answers(path: Path) -> list[Answer]:
    return [Answer(**json.loads(line)) for line in lines_of(path.read_text(encoding="utf-8"))]


def exact_match(answers: Sequence[Answer]) -> dict[str, float]:
    """Greedy and sampled exact match, with the share of greedy completions that stop."""
    metrics: dict[str, float] = {"rows": len(answers)}
    metrics |= _flatten("greedy_exact", wilson(sum(a.greedy_score for a in answers), len(answers)))
    metrics["stops"] = sum(a.stopped for a in answers) / len(answers)
    if answers[0].sampled:
        metrics |= _flatten("sampled_exact", mean_interval([a.sampled_score for a in answers]))
    return metrics


def comparable(before: Sequence[Answer], after: Sequence[Answer]) -> bool:
    """Whether both answered the same rows, with the same number of samples."""
    return [(a.prompt, a.expected, len(a.sampled)) for a in before] == [
        (a.prompt, a.expected, len(a.sampled)) for a in after
    ]


def change(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, float]:
    """By how much exact match rose, row by row: a row's own difficulty is in both and cancels."""
    pairs = list(zip(before, after, strict=True))
    metrics = _flatten("greedy_exact", mean_interval([b.greedy_score - a.greedy_score for a, b in pairs], lowest=-1.0))
    if after[0].sampled:
        metrics |= _flatten(
            "sampled_exact", mean_interval([b.sampled_score - a.sampled_score for a, b in pairs], lowest=-1.0)
        )
    return metrics


def _flatten(name: str, share: Share) -> dict[str, float]:
    return {name: share.mean, f"{name}_low": share.low, f"{name}_high": share.high}


def in_percent(metrics: Mapping[str, float], name: str, sign: str = "") -> str:
    """A share or a change with its interval, as people read it; empty when it was not measured."""
    if name not in metrics:
        return ""
    mean, low, high = (100 * metrics[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{mean:{sign}.1f}% [{low:{sign}.1f}, {high:{sign}.1f}]"
