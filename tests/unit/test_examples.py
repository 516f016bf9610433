"""Labelled rows: padding and cutting by hand, and an order that depends on seed and step alone."""

import numpy as np
import pytest
import torch

from engine.data.batches import Drawn, Prefetcher
from engine.data.examples import IGNORED, ExampleOrder, Examples, eval_batches
from engine.errors import ConfigError


def examples(rows: list[list[int]], labels: list[int] | None = None, kind=np.uint16) -> Examples:
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    labels = range(len(rows)) if labels is None else labels
    return Examples(np.array(sum(rows, []), dtype=kind), ends, np.array(labels, dtype=np.int32))


FOUR = examples([[5], [6, 7, 8, 9], [3, 4], [2, 2, 2]], [1, 0, 2, 1])
MANY = examples([[100 + i] * (1 + i % 5) for i in range(30)])  # a row's label and tokens tell its number


def order(**changes) -> ExampleOrder:
    return ExampleOrder(**{"examples": MANY, "context": 3, "batch_size": 4, "seed": 7} | changes)


# --- rows


def test_rows_are_cut_at_the_context_and_padded_with_zero():
    inputs, labels = FOUR.gather(np.array([1, 0, 3, 2]), 3)
    assert inputs.tolist() == [[6, 7, 8], [5, 0, 0], [2, 2, 2], [3, 4, 0]]
    assert labels.tolist() == [0, 1, 1, 2]
    assert inputs.dtype == labels.dtype == np.int64
    assert FOUR.gather(np.array([3]), 6)[0].tolist() == [
        [2, 2, 2, 0, 0, 0]
    ]  # the last row reads nothing behind it


def test_a_row_and_the_lengths_are_whole():
    assert len(FOUR) == 4 and FOUR.lengths().tolist() == [1, 4, 2, 3]
    assert [FOUR.row(i).tolist() for i in range(4)] == [[5], [6, 7, 8, 9], [3, 4], [2, 2, 2]]


def test_the_digest_is_of_tokens_ends_and_labels_but_not_of_their_types():
    rows, labels = [[5], [6, 7, 8, 9], [3, 4], [2, 2, 2]], [1, 0, 2, 1]
    assert examples(rows, labels, np.uint32).sha256() == FOUR.sha256()
    others = [
        examples([[5], [6, 7, 8, 1], [3, 4], [2, 2, 2]], labels),
        examples([[5, 6], [7, 8, 9], [3, 4], [2, 2, 2]], labels),
        examples(rows, [1, 0, 2, 0]),
    ]
    assert len({one.sha256() for one in [FOUR, *others]}) == 4


def test_memory_maps_give_the_same_batches(tmp_path):
    parts = []
    for name in ("tokens", "ends", "labels"):
        array = getattr(FOUR, name)
        array.tofile(tmp_path / name)
        parts.append(np.memmap(tmp_path / name, dtype=array.dtype, mode="r"))
    mapped = Examples(*parts)
    assert mapped.sha256() == FOUR.sha256()
    np.testing.assert_array_equal(mapped.gather(np.arange(4), 3)[0], FOUR.gather(np.arange(4), 3)[0])


# --- training


def test_no_rows_are_an_error():
    with pytest.raises(ConfigError, match="the training split has no rows"):
        order(examples=examples([]))


