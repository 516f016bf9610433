"""Pruning in a run: exact counts from the saved weights, sparsity over time, resuming, memory, the ledger."""

import json

import pytest
import torch
from engine_runs import assert_same_weights, events, ledger, read_json, rows, untimed, weights

from engine import checkpoint, plan
from engine.config import Pruning
from engine.guards import Diverged
from engine.pruning import rules
from engine.pruning.masks import Pruner
from engine.step import Step

RUN = {"steps": 8, "pruning_interval": 2, "pruning_hold": 2, "eval_interval": 3}
WAYS = {
    "magnitude": {"pruning": "magnitude"},
    "movement": {"pruning": "movement"},
    "movement_original": {"pruning": "movement_original", "pruning_threshold": "layer"},
    "state": {"pruning": "state", "optimizer": "adamwprune"},
    "layer_ramp": {"pruning": "state", "pruning_score": "bitter4", "pruning_threshold": "layer_ramp"},
    "2:4": {"pruning": "magnitude", "pruning_pattern": "2:4", "pruning_ramp": "cubic_early"},
    "regrowth": {"pruning": "state", "pruning_score": "bitter5", "pruning_regrowth": True},
    "averaged": {"pruning": "magnitude", "average_decay": 0.5},
    "accumulated": {"pruning": "magnitude", "micro_batch_size": 1, "on_divergence": "skip"},
    "muon": {"pruning": "magnitude", "optimizer": "muon"},
    "sgd": {"pruning": "movement", "optimizer": "sgd", "precision": "fp16"},
    "untied": {"pruning": "magnitude", "tie_embeddings": False, "pruning_exclude": "head"},
    "fused": {
        "pruning": "state",
        "precision": "bf16",
        "loss_kernel": "fused",
        "gradient_sums": "fused",
        "micro_batch_size": 2,
    },
    "checkpointed": {"pruning": "state", "activation_checkpointing": "full"},
    "classifier": {
        "pruning": "movement_original",
        "model": "classifier",
        "dataset": "synthetic",
        "data_dir": "",
        "tokenizer": "frequent_words",
        "vocab_size": 500,
        "validation_rows": 45,
    },
    "latent": {"pruning": "magnitude", "attention_form": "latent", "latent_width": 16},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_with_exactly_as_many_zeros_as_it_should(lab, way):
    run = lab.train(**{**RUN, **WAYS[way]})
    lines = ledger(run)
    assert [line for line in lines.values() if not line["agrees"]] == []
    metrics, kept = read_json(run / "metrics.json"), weights(run)
    layers = metrics["sparsity_layers"]
    for layer in layers:  # from the saved weights
        assert (kept[layer["name"]] == 0).sum().item() == layer["zeros"], layer["name"]
    zeros, total = (sum(layer[key] for layer in layers) for key in ("zeros", "weights"))
    assert metrics["sparsity"] == zeros / total == metrics["sparsity_target"]
    if way != "layer_ramp":
        assert zeros == total // 2
    if way == "layer_ramp":
        assert [layer["target"] for layer in layers] == [layer["zeros"] for layer in layers]
        shares = [layer["zeros"] / layer["weights"] for layer in layers]
        assert shares == sorted(shares) and shares[0] == pytest.approx(0.35, abs=1e-3)
        assert shares[-1] == pytest.approx(0.65, abs=1e-3) and metrics["sparsity"] > 0.5
    if way == "2:4":
        for layer in layers:
            assert ((kept[layer["name"]].view(-1, 4) == 0).sum(1) == 2).all(), layer["name"]
        assert "a mask only: products stay dense" in lines["pruning"]["how"]
    if way == "latent":
        assert not any("map" in layer["name"] for layer in layers) and len(layers) == 11
    final = float(rows(run / "evals.csv")[-1]["val_loss"])
    assert metrics["best_val_loss_at_target"] == min(
        final, *(float(r["val_loss"]) for r in rows(run / "evals.csv") if int(r["step"]) >= 5)
    )


def test_sparsity_over_time_is_the_ramp_of_the_settings(lab):
    """Of 32,768 weights: ranked after 2, 4 and 6 updates to 1/6, 1/3 and 1/2; evaluated after 3, 6 and 8."""
    run = lab.train(**RUN, **WAYS["magnitude"])
    found = [(int(r["step"]), int(r["zeros"])) for r in rows(run / "sparsity.csv")]
    assert found == [(1, 5461), (2, 5461), (3, 10922), (5, 16384), (7, 16384)]
    assert all(r["target"] == r["sparsity"] for r in rows(run / "sparsity.csv"))
    metrics = read_json(run / "metrics.json")
    assert metrics["pruning"]["formula"] == "|w|" and metrics["pruning"]["threshold_error"] == 0
    assert metrics["sparsity_of_all_parameters"] == 16384 / metrics["parameters"]
    assert metrics["pruning_held_bytes"] == 32768
    plain = lab.train(run="plain", steps=2)
    assert not (plain / "sparsity.csv").exists() and "pruning" not in ledger(plain)
    assert "sparsity" not in read_json(plain / "metrics.json")


def test_best_counts_only_at_the_target(lab):
    """Of evaluations after 2, 4 and 5 updates the last alone is at the target: there is no hold."""
    run = lab.train(steps=5, pruning="magnitude", sparsity=0.95, pruning_interval=2, eval_interval=2, lr=1e-4)
    metrics, losses = read_json(run / "metrics.json"), [float(r["val_loss"]) for r in rows(run / "evals.csv")]
    assert (
        metrics["best_val_loss"] == min(losses) == losses[0] < losses[2] == metrics["best_val_loss_at_target"]
    )


def test_a_sampled_threshold_reports_its_error(lab):
    run = lab.train(**RUN, pruning="magnitude", pruning_sample=0.5)
    assert ledger(run)["pruning"]["agrees"]
    metrics = read_json(run / "metrics.json")
    errors = [abs(float(r["sparsity"]) - float(r["target"])) for r in rows(run / "sparsity.csv")]
    assert 0 < metrics["pruning"]["threshold_error"] == max(errors) < 0.01
    assert metrics["best_val_loss_at_target"] is not None


def test_movement_takes_every_step_into_account_with_clipped_gradients(lab, monkeypatch):
    """The first update's scores are -w g of the weights before it, of a gradient whose norm is clip_norm."""
    seen, before = [], Pruner.before_update

    def noting(self, *arguments):
        weights = [w.clone() for w in self._weights]
        before(self, *arguments)
        gradients = [t.own(t.parameter.grad).clone() for t in self.tensors]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        whole = torch.cat([p.grad.flatten() for p in parameters])
        seen.append((weights, gradients, whole.norm().item(), [s.clone() for s in self._kept]))

    monkeypatch.setattr(Pruner, "before_update", noting)
    lab.train(**RUN, pruning="movement", clip_norm=0.01)
    assert len(seen) == 8
    weights, gradients, norm, scores = seen[0]
    assert norm == pytest.approx(0.01, rel=1e-3)
    for w, g, s in zip(weights, gradients, scores, strict=True):
        torch.testing.assert_close(s, -w * g)


def test_what_comes_back_is_zero_for_a_step_but_the_threshold_is_exact(lab):
    run = lab.train(**RUN, **WAYS["regrowth"])
    found = [(int(r["zeros"]), int(r["masked"])) for r in rows(run / "sparsity.csv")]
    assert [masked for _, masked in found] == [5461, 5461, 10922, 16384, 16384]
    assert any(zeros > masked for zeros, masked in found) and found[-1] == (16384, 16384)
    assert read_json(run / "metrics.json")["pruning"]["threshold_error"] == 0


def test_masks_only_grow(lab, monkeypatch):
    seen, after = [], Pruner.after_update

    def noting(self, step):
        due = after(self, step)
        seen.append([m.clone() for m in self.masks])
        return due

    monkeypatch.setattr(Pruner, "after_update", noting)
    lab.train(**RUN, pruning="state", pruning_score="bitter5")
    for before, later in zip(seen, seen[1:], strict=False):
        assert not any((b < m).any() for b, m in zip(before, later, strict=True))
    assert sum((~m).sum() for m in seen[-1]) == 16384


def test_the_optimizer_keeps_nothing_of_what_is_pruned(lab, monkeypatch):
    seen, after = {}, Pruner.after_update

    def noting(self, step):
        due = after(self, step)
        for t, mask in zip(self.tensors, self.masks, strict=True):
            state = self.optimizer.state[t.parameter]
            seen[t.name] = all((state[key][~mask] == 0).all() for key in ("exp_avg", "exp_avg_sq"))
        return due

    monkeypatch.setattr(Pruner, "after_update", noting)
    lab.train(**RUN, **WAYS["state"])
    assert len(seen) == 9 and all(seen.values())


@pytest.mark.parametrize("way", ["movement", "movement_original", "state", "averaged"])
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(lab, monkeypatch, way):
    settings = {**RUN, **WAYS[way], "checkpoint_interval": 1}
    whole = lab.train(run="whole", **settings)
    save = checkpoint.Checkpoints.save

    def stop(self, step, *others):
        save(self, step, *others)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        lab.train(run="parted", **settings)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    parted = lab.train(run="parted", **settings)
    assert events(parted) == [{"event": "resumed", "step": 5}]
    assert_same_weights(weights(whole), weights(parted))
    assert rows(whole / "sparsity.csv") == rows(parted / "sparsity.csv")
    assert untimed(whole / "steps.csv") == untimed(parted / "steps.csv")
    assert ledger(parted)["pruning"]["agrees"]


def test_a_run_without_pruning_is_untouched_by_a_later_start(lab):
    """Before the first ranking a run has the losses of one that is not pruned."""
    plain = lab.train(run="plain")
    late = lab.train(run="late", pruning="magnitude", pruning_start=5, pruning_interval=1)
    assert untimed(plain / "steps.csv") == untimed(late / "steps.csv")
    assert read_json(late / "metrics.json")["sparsity"] == 0.5


def test_the_gradient_norm_is_of_what_is_left(lab, monkeypatch):
    norms = []
    for masked in (False, True):
        with monkeypatch.context() as patch:
            if not masked:
                patch.setattr(Pruner, "mask_gradients", lambda self: None)
            run = lab.train(**RUN, pruning="magnitude")
        norms.append([float(r["grad_norm"]) for r in rows(run / "steps.csv")])
    assert norms[0][:2] == norms[1][:2] and norms[0][2] > norms[1][2]


def test_a_run_that_diverges_leaves_rows_until_then(lab):
    with pytest.raises(Diverged):
        lab.train(**{**RUN, "steps": 30}, pruning="magnitude", lr=5.0, divergence_rise=0.5, log_interval=1)
    run = lab.config().directory
    metrics, found = read_json(run / "metrics.json"), rows(run / "sparsity.csv")
    assert metrics["status"] == "diverged" and found
    assert int(found[-1]["step"]) <= metrics["step"] < 28 and "sparsity" not in metrics


def test_masks_are_in_the_measured_and_in_the_planned_memory(lab):
    for way, bytes_a_weight in (("magnitude", 1), ("movement", 5)):
        changes = {**RUN, "batch_size": 1, **WAYS[way]}
        metrics = read_json(lab.train(run=way, **changes) / "metrics.json")
        planned = plan.estimate(lab.config(**changes), 256, "cpu", 1)
        assert planned.peak / 2**30 == pytest.approx(metrics["peak_memory_gib"], rel=0.01)
        without = plan.estimate(lab.config(batch_size=1, steps=8), 256, "cpu", 1)
        assert metrics["pruning_held_bytes"] == bytes_a_weight * 32768
        more = planned.peak - without.peak
        assert ("optimizer", "pruning masks", bytes_a_weight * 32768) in planned.parts
        shard = plan.estimate(
            lab.config(**{**changes, "batch_size": 2, "data_parallel": "fsdp"}), 256, "cpu", 2
        )
        assert ("optimizer", "pruning masks", bytes_a_weight * 32768 // 2) in shard.parts
        assert more == pytest.approx(bytes_a_weight * 32768, abs=100)  # and 8 bytes a tensor


# --- the ledger


BROKEN = {
    "never": ("after_update", lambda self, step: False),
    "ranked, never applied": ("_mask_all", lambda self: None),
    "not ranked": ("_rank", lambda self, updates: setattr(self, "ranked", updates)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_pruning_that_is_off_in_silence_is_told(lab, monkeypatch, name):
    monkeypatch.setattr(Pruner, *BROKEN[name])
    lines = ledger(lab.train(**RUN, **WAYS["state"]))
    assert [what for what, line in lines.items() if not line["agrees"]] == ["pruning"]
    assert lines["pruning"]["requested"] == "state, bitter3 version 1, to 0.5"
    assert lines["pruning"]["in_effect"].startswith("state, 0.0")


def test_weights_that_came_back_in_the_last_step_are_told(lab, monkeypatch):
    monkeypatch.setattr(rules, "checks", lambda _: [])  # which refuse it
    line = ledger(lab.train(**{**RUN, "pruning_hold": 0}, **WAYS["regrowth"]))["pruning"]
    assert not line["agrees"] and "masks say 16384, of which 0 are not zero" in line["how"]
    assert "zeros are not masked, where 0 came back" in line["how"] and " 0 zeros are" not in line["how"]
    assert not line["in_effect"].endswith("0.5000 of its weights zero")


def test_masks_that_are_left_out_between_rankings_are_told(lab, monkeypatch):
    """Masked moments keep the weights at zero all the same, so only the count shows it."""
    after = Pruner.after_update

    def only_when_due(self, step):
        return self.ramp.is_due(step + 1) and after(self, step)

    monkeypatch.setattr(Pruner, "after_update", only_when_due)
    line = ledger(lab.train(**RUN, **WAYS["state"]))["pruning"]
    assert not line["agrees"] and "applied in 3 of 7 steps" in line["how"]
    assert line["in_effect"] == "state, 0.5000 of its weights zero"


def test_a_run_without_masks_is_told(lab, monkeypatch):
    from engine import trainer

    def none(model, optimizer, settings, **how):
        return Pruner(model, optimizer, Pruning(), **how)

    monkeypatch.setattr(trainer, "Pruner", none)
    line = ledger(lab.train(**RUN, **WAYS["magnitude"]))["pruning"]
    assert not line["agrees"] and line["in_effect"] == "none"


def test_weights_that_come_back_after_the_masks_are_told(lab, monkeypatch):
    call = Step._update

    def leaking(self, *arguments):
        refused = call(self, *arguments)
        if self.number == 7:
            with torch.no_grad():
                self.pruner._weights[0].add_(1e-3)
        return refused

    monkeypatch.setattr(Step, "_update", leaking)
    line = ledger(lab.train(**RUN, **WAYS["magnitude"]))["pruning"]
    assert not line["agrees"] and "of which 0 are not zero" not in line["how"]


def test_metrics_json_is_valid_json_with_every_layer(lab):
    run = lab.train(**RUN, **WAYS["state"])
    text = (run / "metrics.json").read_text(encoding="utf-8")
    layers = json.loads(text, parse_constant=pytest.fail)["sparsity_layers"]
    assert (
        sum(layer["weights"] for layer in layers) == 32768 and len({layer["name"] for layer in layers}) == 9
    )
