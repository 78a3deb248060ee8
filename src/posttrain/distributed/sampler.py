"""Batches of rows of similar length, in the same order on any number of processes and after a resume."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..upstream.transformers import replace_train_sampler

if TYPE_CHECKING:
    from transformers import Trainer


class SeededLengthSampler(LengthGroupedSampler):  # type: ignore[misc]
    """A length-grouped order that depends only on `seed` and epoch.

    transformers 5.23 draws the order from each process's own random state. Dropout on rows of different lengths
    advances that differently on each process, so from the second epoch on processes share some rows and leave others
    out. After a resume in the middle of an epoch the order is another one, and rows are seen twice or never.
    `batch_size` is that of all processes together, so that the order does not depend on how many there are.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], *, seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows: Iterator[int] = super().__iter__()
        return rows


def seed_length_sampler(trainer: "Trainer") -> None:
    """Make a trainer that groups by length use SeededLengthSampler."""
    args = trainer.args
    copies = args.world_size // trainer.get_tp_size()  # of the model: processes that get different batches
    batch = args.train_batch_size * args.gradient_accumulation_steps * copies
    seed = args.seed if args.data_seed is None else args.data_seed

    replace_train_sampler(trainer, lambda own: SeededLengthSampler(batch, own.lengths, seed=seed))
