"""The weights of the best evaluation: which one that is, what is kept of it, and who reads it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_runs import (
    TALKING,
    assert_same_weights,
    ledger,
    read_json,
    rows,
    untimed,
    weights,
    write_dialogues,
)
from fake_results import write_json, write_study
from safetensors.torch import load_file, save_file

from engine import best, chat, evaluate, generate
from engine.best import Best
from engine.config import ConfigError, load, resolve
from engine.evaluations import Evaluations
from engine.frontier import settings_of_trial
from engine.generate import open_run
from engine.guards import Diverged
from engine.parallel import Ranks
from engine.rundir import toml
from engine.tasks import classes, next_token
from metrics import rows as metric_rows

ONE = Ranks(0, 1, torch.device("cpu"))
RUN = {"steps": 8, "eval_interval": 2, "schedule": "constant", "keep_best": True, "dropout": 0.1}
UNPRUNED = SimpleNamespace(pruner=SimpleNamespace(tensors=[]))


@pytest.fixture
def losses(monkeypatch):
    """losses(3.0, 1.0, …): what the run's evaluations find, one after another, whatever the model."""

    def script(*values: float):
        monkeypatch.setattr(Evaluations, "_scores", lambda self, model: {"val_loss": values[self.count]})

    return script


def kept(run) -> dict:
    return load_file(run / best.FILE)


def evaluated(run, monkeypatch, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "validation", "out.json", *arguments])
    evaluate.main()
    return read_json(Path("out.json"))


# --- which one


@pytest.mark.parametrize(
    ("task", "values", "step"),
    [
        (next_token, [3.0, 1.0, 2.0, 1.0], 1),  # the first of equal ones
        (next_token, [float("nan"), 3.0, 2.5, float("inf")], 2),
        (next_token, [float("nan")], None),
        (classes, [0.2, 0.9, 0.9, 0.4], 1),
    ],
)
def test_the_best_is_the_first_of_the_lowest_losses_or_highest_accuracies(tmp_path, task, values, step):
    keeper = Best(resolve({"keep_best": True}, "test"), task, UNPRUNED, ONE)
    model = torch.nn.Linear(2, 1)
    for i, value in enumerate(values):
        torch.nn.init.constant_(model.weight, float(i))
        scores = {"val_loss": value} if task is next_token else {"val_loss": -value, "val_accuracy": value}
        keeper.consider(i, scores, model, tmp_path)
    assert best.step_of(tmp_path) == step
    if step is not None:
        assert kept(tmp_path)["weight"].tolist() == [[step, step]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ([] if step is None else [best.FILE])


def test_of_a_run_that_prunes_only_weights_at_the_target_count(lab, losses):
    """Evaluated after 2, 4, 6 and 8 updates; at the target from 6 on."""
    losses(1.0, 1.5, 2.0, 3.0)
    pruned = {"pruning": "magnitude", "pruning_interval": 2, "pruning_hold": 2}
    run = lab.train(**RUN, **pruned)
    assert best.step_of(run) == 5
    zeros = sum((w == 0).sum().item() for w in kept(run).values())
    assert zeros >= read_json(run / "metrics.json")["sparsity_target"] * 32768
    line = ledger(run)["keep_best"]
    assert line["agrees"] and line["requested"] == "lowest val_loss at the target sparsity"
    assert (
        line["in_effect"] == "val_loss 2.0 at step 5"
        and "of 2 evaluations in evals.csv that count" in line["how"]
    )


# --- what is kept


@pytest.mark.parametrize("more", [{}, {"average_decay": 0.5}], ids=["plain", "averaged"])
def test_they_are_the_weights_of_that_step_and_training_does_not_notice(lab, losses, more):
    losses(3.0, 1.0, 2.0, 1.5)
    run = lab.train(run="kept", **RUN, **more)
    plain = lab.train(run="plain", **{**RUN, "keep_best": False}, **more)
    assert untimed(run / "steps.csv") == untimed(plain / "steps.csv")
    assert_same_weights(weights(run), weights(plain))
    assert not (plain / best.FILE).exists() and "keep_best" not in ledger(plain)
    until_then = lab.train(run="shorter", **{**RUN, "steps": 4, "keep_best": False}, **more)
    assert_same_weights(kept(run), weights(until_then))
    line = ledger(run)["keep_best"]
    assert line["agrees"] and line["in_effect"] == "val_loss 1.0 at step 3"


def test_scored_again_they_have_the_loss_of_that_evaluation(lab, monkeypatch):
    """At a learning rate at which it is worse after four steps than after two."""
    run = lab.train(**{**RUN, "steps": 4, "lr": 0.3, "on_divergence": "off"}, average_decay=0.3)
    found = [float(r["val_loss"]) for r in rows(run / "evals.csv")]
    step = int(min(rows(run / "evals.csv"), key=lambda r: float(r["val_loss"]))["step"])
    assert min(found) < found[-1]
    scores = evaluated(run, monkeypatch, "--weights", "best")
    assert scores["validation_loss"] == pytest.approx(min(found), rel=1e-6)
    assert (scores["weights"], scores["weights_step"]) == ("best", step)
    final = evaluated(run, monkeypatch)
    assert final["validation_loss"] == pytest.approx(found[-1], rel=1e-6) and "weights" not in final


@pytest.mark.parametrize("at", [4, 7])
def test_it_survives_an_interruption(lab, losses, interrupt, at):
    """The best is before the checkpoint after 3 updates, or between it and that after 6."""
    losses(1.0, 3.0, 2.0, 2.5) if at == 4 else losses(3.0, 1.0, 2.0, 2.5)
    settings = {**RUN, "checkpoint_interval": 3}
    whole = lab.train(**settings)
    expected, line = (whole / best.FILE).read_bytes(), ledger(whole)["keep_best"]["in_effect"]
    run = interrupt(at, **settings)
    # Evaluations of this process count from 0 again.
    losses(*([3.0, 2.0, 2.5] if at == 4 else [2.5]))
    assert lab.train(**settings) == run
    assert (run / best.FILE).read_bytes() == expected
    assert ledger(run)["keep_best"]["in_effect"] == line and ledger(run)["keep_best"]["agrees"]


def test_a_run_that_diverges_leaves_none(lab, losses, monkeypatch):
    from engine import step

    right = step.Step.__call__

    def poisoned(self, number, micro_batches):
        if number == 5:
            torch.nn.init.constant_(next(self.model.parameters()), float("nan"))
        return right(self, number, micro_batches)

    losses(2.0, 1.0, 3.0, 4.0)
    monkeypatch.setattr(step.Step, "__call__", poisoned)
    with pytest.raises(Diverged, match="step 5"):
        lab.train(**RUN)
    run = lab.config(**RUN).directory
    assert read_json(run / "metrics.json")["status"] == "diverged" and not (run / best.FILE).exists()


def test_one_that_is_not_kept_is_told(lab, losses, monkeypatch):
    losses(3.0, 1.0, 2.0, 1.5)
    right = Best.consider
    monkeypatch.setattr(Best, "consider", lambda *_: None)
    line = ledger(lab.train(**RUN))["keep_best"]
    assert not line["agrees"] and line["in_effect"] == "no file"
    monkeypatch.setattr(Best, "consider", lambda self, step, *rest: step == 1 and right(self, step, *rest))
    line = ledger(lab.train(**RUN))["keep_best"]
    assert not line["agrees"] and line["in_effect"] == "val_loss 3.0 at step 1"
    assert line["how"].endswith("of 4 evaluations in evals.csv that count the best: val_loss 1.0 at step 3")


# --- who reads it


def test_a_text_is_written_by_the_weights_that_were_asked_for(lab, losses, monkeypatch):
    losses(3.0, 1.0, 2.0, 1.5)
    run = lab.train(**RUN)
    _, _, model = open_run(run, "best")
    assert_same_weights(dict(model.state_dict()), kept(run))
    assert not torch.equal(kept(run)["token_embedding.weight"], weights(run)["token_embedding.weight"])
    (run / best.FILE).write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"best\.safetensors cannot be read"):
        open_run(run, "best")
    (run / best.FILE).unlink()
    with pytest.raises(
        ConfigError, match=r"--weights best: no best\.safetensors; the run kept none: use --weights final"
    ):
        open_run(run, "best")
    open_run(run)


