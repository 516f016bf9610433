"""Curriculum: rarity by hand, an order that follows from seed and step, and a ledger that tells when it is off."""

import math

import numpy as np
import pytest
from engine_runs import ledger, read_json

from engine.config import Training, resolve
from engine.data.batches import TrainOrder
from engine.data.curriculum import CurriculumOrder, share, surprisal
from engine.errors import ConfigError
from engine.tasks import next_token

EASY = {"curriculum": "rarity", "curriculum_steps": 4, "curriculum_start": 0.2}
SETTINGS = Training(**EASY, steps=9)


def tokens(count: int = 1000) -> np.ndarray:
    return np.random.default_rng(5).geometric(0.3, count).astype(np.uint16)


def order(settings: Training = SETTINGS, seed: int = 1, batch_size: int = 8) -> CurriculumOrder:
    return CurriculumOrder(tokens(), 10, batch_size, seed, settings)


def test_surprisal_by_hand():
    """Of eight tokens four are a 1, three a 3 and one a 0."""
    found = surprisal(np.array([1, 1, 1, 1, 3, 3, 3, 0], dtype=np.uint16))
    assert found.tolist() == pytest.approx([math.log(8), math.log(2), 0.0, math.log(8 / 3)])


def test_the_share_grows_from_its_start_to_all():
    assert [share(SETTINGS, step) for step in (0, 1, 2, 3, 4, 8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert share(Training(), 0) == 1.0


def test_a_step_draws_distinct_samples_of_the_easiest_only():
    made = order()
    for step in range(4):
        ids = made.sample_ids(step)
        assert len(set(ids.tolist())) == 8
        starts = made.starts(ids)
        text = tokens()
        mine = np.array([surprisal(text)[text[s : s + 10]].mean() for s in starts])
        epoch = step * 8 // made.samples_per_epoch
        every = np.array(
            [
                surprisal(text)[text[s : s + 10]].mean()
                for s in made.starts(epoch * made.samples_per_epoch + np.arange(made.samples_per_epoch))
            ]
        )
        allowed = math.ceil(share(SETTINGS, step) * made.samples_per_epoch)
        assert mine.max() <= np.sort(every)[allowed - 1] + 1e-12
    assert made.allowed(0) == math.ceil(0.2 * made.samples_per_epoch)


def test_the_order_follows_from_seed_and_step_alone():
    one = order()
    steps = [7, 2, 0, 3, 2]  # in any order, again and again
    for step in steps:
        assert one.sample_ids(step).tolist() == order().sample_ids(step).tolist()
    assert order(seed=2).sample_ids(0).tolist() != one.sample_ids(0).tolist()
    assert one.sample_ids(0).tolist() != one.sample_ids(1).tolist()


def test_after_the_curriculum_the_order_is_the_plain_one():
    plain = TrainOrder(tokens(), 10, 8, 1)
    assert [order().sample_ids(s).tolist() for s in (4, 5, 40)] == [
        plain.sample_ids(s).tolist() for s in (4, 5, 40)
    ]
    assert order().sample_ids(3).tolist() != plain.sample_ids(3).tolist()


def test_ranks_take_disjoint_parts_of_a_step():
    made = order()
    parts = [made.rank_slice(1, rank, 4) for rank in range(4)]
    assert np.concatenate(parts).tolist() == made.sample_ids(1).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum": "rarity"}, "curriculum_steps = 0: must be from 1 to steps = 100"),
        (
            {"curriculum": "rarity", "curriculum_steps": 101},
            "curriculum_steps = 101: must be from 1 to steps = 100",
        ),
        ({"curriculum_steps": 5}, "curriculum_steps = 5: would do nothing with curriculum = none"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(changes, "test")


def test_too_few_easy_samples_for_a_step_are_refused():
    with pytest.raises(
        ConfigError, match=r"curriculum_start = 0.2: 20 of 99 samples, fewer than the 21 of a step"
    ):
        order(batch_size=21)


def test_a_run_says_that_it_drew_easy_samples_and_counts_as_usual(lab):
    run, plain = lab.train(run="easy", **EASY), lab.train(run="plain")
    lines = ledger(run)
    assert all(line["agrees"] for line in lines.values()), lines
    assert lines["curriculum"]["requested"] == "rarity: from 20% of the samples to all at step 4"
    assert lines["curriculum"]["in_effect"] == "4 of 4 steps had only samples that were easy enough"
    assert "curriculum" not in ledger(plain)
    one, other = (read_json(r / "metrics.json") for r in (run, plain))
    assert one["tokens"] == other["tokens"] and one["samples"] == other["samples"]
    assert one["data_order_sha256"] != other["data_order_sha256"]


def test_a_curriculum_that_is_off_in_silence_is_told(lab, monkeypatch):
    def plain(tokens, config):
        return TrainOrder(tokens.train, config.model.context, config.training.batch_size, config.run.seed)

    monkeypatch.setattr(next_token, "train_order", plain)
    lines = ledger(lab.train(**EASY))
    assert [line["what"] for line in lines.values() if not line["agrees"]] == ["curriculum"]


def test_a_curriculum_that_begins_with_nearly_all_leaves_no_sample_out():
    """What remains of it is another shuffle: over many steps every window comes up about as often."""
    made = order(Training(curriculum="rarity", curriculum_start=0.999, curriculum_steps=2000, steps=2000))
    assert made.allowed(0) == made.samples_per_epoch == 99
    windows = np.concatenate([made.sample_ids(step) % 99 for step in range(2000)])
    counts = np.bincount(windows, minlength=99)
    assert counts.min() > 0.7 * 16000 / 99 and counts.max() < 1.3 * 16000 / 99
