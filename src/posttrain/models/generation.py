"""Reproducible generation of completions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from . import is_prompt_learning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """One generated completion: its text without special tokens, its length, and whether it ended by EOS."""

    text: str
    num_tokens: int
    stopped: bool


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
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

    Prompts are rendered as in training (`data.conversation.render`), sorted by length and padded on the left; with
    virtual tokens, which come before the padding, a batch has prompts of one length. A model's own repetition penalty
    and n-gram ban are switched off. Each batch is seeded by the place of its first row, so that a run resumed at a
    batch draws what an uninterrupted one does.
    """
    from ..data.conversation import render
    from .cpu.decoding import in_slices

    ids = [render(p, tokenizer, add_generation_prompt=not isinstance(p, str)) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    results: list[list[Completion]] = [[] for _ in prompts]
    copies = len(temperatures)
    per_batch = max(1, batch_size // copies)
    mixed = not is_prompt_learning(model)
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
            temperatures_by_row = [*temperatures] * len(batch)
            draw = Draw(temperatures_by_row, top_p, partial(fresh_uniforms, len(temperatures_by_row), model.device))
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
    """(place in `order`, the next rows), `size` rows at most; with `lengths`, all rows of a batch have one length."""
    start = 0
    while start < len(order):
        batch = list(order[start : start + size])
        if lengths is not None:
            batch = [i for i in batch if lengths[i] == lengths[batch[0]]]
        yield start, batch
        start += len(batch)


def _shared_prefill(model: "PreTrainedModel", input_ids: Any, attention_mask: Any, copies: int) -> Any:
    """The cache of prompts (B, T) without their last token, repeated for each completion: (B x copies).

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
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids that end a completion: the tokenizer's EOS, and those in the model's generation_config."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])}


def settings(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int) -> GenerationConfig:
    """Greedy, with the model's own repetition penalty and n-gram ban switched off.

    `generate` takes everything else from the model's generation_config. So suppressed and forced tokens stay in
    evaluations; PPO refuses them (`check_generation_settings`).
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_tokens(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        use_cache=True,  # full fine-tuning writes False into the model's config
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )


_OTHER_DISTRIBUTION = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id",
    "sequence_bias", "exponential_decay_length_penalty", "min_length", "min_new_tokens", "guidance_scale",
    "watermarking_config",
)  # fmt: skip


def check_generation_settings(model: "PreTrainedModel") -> None:
    """Raise ValueError if the model's generation_config forbids or forces tokens, naming the settings.

    Such samples do not follow the distribution of the logits, so PPO's ratios would be wrong.
    """
    own = {name: getattr(model.generation_config, name, None) for name in _OTHER_DISTRIBUTION}
    found = [f"{name}={value}" for name, value in own.items() if value]
    if found:
        raise ValueError(f"the model's generation_config.json sets {', '.join(found)}; PPO draws from its plain logits")


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Samples one token per row at the row's temperature (0 is greedy), and masks all others.

    `generate(do_sample=True)` has one temperature per batch, and samples by filling a (B, V) matrix with exponential
    variates, which takes a quarter of the time of short completions on a CPU. One uniform number per row and the
    cumulative distribution do the same, and the caller chooses the numbers.

    Args:
        temperatures: one per row.
        top_p: the nucleus; 1 is everything.
        uniform: given the token's place in the completion, returns one number in [0, 1) per row (B,).
    """

    def __init__(self, temperatures: Sequence[float], top_p: float, uniform: Callable[[int], Tensor]) -> None:
        self.temperatures, self.uniform = torch.tensor(temperatures)[:, None], uniform
        self.greedy = 0 in temperatures
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1.0 else None
        self.place = 0
        self.logprobs: list[Tensor] | None = None  # of the sampled tokens, under the sampling distribution
        self.entropies: list[Tensor] = []

    def keep(self) -> None:
        """Keep each sampled token's log-probability and the entropy of its distribution, (B,) per place."""
        self.logprobs = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        temperatures = self.temperatures.to(scores.device)
        scaled = scores.float() / temperatures.clamp(min=1e-6)
        if self.nucleus is not None:
            scaled = self.nucleus(input_ids, scaled)
        log_p = torch.log_softmax(scaled, -1)
        probabilities = log_p.exp()
        cumulative = probabilities.cumsum(-1)
        number = self.uniform(self.place).to(scores.device)[:, None] * cumulative[:, -1:]
        self.place += 1
        chosen = torch.searchsorted(cumulative, number, right=True).clamp(max=scores.shape[-1] - 1)
        if self.greedy:
            chosen = torch.where(temperatures > 0, chosen, scores.argmax(-1, keepdim=True))
        if self.logprobs is not None:
            self.logprobs.append(log_p.gather(1, chosen)[:, 0])
            log_p.clamp_(min=torch.finfo(log_p.dtype).min)  # or a token of probability 0 gives 0 times infinity
            self.entropies.append(-torch.linalg.vecdot(probabilities, log_p))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def fresh_uniforms(rows: int, device: Any, place: int) -> Tensor:
    """New random numbers at every place (rows,), from torch's own generator."""
    return torch.rand(rows, device=device)


@dataclass
class Generation:
    """Completions of B prompts; the longest has T tokens."""

    ids: list[list[int]]  # up to and including EOS
    logprobs: Tensor | None  # (B, T) of each token under the distribution that it was sampled from; arbitrary past EOS
    entropies: Tensor | None  # (B, T) of those distributions


def generate_ids(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    temperature: float,
    max_new_tokens: int,
    uniforms: Tensor,
) -> Generation:
    """One completion per row; prompts (B, P) are padded on the left.

    `uniforms` (B, max_new_tokens) are the random numbers: the same ones give the same completions, in any batch.
    """
    from .cpu.decoding import cache_with_room, in_slices

    draw = Draw([temperature] * len(input_ids), 1.0, lambda place: uniforms[:, place])
    draw.keep()
    with in_slices(model):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache_with_room(model, max_new_tokens),
            logits_processor=LogitsProcessorList([draw]),
            generation_config=settings(model, tokenizer, max_new_tokens),
        )
    ends = end_tokens(model, tokenizer)
    ids = [until_end(row, ends) for row in out[:, input_ids.shape[1] :].tolist()]
    width = max(map(len, ids))
    assert draw.logprobs is not None
    return Generation(ids, torch.stack(draw.logprobs[:width], 1), torch.stack(draw.entropies[:width], 1))


def until_end(row: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first that ends a completion."""
    end = next((t for t, token in enumerate(row) if token in ends), None)
    return row if end is None else row[: end + 1]
