"""AdamWSPAM as its authors coded it, with its faults: for comparing with their figures, not for use. See spam.py.

AdamW with AMSGrad, and before each update, in this order:

    1. with v of the update before: |g| > √(θ (v + 1e-12)) is cut to that      θ = legacy_threshold
    2. clip_norm, by the norm of what is left
    3. with the last 100 finite such norms, once there are 10: (norm - their mean) / their standard deviation
       > legacy_spike: m *= 0.5, v *= 0.9. The counter goes up by one.
    4. The counter goes up by one. If it is a multiple of legacy_reset_counts: m = v = 0. While fewer than
       N = legacy_warmup_counts were counted since then: lr *= max(0.001, (1 - cos(π counted / N)) / 2)

Its faults, kept: v = 0 is no exception in 1., so that gradients after a reset are cut to about 7e-6, and v recovers
over tens of updates; a reset keeps AMSGrad's largest v and the count of bias correction; 3. fires on 2 to 3 % of
steps of ordinary noise; and the counter goes up twice an update, so that resets come twice as often, and warm-up
takes half as long, as the names say.

What is not known of the original is taken so: the deviation is that of a population; the very first update cuts
nothing, because AdamW has no v before it. What is not finite is not cut, so that guards and loss scaling see it.

So `grad_norm`, the blocks' norms and what guards judge are of gradients that 1. has cut already, not of whole ones as
with other optimizers; the noise scale, which compares the two, is refused.

All counts stay on the device, and a refused update changes none of them. 1. takes some operations a parameter: it is
not fast. It needs all of v before the first parameter is updated: no optimizer_offload.
"""

import math

import torch

from engine import split, titan
from engine.ledger import Line
from engine.optimizers.around_clipping import AroundClipping
from engine.split import local

KEPT, NEEDED = 100, 10  # gradient norms
ADDED = 1e-12  # to v
SPIKE_FACTORS = (0.5, 0.9)  # of m and v
SMALLEST_FACTOR = 1e-3  # of the learning rate


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    """With AMSGrad whatever `amsgrad` says of others, as it was coded."""
    return AdamWSPAMLegacy(groups, settings)


