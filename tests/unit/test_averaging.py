"""Weight averaging: the formula by hand, training untouched, evaluations and the final model with the average."""

import contextlib

import pytest
import torch
from engine_runs import assert_same_weights, column, ledger, read_json, rows, weights

from engine import checkpoint, plan
from engine.averaging import Average, decay_at
from engine.config import resolve
from engine.step import Step


def one_weight(value: float) -> torch.nn.Linear:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


def test_the_formula_by_hand():
    """From 8, with weights 4, 2 and 1 and d = 0.1, 2/11 and 0.2."""
    model = one_weight(8.0)
    average = Average(model, 0.2)
    for value in (4.0, 2.0, 1.0):
        torch.nn.init.constant_(model.weight, value)
        average.update()
    by_hand = 0.1 * 8 + 0.9 * 4
    by_hand = 2 / 11 * by_hand + 9 / 11 * 2
    by_hand = 0.2 * by_hand + 0.8 * 1
    assert average.held[0].item() == pytest.approx(by_hand) and model.weight.item() == 1.0
    assert [decay_at(n, 0.99) for n in (1, 9, 10_000)] == [0.1, 0.5, 0.99]


def test_the_average_is_in_place_only_inside_also_when_it_fails():
    model = one_weight(1.0)
    average, address = Average(model, 0.9), model.weight.data_ptr()
    average.held[0].fill_(5.0)
    with pytest.raises(KeyError, match="on the way"), average.in_place():
        assert model.weight.item() == 5.0 and model.weight.data_ptr() == address
        raise KeyError("on the way")
    assert model.weight.item() == 1.0 and average.held[0].item() == 5.0
    none = Average(model, 0.0)
    none.update()
    with none.in_place():
        assert model.weight.item() == 1.0 and none.held == []


AVERAGED = {"average_decay": 0.6, "eval_interval": 3}


def test_training_is_as_without_and_the_final_model_is_the_average(lab, monkeypatch):
    plain = lab.train(run="plain", eval_interval=3)
    seen, call = [], Step.__call__

    def noting(self, *arguments):
        found = call(self, *arguments)
        seen.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
        return found

    monkeypatch.setattr(Step, "__call__", noting)
    run = lab.train(run="averaged", **AVERAGED)
    assert column(plain, "train_loss") == column(run, "train_loss")
    # d is n / (n + 9) up to the 6th update, 0.4 there: the average by hand from the weights of every step.
    first = lab.train(run="first", steps=1, average_decay=0.6)
    start = {
        n: (w - 0.9 * seen[-1][n]) / 0.1 for n, w in weights(first).items()
    }  # d of its only update is 0.1
    by_hand = start
    for update, found in enumerate(seen[:6], 1):
        d = update / (update + 9)
        by_hand = {n: d * by_hand[n] + (1 - d) * found[n] for n in found}
    final = weights(run)
    for name, expected in by_hand.items():
        torch.testing.assert_close(final[name], expected, rtol=1e-4, atol=1e-5)
    last, other = (float(rows(r / "evals.csv")[-1]["val_loss"]) for r in (run, plain))
    assert last != other
    scored = read_json(run / "metrics.json")
    assert scored["val_loss"] == last


def test_the_last_evaluation_is_of_the_model_that_is_kept(lab, monkeypatch):
    import sys

    from engine import evaluate

    run = lab.train(**AVERAGED)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "validation", "out.json"])
    evaluate.main()
    found = read_json(lab.directory / "out.json")["validation_loss"]
    assert found == pytest.approx(float(rows(run / "evals.csv")[-1]["val_loss"]), rel=1e-6)


def test_the_ledger_agrees_and_tells_when_it_is_off(lab, monkeypatch):
    lines = ledger(lab.train(run="honest", **AVERAGED))
    assert all(line["agrees"] for line in lines.values())
    assert lines["average_decay"]["in_effect"] == "0.6, 6 updates, in effect for 2 evaluations"
    assert "average_decay" not in ledger(lab.train(run="plain"))
    monkeypatch.setattr(Average, "update", lambda self: None)
    line = ledger(lab.train(run="never", **AVERAGED))["average_decay"]
    assert not line["agrees"] and line["in_effect"].startswith("0.6, 0 updates")
    monkeypatch.undo()


def test_evaluations_without_it_are_told(lab, monkeypatch):
    monkeypatch.setattr(Average, "in_place", lambda self: contextlib.nullcontext())
    line = ledger(lab.train(**AVERAGED))["average_decay"]
    assert not line["agrees"] and line["in_effect"] == "0.6, 6 updates, in effect for 0 evaluations"


def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(lab, monkeypatch):
    whole = lab.train(run="whole", checkpoint_interval=2, **AVERAGED)
    save = checkpoint.Checkpoints.save

    def stop(self, step, *others):
        save(self, step, *others)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        lab.train(run="parted", checkpoint_interval=2, **AVERAGED)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    parted = lab.train(run="parted", checkpoint_interval=2, **AVERAGED)
    assert_same_weights(weights(whole), weights(parted))
    assert ledger(parted)["average_decay"]["agrees"]


def test_its_copy_is_in_the_measured_and_in_the_planned_memory(lab):
    peaks = {
        decay: read_json(lab.train(run=f"run{i}", average_decay=decay) / "metrics.json")
        for i, decay in enumerate((0.0, 0.9))
    }
    size = 4 * peaks[0.0]["parameters"]
    more = (peaks[0.9]["peak_memory_gib"] - peaks[0.0]["peak_memory_gib"]) * 2**30
    assert more == pytest.approx(size, rel=0.02)
    planned = [plan.estimate(resolve({"average_decay": d}, "test"), 256, "cpu", 1) for d in (0.0, 0.9)]
    copy = planned[1].peak - planned[0].peak
    assert copy == pytest.approx(planned[0].parameters, rel=0.01)
