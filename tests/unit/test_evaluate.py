"""Evaluation: every token once, whatever the batches; and a finished run's model scored by itself."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from engine_runs import read_json, rows

from engine import build, evaluate
from engine.build import build_model
from engine.config import resolve
from engine.data.prepare import open_tokens
from engine.errors import ConfigError
from engine.evaluate import final_model
from engine.parallel import Ranks
from engine.tasks import next_token

ONE = Ranks(0, 1, torch.device("cpu"))
TOKENS = np.random.Philox(key=5).random_raw(75) % 61  # four windows of 16 targets, and ten more


def scored(lab, limit: int = 0, **changes) -> tuple[float, int]:
    config = lab.config(**changes)
    scores = next_token.evaluate(build_model(config, 61, ONE), TOKENS, config, ONE, limit)
    return scores["loss"], scores["count"]


def by_hand(lab, windows: list[tuple[int, int, int]]) -> float:
    """The mean loss of targets first … last of the windows that start at `start`, one token after another."""
    model = build_model(lab.config(), 61, ONE)
    losses = []
    for start, first, last in windows:
        logits, _ = model(torch.tensor(TOKENS[None, start:last].astype(np.int64)))
        logs = logits[0].double().log_softmax(-1)
        losses += [
            -logs[position - 1 - start, int(TOKENS[position])].item() for position in range(first, last + 1)
        ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_mean_is_over_every_token_whatever_the_batch(lab, batch):
    loss, count = scored(lab, eval_batch_size=batch)
    assert count == 74
    windows = [(start, start + 1, min(start + 16, 74)) for start in range(0, 74, 16)]
    assert loss == pytest.approx(by_hand(lab, windows), rel=1e-6)


def test_sliding_windows_score_every_token_once_with_more_before_it(lab):
    loss, count = scored(lab, eval_stride=4)
    windows = [(0, 1, 16), *((start, start + 13, min(start + 16, 74)) for start in range(4, 62, 4))]
    assert count == sum(last - first + 1 for _, first, last in windows) == 74
    assert loss == pytest.approx(by_hand(lab, windows), rel=1e-6)


def test_a_limit_takes_the_first_targets(lab):
    loss, count = scored(lab, limit=20)
    assert count == 20 and loss == pytest.approx(by_hand(lab, [(0, 1, 16), (16, 17, 20)]), rel=1e-6)
    assert scored(lab, limit=5000)[1] == 74


def test_evaluating_leaves_training_as_it_was(lab):
    """No dropout in it, no random numbers drawn, and the model is in training mode again."""
    config = lab.config(dropout=0.4)
    model = build_model(config, 61, ONE)
    before = torch.get_rng_state()
    first, second = (next_token.evaluate(model, TOKENS, config, ONE) for _ in range(2))
    assert first == second and model.training and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_figures_by_hand():
    found = next_token.figures({"loss": math.log(8)}, {"bytes_per_token": 1.5}, "val")
    assert found == {
        "val_loss": math.log(8),
        "val_perplexity": pytest.approx(8.0),
        "val_bits_per_byte": pytest.approx(2.0),
    }
    assert (
        next_token.figures({"loss": 1000.0}, {"bytes_per_token": 1.0}, "test")["test_perplexity"] == math.inf
    )  # not capped


# --- the command


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


def test_the_final_model_scores_as_it_did_in_training(lab, monkeypatch):
    run = lab.train(eval_interval=3, activation_checkpointing="full", tie_embeddings=False)
    command(monkeypatch, run, "validation", "out/valid.json")
    found, metrics = read_json(lab.directory / "out/valid.json"), read_json(run / "metrics.json")
    assert found["split"] == "validation"
    assert found["validation_loss"] == float(rows(run / "evals.csv")[-1]["val_loss"]) == metrics["val_loss"]
    assert found["validation_bits_per_byte"] == metrics["val_bits_per_byte"]
    tokens = open_tokens("tokens/by_hand")
    assert found["tokens"] == len(tokens.validation) - 1
    model = final_model(run, lab.config(tie_embeddings=False), 256)
    assert sum(p.numel() for p in model.parameters()) == metrics["parameters"]


def test_the_test_split_is_whole_though_validation_was_cut(lab, monkeypatch):
    run = lab.train(eval_tokens=40)
    command(monkeypatch, run, "test", "test.json")
    found = read_json(lab.directory / "test.json")
    identity = {"status", "study", "run", "seed", "config_sha256"}
    assert {key: found.pop(key) for key in identity} == {
        key: read_json(run / "metrics.json")[key] for key in identity
    }
    assert set(found) == {
        "split",
        "tokens",
        "test_loss",
        "test_perplexity",
        "test_bits_per_byte",
        "evaluation_sha256",
        "evaluation_precision",
    }
    assert read_json(lab.directory / "test.json")["tokens"] == len(open_tokens("tokens/by_hand").test) - 1


def test_a_run_of_several_processes_is_scored_by_one(lab, monkeypatch):
    """Its settings ask for two processes, which is how it was trained and not how it must be scored."""
    run = lab.train()
    text = (run / "config.toml").read_text()
    assert "processes = 0" in text
    (run / "config.toml").write_text(text.replace("processes = 0", "processes = 2"))
    command(monkeypatch, run, "test", "test.json")
    assert read_json(lab.directory / "test.json")["test_loss"] > 0


def test_an_incomplete_run_is_not_scored(lab, monkeypatch, capsys):
    run = lab.train()
    (run / "metrics.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, run, "test", "test.json")
    assert "the run is not complete, so there is no final model" in capsys.readouterr().err
    assert not (lab.directory / "test.json").exists()


# --- what a run needs first


def test_missing_data_ends_with_its_message_and_status(lab):
    (lab.directory / "text/test.txt").unlink()
    done = lab.start("-m", "engine.train", lab.file())
    assert done.returncode == 2 and "test.txt is missing" in done.stderr and "Traceback" not in done.stderr
    assert not (lab.directory / "results").exists() and not (lab.directory / "tokens").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error(lab):
    with pytest.raises(ConfigError, match="device = 'cuda': no GPU is visible to torch"):
        lab.train(device="cuda")
    assert not (lab.directory / "results").exists()


def test_too_little_text_for_one_window_is_an_error(lab):
    with pytest.raises(ConfigError, match=r"the training split has \d+ tokens; context = 99999 needs"):
        lab.train(context=99999, layers=1)


def test_another_number_of_processes_than_asked_for_is_an_error(lab):
    with pytest.raises(
        ConfigError, match="processes = 2, but 1 were launched: use torchrun --nproc-per-node 2"
    ):
        lab.train(processes=2)


def test_the_settings_can_be_listed(lab):
    done = subprocess.run(
        lab.command("-m", "engine.config"), env=lab.environment(), capture_output=True, text=True, check=True
    )
    assert "  lr = 0.001" in done.stdout and "learning rate at its peak; a number > 0" in done.stdout


def test_a_kernel_that_evaluation_cannot_use_is_refused_before_training():
    config = resolve({"precision": "bf16", "attention": "flash", "eval_precision": "fp32"}, "test")
    with pytest.raises(ConfigError, match="attention = 'flash': multiplies in 16 bits only"):
        build.check(config, Ranks(0, 1, torch.device("cuda")))