def test_a_batch_holds_the_rows_of_its_ids_whatever_the_epoch():
    inputs, labels = order().batch(np.array([0, 30 + 6, 60 + 29]))
    assert inputs.tolist() == [[100, 0, 0], [106, 106, 0], [129, 129, 129]]
    assert labels.tolist() == [0, 6, 29]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30, 64])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_every_row_comes_once_an_epoch(seed, batch_size):
    o = order(seed=seed, batch_size=batch_size)
    assert o.samples_per_epoch == 30
    ids = np.concatenate([o.sample_ids(step) for step in range(-(-90 // batch_size))])[:90]
    for epoch in range(3):
        assert sorted(ids[epoch * 30 : epoch * 30 + 30]) == list(range(epoch * 30, epoch * 30 + 30))
    assert len({tuple(ids[e * 30 : e * 30 + 30] % 30) for e in range(3)}) == 3  # another order each epoch


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("rows", [5, 12, 29, 30])
def test_ranks_share_nothing_and_together_draw_what_one_process_draws(world, rows):
    chosen = examples([[1 + i] for i in range(rows)])
    alone, shared = order(examples=chosen, batch_size=12), order(examples=chosen, batch_size=12)
    for step in (0, 1, 2, 11):
        parts = [shared.rank_slice(step, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {12 // world}
        together = np.concatenate(parts)
        assert len(set(together)) == 12  # a row that comes twice has another epoch in its id
        np.testing.assert_array_equal(together, alone.sample_ids(step))


def test_the_order_depends_on_seed_and_step_only():
    steps = [order().sample_ids(step) for step in range(20)]
    backwards = order()
    for step in reversed(range(20)):  # whatever was asked before
        np.testing.assert_array_equal(backwards.sample_ids(step), steps[step])
    assert not np.array_equal(steps[0], order(seed=8).sample_ids(0))
    np.testing.assert_array_equal(order(context=9).sample_ids(3), steps[3])


def test_the_order_is_pinned():
    """Recorded once: a change here breaks the resuming and repeating of every earlier run."""
    assert order().sample_ids(0).tolist() == [7, 28, 15, 3]


def test_batches_are_made_ahead_as_for_text():
    o = order()
    with Prefetcher(order(), first_step=5, last_step=9, rank=1, world=2) as batches:
        seen = list(batches)
    assert [batch.step for batch in seen] == [5, 6, 7, 8]
    for batch in seen:
        inputs, labels = o.batch(o.rank_slice(batch.step, 1, 2))
        assert torch.equal(batch.inputs, torch.from_numpy(inputs)) and batch.inputs.shape == (2, 3)
        assert torch.equal(batch.targets, torch.from_numpy(labels)) and batch.targets.shape == (2,)


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_parts_of_the_fingerprint_add_up(world):
    def sums(rank: int, of: int) -> np.ndarray:
        seen = Drawn(order())
        seen.resumed(20, rank, of)
        return seen.sums

    alone = Drawn(order()).digest(sums(0, 1), "rows")
    assert Drawn(order()).digest(sum(sums(rank, world) for rank in range(world)), "rows") == alone
    assert Drawn(order(context=4)).digest(sums(0, 1), "rows") != alone


# --- evaluation


def test_evaluation_batches_by_hand():
    first, second = eval_batches(FOUR, 2, 3)
    assert first[0].tolist() == [[5, 0], [6, 7], [3, 4]] and first[1].tolist() == [1, 0, 2]
    assert second[0].tolist() == [[2, 2], [0, 0], [0, 0]] and second[1].tolist() == [1, -100, -100]
    assert second[0].dtype == second[1].dtype == np.int64


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("rows", [1, 2, 6, 8, 29])
def test_every_row_is_scored_once_and_ranks_have_equally_many_batches(rows, batch_size, world):
    chosen, scored, counts = examples([[1 + i] for i in range(rows)]), [], set()
    for rank in range(world):
        batches = list(eval_batches(chosen, 3, batch_size, rank, world))
        counts.add(len(batches))
        for inputs, labels in batches:
            assert inputs.shape == (batch_size, 3) and labels.shape == (batch_size,)
            there = labels != IGNORED
            assert (inputs[there, 0] == labels[there] + 1).all() and not inputs[~there].any()
            scored += labels[there].tolist()
    assert sorted(scored) == list(range(rows)) and len(counts) == 1


def test_a_batch_is_cut_to_its_longest_row():
    """Rows of 1, 4, 2 and 3 tokens."""
    for rows, trim_to, length in (([0, 2], 2, 2), ([0, 3], 2, 4), ([0], 1, 1), ([1], 3, 5), ([1], 8, 5)):
        inputs, _ = FOUR.gather(np.array(rows), 5, trim_to)
        whole, _ = FOUR.gather(np.array(rows), 5)
        assert inputs.shape[1] == length
        assert (inputs == whole[:, :length]).all() and not whole[:, length:].any()