class History:
    """The last norms, and the counts; on the device, the same on all ranks. A checkpoint holds it."""

    def __init__(self, device: torch.device):
        self.norms = torch.full((KEPT,), torch.nan, dtype=torch.float64, device=device)  # NaN: none yet
        self.counter, self.resets, self.spikes = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        self.reset_at = torch.full((), -1, dtype=torch.int64, device=device)  # -1: there was none

    def state_dict(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a `state_dict`, from any device."""
        for name, value in state.items():
            setattr(self, name, value.to(self.norms.device))

    def advance(self, norm: torch.Tensor, s, refused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take in a norm, unless `refused` (bool); factors of m, of v and of the learning rate; whether it spikes."""
        is_spike = self._is_spike(norm, s.legacy_spike) & ~refused
        counter = self.counter + 2  # once for the norms, once for the resets
        resets = (counter % s.legacy_reset_counts == 0) & ~refused
        reset_at = torch.where(resets, counter, self.reset_at)
        counted = counter - reset_at
        growing = (reset_at >= 0) & (counted < s.legacy_warmup_counts)
        grown = (1 - (math.pi * counted.double() / max(s.legacy_warmup_counts, 1)).cos()) / 2
        lr_factor = torch.where(growing, grown.clamp(min=SMALLEST_FACTOR), 1.0)
        zeroed = torch.where(resets, 0.0, 1.0)
        first, second = (torch.where(is_spike, f, 1.0) * zeroed for f in SPIKE_FACTORS)
        window = torch.where(norm.isfinite() & ~refused, torch.cat([self.norms[1:], norm[None]]), self.norms)
        self.norms, self.reset_at = window, reset_at
        self.counter = torch.where(refused, self.counter, counter)
        self.resets, self.spikes = self.resets + resets, self.spikes + is_spike
        return first, second, lr_factor, is_spike

    def _is_spike(self, norm: torch.Tensor, limit: float) -> torch.Tensor:
        there = ~self.norms.isnan()
        count = there.sum()
        mean = self.norms.nansum() / count
        deviation = (torch.where(there, self.norms - mean, 0.0).square().sum() / count).sqrt()
        return (count >= NEEDED) & ((norm - mean) / deviation > limit)  # a comparison with NaN is false


class AdamWSPAMLegacy(AroundClipping, torch.optim.AdamW):
    """By itself, `step` calls `before_clipping` and takes the norm of what is left; nothing else clips then."""

    NAME = "adamwspam_legacy"
    COUNTERS = {  # noqa: RUF012
        "clipped_coordinates": "sum",
        "largest_square_ratio": "largest",
        "optimizer_resets": "same",
        "update_factor": "same",
        "optimizer_spikes": "same",
    }

    def __init__(self, groups: list[dict], settings):
        s = self.settings = settings
        super().__init__(groups, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.epsilon, amsgrad=True, fused=True)
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        device = local(self.parameters[0]).device
        self.history = History(device)
        self.cut_first = self.steps_taken = (
            0  # in this process: steps whose gradients were cut before clip_norm
        )
        # The largest |m| or v that a reset in this process left, on the device.
        self._left = torch.zeros((), device=device)
        # Of gradients that are not applied yet: how many of each parameter's were cut, and the largest g² / v.
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None
        self._newest: tuple[torch.Tensor, ...] | None = (
            None  # the same of the newest update, and the other counters
        )
        self._shares: torch.Tensor | None = None
        for p in self.parameters:
            self.state[p] = {
                "step": torch.zeros((), device=device),
                **{name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")},
            }

    @torch.no_grad()
    def before_clipping(self) -> None:
        """Cut the gradients, in place."""
        none = torch.zeros((), device=self.history.norms.device)
        cut, largest = [], [none]
        for p in self.parameters:
            if p.grad is None or not local(p).numel():
                cut.append(none)
                continue
            g, v = local(p.grad), local(self.state[p]["exp_avg_sq"])
            limit = (self.settings.legacy_threshold * (v + ADDED)).sqrt()
            above = (g.abs() > limit) & g.isfinite() & (self.state[p]["step"] > 0)
            largest.append(torch.where(v > 0, g.square() / v, 0.0).amax())
            cut.append(above.sum())
            g.copy_(torch.where(above, limit.copysign(g), g))
        self._found = torch.stack([c.double() for c in cut]), torch.stack(largest).amax().double()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient; there is no `closure` in the engine."""
        having = [p for p in self.parameters if p.grad is not None]
        if not having:
            return
        if self._found is None:
            self.before_clipping()
            self.grad_norm = titan.clip_gradients(having, 0)
        else:
            self.cut_first += 1
        self.steps_taken += 1
        found_inf = getattr(self, "found_inf", None)
        refused = torch.zeros_like(self.history.counter) if found_inf is None else found_inf
        refused = refused.bool()
        before = self.history.resets
        first, second, factor, spike = self.history.advance(self.grad_norm.double(), self.settings, refused)
        for name, change in (("exp_avg", first), ("exp_avg_sq", second)):
            torch._foreach_mul_([local(self.state[p][name]) for p in having], change.float())
        self._look_at_reset(having, self.history.resets > before)
        for group in self.param_groups:
            self._update(group, factor.float(), found_inf)
        cut, largest = (torch.where(refused, 0.0, x) for x in self._found)
        self._newest = cut, largest, self.history.resets.double(), factor.double(), spike.double()
        self._found = self.grad_norm = None

    def _look_at_reset(self, having: list[torch.Tensor], is_reset: torch.Tensor) -> None:
        moments = [local(self.state[p][name]) for p in having for name in ("exp_avg", "exp_avg_sq")]
        moments = [t for t in moments if t.numel()]
        if moments:
            left = torch.stack(torch._foreach_norm(moments, math.inf)).amax()
            self._left = torch.maximum(self._left, torch.where(is_reset, left, 0.0))

    def _update(self, group: dict, factor: torch.Tensor, found_inf: torch.Tensor | None) -> None:
        """torch's fused kernel, on this rank's parts; it takes a learning rate that is on the device."""
        having = [p for p in group["params"] if p.grad is not None]
        if not having:
            return
        states = [self.state[p] for p in having]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [local(p) for p in having],
            [local(p.grad) for p in having],
            *([local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
            steps,
            amsgrad=True,
            lr=group["lr"] * factor,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            grad_scale=None,
            found_inf=found_inf,
        )
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))

    def take_counters(self, world_size: int) -> torch.Tensor:
        """(COUNTERS,) float64 of the newest update; this rank's share of those that are sums."""
        if self._shares is None:
            shares = [split.share(p, world_size) for p in self.parameters]
            self._shares = torch.tensor(shares, dtype=torch.float64, device=self.history.norms.device)
        cut, *others = self._newest
        return torch.stack([(cut * self._shares).sum(), *others])

    def note_counters(self, found: torch.Tensor) -> None:
        """Nothing to note: what the ledger needs is in the history."""


def lines(settings, optimizer: torch.optim.Optimizer) -> list[Line]:
    """Whether every update counted twice, resets came when due and left nothing, and gradients were cut first.

    And whether there is AMSGrad.
    """
    wanted = (
        f"cut at √({settings.legacy_threshold:g} v), spikes above {settings.legacy_spike:g} deviations, reset every "
        f"{settings.legacy_reset_counts} counts, {settings.legacy_warmup_counts} to warm up; AMSGrad"
    )
    if not isinstance(optimizer, AdamWSPAMLegacy):
        return [Line("adamwspam_legacy", wanted, "none", "class of the optimizer", False)]
    h = optimizer.history
    counter, resets, spikes = (x.item() for x in (h.counter, h.resets, h.spikes))
    updates = {int(optimizer.state[p]["step"].item()) for p in optimizer.parameters}
    left = optimizer._left.item()
    amsgrad = all(g["amsgrad"] for g in optimizer.param_groups)
    every = math.lcm(2, settings.legacy_reset_counts)  # the counter is even when it is looked at
    found = (
        f"{counter} counts in {max(updates)} updates, {resets} resets, {spikes} spikes"
        + "; AMSGrad" * amsgrad
    )
    how = (
        f"counts on the device; moments of up to {left:.4g} after resets, "
        f"gradients cut before clip_norm in {optimizer.cut_first} of {optimizer.steps_taken} steps of this process"
    )
    agrees = updates == {counter // 2} and resets == counter // every and amsgrad
    agrees &= left == 0 and optimizer.cut_first == optimizer.steps_taken
    return [Line("adamwspam_legacy", wanted, found, how, agrees)]
