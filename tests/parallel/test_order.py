"""The order of rows by length is one on all processes, whatever each has drawn before."""

import torch

from posttrain.parallel.order import OneOrder

LENGTHS = [n % 7 + 1 for n in range(50)]


def test_the_order_is_by_seed_and_epoch_alone():
    orders = {}
    for rank in (0, 1):
        sampler = OneOrder(4, LENGTHS, seed=3)
        for epoch in (0, 1):
            torch.rand(rank + 1)  # dropout on another number of tokens
            sampler.set_epoch(epoch)
            orders[rank, epoch] = list(sampler)
    assert orders[0, 0] == orders[1, 0] and orders[0, 1] == orders[1, 1]
    assert orders[0, 0] != orders[0, 1]
    assert sorted(orders[0, 0]) == sorted(orders[0, 1]) == list(range(50))
    assert orders[0, 0] != list(OneOrder(4, LENGTHS, seed=4))


def test_batches_are_of_like_length():
    rows = list(OneOrder(4, LENGTHS, seed=3))
    spread = [max(b) - min(b) for b in ([LENGTHS[i] for i in rows[k : k + 4]] for k in range(4, 48, 4))]
    assert sum(spread) / len(spread) < 2.5  # of four rows at random it is above 4
