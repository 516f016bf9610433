"""AdamWSPAM as it was coded, against a transcription of its description in plain numbers, faults and all."""

import math

import pytest
import torch
import torch.nn as nn
from engine_runs import assert_same_weights, column, ledger, read_json, untimed, weights

from engine import optimizers, plan
from engine.config import Optimizer, resolve
from engine.errors import ConfigError
from engine.guards import step_unless
from engine.optimizers import adamwspam_legacy, groups
from engine.optimizers.adamwspam_legacy import History
from engine.step import Step

QUICK = {
    "optimizer": "adamwspam_legacy",
    "lr": 0.1,
    "weight_decay": 0.3,
    "beta1": 0.8,
    "beta2": 0.9,
    "epsilon": 1e-3,
    "legacy_reset_counts": 30,
    "legacy_warmup_counts": 10,
}


def built(model: nn.Module, **changes):
    settings = Optimizer(**{**QUICK, **changes})
    return adamwspam_legacy.build(groups.of(model, settings), settings)


class AsDescribed:
    """One coordinate, one statement of the description a line; clip_norm is that of its gradient alone."""

    def __init__(self, w: float, decay: float, s: Optimizer, clip_norm: float = math.inf):
        self.w, self.decay, self.s, self.clip_norm = w, decay, s, clip_norm
        self.m = self.v = self.largest_v = 0.0
        self.t, self.counter, self.norms, self.reset_at = 0, 0, [], None
        self.resets = self.spikes = 0

    def step(self, g: float, others: float = 0.0) -> dict:
        """others: the sum of squares of the rest of the gradient, which the norm is of too."""
        s, cut = self.s, False
        if self.t > 0:  # AdamW makes v in its first step
            thr = math.sqrt(s.legacy_threshold * (self.v + 1e-12))
            cut = abs(g) > thr
            g = math.copysign(thr, g) if cut else g
        norm = math.sqrt(g * g + others)
        if norm > self.clip_norm:
            g *= self.clip_norm / norm
        # b
        self.counter += 1
        spike = False
        if len(self.norms) >= 10:
            mean = sum(self.norms) / len(self.norms)
            std = math.sqrt(sum((n - mean) ** 2 for n in self.norms) / len(self.norms))
            spike = (norm - mean) / std > s.legacy_spike if std else norm > mean
            if spike:
                self.m *= 0.5
                self.v *= 0.9
        self.norms = [*self.norms, norm][-100:]
        # c
        self.counter += 1
        if self.counter % s.legacy_reset_counts == 0:
            self.m = self.v = 0.0
            self.reset_at = self.counter
            self.resets += 1
        factor = 1.0
        if self.reset_at is not None and self.counter - self.reset_at < s.legacy_warmup_counts:
            elapsed = self.counter - self.reset_at
            factor = max(1e-3, 0.5 * (1 - math.cos(math.pi * elapsed / s.legacy_warmup_counts)))
        # AdamW with AMSGrad
        self.t += 1
        lr = s.lr * factor
        self.w -= lr * self.decay * self.w
        self.m = s.beta1 * self.m + (1 - s.beta1) * g
        self.v = s.beta2 * self.v + (1 - s.beta2) * g * g
        self.largest_v = max(self.largest_v, self.v)
        denominator = math.sqrt(self.largest_v / (1 - s.beta2**self.t)) + s.epsilon
        self.w -= lr * self.m / (1 - s.beta1**self.t) / denominator
        self.spikes += spike
        return {"cut": cut, "spike": spike, "factor": factor}


