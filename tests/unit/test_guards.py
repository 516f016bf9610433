"""Guards: verdicts by hand, updates that are not applied, and what a run leaves that one of them stopped."""

import json
import math

import pytest
import torch
from engine_runs import NEEDS, column, events, ledger, read_json, rows, untimed
from test_loss_scale import HostReads, held

from engine import guards
from engine.build import build_model, build_optimizer
from engine.config import Guards, resolve
from engine.guards import GATHERED, NORMS, Diverged, Guard
from engine.optimizers import ON_DEVICE_ONLY, OPTIMIZERS
from engine.parallel import Ranks
from engine.step import Step

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
USUAL = [(3.0, 1.0)] * NORMS  # losses and gradient norms of so many steps


def judged(settings: Guards, steps: list[tuple[float, float]], **how) -> tuple[Guard, list[int]]:
    """The guard, and its verdict on each (loss, norm)."""
    guard = Guard(settings, CPU, **how)
    verdicts = [judge(guard, i, *values) for i, values in enumerate(steps)]
    return guard, [int(v) for v in verdicts]


def judge(guard: Guard, step: int, loss: float, norm: float) -> torch.Tensor:
    """As a step does."""
    numbers = torch.tensor([loss, norm]).unbind()
    verdict = guard.judge(*numbers)
    guard.note(step, *numbers, verdict)
    return verdict


def end(guard: Guard) -> tuple[int, str] | None:
    stop = guard.stopped(wait=False)
    assert guard.unlike == 0  # the device's verdicts are the host's
    return stop and (stop.step, stop.reason)


# --- verdicts


@pytest.mark.parametrize("bad", [(NAN, 1.0), (INF, 1.0), (3.0, NAN), (3.0, INF)])
def test_what_is_not_finite_is_not_applied_and_ends_the_run(bad):
    guard, verdicts = judged(Guards(), [(3.0, 1.0), (3.0, 1.0), bad, (2.0, 1.0), bad])
    assert verdicts == [0, 0, 1, 0, 1]  # nothing is kept of what comes after
    assert end(guard) == (2, "the training loss or the gradient norm is not finite") and guard.steps == 3


def test_a_smoothed_loss_that_rises_above_its_minimum_ends_the_run():
    """3, then 0.9 · 3 + 0.1 · 2 = 2.9, which is the minimum; 0.9 · 2.9 + 0.1 · 7.89 = 3.399, and with 7.91 3.401."""
    settings = Guards(divergence_rise=0.5)
    guard, verdicts = judged(settings, [(3.0, 1.0), (2.0, 1.0), (7.89, 1.0)])
    assert verdicts == [0, 0, 0] and end(guard) is None
    guard, verdicts = judged(settings, [(3.0, 1.0), (2.0, 1.0), (7.91, 1.0), (2.0, 1.0)])
    assert verdicts == [0, 0, 0, 0]
    reason = "the smoothed training loss 3.401 is more than divergence_rise = 0.5 above its minimum 2.9"
    assert end(guard) == (2, reason)


def test_a_rise_of_0_lets_any_be():
    guard, verdicts = judged(Guards(divergence_rise=0.0), [(1.0, 1.0)] + [(1000.0, 1.0)] * 50)
    assert not any(verdicts) and end(guard) is None


@pytest.mark.parametrize(("mode", "refused"), [("abort", 0), ("skip", 1)])
def test_a_norm_of_more_than_so_many_medians_is_a_spike(mode, refused):
    settings = Guards(on_divergence=mode, spike_norms=4.0)
    guard, verdicts = judged(settings, [*USUAL, (3.0, 4.0), (3.0, 4.01), (3.0, 1.0)])
    assert verdicts == [0] * NORMS + [0, refused, 0]
    assert end(guard) is None and (guard.spikes, guard.skipped) == (1, refused)


def test_the_median_is_of_the_newest_applied_updates():
    """Norms grow to 3; what was skipped at 100 is not among them, so 13 is a spike of 4 medians and 11 is none."""
    settings = Guards(on_divergence="skip", spike_norms=4.0, max_skipped_steps=99)
    steps = [*USUAL, *[(3.0, 3.0), (3.0, 100.0)] * NORMS, (3.0, 13.0), (3.0, 11.0)]
    assert judged(settings, steps)[1] == [0] * NORMS + [0, 1] * NORMS + [1, 0]