def test_a_study_does_not_take_them_for_the_final_model(tmp_path):
    results = write_study(tmp_path)
    path = results / "test" / "sgd-1.json"
    write_json(path, json.loads(path.read_text()) | {"weights": "best", "weights_step": 3})
    with pytest.raises(metric_rows.ResultsError, match="is of weights 'best', not 'final'"):
        metric_rows.read(results)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"steps": 50, "eval_interval": 50},
            "eval_interval = 50 and steps = 50: there is the last step's alone",
        ),
        (
            {"steps": 100, "eval_interval": 10, "pruning": "magnitude"},
            "of evaluations at the target sparsity, with pruning_hold = 0, there is the last step's alone; set a "
            "smaller eval_interval or a longer pruning_hold, or keep_best = false",
        ),
        (
            {"steps": 100, "eval_interval": 30, "pruning": "magnitude", "pruning_hold": 9},
            "pruning_hold = 9, there is",
        ),
    ],
)
def test_one_evaluation_is_no_choice(values, message):
    with pytest.raises(ConfigError, match=f"keep_best = true: would do nothing with .*{message}"):
        resolve({"keep_best": True, **values}, "test")


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 51, "eval_interval": 50},
        {"steps": 100, "pruning": "magnitude", "pruning_hold": 10, "eval_interval": 30},
    ],
)
def test_two_are(values):
    assert resolve({"keep_best": True, **values}, "test").saving.keep_best


def test_a_trial_of_memory_with_its_one_evaluation_is_a_run(tmp_path):
    config = settings_of_trial(resolve({"keep_best": True}, "test"), 2)
    (tmp_path / "trial.toml").write_text(toml(config), encoding="utf-8")
    assert not load(tmp_path / "trial.toml").saving.keep_best


@pytest.mark.parametrize(("command", "more"), [(generate, ["--prompt", "a"]), (chat, ["--persona", "p.txt"])])
def test_a_command_asks_for_the_weights_that_it_was_told(monkeypatch, command, more):
    asked = []

    def open_run(directory, which):
        asked.append((str(directory), which))
        raise ConfigError("enough")

    monkeypatch.setattr(command, "open_run", open_run)
    for own in ([], ["--weights", "best"]):
        monkeypatch.setattr(sys, "argv", ["command", "run", *more, *own])
        with pytest.raises(SystemExit, match="2"):
            command.main()
    assert asked == [("run", "final"), ("run", "best")]


def test_a_conversation_is_with_the_weights_that_were_asked_for(lab):
    write_dialogues(lab.directory / "dialogues")
    run = lab.train(**TALKING, steps=2, eval_interval=1, keep_best=True)
    path = run / best.FILE
    save_file({name: w + 1 for name, w in kept(run).items()}, path)
    assert_same_weights(dict(chat.open_run(run, "best")[2].state_dict()), kept(run))
    assert_same_weights(dict(chat.open_run(run)[2].state_dict()), weights(run))
    assert ledger(run)["keep_best"]["requested"] == "highest val_accuracy"