def trace(steps: int) -> list[float]:
    """Noise, with a spike of 30 now and then and one of 3000."""
    draw = torch.Generator().manual_seed(4)
    values = (torch.randn(steps, generator=draw) * 0.1 + 1).tolist()
    return [v * (3000 if i == 40 else 30 if i % 13 == 12 else 1) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"legacy_warmup_counts": 0},
        {"legacy_reset_counts": 45, "legacy_warmup_counts": 45},
        {"legacy_spike": 0.5},
    ],
    ids=str,
)
def test_every_update_is_that_of_the_description_and_so_is_what_it_counts(changes):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.5)
    optimizer = built(model, **changes)
    expected = AsDescribed(1.5, 0.3, Optimizer(**{**QUICK, **changes}))
    happened = {"cut": 0, "spike": 0}
    for i, g in enumerate(trace(60)):
        model.weight.grad = torch.tensor([[g]])
        optimizer.step()
        want = expected.step(g)
        assert model.weight.item() == pytest.approx(expected.w, rel=2e-4), i
        state = optimizer.state[model.weight]
        names = {"exp_avg": expected.m, "exp_avg_sq": expected.v, "max_exp_avg_sq": expected.largest_v}
        for name, value in names.items():
            assert state[name].item() == pytest.approx(value, rel=2e-4, abs=1e-15), (i, name)
        found = dict(zip(optimizer.COUNTERS, optimizer.take_counters(1).tolist(), strict=True))
        assert found["clipped_coordinates"] == want["cut"], i
        assert (found["optimizer_spikes"], found["optimizer_resets"]) == (want["spike"], expected.resets)
        assert found["update_factor"] == pytest.approx(want["factor"], rel=1e-6)
        happened = {name: n + want[name] for name, n in happened.items()}
    assert expected.resets >= 1 and happened["cut"] > 4 and happened["spike"] >= 2


def test_the_counter_goes_up_twice_so_that_1000_counts_are_500_updates():
    settings, history = Optimizer(optimizer="adamwspam_legacy"), History(torch.device("cpu"))
    no, factors = torch.zeros((), dtype=torch.bool), []
    for update in range(1, 1001):
        *_, factor, _ = history.advance(torch.tensor(1.0, dtype=torch.float64), settings, no)
        factors.append(factor.item())
        assert history.counter == 2 * update and history.resets == update // 500
    # 100 counts are 50 updates, of which the first, at the reset, has the least factor.
    grown = [max(1e-3, (1 - math.cos(math.pi * 2 * i / 100)) / 2) for i in range(50)]
    assert factors[:499] == [1.0] * 499 and factors[499:549] == pytest.approx(grown)
    assert factors[549:999] == [1.0] * 450 and factors[999] == 1e-3


def test_a_warm_up_as_long_as_the_interval_is_a_saw_tooth_of_mean_one_half():
    settings = Optimizer(optimizer="adamwspam_legacy", legacy_reset_counts=1000, legacy_warmup_counts=1000)
    history, no, factors = History(torch.device("cpu")), torch.zeros((), dtype=torch.bool), []
    for _ in range(1500):
        factors.append(history.advance(torch.tensor(1.0).double(), settings, no)[2].item())
    assert sum(factors[499:999]) / 500 == pytest.approx(0.5, abs=0.002)


def test_after_a_reset_gradients_are_cut_to_next_to_nothing_for_tens_of_updates():
    """√(50 · 1e-12) = 7.07e-6; what is left of 1 then grows by √(1 + 49 (1 - β2)) = 1.0242 an update."""
    model = nn.Linear(1, 1, bias=False)
    optimizer, left = built(model, beta2=0.999, legacy_reset_counts=4), []
    for _ in range(3):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        left.append(model.weight.grad.item())
    # The second update's gradient was cut by the first one's v; then came the reset, and v from that gradient.
    assert left[:2] == pytest.approx([1.0, math.sqrt(50 * 0.001)])
    optimizer.settings = Optimizer(**{**QUICK, "beta2": 0.999, "legacy_reset_counts": 1000})
    optimizer.state[model.weight]["exp_avg_sq"].zero_()
    left = []
    for _ in range(51):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        left.append(model.weight.grad.item())
    assert left[0] == pytest.approx(7.0711e-6, rel=1e-4)
    assert left[50] / left[0] == pytest.approx((1 + 49 * 0.001) ** 25, rel=0.05) and left[50] < 3e-5


def test_the_description_holds_for_two_parameters_whose_norm_is_one():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.5)
    nn.init.constant_(model.bias, -0.7)
    optimizer, s = built(model), Optimizer(**QUICK)
    expected = AsDescribed(1.5, 0.3, s), AsDescribed(-0.7, 0.0, s)
    for g in trace(50):
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        optimizer.step()
        left = [p.grad.item() for p in model.parameters()]  # as cut
        for one, other in zip(expected, reversed(left), strict=True):
            one.step(g, others=other**2)
    assert [model.weight.item(), model.bias.item()] == pytest.approx([e.w for e in expected], rel=2e-4)
    assert optimizer.history.spikes == expected[0].spikes > 0


# --- in the step