def test_before_there_are_enough_norms_none_is_a_spike_and_0_means_none():
    high = [(3.0, 1e6)]
    for settings, steps, spikes in (
        (Guards(), USUAL[1:] + high, 0),
        (Guards(), USUAL + high, 1),
        (Guards(spike_norms=0.0), USUAL + high, 0),
    ):
        guard, _ = judged(settings, steps)
        assert end(guard) is None and guard.spikes == spikes


def test_skipping_is_capped():
    bad = [(3.0, NAN), (3.0, 1.0)]
    guard, verdicts = judged(Guards(on_divergence="skip", max_skipped_steps=2), bad * 4)
    assert verdicts == [1, 0] * 4
    reason = "3 updates were not finite or a spike, more than max_skipped_steps = 2"
    assert end(guard) == (4, reason)


def test_a_norm_that_is_not_finite_is_the_loss_scales_business_and_a_loss_is_not():
    for mode in ("abort", "skip"):
        guard, verdicts = judged(Guards(on_divergence=mode), [(3.0, INF), (3.0, NAN)], scaled=True)
        assert verdicts == [0, 0] and end(guard) is None and guard.skipped == guard.spikes == 0
        guard, verdicts = judged(Guards(on_divergence=mode), [*USUAL, (3.0, INF), (NAN, 1.0)], scaled=True)
        assert verdicts[-2:] == [0, 1] and (end(guard) is None) == (mode == "skip")
    steps = [*USUAL, *[(3.0, INF)] * NORMS, (3.0, 11.0)]  # such norms do not count for the median
    assert judged(Guards(on_divergence="skip"), steps, scaled=True)[1][-1] == 1


def test_a_checkpoint_brings_all_back(tmp_path):
    settings = Guards(on_divergence="skip", spike_norms=4.0, max_skipped_steps=1)
    guard, _ = judged(settings, [*USUAL, (3.0, 5.0)])
    torch.save(guard.state_dict(), tmp_path / "guard.pt")
    other = Guard(settings, CPU)
    other.load_state_dict(torch.load(tmp_path / "guard.pt", weights_only=True))
    assert other.state_dict() == guard.state_dict()
    assert judge(other, NORMS + 1, 3.0, 5.0) == 1
    assert other.stopped(wait=True).step == NORMS + 1


# --- updates


def test_a_checkpoint_knows_that_the_run_is_over():
    """Killed after it, before the outcome was written: the run that goes on must not count as whole."""
    guard, _ = judged(Guards(), [(math.nan, 1.0)])
    other = Guard(Guards(), torch.device("cpu"))
    other.load_state_dict(guard.state_dict())
    assert end(guard) is not None and end(other) == end(guard)


def step_of(**changes) -> Step:
    settings = {"layers": 1, "heads": 2, "width": 64, "context": 8, "device": "cpu", "steps": 10}
    needed = NEEDS.get(changes.get("optimizer"), {})
    c = resolve({**settings, **needed, **changes}, "test")
    ranks = Ranks(0, 1, CPU)
    model = build_model(c, 64, ranks)
    return Step(
        model,
        build_optimizer(model, c),
        ranks,
        training=c.training,
        schedule=c.schedule,
        lr=c.optimizer.lr,
        guards=c.guards,
    )


def micro_batch(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(64, (4, 8), generator=draw) for _ in range(2))]


