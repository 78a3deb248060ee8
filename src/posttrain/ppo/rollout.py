"""A rollout's tensors, its random numbers, its micro-batches, and the order of the prompts."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


@dataclass
class Rollout:
    """One process's completions: B rows, prompts (P tokens) padded on the left, completions (C tokens) on the right."""

    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P)
    completion_ids: Tensor  # (B, C)
    completion_mask: Tensor  # (B, C), 1 up to EOS and on EOS itself
    old_logprobs: Tensor  # (B, C), under the policy that sampled them
    old_values: Tensor  # (B, C)
    advantages: Tensor  # (B, C)
    returns: Tensor  # (B, C)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, rows: Tensor) -> dict[str, Tensor]:
        """These rows, without columns that are padding in all of them."""
        prompt = int(self.prompt_mask[rows].sum(1).max())
        completion = int(self.completion_mask[rows].sum(1).max())
        chosen = {f.name: getattr(self, f.name)[rows] for f in fields(self)}
        return {k: v[:, -prompt:] if k.startswith("prompt") else v[:, :completion] for k, v in chosen.items()}

    def state(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name).contiguous() for f in fields(self)}


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, P)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, C). The mask follows the lengths, since a drawn EOS may have the pad token's id."""
    width = max(map(len, rows))
    ids = torch.tensor([list(r) + [pad_id] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    return ids, mask


def seeded(*numbers: int) -> torch.Generator:
    """A generator seeded by all these numbers, hashed: torch uses 32 bits of a seed, and accepts 64 at most."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def uniforms(seed: int, rollout: int, rows: range, tokens: int) -> Tensor:
    """One uniform number per row and token: (rows, tokens).

    A row's numbers depend only on seed, rollout and the row's place in the rollout over all processes, so completions
    are the same on any number of processes and after a resume.
    """
    drawn = []
    for row in rows:
        generator = seeded(seed, rollout, row)
        drawn.append(torch.rand(tokens, generator=generator))
    return torch.stack(drawn)


def micro_batches(
    seed: int, rollout: int, epoch: int, lengths: Sequence[int], num_mini_batches: int, micro_batch: int
) -> list[Tensor]:
    """The rows of each micro-batch of one pass, mini-batch after mini-batch.

    Each pass shuffles rows into mini-batches (optimizer steps). Within one, rows of similar length share a micro-batch,
    which changes only the padding.
    """
    generator = seeded(seed, rollout, epoch)
    order = torch.randperm(len(lengths), generator=generator)
    batches: list[Tensor] = []
    for mini in order.chunk(num_mini_batches):
        by_length = sorted(mini.tolist(), key=lambda row: lengths[row])
        batches += [torch.tensor(by_length[i : i + micro_batch]) for i in range(0, len(by_length), micro_batch)]
    return batches


class RolloutSampler(Sampler[int]):
    """Rows in groups of `rollout_size` (over all processes), each group repeated `repeats` times; a last incomplete
    group is left out.

    transformers counts steps by the batches that the loader yields, so a rollout is yielded once per micro-batch. The
    order depends only on seed and epoch, so a resumed run finds its place.
    """

    def __init__(self, rows: int, rollout_size: int, repeats: int, *, seed: int, shuffle: bool) -> None:
        self.rows, self.rollout_size, self.repeats = rows, rollout_size, repeats
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order: Any = range(self.rows)
        if self.shuffle:
            generator = seeded(self.seed, self.epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.rows - self.rollout_size + 1, self.rollout_size):
            for _ in range(self.repeats):
                yield from order[start : start + self.rollout_size]

    def __len__(self) -> int:
        return self.rows // self.rollout_size * self.rollout_size * self.repeats
