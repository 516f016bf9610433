"""A length and a warm-up in epochs: how many steps they are, by hand, and what a run makes of them."""

import dataclasses
import json

import numpy as np
import pytest
from engine_runs import ledger, read_json, rows, untimed

from engine import epochs, trainer
from engine.config import ConfigError, load, resolve
from engine.data.batches import TrainOrder
from engine.data.order import windows
from engine.frontier import settings_of_trial
from stages import checklist, progress
from stages.study import fairness_problems

TEXT = {"splits": {"train": {"tokens": 167}}}  # (167 - 16) // 16 = 9 windows of 16
ROWS = {"splits": {"train": {"rows": 10, "tokens": 999}}}


@pytest.mark.parametrize(
    ("length", "samples", "batch", "steps"),
    [
        (1, 9, 4, 3),
        (2, 9, 4, 5),
        (0.5, 10, 5, 1),
        (0.1, 10, 1, 1),
        (0.3, 10, 1, 3),
        (3, 1000, 16, 188),
        (1e-5, 9, 4, 1),
    ],
)
def test_steps_are_the_fewest_that_have_all_samples(length, samples, batch, steps):
    assert epochs.steps_of(length, samples, batch) == steps


@pytest.mark.parametrize("tokens", [17, 31, 32, 33, 48, 167, 168])
def test_an_epoch_has_the_windows_of_the_order(tokens):
    order = TrainOrder(np.zeros(tokens, dtype=np.uint16), 16, 4, 1)
    assert order.samples_per_epoch == windows(tokens, 16) == max(1, (tokens - 16) // 16)


def test_epochs_become_steps_and_nothing_else_changes():
    asked = resolve({"epochs": 2, "warmup_epochs": 0.5, "context": 16, "batch_size": 4}, "test")
    found = epochs.in_steps(asked, TEXT)
    assert (found.training.steps, found.schedule.warmup_steps) == (5, 2)  # ceil(18 / 4), ceil(4.5 / 4)
    same = resolve({"steps": 5, "warmup_steps": 2, "context": 16, "batch_size": 4}, "test")
    assert found == same and epochs.in_steps(same, TEXT) is same
    assert epochs.in_steps(asked, ROWS).training.steps == 5  # ceil(20 / 4)
    only_warmup = resolve({"steps": 7, "warmup_epochs": 1, "context": 16, "batch_size": 4}, "test")
    assert epochs.in_steps(only_warmup, TEXT) == resolve(
        {"steps": 7, "warmup_steps": 3, "context": 16, "batch_size": 4}, "test"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 2, "steps": 300}, "steps = 300: would do nothing with epochs = 2; it needs epochs = 0"),
        (
            {"warmup_epochs": 1, "warmup_steps": 3},
            "warmup_steps = 3: would do nothing with warmup_epochs = 1; it needs warmup_epochs = 0",
        ),
        ({"epochs": 1, "warmup_epochs": 1.5}, "warmup_epochs = 1.5: must be ≤ epochs = 1"),
        ({"epochs": -1}, "epochs = -1: must be a number ≥ 0"),
        ({"epochs": "two"}, "epochs = 'two': must be a number ≥ 0"),
    ],
)
def test_both_and_what_cannot_be_are_refused(values, message):
    with pytest.raises(ConfigError) as error:
        resolve(values, "test")
    assert error.value.problems == [message]


def test_rules_about_steps_wait_for_the_tokens():
    """None may be told of the default that stands where the steps will be."""
    values = {"epochs": 2, "warmup_steps": 300, "context": 16, "batch_size": 4}
    with pytest.raises(ConfigError, match="warmup_steps = 300: must be ≤ steps = 5") as error:
        epochs.in_steps(resolve(values, "test"), TEXT)
    assert error.value.where == "epochs = 2, which is steps = 5 (9 samples an epoch, batch_size = 4)"
    with pytest.raises(
        ConfigError, match="the training split has no sample of context = 16 tokens; set a smaller"
    ):
        epochs.in_steps(resolve(values, "test"), {"splits": {"train": {"tokens": 16}}})