def test_gradients_are_cut_before_clip_norm_and_the_norms_are_those_between(lab, monkeypatch):
    norms, cut = [], []
    own, clip = History.advance, adamwspam_legacy.AdamWSPAMLegacy.before_clipping

    def seen(self, norm, s, refused):
        norms.append(norm.item())
        return own(self, norm, s, refused)

    def before(self):
        clip(self)
        squares = [p.grad.square().sum() for p in self.parameters]
        cut.append(math.sqrt(sum(squares).item()))

    monkeypatch.setattr(History, "advance", seen)
    monkeypatch.setattr(adamwspam_legacy.AdamWSPAMLegacy, "before_clipping", before)
    run = lab.train(optimizer="adamwspam_legacy", clip_norm=0.5, legacy_threshold=3.0)
    assert norms == pytest.approx(cut, rel=1e-5) and norms == pytest.approx(column(run, "grad_norm"))
    assert max(norms) > 0.5 and sum(column(run, "clipped_coordinates")) > 0
    assert disagreeing_of(run) == []


RUN = {
    "optimizer": "adamwspam_legacy",
    "legacy_reset_counts": 6,
    "legacy_warmup_counts": 4,
    "legacy_spike": 0.1,
}


def disagreeing_of(run) -> list[str]:
    return [what for what, line in ledger(run).items() if not line["agrees"]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp16", "micro_batch_size": 2},
        {"gradient_sums": "fused", "loss_kernel": "fused", "precision": "bf16"},
    ],
    ids=str,
)
def test_a_run_tells_its_counters(lab, changes):
    run = lab.train(**RUN, steps=14, **changes)
    assert disagreeing_of(run) == []
    assert column(run, "optimizer_resets") == [i // 3 for i in range(1, 15)]
    assert column(run, "update_factor") == pytest.approx([1, 1] + [1e-3, 0.5, 1] * 4)
    metrics = read_json(run / "metrics.json")
    assert metrics["optimizer_resets"] == 4
    assert metrics["optimizer_spikes"] == sum(column(run, "optimizer_spikes"))
    assert 4 < metrics["optimizer_memory_multiple"] < 4.01  # AMSGrad's is the third
    assert ledger(run)["adamwspam_legacy"]["in_effect"].startswith("28 counts in 14 updates, 4 resets, ")


def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(lab, interrupt):
    settings = {**RUN, "steps": 16, "checkpoint_interval": 5}
    whole = lab.train(run="whole", **settings)
    interrupt(13, run="cut", **settings)
    again = lab.train(run="cut", **settings)
    assert untimed(again / "steps.csv") == untimed(whole / "steps.csv")
    assert_same_weights(weights(again), weights(whole))
    assert sum(column(whole, "optimizer_spikes")[10:]) > 0  # which the norms before the interruption decide
    assert disagreeing_of(again) == []


@pytest.mark.parametrize("gradient", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("after", [0, 2, 12])
def test_a_refused_update_changes_nothing_and_counts_nothing(gradient, after):
    model = nn.Linear(4, 3)
    optimizer = built(model, legacy_reset_counts=6)
    for i in range(after):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 + i / 7)
        optimizer.step()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    kept = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()}
    history = {k: v.clone() for k, v in optimizer.history.state_dict().items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    step_unless(torch.tensor(1.0), optimizer)
    assert_same_weights(model.state_dict(), before)
    assert all(torch.equal(kept[p][k], v) for p in kept for k, v in optimizer.state[p].items())
    now = optimizer.history.state_dict()
    assert all(torch.equal(history[k].nan_to_num(-1), now[k].nan_to_num(-1)) for k in history)
    assert optimizer.take_counters(1)[[0, 1, 4]].tolist() == [0, 0, 0]


def test_what_is_not_finite_is_not_cut():
    model = nn.Linear(2, 1, bias=False)
    optimizer = built(model)
    for values in ([1.0, 1.0], [math.inf, 9.0]):
        model.weight.grad = torch.tensor([values])
        optimizer.before_clipping()
        if values[0] == 1:
            optimizer.grad_norm = model.weight.grad.norm()
            optimizer.step()
    assert model.weight.grad[0, 0] == math.inf
    assert model.weight.grad[0, 1].item() == pytest.approx(math.sqrt(50 * 0.1))


# --- the ledger


def lines(optimizer, **changes) -> dict:
    found = optimizers.lines(Optimizer(**{**QUICK, **changes}), optimizer)
    return {line.what: line for line in found}


def disagreeing(found: dict) -> list[str]:
    return [what for what, line in found.items() if not line.agrees]


def stepped(optimizer, model: nn.Module, steps: int, *, hooked: bool = True) -> None:
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if hooked:
            optimizer.before_clipping()
            optimizer.grad_norm = torch.tensor(1.0)
        optimizer.step()


def test_an_honest_optimizer_agrees_and_what_is_off_disagrees():
    model = nn.Linear(4, 3)
    optimizer = built(model)
    stepped(optimizer, model, 16)
    found = lines(optimizer)
    assert disagreeing(found) == []
    assert (
        found["optimizer"].in_effect == "adamwspam_legacy" and found["optimizer_kernel"].in_effect == "fused"
    )
    assert found["adamwspam_legacy"].in_effect == "32 counts in 16 updates, 1 resets, 0 spikes; AMSGrad"
    assert "gradients cut before clip_norm in 16 of 16 steps" in found["adamwspam_legacy"].how
    assert disagreeing(lines(optimizer, legacy_reset_counts=10)) == [
        "adamwspam_legacy"
    ]  # 3 would have been due
    stepped(optimizer, model, 1, hooked=False)
    assert disagreeing(lines(optimizer)) == ["adamwspam_legacy"]  # that one was cut after clipping
    adamw = torch.optim.AdamW(groups.decay_groups(model, 0.3), fused=True)
    stepped(adamw, model, 1, hooked=False)
    assert {"optimizer", "adamwspam_legacy"} <= set(disagreeing(lines(adamw)))


def test_a_reset_that_leaves_moments_disagrees(monkeypatch):
    model = nn.Linear(4, 3)
    optimizer = built(model)
    monkeypatch.setattr(torch, "_foreach_mul_", lambda tensors, factor: None)
    stepped(optimizer, model, 14)
    assert disagreeing(lines(optimizer)) == []  # none was due
    stepped(optimizer, model, 1)
    found = lines(optimizer)
    assert disagreeing(found) == ["adamwspam_legacy"]
    largest = 1 - 0.8**14  # m after 14 gradients of 1
    assert f"moments of up to {largest:.4g} after resets" in found["adamwspam_legacy"].how


def test_norms_of_blocks_are_of_what_is_left_as_the_whole_one_is(lab):
    run = lab.train(**RUN, steps=8, layers=1, gradient_norm_layers=[0], legacy_threshold=1e-4)
    whole, block = column(run, "grad_norm"), column(run, "gradient_norm_0")
    assert sum(column(run, "clipped_coordinates")) > 0
    assert all(0 < part < all_ for part, all_ in zip(block, whole, strict=True))


def test_the_noise_scale_is_refused():
    values = {"optimizer": "adamwspam_legacy", "noise_scale_interval": 5, "micro_batch_size": 4}
    with pytest.raises(
        ConfigError, match="noise_scale_interval = 5: not with optimizer = 'adamwspam_legacy'"
    ):
        resolve({**values, "batch_size": 8}, "test")
    resolve({**values, "batch_size": 8, "optimizer": "adamw"}, "test")


def test_a_step_that_forgets_to_cut_first_disagrees(lab, monkeypatch):
    def clip(self):
        from engine import titan

        return titan.clip_gradients(self.parameters, self.training.clip_norm), self.block_norms.squares()

    monkeypatch.setattr(Step, "_clip", clip)
    assert disagreeing_of(lab.train(**RUN)) == ["adamwspam_legacy"]


def test_offload_is_refused():
    match = "optimizer_offload = true: not with optimizer = 'adamwspam_legacy'"
    with pytest.raises(ConfigError, match=match):
        resolve({"optimizer": "adamwspam_legacy", "optimizer_offload": True}, "test")


def test_the_memory_plan_is_what_a_real_run_measures(lab):
    sizes = {"layers": 2, "heads": 2, "width": 128, "context": 16, "batch_size": 4, "steps": 4}
    settings = {**sizes, "optimizer": "adamwspam_legacy"}
    run = lab.train(**settings)
    planned = plan.estimate(lab.config(**settings), 256, "cpu", 1)
    assert planned.peak / 2**30 == pytest.approx(read_json(run / "metrics.json")["peak_memory_gib"], rel=0.02)
