"""Wrong replies drawn anew in each epoch: which they may be, what they follow from, and the ledger about them."""

import numpy as np
import pytest
from engine_runs import TALKING, column, ledger, rows, write_dialogues

from engine.data.choices import ChoiceOrder, Choices
from engine.data.redraw import Redraw
from engine.errors import ConfigError
from engine.redrawn import Seen

CONTEXT, REPLY = 2, 3
DIALOGUES = [0, 0, 1, 2, 3, 4, 5, 6]
REPLIES = [
    0,
    1,
    2,
    3,
    4,
    4,
    5,
    0,
]  # rows 4 and 5 say the same; row 7 says what row 0 does, in another dialogue


def examples(candidates: int = 3) -> Choices:
    """A row of each of REPLIES: reply r is [100, r, 101], the first one in the files, before 50, 51, …"""
    tokens, ends = [], []
    for number, reply in enumerate(REPLIES):
        for part in ([10, number], [100, reply, 101], *([100, 50 + i, 101] for i in range(candidates - 1))):
            tokens += part
            ends.append(len(tokens))
    arrays = (np.array(values, np.int32) for values in ([0] * len(REPLIES), DIALOGUES, REPLIES))
    return Choices(np.array(tokens, np.uint16), np.array(tokens, np.uint16), np.array(ends), *arrays, pad=0)


def order(seed: int = 1, redraw: bool = True, batch_size: int = 4) -> ChoiceOrder:
    return ChoiceOrder(examples(), CONTEXT, REPLY, batch_size, seed, redraw)


def shown(order: ChoiceOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """What the candidates of each row say in an epoch (rows, candidates), and which is the true one (rows,)."""
    inputs, targets = order.batch(epoch * len(REPLIES) + np.arange(len(REPLIES)))
    assert inputs.shape == (8, 2, 1 + 3, REPLY)
    assert (inputs[:, 0, 1:, 0] == 100).all() and (inputs[:, 0, 1:, 2] == 101).all()
    return inputs[:, 0, 1:, 1], targets[:, 0]


def test_candidates_are_the_true_one_and_true_ones_of_other_dialogues():
    made, places = order(), set()
    for epoch in range(40):
        said, gold = shown(made, epoch)
        for row, (candidates, place) in enumerate(zip(said.tolist(), gold.tolist(), strict=True)):
            assert candidates[place] == REPLIES[row] and len(set(candidates)) == 3
            others = {candidates[i] for i in range(3) if i != place}
            own = {r for r, dialogue in zip(REPLIES, DIALOGUES, strict=True) if dialogue == DIALOGUES[row]}
            assert not others & own and others <= set(REPLIES)
            places.add((row, place))
    assert len(places) == 8 * 3  # the true one stands anywhere


def test_targets_and_types_follow_the_candidates():
    inputs, targets = order().batch(np.arange(8))
    assert (inputs[:, 1] == inputs[:, 0]).all()  # the types of `examples` are its tokens
    assert targets[:, 1:].tolist() == [[reply, 101, -100] for reply in REPLIES]


def test_what_is_drawn_follows_from_seed_epoch_and_row_alone():
    epochs = [shown(order(), epoch) for epoch in range(3)]
    assert not np.array_equal(epochs[0][0], epochs[1][0]) and not np.array_equal(epochs[1][0], epochs[2][0])
    assert not np.array_equal(shown(order(seed=2), 0)[0], epochs[0][0])
    made = order(batch_size=8)
    for epoch in (2, 0, 1):  # in any order, in other batches, one row alone
        assert np.array_equal(shown(made, epoch)[0], epochs[epoch][0])
    inputs, _ = made.batch(np.array([2 * 8 + 5, 3]))
    assert inputs[0, 0, 1:, 1].tolist() == epochs[2][0][5].tolist()
    assert inputs[1, 0, 1:, 1].tolist() == epochs[0][0][3].tolist()


def test_those_of_the_files_are_in_every_epoch_where_it_is_off():
    for epoch in range(2):
        said, gold = shown(order(redraw=False), epoch)
        assert said.tolist() == [[reply, 50, 51] for reply in REPLIES] and not gold.any()


def test_too_few_to_draw_from_are_told():
    """Six different replies, of which dialogue 0 has two."""
    Redraw(examples(candidates=5), seed=1).draw(np.array([0]), np.array([0]))
    with pytest.raises(
        ConfigError, match="there are 4 different replies in the .*, and candidates = 6 needs 5"
    ):
        Redraw(examples(candidates=6), seed=1)


# --- the ledger


def line(of: ChoiceOrder, epochs: int = 2):
    seen = Seen(of, wanted=True)
    for step in range(epochs * 2):
        ids = of.sample_ids(step)
        seen.add(ids, *of.batch(ids))
    [found] = seen.lines(0)
    return found


def test_the_ledger_counts_what_was_trained_on():
    found = line(order(), epochs=10)
    # Of so few replies the same are drawn twice running now and then.
    assert found.agrees and found.in_effect == "other candidates in 78 of 80 rows"
    assert found.how.endswith("6 different wrong replies trained on, of 6")
    assert Seen(order(), wanted=False).lines(0) == []


def test_the_ledger_disagrees_where_nothing_was_drawn():
    found = line(order(redraw=False))
    assert not found.agrees and found.in_effect == "other candidates in 0 of 16 rows"
    assert found.how.endswith("0 different wrong replies trained on, of 6")


def test_the_ledger_disagrees_where_every_epoch_has_the_same(monkeypatch):
    draw = Redraw.draw
    monkeypatch.setattr(Redraw, "draw", lambda self, rows, epochs: draw(self, rows, 0 * epochs))
    found = line(order())
    assert not found.agrees and found.in_effect == "other candidates in 8 of 16 rows"


def test_a_run_draws_anew_and_its_evaluations_stay(lab, tmp_path):
    write_dialogues(tmp_path / "dialogues")
    settings = {
        **TALKING,
        "steps": 4,
        "batch_size": 60,
        "lr": 1e-9,
        "eval_train_rows": 120,
        "log_interval": 1,
    }
    run, fixed = lab.train(**settings, redraw_candidates=True), lab.train(**settings, run="fixed")
    found = ledger(run)["redraw_candidates"]
    assert found["agrees"] and found["in_effect"] == "other candidates in 32 of 32 rows"
    assert "redraw_candidates" not in ledger(fixed)
    # With weights that hardly move, an epoch of two steps has the loss of its candidates.
    epochs = [np.reshape(column(r, "train_mc_loss"), (2, 2)).mean(1) for r in (run, fixed)]
    assert epochs[1][0] == pytest.approx(epochs[1][1], abs=1e-6)
    assert abs(epochs[0][0] - epochs[0][1]) > 1e-5
    scored = [[float(value) for value in rows(r / "evals.csv")[0].values()] for r in (run, fixed)]
    assert scored[0] == pytest.approx(scored[1], abs=1e-6)
