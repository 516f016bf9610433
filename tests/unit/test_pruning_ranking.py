"""Thresholds against sorting in plain Python: exact, over tensors and shards, ties in order; 2:4; sampled."""

import random

import pytest
import torch

from engine.pruning import ranking


class OfOne:
    """The shards of tensors that are whole."""

    size, rank = 1, 0

    def summed(self, tensor):
        return tensor


def keys_of(*scores: list[float]) -> list[torch.Tensor]:
    return [ranking.to_keys(torch.tensor(x)) for x in scores]


def pruned(masks: list[torch.Tensor]) -> list[list[int]]:
    return [(~m).flatten().nonzero().flatten().tolist() for m in masks]


def lowest(scores: list[list[float]], k: int) -> list[list[int]]:
    """By sorting: stable, so ties are in the order of tensors and elements."""
    order = sorted((s, t, i) for t, x in enumerate(scores) for i, s in enumerate(x))[:k]
    return [sorted(i for _, t, i in order if t == own) for own in range(len(scores))]


def exact(keys, groups, k):
    return pruned(ranking.keep_all_but_lowest(keys, torch.tensor(groups), torch.tensor(k), OfOne()))


def test_keys_have_the_order_of_floats():
    values = [-torch.inf, -3.0, -1e-40, -0.0, 0.0, 1e-45, 1e-8, 2.0, torch.inf]
    keys = ranking.to_keys(torch.tensor(values)).tolist()
    assert keys == sorted(keys) and len(set(keys)) == len(values) - 1 and keys[3] == keys[4] == 0


def test_the_lowest_over_all_tensors_by_hand():
    scores = [[0.3, 0.1, 0.5], [0.2, 0.4, 0.05]]
    assert exact(keys_of(*scores), [0, 0], [3]) == [[1], [0, 2]]
    assert exact(keys_of(*scores), [0, 0], [0]) == [[], []]
    assert exact(keys_of(*scores), [0, 0], [6]) == [[0, 1, 2], [0, 1, 2]]
    assert exact(keys_of(*scores), [0, 1], [1, 2]) == [[1], [0, 2]]


def test_ties_are_pruned_in_the_order_of_tensors_and_elements():
    scores = [[1.0, 1.0], [1.0, 0.5, 1.0], [1.0]]
    assert [exact(keys_of(*scores), [0, 0, 0], [k]) for k in (1, 2, 4)] == [
        [[], [1], []],
        [[0], [1], []],
        [[0, 1], [0, 1], []],
    ]


@pytest.mark.parametrize("k", [0, 1, 37, 150, 299, 300])
def test_exactly_k_as_sorting_has_it(k):
    draw = random.Random(k)
    # Few different values, so that there are ties, of either sign.
    scores = [[draw.choice([-1, 1]) * draw.randrange(20) / 16 for _ in range(n)] for n in (100, 150, 50)]
    assert exact(keys_of(*scores), [0, 0, 0], [k]) == lowest(scores, k)


class Halves:
    """One of two ranks that each have a part of every tensor; what it adds up, the other side gives it."""

    size = 2

    def __init__(self, rank, meeting):
        self.rank, self.meeting = rank, meeting

    def summed(self, tensor):
        return self.meeting.sum(self.rank, tensor)


class Meeting:
    """Adds up what two threads bring."""

    def __init__(self):
        import threading

        self.barrier, self.brought = threading.Barrier(2, timeout=30), [None, None]

    def sum(self, rank, tensor):
        self.brought[rank] = tensor.clone()
        self.barrier.wait()
        total = self.brought[0] + self.brought[1]
        self.barrier.wait()
        return tensor.copy_(total)


def on_two(function) -> list:
    from concurrent.futures import ThreadPoolExecutor

    meeting = Meeting()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: function(Halves(rank, meeting)), range(2)))


@pytest.mark.parametrize("k", [1, 40, 121])
def test_split_over_two_ranks_the_same_elements_are_pruned_ties_too(k):
    draw = random.Random(1)
    scores = [[draw.randrange(8) / 4 for _ in range(n)] for n in (61, 90)]
    parts = [[x[:30] for x in scores], [x[30:] for x in scores]]
    groups = torch.tensor([0, 0])

    def one(shards):
        keys = keys_of(*parts[shards.rank])
        return list(ranking.keep_all_but_lowest(keys, groups, torch.tensor([k]), shards))

    first, second = on_two(one)
    together = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    assert pruned(together) == lowest(scores, k)


def test_of_every_four_the_two_lowest_can_be_pruned_ties_in_order():
    keys = keys_of([[4.0, 1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0], [-1.0, 0.0, -2.0, 7.0, 0.5, 0.25, 0.0, -0.0]])[
        0
    ]
    kept = keys.clone()
    found = ranking.only_two_of_four(keys) == ranking.HIGHEST
    assert found.tolist() == [
        [True, False, True, False, False, False, True, True],
        [False, True, False, True, True, True, False, False],
    ]
    assert torch.equal(keys[~found], kept[~found])


def test_a_sampled_threshold_prunes_about_as_many_and_the_same_ones_every_time():
    scores = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(1)).abs()
    keys = [ranking.to_keys(x.clone()) for x in scores]
    size, k, groups = torch.tensor([100_000]), torch.tensor([30_000]), torch.tensor([0, 0])

    def sampled(share, seed):
        how = {"share": share, "seed": seed}
        return torch.cat(list(ranking.keep_above_sampled(keys, groups, k, size, OfOne(), **how)))

    first, again, other = sampled(0.02, 1), sampled(0.02, 1), sampled(0.02, 2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    # A share of 0.3 from 2,000 draws has a standard deviation of √(0.3 · 0.7 / 2000) = 0.0102.
    for mask in (first, other):
        assert 0 < abs((~mask).sum().item() / 100_000 - 0.3) < 0.04
        assert scores.flatten()[mask].min() > scores.flatten()[~mask].max()
    assert abs((~sampled(0.5, 3)).sum().item() / 100_000 - 0.3) < 0.008
