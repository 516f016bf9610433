"""The data order: hand-computed windows, and nothing that depends on ranks, restarts or threads."""

import threading
import time

import numpy as np
import pytest
import torch

from engine.data.batches import IGNORED, Prefetcher, TrainOrder, eval_batches, eval_windows
from engine.errors import ConfigError

TOKENS = np.arange(1000, 1100, dtype=np.uint16)  # a token's value tells its position


def order(**changes) -> TrainOrder:
    return TrainOrder(**{"tokens": TOKENS, "context": 8, "batch_size": 4, "seed": 7} | changes)


# --- training


def test_windows_share_one_token_and_targets_are_the_next_token():
    inputs, targets = order(context=3).gather(np.array([0, 3, 96]))
    assert inputs.tolist() == [[1000, 1001, 1002], [1003, 1004, 1005], [1096, 1097, 1098]]
    assert targets.tolist() == [[1001, 1002, 1003], [1004, 1005, 1006], [1097, 1098, 1099]]
    assert inputs.dtype == targets.dtype == np.int64


def test_an_epoch_takes_every_window_once_from_a_drawn_offset():
    o = order()
    assert o.samples_per_epoch == 11  # (100 - 8) // 8: behind the largest offset, 7, are 92 targets
    ids = np.concatenate([o.sample_ids(step) for step in range(11)])  # 44 samples: four epochs
    for epoch in range(4):
        mine = ids[epoch * 11 : (epoch + 1) * 11]
        assert sorted(mine) == list(range(epoch * 11, epoch * 11 + 11))
        offset, _ = o.epoch(epoch)
        assert 0 <= offset < 8
        starts = o.starts(mine)
        assert sorted(starts) == [offset + 8 * i for i in range(11)]
        assert starts.max() + 8 < 100  # the last target exists
    assert len({tuple(ids[e * 11 : (e + 1) * 11] % 11) for e in range(4)}) == 4  # another order each epoch
    assert len({order(seed=s).epoch(0)[0] for s in range(40)}) == 8  # every offset occurs