def poisoned(step: Step, number: int, value: float) -> dict:
    """Take a step in which one element of one gradient has this value."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[5] = value
        return gradient

    hook = step.parameters[3].register_hook(spoil)
    measured = step(number, micro_batch(9))
    hook.remove()
    return measured


@pytest.mark.parametrize(
    ("name", "offloaded"),
    [(name, on) for name in OPTIMIZERS for on in (False, True) if not (on and name in ON_DEVICE_ONLY)],
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_an_update_that_is_not_finite_leaves_no_trace(name, value, offloaded):
    """Not in the first step either, before which some optimizers have no state."""
    settings = {"optimizer": name, "on_divergence": "skip"}
    settings |= {
        "optimizer_offload": offloaded and name not in NEEDS
    }  # which moments that are pruned by refuse
    spoilt, clean = step_of(**settings), step_of(**settings)
    for number in (0, 1):
        before = [p.detach().clone() for p in spoilt.parameters]
        measured = poisoned(spoilt, number, value)
        assert measured["train_loss"].isfinite() and not measured["grad_norm"].isfinite()
        assert all(torch.equal(p, b) for p, b in zip(spoilt.parameters, before, strict=True))
        for step in (spoilt, clean):
            step(number, micro_batch(number))
        pairs = zip(held(spoilt.model, spoilt.optimizer), held(clean.model, clean.optimizer), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert spoilt.guard.stopped(wait=True) is None and clean.guard.stopped(wait=True) is None
    assert (spoilt.guard.skipped, clean.guard.skipped) == (2, 0)


def test_off_applies_it():
    step = step_of(on_divergence="off")
    poisoned(step, 0, NAN)
    assert not all(p.isfinite().all() for p in step.parameters)


def test_with_fp16_a_loss_that_is_not_finite_is_not_applied_either(monkeypatch):
    step = step_of(precision="fp16", loss_scale=1.0)
    step(0, micro_batch(1))
    before, whole = held(step.model, step.optimizer), step._forward_backward
    monkeypatch.setattr(step, "_forward_backward", lambda *args: whole(*args) * NAN)
    step(1, micro_batch(2))
    assert all(torch.equal(a, b) for a, b in zip(before, held(step.model, step.optimizer), strict=True))
    assert step.guard.stopped(wait=True).step == 1 and step.loss_scale.skipped == 0


def test_many_steps_between_two_looks_are_all_seen():
    steps = [(3.0 - i / 1000, 1.0) for i in range(2 * GATHERED + 5)]
    guard, _ = judged(Guards(), [*steps, (3.0, NAN)])
    assert len(guard._pending) == 6  # the others are in two tensors
    assert end(guard) == (2 * GATHERED + 5, REASON)
    assert guard.steps == 2 * GATHERED + 6


@pytest.mark.parametrize("mode", ["abort", "skip"])
@pytest.mark.parametrize(
    ("name", "reads"), [*((name, 0) for name in OPTIMIZERS if name != "adamw8bit"), ("adamw8bit", 1)]
)
def test_the_host_reads_nothing_in_a_step_unless_the_optimizer_cannot_skip_by_itself(name, reads, mode):
    step = step_of(optimizer=name, on_divergence=mode)
    step(0, micro_batch(0))
    with HostReads() as seen:
        step(1, micro_batch(1))
    assert seen.count == reads


# --- a whole run


@pytest.fixture
def poison(monkeypatch):
    """poison(first, last): in these steps every gradient is NaN."""

    def start(first: int, last: int) -> None:
        clip = Step._clip
        call = Step.__call__

        def noted(self, step, micro_batches):
            self.number = step
            return call(self, step, micro_batches)

        def spoilt(self):
            if first <= self.number <= last:
                for p in self.parameters:
                    p.grad.mul_(NAN)
            return clip(self)

        monkeypatch.setattr(Step, "__call__", noted)
        monkeypatch.setattr(Step, "_clip", spoilt)

    return start


REASON = "the training loss or the gradient norm is not finite"


def test_a_run_that_diverges_leaves_its_rows_and_the_reason_and_no_figures_or_model(lab, poison):
    lab.train(steps=30)  # complete at first, and all of that is gone afterwards
    poison(13, 99)
    settings = {"steps": 30, "eval_interval": 4, "log_interval": 10, "checkpoint_interval": 5}
    with pytest.raises(Diverged, match=f"^at step 13: {REASON}$"):
        lab.train(**settings)
    run = lab.config(**settings).directory
    assert read_json(run / "metrics.json") == {
        "status": "diverged",
        "study": "by_hand",
        "run": "run",
        "seed": 1,
        "config_sha256": read_json(run / "metrics.json")["config_sha256"],
        "step": 13,
        "reason": REASON,
        "skipped_steps": 0,
        "norm_spikes": 0,
    }
    assert [int(step) for step in column(run, "step")] == list(range(14))
    assert math.isnan(column(run, "grad_norm")[13]) and math.isfinite(sum(column(run, "grad_norm")[:13]))
    assert [row["step"] for row in rows(run / "evals.csv")] == ["3", "7", "11"]
    assert events(run) == [{"event": "diverged", "step": 13, "reason": REASON}]
    line = ledger(run)["on_divergence"]
    assert line["agrees"] and "diverged at step 13" in line["how"]
    assert not (run / "model.safetensors").exists()
    assert list((lab.directory / "checkpoints").iterdir()) == []


def test_rows_after_the_end_are_not_kept_wherever_it_is_found_out(lab, poison):
    """Progress lines only at the very end, so that eight more steps were taken in vain."""
    poison(21, 21)
    with pytest.raises(Diverged, match="^at step 21: "):
        lab.train(steps=30, log_interval=100, eval_interval=100)
    assert column(lab.config().directory, "step")[-1] == 21


def test_skipped_updates_are_counted_and_the_run_goes_on(lab, poison):
    poison(3, 5)
    run = lab.train(on_divergence="skip", steps=12)
    metrics = read_json(run / "metrics.json")
    assert (metrics["status"], metrics["skipped_steps"], metrics["norm_spikes"]) == ("complete", 3, 0)
    assert ledger(run)["on_divergence"]["in_effect"] == "12 updates judged, 3 skipped, 0 spikes"
    losses = column(run, "train_loss")
    assert math.isfinite(sum(losses))


def test_fp16s_skipped_steps_are_counted_at_the_same_place(lab):
    run = lab.train(precision="fp16", loss_scale=2.0**40, steps=30)
    skipped = sum(not math.isfinite(n) for n in column(run, "grad_norm"))
    assert read_json(run / "metrics.json")["skipped_steps"] == skipped > 0


def test_a_guard_that_is_left_out_is_told_by_the_ledger(lab, monkeypatch):
    monkeypatch.setattr(Guard, "judge", lambda *_, **__: torch.tensor(0.0))
    monkeypatch.setattr(Guard, "note", lambda *_, **__: None)
    line = ledger(lab.train())["on_divergence"]
    assert line["in_effect"] == "0 updates judged, 0 skipped, 0 spikes" and not line["agrees"]
    assert ledger(lab.train(run="off", on_divergence="off"))["on_divergence"]["agrees"]


def test_a_device_that_judges_otherwise_is_told_by_the_ledger(lab, poison, monkeypatch):
    """The updates of two steps are applied that should not be; then all is NaN, in a third one too."""
    poison(3, 4)
    monkeypatch.setattr(guards, "_is_not_finite", lambda x: torch.zeros_like(x).bool())
    line = ledger(lab.train(on_divergence="skip"))["on_divergence"]
    assert "3 of them others than they should" in line["how"]
    assert not line["agrees"]


def test_an_interrupted_run_skips_the_same_updates(lab, monkeypatch):
    settings = {"on_divergence": "skip", "spike_norms": 1.02, "max_skipped_steps": 99, "steps": 60}
    settings |= {"checkpoint_interval": 20, "lr": 3e-3}

    def outcome(run) -> tuple:
        counts = read_json(run / "metrics.json")["skipped_steps"]
        return counts, untimed(run / "steps.csv"), (run / "model.safetensors").read_bytes()

    expected, step = outcome(lab.train(**settings)), Step.__call__
    assert 0 < expected[0] < 20

    def stop(self, number, micro_batches):
        if number == 50:
            raise InterruptedError
        return step(self, number, micro_batches)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "__call__", stop)
        with pytest.raises(InterruptedError, match="^$"):
            lab.train(**settings)
    assert outcome(lab.train(**settings)) == expected


# --- commands


@pytest.mark.slow
def test_the_commands_say_so_once_and_the_stages_go_on(lab):
    wild = {"optimizer": "sgd", "lr": 1e6, "clip_norm": 0.0, "steps": 40, "study": "s", "run": "wild"}
    done = lab.start("-m", "engine.train", lab.file(**wild))
    metrics = read_json(lab.directory / "results/s/wild-1/metrics.json")
    assert metrics["status"] == "diverged" and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "diverged" in line]
    assert done.returncode == 4
    assert said.startswith(
        f"diverged at step {metrics['step']}: {metrics['reason']}. results/s/wild-1 says so;"
    )
    assert "lower lr" in said
    (line,) = [json.loads(line) for line in done.stdout.splitlines() if '"diverged"' in line]
    assert line == {"event": "diverged", "step": metrics["step"], "reason": metrics["reason"]}
    assert lab.start("-m", "stages.train", "run.toml").returncode == 0
    scored = lab.start("-m", "stages.eval", "results/s/wild-1", "results/s/test/wild-1.json")
    assert scored.returncode == 0 and "results/s/wild-1 diverged" in scored.stderr
    found = read_json(lab.directory / "results/s/test/wild-1.json")
    identity = {key: metrics[key] for key in ("status", "study", "run", "seed", "config_sha256", "reason")}
    assert found == {**identity, "split": "test"}
    refused = lab.start("-m", "engine.generate", "results/s/wild-1", "--prompt", "a")
    assert refused.returncode == 2 and "the run has diverged at step" in refused.stderr


@pytest.mark.slow
def test_so_does_the_stage_with_torchrun(lab):
    lab.file(optimizer="sgd", lr=1e6, clip_norm=0.0, steps=40, processes=2)
    done = lab.start("-m", "stages.train", "run.toml")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("diverged at step") == 1
    assert read_json(lab.config().directory / "metrics.json")["status"] == "diverged"
