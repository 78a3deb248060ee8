"""Rows sorted into batches of like length, in one order: for every process, any number of them, and after a resume."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class OneOrder(LengthGroupedSampler):  # type: ignore[misc]
    """Another order in each epoch, by `seed` and epoch, and nothing else.

    transformers 5.23 draws the order from each process's own random state. Dropout on rows of other lengths moves that
    on by another number of draws, and from the second epoch on processes share rows and leave others out. After a
    resume in the middle of an epoch it draws another order, and rows are seen twice or never.
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


def keep_one_order(trainer: Any) -> None:
    """Give a trainer that sorts by length OneOrder."""
    args = trainer.args
    own = trainer._get_train_sampler
    copies = args.world_size // trainer.get_tp_size()  # of the model: processes that get another batch
    batch = args.train_batch_size * args.gradient_accumulation_steps * copies
    seed = args.seed if args.data_seed is None else args.data_seed

    def sampler(dataset: Any = None) -> Any:
        return OneOrder(batch, own(dataset).lengths, seed=seed)

    trainer._get_train_sampler = sampler


def reach_samplers_behind_skips() -> None:
    """After a resume in the middle of an epoch, tell the sampler on each of several processes which epoch it is.

    accelerate 1.15's DataLoaderShard.set_epoch looks two levels deep, and a skip in front of a process's share of the
    batches is a third: without this every sampler begins with the order of epoch 0 again. Safe to call again.
    """
    from accelerate.data_loader import SkipBatchSampler

    def set_epoch(self: Any, epoch: int) -> None:
        inner = self.batch_sampler
        while hasattr(inner, "batch_sampler"):
            inner = inner.batch_sampler
        if hasattr(inner.sampler, "set_epoch"):
            inner.sampler.set_epoch(epoch)

    SkipBatchSampler.set_epoch = set_epoch
