"""The length-grouped order is the same on all processes, whatever random numbers each has drawn before."""

import pytest
import torch

from posttrain.distributed.sampler import SeededLengthSampler
from posttrain.upstream.accelerate import reach_samplers_behind_skips

LENGTHS = [n % 7 + 1 for n in range(50)]


def test_the_order_depends_only_on_seed_and_epoch():
    orders = {}
    for rank in (0, 1):
        sampler = SeededLengthSampler(4, LENGTHS, seed=3)
        for epoch in (0, 1):
            torch.rand(rank + 1)  # dropout on another number of tokens
            sampler.set_epoch(epoch)
            orders[rank, epoch] = list(sampler)
    assert orders[0, 0] == orders[1, 0] and orders[0, 1] == orders[1, 1]
    assert orders[0, 0] != orders[0, 1]
    assert sorted(orders[0, 0]) == sorted(orders[0, 1]) == list(range(50))
    assert orders[0, 0] != list(SeededLengthSampler(4, LENGTHS, seed=4))


def test_batches_have_rows_of_similar_length():
    rows = list(SeededLengthSampler(4, LENGTHS, seed=3))
    spread = [max(b) - min(b) for b in ([LENGTHS[i] for i in rows[k : k + 4]] for k in range(4, 48, 4))]
    assert sum(spread) / len(spread) < 2.5  # of four rows at random it is above 4


@pytest.mark.parametrize("sampling", ["one order", "random"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resume_in_a_later_epoch_continues_that_epochs_order(sampling, rank):
    """After three batches of epoch 2, the remaining batches are those of an uninterrupted run."""
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from torch.utils.data import DataLoader

    def loader():
        own = {"sampler": SeededLengthSampler(4, LENGTHS, seed=3)} if sampling == "one order" else {"shuffle": True}
        made = DataLoader(range(50), batch_size=2, generator=torch.Generator().manual_seed(7), **own)
        return prepare_data_loader(made, num_processes=2, process_index=rank, use_seedable_sampler=True)

    undisturbed = loader()
    for epoch in (0, 1, 2):
        undisturbed.set_epoch(epoch)
        rows = [batch.tolist() for batch in undisturbed]
    reach_samplers_behind_skips()
    resumed = skip_first_batches(loader(), 3)
    resumed.set_epoch(2)
    assert [batch.tolist() for batch in resumed] == rows[3:]
