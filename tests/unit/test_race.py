"""The race to a validation loss: its arithmetic by hand, one recipe in two places, and nanoGPT's own values."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_benchmarks import NANOGPT, cells, row
from test_studies import composed

from benchmarks.data import make_tokens
from benchmarks.peers import nanogpt_char
from benchmarks.race import evaluations, outcome
from benchmarks.recipes import best, engine_settings
from benchmarks.rows import complete
from benchmarks.sizes import SIZES, peers
from benchmarks.speed import chosen_size, parse
from benchmarks.table import tables
from benchmarks.task import Missing, Task
from engine.config import resolve
from engine.errors import ConfigError
from stages.plan import resolve_study

CHAR, SMOKE = SIZES["char"], SIZES["char_smoke"]
CONFIG = """
eval_interval = 250
n_layer, n_head, n_embd, dropout = 6, 6, 384, 0.2
batch_size, block_size = 64, 256
learning_rate, min_lr, max_iters, lr_decay_iters = 1e-3, 1e-4, 5000, 5000
beta2 = 0.99
warmup_iters = 100
"""


def test_seconds_to_an_evaluation_with_and_without_compiling():
    """Steps of 2 s, the first of 60 s and one of 3 s, which is slow but compiled nothing."""
    found = evaluations([(2, 1.6), (4, 1.4)], [60.0, 2.0, 3.0, 2.0])
    assert found == [
        {"steps": 2, "val_loss": 1.6, "train_seconds": 4.5, "train_seconds_compiling": 62.0},
        {"steps": 4, "val_loss": 1.4, "train_seconds": 9.5, "train_seconds_compiling": 67.0},
    ]  # the median of the four is 2.5 s


def test_the_first_evaluation_at_the_target_and_the_best():
    losses = [1.6, 1.47, 1.44, 1.5]
    evals = evaluations([(i + 1, loss) for i, loss in enumerate(losses)], [1.0] * 4)
    found = outcome(evals, 1.4731)
    assert (found["steps_to_target"], found["seconds_to_target"]) == (2, 2.0)
    assert (found["best_val_loss"], found["best_val_loss_steps"], found["last_val_loss"]) == (1.44, 3, 1.5)
    never = outcome(evals, 1.43)
    assert never["seconds_to_target"] is None and never["steps_to_target"] is None


def test_a_row_of_a_race_counts_the_peers_own_tokens():
    evals = evaluations([(2, 1.5), (3, 1.47)], [1.0, 0.5, 0.5])
    measured = {"status": "ok", "step_seconds": [0.5], "loss_first": 4.2, "loss_last": 1.5, "evals": evals}
    found = complete(measured | {"step_tokens": 1000}, CHAR, 66, "unknown")
    assert found["tokens_per_second"] == 2000 and found["seconds_to_target"] == 2.0


def test_the_table_of_a_race():
    def racer(peer, turn, seconds, best_loss):
        evals = {
            "target_loss": 1.4731,
            "best_val_loss": best_loss,
            "steps_to_target": 1000 if seconds else None,
        }
        times = {"seconds_to_target": seconds, "seconds_to_target_compiling": seconds and seconds + 20}
        return row(peer, turn, size="char", **evals, **times)

    rows = [
        racer("engine", 0, 8.0, 1.44),
        racer("engine", 1, 9.0, 1.46),
        racer("nanogpt_char", 0, 20.0, 1.47),
        racer("nanogpt_char", 1, None, 1.48),
    ]
    text = tables(rows)
    engine, nanogpt = cells(text, "engine"), cells(text, "nanogpt_char")
    assert engine[1:8] == ["1.4500", "1.4600", "2 of 2", "1,000", "8.50", "0.40", "28.5"]
    assert nanogpt[1:6] == ["1.4750", "1.4800", "1 of 2", "1,000", "20.00"]
    assert "turns at 1.4731" in text


def test_the_recipe_is_the_studys(tmp_path):
    """One run of conf/study/chargpt_quick.yaml and the race: what decides what is learned is the same."""
    _, configs = resolve_study(composed(tmp_path / "params.yaml", "study=chargpt_quick"))
    data = {"dataset": "tinyshakespeare", "tokenizer": "chars", "validation_percent": 10, "test_percent": 0}
    race = resolve(engine_settings(CHAR, data) | best(CHAR), "race")
    study = configs["quick-1"]
    for section in ("data", "model", "optimizer", "schedule", "training", "guards", "memory", "compile"):
        assert getattr(race, section) == getattr(study, section), section


def test_the_size_is_nanogpts(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / nanogpt_char.CONFIG).write_text(CONFIG, encoding="utf-8")
    values = nanogpt_char.recipe(tmp_path, CHAR)
    assert (values["dropout"], values["beta2"], values["weight_decay"], values["bias"]) == (
        0.2,
        0.99,
        0.1,
        False,
    )
    (tmp_path / nanogpt_char.CONFIG).write_text(CONFIG.replace("384", "512"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has {'n_embd': 512}, and --size char"):
        nanogpt_char.recipe(tmp_path, CHAR)
    with pytest.raises(Missing, match="no config/train_shakespeare_char.py: --nanogpt PATH"):
        nanogpt_char.recipe(None, CHAR)


def test_nanogpts_learning_rate():
    values = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 4, "lr_decay_iters": 14}
    found = [nanogpt_char.lr(step, values) for step in (0, 3, 4, 9, 14, 20)]
    assert found == pytest.approx([0.2, 0.8, 1.0, 0.55, 0.1, 0.1])


def test_a_checkout_races_on_the_same_tokens_and_is_scored_as_the_engine_is(tmp_path):
    """In its place one that learns how common the characters are."""
    checkout = tmp_path / "checkout"
    (checkout / "config").mkdir(parents=True)
    (checkout / "model.py").write_text(
        NANOGPT.replace("flatten())", "flatten(), ignore_index=-1)").replace("[tokens]", "[tokens * 0]"),
        encoding="utf-8",
    )
    (checkout / nanogpt_char.CONFIG).write_text(
        CONFIG.replace("1e-3, 1e-4", "2e-2, 2e-2").replace("= 100", "= 1"), encoding="utf-8"
    )
    size = replace(SMOKE, micro_batch=3)  # so that the last batch of an evaluation is not full
    data, meta = make_tokens(size, tmp_path, None)
    task = Task(
        size, {}, tmp_path / "tokens" / data["study"], meta["dtype"], meta["vocabulary_size"], checkout
    )
    found = nanogpt_char.measure(task)
    assert found["loss_first"] == pytest.approx(math.log(65), abs=1e-5)
    assert [one["steps"] for one in found["evals"]] == [5, 10]
    assert 3 < found["evals"][1]["val_loss"] < found["evals"][0]["val_loss"] < math.log(65)
    assert len(found["step_seconds"]) == SMOKE.steps and found["step_tokens"] == 96
    tokens = np.fromfile(task.tokens / "validation.bin", dtype=meta["dtype"])
    batches = nanogpt_char.validation_of(task)
    assert sum(int((y != -1).sum()) for _, y in batches) == len(tokens) - 1
    assert any((y == -1).any() for _, y in batches)

    class Uniform(torch.nn.Module):
        def forward(self, x, y):
            logits = torch.zeros(*x.shape, 65)
            return logits, torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), y.flatten(), ignore_index=-1
            )

    plain = torch.autocast("cpu", enabled=False)
    assert nanogpt_char.evaluate(Uniform(), batches, size, plain) == pytest.approx(math.log(65))


def test_a_race_has_its_own_peers_and_needs_a_text():
    assert peers(CHAR) == ("engine", "nanogpt_char")
    with pytest.raises(ConfigError, match="--size char: a race needs --data-dir"):
        chosen_size(parse(["--size", "char"]))
