"""A rollout's prompts, its random numbers, and its micro-batches."""

import torch

from posttrain.ppo.rollout import RolloutSampler, micro_batches, uniforms


def test_each_prompt_is_used_once_per_epoch_and_a_rollout_is_repeated_in_full():
    sampler = RolloutSampler(11, 4, 3, seed=1, shuffle=True)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 2 * 4 * 3
        rollouts = [rows[i : i + 12] for i in (0, 12)]
        assert all(r == r[:4] * 3 for r in rollouts)
        orders.append(rollouts[0][:4] + rollouts[1][:4])
        assert len(set(orders[-1])) == 8  # the three that are left over wait for another epoch
    assert orders[0] != orders[1]
    assert list(sampler) == rows


def test_mini_batches_are_reshuffled_each_pass_and_sorted_by_length():
    lengths = [5, 1, 4, 2, 8, 3, 7, 6]
    passes = [micro_batches(0, 0, epoch, lengths, 2, 2) for epoch in (0, 1)]
    for batches in passes:
        assert [len(b) for b in batches] == [2] * 4
        assert sorted(torch.cat(batches).tolist()) == list(range(8))
        for mini in (batches[:2], batches[2:]):
            sizes = [lengths[row] for b in mini for row in b.tolist()]
            assert sizes == sorted(sizes)
    minis = [{frozenset(torch.cat(b[:2]).tolist()), frozenset(torch.cat(b[2:]).tolist())} for b in passes]
    assert minis[0] != minis[1]


def test_a_rows_random_numbers_do_not_depend_on_the_process():
    whole = uniforms(3, 1, range(4), 6)
    assert torch.equal(whole[2:], uniforms(3, 1, range(2, 4), 6))
    assert not torch.equal(whole, uniforms(3, 2, range(4), 6))
    assert len(set(whole.flatten().tolist())) == 24