def test_a_step_may_span_two_epochs():
    o = order()
    ids = o.sample_ids(2)  # samples 8 to 11: three of epoch 0 and the first of epoch 1
    assert (ids // 11).tolist() == [0, 0, 0, 1]
    assert ids[3] == 11 + o.epoch(1)[1][0]
    assert o.starts(ids)[3] == o.epoch(1)[0] + 8 * (ids[3] - 11)


def test_more_than_two_epochs_fit_into_one_step():
    ids = order(batch_size=40).sample_ids(0)
    assert np.bincount(ids // 11).tolist() == [11, 11, 11, 7] and len(set(ids)) == 40


@pytest.mark.parametrize("n_tokens", [9, 10, 15, 16, 17, 23, 24, 25])
def test_few_tokens_are_enough_and_never_overrun(n_tokens):
    o = order(tokens=TOKENS[:n_tokens])
    for step in range(30):
        inputs, targets = o.gather(o.starts(o.sample_ids(step)))
        assert targets.max() <= 1000 + n_tokens - 1
        np.testing.assert_array_equal(targets, inputs + 1)


def test_too_few_tokens_are_an_error():
    with pytest.raises(ConfigError, match="8 tokens; context = 8 needs at least 9"):
        order(tokens=TOKENS[:8])


def test_the_order_depends_on_seed_and_step_only():
    steps = [order().sample_ids(step) for step in range(20)]
    backwards = order()
    for step in reversed(range(20)):  # whatever was asked before
        np.testing.assert_array_equal(backwards.sample_ids(step), steps[step])
    assert not np.array_equal(
        np.concatenate(steps), np.concatenate([order(seed=8).sample_ids(step) for step in range(20)])
    )


def test_the_order_is_pinned():
    """Recorded once: a change here breaks the resuming and repeating of every earlier run."""
    assert order().sample_ids(0).tolist() == [7, 3, 0, 5]
    assert order().epoch(0)[0] == 4


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_the_ranks_together_make_the_step(world):
    o = order(batch_size=12)
    for step in range(5):
        parts = [o.rank_slice(step, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {12 // world}
        np.testing.assert_array_equal(np.concatenate(parts), o.sample_ids(step))
        assert len(set(np.concatenate(parts))) == 12


def test_a_memory_map_gives_the_same_batches(tmp_path):
    TOKENS.tofile(tmp_path / "t.bin")
    mapped = order(tokens=np.memmap(tmp_path / "t.bin", dtype=np.uint16, mode="r"))
    starts = mapped.starts(mapped.sample_ids(3))
    np.testing.assert_array_equal(mapped.gather(starts)[0], order().gather(starts)[0])


# --- prefetching


def test_prefetching_changes_nothing_and_starts_anywhere():
    o = order()
    with Prefetcher(order(), first_step=5, last_step=12, rank=1, world=2) as batches:
        seen = list(batches)
    assert [batch.step for batch in seen] == list(range(5, 12))
    for batch in seen:
        ids = o.rank_slice(batch.step, 1, 2)
        inputs, targets = o.gather(o.starts(ids))
        np.testing.assert_array_equal(batch.sample_ids, ids)
        assert torch.equal(batch.inputs, torch.from_numpy(inputs))
        assert torch.equal(batch.targets, torch.from_numpy(targets))
        assert batch.inputs.shape == (2, 8) and batch.inputs.dtype == torch.int64


def test_an_exception_in_the_thread_reaches_the_consumer():
    class Broken(TrainOrder):
        def gather(self, starts):
            if self.broken_from <= self.calls:
                raise OSError("the disk is gone")
            self.calls += 1
            return super().gather(starts)

    broken = Broken(TOKENS, 8, 4, 7)
    broken.calls, broken.broken_from = 0, 2
    batches = Prefetcher(broken, first_step=0, last_step=10)
    assert [next(batches).step for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert list(batches) == []


def test_closing_ends_the_thread_with_batches_left():
    batches = Prefetcher(order(), first_step=0, last_step=10**9)
    next(batches)
    batches.close()
    batches.close()
    assert "batches" not in {thread.name for thread in threading.enumerate()}
    assert list(batches) == []


class Counted(TrainOrder):
    """Counts its batches, and makes none before `go` is set."""

    def __init__(self):
        super().__init__(TOKENS, 8, 4, 7)
        self.made, self.go = 0, threading.Event()

    def gather(self, starts):
        assert self.go.wait(60)
        self.made += 1
        return super().gather(starts)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 3])
def test_so_many_batches_are_prepared_ahead_and_no_more(depth):
    o = Counted()
    o.go.set()
    with Prefetcher(o, first_step=0, last_step=100, depth=depth) as batches:
        for taken in range(4):
            wait_until(lambda taken=taken: o.made == taken + depth)
            time.sleep(0.02)
            assert o.made == taken + depth
            next(batches)
    (line,) = batches.lines(wanted=depth)
    assert line.agrees and line.in_effect == str(depth) and f"at most {depth} did" in line.how
    assert not batches.lines(wanted=depth + 1)[0].agrees


def test_the_time_that_training_waits_for_a_batch_is_measured():
    o = Counted()
    with Prefetcher(o, first_step=0, last_step=100, depth=2) as batches:
        threading.Timer(0.2, o.go.set).start()
        assert 0.1 < next(batches).wait_seconds < 30
        wait_until(lambda: o.made == 3)
        time.sleep(0.02)
        assert next(batches).wait_seconds < 0.1  # it was there


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_pinned():
    with Prefetcher(order(), first_step=0, last_step=2, device="cuda") as batches:
        assert all(batch.inputs.is_pinned() and batch.targets.is_pinned() for batch in batches)


# --- evaluation


def test_plain_windows_by_hand():
    assert eval_windows(9, 4, 4).tolist() == [0, 4]
    assert eval_windows(10, 4, 4).tolist() == [0, 4, 8]
    assert eval_windows(2, 4, 4).tolist() == [0]
    ((inputs, targets),) = eval_batches(TOKENS[:7], 4, 3)
    assert inputs.tolist() == [[1000, 1001, 1002, 1003], [1004, 1005, 1006, 0], [0, 0, 0, 0]]
    assert targets.tolist() == [[1001, 1002, 1003, 1004], [1005, 1006, -100, -100], [-100] * 4]


def test_sliding_windows_by_hand():
    ((inputs, targets),) = eval_batches(TOKENS[:8], 4, 3, stride=2)
    assert inputs.tolist() == [[1000, 1001, 1002, 1003], [1002, 1003, 1004, 1005], [1004, 1005, 1006, 1007]]
    assert targets.tolist() == [[1001, 1002, 1003, 1004], [-100, -100, 1005, 1006], [-100, -100, 1007, -100]]


def test_one_token_cannot_be_evaluated():
    with pytest.raises(ConfigError, match="at least 2 tokens, there are 1"):
        eval_windows(1, 4, 4)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stride", [0, 1, 3, 5, 8])
@pytest.mark.parametrize("n_tokens", [2, 8, 9, 10, 17, 63, 100])
def test_every_token_but_the_first_is_scored_once(n_tokens, stride, world):
    context, batch_size, scored, counts = 8, 3, [], set()
    for rank in range(world):
        batches = list(
            eval_batches(TOKENS[:n_tokens], context, batch_size, stride=stride, rank=rank, world=world)
        )
        counts.add(len(batches))
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (batch_size, context)
            assert inputs.dtype == targets.dtype == torch.int64
            valid = targets != IGNORED
            assert torch.equal(inputs[valid] + 1, targets[valid])
            scored += targets[valid].tolist()
            if stride:  # a prediction sees all there is, or at least context - stride tokens and its input
                seen = torch.arange(1, context + 1).expand_as(targets)[valid]
                there = targets[valid] - 1000
                assert (seen >= torch.clamp(there, max=context - stride + 1)).all()
    assert sorted(scored) == list(range(1001, 1000 + n_tokens))
    assert len(counts) == 1  # every rank the same number, so collectives line up
