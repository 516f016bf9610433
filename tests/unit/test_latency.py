"""Latency: what is timed and how often, bytes of real caches, the same logits, and what a run leaves of it."""

import json
import sys

import finished_run
import numpy as np
import pytest
import torch
from engine_runs import ledger, read_json, rows
from test_generate import VARIANTS

from engine import latency
from engine.config import resolve
from engine.data.prepare import prepare
from engine.errors import ConfigError

VOCABULARY = 37
CPU = torch.device("cpu")
FIGURES = {
    "length",
    "prefill_p50_ms",
    "prefill_p95_ms",
    "token_p50_ms",
    "token_p95_ms",
    "cache_bytes",
    "cache_bytes_per_token",
}


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    monkeypatch.setattr(latency, "WARM_UP", 2)
    monkeypatch.setattr(latency, "RUNS", 3)


def test_percentiles_of_the_calls_after_the_warm_up(monkeypatch):
    """By a clock that the n-th call moves by n seconds: 1 and 2 are warm-up, 3, 4 and 5 are timed."""
    clock, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def call():
        calls.append(1)
        clock[0] += len(calls)

    assert latency.timed(call, CPU) == [3000.0, 4000.0, 5000.0] and len(calls) == 5
    assert np.percentile([3000.0, 4000.0, 5000.0], latency.PERCENTILES).tolist() == [4000.0, 4900.0]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_bytes_of_a_cache_are_those_of_its_tensors(name):
    """fp32: 2 C numbers a token and layer, of latent attention 2 L; and the last W queries, if needed."""
    config = finished_run.config(**VARIANTS[name])
    m, model = config.model, finished_run.drawn(config, VOCABULARY)
    wide = 2 * m.latent_width if m.attention_form == "latent" else 2 * m.width
    queries = m.latent_width * (1 if m.latent_query == "shared" else m.heads) if m.reciprocal_alpha else 0

    def expected(length: int) -> int:
        return 4 * m.layers * (length * wide + min(length, m.reciprocal_window) * queries)

    for one in latency.measure(model, config, [5, 12], CPU)["lengths"]:
        assert one["cache_bytes"] == expected(one["length"])
        assert one["cache_bytes_per_token"] == expected(one["length"]) - expected(one["length"] - 1)
    assert set(one) == FIGURES and all(value > 0 for value in one.values())


def test_what_is_timed_gives_the_logits_of_the_last_token(monkeypatch):
    """Both ways, however often: each call of the second finds the cache as the first did."""
    config = finished_run.config()
    model, seen = finished_run.drawn(config, VOCABULARY), []
    logits = type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda self, hidden: seen.append(logits(self, hidden)))
    latency.measure(model, config, [7], CPU)
    assert len(seen) == 2 * 5
    for one in seen:
        torch.testing.assert_close(one, seen[0], rtol=1e-4, atol=1e-5)
    assert seen[0].shape == (1, VOCABULARY)


def test_a_run_leaves_its_latency_with_its_figures(lab):
    run = lab.train(latency_lengths=[16, 8], attention_form="latent", latent_width=8, precision="bf16")
    found, metrics = read_json(run / latency.FILE), read_json(run / "metrics.json")
    assert [one["length"] for one in found["lengths"]] == [16, 8] and (found["warm_up"], found["runs"]) == (
        2,
        3,
    )
    assert found["config_sha256"] == metrics["config_sha256"] and found["attention_kernels"] == ["flash"]
    for name, value in found["lengths"][0].items():  # of the longest
        assert metrics[f"latency_{name}"] == value
    assert metrics["latency_cache_bytes_per_token"] == 2 * 2 * (2 * 8)  # layers, bytes of bf16, numbers
    assert metrics["latency_seconds"] == found["seconds"] > 0
    line = ledger(run)["latency_lengths"]
    assert line["agrees"] and line["in_effect"] == "16, 8"
    plain = lab.train(attention_form="latent", latent_width=8, precision="bf16")
    assert not (plain / latency.FILE).exists() and not any(
        "latency" in key for key in read_json(plain / "metrics.json")
    )


def test_measuring_does_not_change_a_run(lab):
    one = lab.train(run="a", dropout=0.1)
    other = lab.train(run="b", dropout=0.1, latency_lengths=[4])
    assert [r["train_loss"] for r in rows(one / "steps.csv")] == [
        r["train_loss"] for r in rows(other / "steps.csv")
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_lengths": [1, 8]}, "latency_lengths = [1, 8]: each must be from 2 to context = 128"),
        ({"latency_lengths": [129]}, "latency_lengths = [129]: each must be from 2 to context = 128"),
        ({"latency_lengths": [8, 8]}, "latency_lengths = [8, 8]: names a length twice"),
    ],
)
def test_lengths_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match="1 problem") as raised:
        resolve(changes, "test")
    assert raised.value.problems == [message]


def test_the_command_prints_what_it_measured(lab, monkeypatch, capsys):
    prepare(lab.config().data, lab.config().tokens_directory)
    vocabulary = json.loads((lab.config().tokens_directory / "meta.json").read_text())["vocabulary_size"]
    finished_run.write(lab.directory / "done", vocabulary, dataset="text", data_dir="text")
    monkeypatch.setattr(sys, "argv", ["latency", "done", "--lengths", "4, 12", "--device", "cpu"])
    latency.main()
    found = json.loads(capsys.readouterr().out)
    assert [one["length"] for one in found["lengths"]] == [4, 12]
    for given, message in (
        ("4,13", "--lengths = [4, 13]: each must be from 2 to context = 12"),
        ("4,4", "--lengths = [4, 4]: names a length twice"),
        ("4,x", "--lengths: '4,x' must be whole numbers with commas between them, as 512,1024"),
    ):
        monkeypatch.setattr(sys, "argv", ["latency", "done", "--lengths", given, "--device", "cpu"])
        with pytest.raises(SystemExit, match="2"):
            latency.main()
        assert message in capsys.readouterr().err


def test_a_model_that_cannot_answer_costs_no_training(lab, monkeypatch):
    """The measurement is the last thing of a run: what is known is kept, and the ledger says what is not."""

    def refuses(*_):
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(latency, "measure", refuses)
    run = lab.train(latency_lengths=[8])
    assert read_json(run / "metrics.json")["status"] == "complete" and not (run / latency.FILE).exists()
    line = ledger(run)["latency_lengths"]
    assert (line["in_effect"], line["how"], line["agrees"]) == ("not measured", "no room", False)
