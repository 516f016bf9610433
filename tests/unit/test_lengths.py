"""Progressive sequence length: lengths by hand, the same samples and tokens, a ledger that tells when it is off."""

import pytest
import torch
from engine_runs import assert_same_weights, column, ledger, read_json, weights

from engine import checkpoint, lengths, parallel, trainer
from engine.build import build_model
from engine.config import Training, resolve
from engine.data.prepare import open_tokens
from engine.errors import ConfigError
from engine.lengths import cut, of_step, stages, steps_at
from engine.probes import training_flops
from engine.tasks import next_token

GROWING = {"first_length": 4, "lengthening_steps": 3}  # of a context of 16: 4, 8, 16


def test_lengths_double_in_equal_parts():
    settings = Training(first_length=16, lengthening_steps=10, steps=20)
    assert stages(settings, 128) == [(0, 16), (3, 32), (6, 64), (10, 128)]
    assert [of_step(settings, 128, step) for step in (0, 2, 3, 5, 6, 9, 10, 19)] == [
        *(16, 16, 32, 32, 64, 64),
        *(128, 128),
    ]
    assert steps_at(settings, 128, 20) == {16: 3, 32: 3, 64: 4, 128: 10}
    assert steps_at(settings, 128, 4) == {16: 3, 32: 1, 64: 0, 128: 0}  # a run that was stopped
    assert stages(Training(), 128) == [(0, 128)] and steps_at(Training(), 128, 7) == {128: 7}


def test_a_sample_is_cut_into_its_own_consecutive_parts():
    samples = torch.arange(12).view(2, 6)
    assert cut(samples, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_length": 5, "lengthening_steps": 3}, "first_length = 5: must double to context = 128"),
        ({"first_length": 128, "lengthening_steps": 3}, "first_length = 128: must double to context = 128"),
        (
            {"first_length": 32},
            "lengthening_steps = 0: must be from 2, so that each shorter length has a step",
        ),
        ({"first_length": 32, "lengthening_steps": 101}, "must be from 2.* to steps = 100"),
        ({"lengthening_steps": 5}, "lengthening_steps = 5: would do nothing with first_length = 0"),
        (
            {"first_length": 1, "lengthening_steps": 50, "context": 256, "compile": "blocks"},
            "first_length = 1: 9 lengths are more shapes than the 8 that torch.compile makes graphs for",
        ),
    ],
)
def test_lengths_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(changes, "test")


def test_a_run_has_the_same_samples_and_tokens_as_without(lab):
    plain, growing = lab.train(run="plain"), lab.train(run="growing", **GROWING)
    one, other = (read_json(run / "metrics.json") for run in (plain, growing))
    for key in ("data_order_sha256", "tokens", "samples", "evaluation_sha256", "steps"):
        assert one[key] == other[key], key
    assert column(plain, "tokens_seen") == column(growing, "tokens_seen")
    line = ledger(growing)["first_length"]
    assert line["agrees"] and line["in_effect"] == "4 from step 0, 8 from step 1, 16 from step 3"
    assert line["requested"] == line["in_effect"]
    assert "first_length" not in ledger(plain)
    assert all(entry["agrees"] for entry in ledger(growing).values())
    assert column(plain, "train_loss")[0] != column(growing, "train_loss")[0]  # tokens see less far


def test_flops_count_the_lengths_that_were_trained_on(lab):
    metrics = read_json(lab.train(**GROWING) / "metrics.json")
    model, step_tokens = lab.config().model, metrics["tokens"] // 6
    n = metrics["parameters"]
    by_hand = 6 * n * metrics["tokens"] + 12 * 2 * 32 * step_tokens * (1 * 4 + 2 * 8 + 3 * 16)
    assert metrics["flops"] == by_hand < training_flops(n, model, metrics["tokens"])


def test_a_schedule_that_is_constant_in_effect_changes_nothing(lab, monkeypatch):
    """With every sequence whole the cutting itself must leave each bit as it is."""
    plain = lab.train(run="plain", activation_norm_layers=[0])
    monkeypatch.setattr(lengths, "stages", lambda settings, context: [(0, context)])
    cut_whole = lab.train(run="whole", activation_norm_layers=[0], **GROWING)
    for name in ("train_loss", "grad_norm", "activation_norm_0"):
        assert column(plain, name) == column(cut_whole, name)
    assert_same_weights(weights(plain), weights(cut_whole))


def test_accumulation_changes_only_rounding(lab):
    whole = lab.train(run="whole", **GROWING)
    parts = lab.train(run="parts", micro_batch_size=1, **GROWING)
    assert column(whole, "train_loss") == pytest.approx(column(parts, "train_loss"), rel=1e-5)
    assert column(whole, "grad_norm") == pytest.approx(column(parts, "grad_norm"), rel=1e-4)
    assert ledger(parts)["first_length"]["agrees"]


def test_the_first_loss_is_that_of_the_samples_cut_by_hand(lab):
    run = lab.train(**GROWING)
    config = lab.config(**GROWING)
    data = open_tokens(config.tokens_directory)
    inputs, targets = next_token.train_order(data, config).batch(
        next_token.train_order(data, config).sample_ids(0)
    )
    model = build_model(config, 256, parallel.start(config.parallel, "cpu"))
    with torch.no_grad():
        loss, _ = model(*(torch.from_numpy(a.reshape(16, 4)) for a in (inputs, targets)))
    assert column(run, "train_loss")[0] == pytest.approx(loss.item() / 64, rel=1e-6)


def test_a_schedule_that_is_off_in_silence_is_told(lab, monkeypatch):
    monkeypatch.setattr(trainer.lengths, "cut", lambda tensor, length: tensor)
    lines = ledger(lab.train(**GROWING))
    assert [line["what"] for line in lines.values() if not line["agrees"]] == ["first_length"]
    assert lines["first_length"]["in_effect"] == "16 from step 0"


def test_a_resumed_run_goes_on_at_the_length_it_would_have_had(lab, monkeypatch):
    whole = lab.train(run="whole", **GROWING)
    save = checkpoint.Checkpoints.save

    def stop(self, step, *others):
        save(self, step, *others)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        lab.train(run="parted", checkpoint_interval=2, **GROWING)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    parted = lab.train(run="parted", checkpoint_interval=2, **GROWING)
    assert_same_weights(weights(whole), weights(parted))
    line = ledger(parted)["first_length"]
    assert line["agrees"] and line["in_effect"] == "8 from step 2, 16 from step 3"


@pytest.mark.slow
def test_compiled_it_makes_one_graph_a_length(lab):
    """As a process of its own, whose counters are its own. Two compiled functions (features, the loss): 2 × 3."""
    run = lab.launch(compile="model", **GROWING)
    line = ledger(run)["first_length"]
    assert line["agrees"] and "3 lengths so far" in line["how"] and "6 graphs, 4 recompiles" in line["how"]
    assert all(entry["agrees"] for entry in ledger(run).values())
    eager = lab.launch(run="eager", **GROWING)
    assert column(run, "train_loss") == pytest.approx(column(eager, "train_loss"), rel=1e-4)