def test_a_run_in_epochs_is_the_run_in_as_many_steps(lab, capsys):
    asked = {"epochs": 0.02, "warmup_epochs": 0.01, "batch_size": 16, "steps": 100}
    run = lab.train(run="epochs", **asked)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"length"' in line]
    samples = read_json(run / "metrics.json")["samples_per_epoch"]
    steps, warmup = -(-samples * 2 // (100 * 16)), -(-samples // (100 * 16))
    assert steps > warmup >= 1
    assert [(line["steps"], line["warmup_steps"], line["samples_per_epoch"]) for line in said] == [
        (steps, warmup, samples)
    ]
    assert said[0]["epochs"] == round(steps * 16 / samples, 3)
    twin = lab.train(run="steps", steps=steps, warmup_steps=warmup, batch_size=16)
    assert untimed(run / "steps.csv") == untimed(twin / "steps.csv") and len(rows(run / "steps.csv")) == steps
    kept = load(run / "config.toml")
    assert (kept.training.steps, kept.training.epochs, kept.schedule.warmup_steps) == (steps, 0.0, warmup)
    lines = ledger(run)
    assert lines["epochs"]["requested"] == "0.02 epochs" and lines["epochs"]["agrees"]
    assert lines["epochs"]["in_effect"] == f"{steps} steps, {steps * 16 / samples:.4g} epochs"
    assert lines["warmup_epochs"]["in_effect"] == f"{warmup} steps, {warmup * 16 / samples:.4g} epochs"
    assert "epochs" not in ledger(twin) and "warmup_epochs" not in ledger(twin)


def test_a_length_that_was_not_that_of_its_epochs_is_told(lab, monkeypatch):
    right = epochs.in_steps

    def shorter(config, meta):
        found = right(config, meta)
        return dataclasses.replace(found, training=dataclasses.replace(found.training, steps=2))

    monkeypatch.setattr(trainer.epochs, "in_steps", shorter)
    lines = ledger(lab.train(epochs=0.02, steps=100))
    assert [what for what, line in lines.items() if not line["agrees"]] == ["epochs"]


def test_an_interrupted_run_in_epochs_resumes(lab, interrupt):
    settings = {"epochs": 0.15, "steps": 100, "checkpoint_interval": 3, "batch_size": 16}
    expected = untimed(lab.train(**settings) / "steps.csv")
    interrupt(5, **settings)
    again = lab.train(**settings)
    assert untimed(again / "steps.csv") == expected
    assert (again / "metrics.json").exists()


def test_a_trial_of_memory_takes_its_own_few_steps():
    config = settings_of_trial(resolve({"epochs": 5, "warmup_epochs": 1}, "test"), 2)
    assert epochs.in_steps(config, TEXT) is config


# --- a study


def problems(axis: str, base: dict, **runs: dict) -> list[str]:
    study = {
        "axis": axis,
        "metric": "val_loss",
        "frozen": [],
        "baseline": "plain",
        "own_budget": [],
        "runs": runs,
    }
    return fairness_problems(study, base)


def test_other_epochs_are_another_budget_where_the_plan_can_tell():
    [problem] = problems("tokens", {"epochs": 2.0}, plain={}, longer={"epochs": 3.0})
    assert problem.startswith(
        "runs.longer: is given 3.0 epochs, the baseline plain 2.0, and the study compares at equal"
    )
    assert "change its epochs, or the axis" in problem
    assert problems("tokens", {"epochs": 2.0}, plain={}, wide={"width": 64}) == []
    # Twice the epochs in twice the batch are as many steps; only the rows tell whether exactly.
    assert problems("steps", {"epochs": 2.0}, plain={}, large={"epochs": 4.0, "batch_size": 32}) == []
    assert problems("tokens", {"epochs": 2.0}, plain={}, short={"epochs": 0.0, "steps": 7}) == []
    assert problems("seconds", {"epochs": 2.0}, plain={}, longer={"epochs": 3.0}) == []


def test_a_study_that_expects_steps_is_not_content_with_epochs():
    [check] = checklist.of_settings({"steps": 100}, resolve({"epochs": 2}, "test"))
    assert not check.passed and str(check).endswith("said in epochs, expected 100")
    assert checklist.of_settings({"epochs": 2.0}, resolve({"epochs": 2}, "test"))[0].passed


def test_how_much_there_is_to_do_is_known_with_the_tokens(lab):
    config = resolve({"study": "later", "epochs": 2, "context": 16, "batch_size": 4}, "test")
    assert progress._tokens(config) == 1
    config.tokens_directory.mkdir(parents=True)
    (config.tokens_directory / "meta.json").write_text(json.dumps(TEXT))
    assert progress._tokens(config) == 5 * 4 * 16
