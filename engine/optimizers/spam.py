"""SPAM (Huang et al. 2025): AdamW that cuts spikes of single gradients, and forgets its moments now and then.

Of every coordinate, with t the updates so far, k those since the last reset, λ the weight decay:

    at every spam_reset_steps-th t > 0: m = v = k = 0
    k += 1
    g~ = g where g² ≤ θ v or v = 0 or k ≤ G, else sign(g) √(θ v)    θ = spam_threshold, G = spam_grace_steps,
    m = β1 m + (1 - β1) g~     v = β2 v + (1 - β2) g~²              v that of the update before
    s = (1 - cos(π min(k, N) / N)) / 2                              N = spam_warmup_steps
    w -= lr λ w + lr s (m / (1 - β1^k)) / (√(v / (1 - β2^k)) + ε)

g is the gradient after clip_norm. Before the first reset s = 1, unless spam_first_warmup. The grace and the start at
full size are its authors' code's, not their formula's: decision 0022.

With spam_density < 1, g~ is 0 at the entries of matrices that are not drawn: they have no moments, and change by
weight decay alone. Moments stay dense tensors: it saves no memory here. Which entries are drawn is a hash of the
seed, the parameter's number, the resets so far and the place in the whole matrix; so it is the same on every rank,
however a matrix is split, on every device and after a restart, and nothing of it is kept.

t and k are counts of applied updates and stay on the device, in the state of each parameter: a refused update changes
nothing, and the host waits for nothing. On a GPU one kernel updates a parameter (engine/kernels/spam.py); `plain` is
the same in torch's operations.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine import split
from engine.errors import ConfigError
from engine.ledger import Line
from engine.split import local

MASK = 0xFFFFFFFF  # hashes have 32 bits
FIRST, SECOND = 0x85EBCA6B, 0xC2B2AE35  # murmur3's
LARGEST = 3.0e38  # a quotient is not infinite in rows and JSON
PIECE = 2**22  # entries that the ledger looks at together


class Rule(NamedTuple):
    """What is the same for all parameters of a group in a step."""

    lr: float
    decay: float  # 1 - lr times the weight decay
    beta1: float
    beta2: float
    epsilon: float
    density: float


class Place(NamedTuple):
    """Where this rank's part of a matrix is in the whole; a parameter of other dimensions is never drawn from."""

    columns: int  # of the part
    whole_columns: int
    first_row: int
    first_column: int


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    """`groups`: of engine.optimizers.groups.of, whose `seed` is the run's."""
    return Spam(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        threshold=settings.spam_threshold,
        reset_steps=settings.spam_reset_steps,
        warmup_steps=settings.spam_warmup_steps,
        first_warmup=settings.spam_first_warmup,
        grace_steps=settings.spam_grace_steps,
        density=settings.spam_density,
    )


class Spam(torch.optim.Optimizer):
    """`kernels` says what updated parameters so far; `seen` what it did, in this process: see `lines`."""

    _step_supports_amp_scaling = True  # a step that `found_inf` refuses is skipped on the device
    # Of one update: coordinates cut, largest g² / v before; resets so far; s.
    COUNTERS = {  # noqa: RUF012  how ranks put theirs together
        "clipped_coordinates": "sum",
        "largest_square_ratio": "largest",
        "optimizer_resets": "same",
        "update_factor": "same",
    }

    def __init__(self, groups: list[dict], **defaults):
        """Raises ConfigError where the kernel of a GPU cannot be had."""
        super().__init__(groups, {"seed": 0, **defaults})
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        for p in self.parameters:
            kernel(local(p))  # what is missing is told now, not at the first update
        self.kernels: set[str] = set()
        self._number = {p: i for i, p in enumerate(self.parameters)}
        self._places = [_place(p) for p in self.parameters]
        device = local(self.parameters[0]).device
        seeds = [group["seed"] for group in self.param_groups for _ in group["params"]]
        bases = [mixed(mixed(seed) ^ i) for i, seed in enumerate(seeds)]
        self._bases = torch.tensor(bases, dtype=torch.int64, device=device)
        self._clipped = torch.zeros(len(bases), dtype=torch.int64, device=device)  # since they were taken
        self._largest = torch.zeros(len(bases), dtype=torch.float32, device=device)
        # Of each parameter's part, in this process: entries whose moments were due for a reset, and those of them
        # whose moments the kernel then found to be 0.
        self._due, self._zeroed = torch.zeros(2, len(bases), dtype=torch.int64, device=device)
        sizes = [local(p).numel() for p in self.parameters]
        self._sizes = torch.tensor(sizes, dtype=torch.int64, device=device).unbind()
        self._newest = (torch.zeros((), device=device), torch.ones((), device=device))  # t, s
        self._since = torch.zeros((), device=device)  # k
        self._earliest_cut = torch.full(
            (), torch.inf, device=device
        )  # the smallest k at which anything was cut
        self._shares: torch.Tensor | None = None
        self.seen = {name: torch.zeros((), dtype=torch.float64, device=device) for name in self.COUNTERS}
        for p in self.parameters:
            self.state[p] = {
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
                # Not named `step`, which torch loads in its own way. As fp32, like all that a checkpoint brings back.
                "updates": torch.zeros((), device=device),
                "since_reset": torch.zeros((), device=device),
            }

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient; there is no `closure` in the engine."""
        for group in self.param_groups:
            having = [p for p in group["params"] if p.grad is not None]
            if having:
                self._update(having, group)

    def _update(self, having: list[torch.Tensor], group: dict) -> None:
        states = [self.state[p] for p in having]
        counts = [torch.stack([s[name] for s in states]) for name in ("updates", "since_reset")]
        scalars, resets, new = advanced(*counts, group, getattr(self, "found_inf", None))
        numbers = [self._number[p] for p in having]
        due = scalars[:, 0] * (1 - scalars[:, 1])
        torch._foreach_add_(
            [self._due[i] for i in numbers], list((due.long() * self._sizes_of(numbers)).unbind())
        )
        keys = None
        if group["density"] < 1:
            keys = mixed(torch.stack([self._bases[i] for i in numbers]) ^ mixed(resets))
        rule = _rule(group)
        for i, (number, p, state) in enumerate(zip(numbers, having, states, strict=True)):
            tensors = [local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
            if not tensors[0].numel():  # an empty part of a split parameter
                continue
            run = kernel(tensors[0])
            self.kernels.add("plain" if run is plain else "triton")
            place = self._places[number] if keys is not None else None
            run(*tensors, scalars, keys, i, (self._clipped, self._largest, self._zeroed, number), rule, place)
        for name, values in zip(("updates", "since_reset"), new, strict=True):
            torch._foreach_copy_([s[name] for s in states], list(values.unbind()))
        self._newest, self._since = (new[0][0], scalars[0, 4]), new[1][0]

    def _sizes_of(self, numbers: list[int]) -> torch.Tensor:
        return torch.stack([self._sizes[i] for i in numbers])

    def take_counters(self, world_size: int) -> torch.Tensor:
        """(COUNTERS,) float64 of the update since they were taken; this rank's share of those that are sums."""
        if self._shares is None:
            shares = [split.share(p, world_size) for p in self.parameters]
            self._shares = torch.tensor(shares, dtype=torch.float64, device=self._clipped.device)
        (updates, factor), period = (x.double() for x in self._newest), self.param_groups[0]["reset_steps"]
        resets = ((updates - 1) / period).floor().clamp(min=0) if period else torch.zeros_like(updates)
        clipped = (self._clipped * self._shares).sum()
        found = torch.stack([clipped, self._largest.max().double(), resets, factor])
        self._clipped.zero_()
        self._largest.zero_()
        return found

    def note_counters(self, found: torch.Tensor) -> None:
        """Take the counters of all ranks together into `seen`."""
        clipped, largest, resets, factor = found.unbind()
        self.seen["clipped_coordinates"] = self.seen["clipped_coordinates"] + clipped
        self.seen["largest_square_ratio"] = torch.maximum(self.seen["largest_square_ratio"], largest)
        self.seen["optimizer_resets"], self.seen["update_factor"] = resets, factor
        cut_at = torch.where(clipped > 0, self._since, torch.inf)
        self._earliest_cut = torch.minimum(self._earliest_cut, cut_at)


def _rule(group: dict) -> Rule:
    return Rule(
        group["lr"],
        1 - group["lr"] * group["weight_decay"],
        *group["betas"],
        group["eps"],
        group["density"],
    )


def _place(p: torch.Tensor) -> Place | None:
    if p.dim() != 2:  # noqa: PLR2004
        return None
    return Place(local(p).size(1), p.size(1), *split.offset(p))


def advanced(
    updates: torch.Tensor, since: torch.Tensor, group: dict, refused: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """What an update needs to know of each of n parameters, whose counts t and k are `updates` and `since` (n,).

    (n, 6) fp32: whether it is applied, whether the moments are kept, s / (1 - β1^k), √(1 - β2^k), s, θ (infinite
    in the grace); (n,) int64: resets so far; t and k after it.
    """
    t, period, warmup = updates.double(), group["reset_steps"], group["warmup_steps"]
    resets = (t / period).floor() if period else torch.zeros_like(t)
    kept = (t == 0) | (t != resets * period) if period else torch.ones_like(t, dtype=torch.bool)
    k = torch.where(kept, since.double(), 0.0) + 1
    s = (1 - (math.pi * (k / warmup).clamp(max=1)).cos()) / 2 if warmup else torch.ones_like(k)
    if not group["first_warmup"]:
        s = torch.where(resets == 0, 1.0, s)
    threshold = torch.where(k <= group["grace_steps"], torch.inf, group["threshold"]).double()
    beta1, beta2 = group["betas"]
    size, root = s / (1 - beta1**k), (1 - beta2**k).sqrt()
    no = torch.zeros_like(kept) if refused is None else refused.bool().expand_as(kept)
    scalars = torch.stack([(~no).double(), kept.double(), size, root, s, threshold], 1).float()
    after = torch.where(no, updates, updates + 1), torch.where(no, since, k.float())
    return scalars, resets.long(), after


def mixed(x):
    """murmur3's last steps (Appleby 2011): a 32-bit number, or each of an int64 tensor, to another one."""
    x = ((x ^ (x >> 16)) * FIRST) & MASK
    x = ((x ^ (x >> 13)) * SECOND) & MASK
    return x ^ (x >> 16)


def drawn(indices: torch.Tensor, key: torch.Tensor, place: Place, density: float) -> torch.Tensor:
    """Which of a part's entries, numbered row by row, are drawn: `density` of all."""
    row, column = indices // place.columns + place.first_row, indices % place.columns + place.first_column
    whole = (row * place.whole_columns + column) & MASK
    return mixed(mixed(whole) ^ key) < round(density * 2**32)


def kernel(p: torch.Tensor) -> Callable:
    """The function that updates `p`: on a GPU one kernel."""
    if not (p.is_cuda and p.is_contiguous()):
        return plain
    try:
        from engine.kernels import spam
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ConfigError(
            "optimizer = 'spam': needs triton on a GPU, and it is not installed; pip install triton"
        ) from None
    return spam.update_


def plain(p, g, m, v, scalars, keys, i, counters, rule: Rule, place: Place | None) -> None:
    """Update the parameter `p` and its moments in place: row i of `scalars` and `keys`, see `advanced`.

    counters: (coordinates cut, largest g² / v, entries whose moments are 0 where they are not kept, number of the
    parameter in these), which are added to. keys: None where everything is drawn.
    """
    applied, kept, size, root, _, threshold = scalars[i].unbind()
    applied, kept = applied.bool(), kept.bool()
    if place is not None:
        entries = torch.arange(g.numel(), device=g.device).view_as(g)
        g = torch.where(drawn(entries, keys[i], place, rule.density), g, 0.0)
    m, before_m, v, before_v = torch.where(kept, m, 0.0), m, torch.where(kept, v, 0.0), v
    fresh = v == 0
    limit = torch.where(fresh, torch.inf, (threshold * v).sqrt())
    cut = torch.clamp(g, -limit, limit)
    ratio = torch.where(fresh | threshold.isinf(), 0.0, g.square() / v)
    clipped, largest, zeroed, number = counters
    zeroed[number] += ((m == 0) & (v == 0) & applied & ~kept).sum()
    clipped[number] += ((cut != g) & applied).sum()
    seen = torch.where(applied, ratio.amax().clamp(max=LARGEST), 0.0)
    largest[number] = torch.maximum(largest[number], seen)
    m = rule.beta1 * m + (1 - rule.beta1) * cut
    v = rule.beta2 * v + (1 - rule.beta2) * cut.square()
    new = p * rule.decay - rule.lr * size * m / (v.sqrt() / root + rule.epsilon)
    for tensor, value in ((p, new), (before_m, m), (before_v, v)):
        tensor.copy_(torch.where(applied, value, tensor))


# --- the ledger


def lines(settings, optimizer: torch.optim.Optimizer) -> list[Line]:
    """Whether moments were reset when due, spikes cut where there were any, and moments only where drawn."""
    wanted = (
        f"cut above {settings.spam_threshold:g} v after {settings.spam_grace_steps} updates, reset every "
        f"{settings.spam_reset_steps} updates, {settings.spam_warmup_steps} to warm up"
        f"{', at the start too' * settings.spam_first_warmup}"
    )
    if not isinstance(optimizer, Spam):
        return [Line("spam", wanted, "none", "class of the optimizer", False)]
    # First, because the host waits here for the device, and so for states on their way to host memory.
    clipped, largest, _, factor = (x.item() for x in optimizer.seen.values())
    own = [optimizer.state[p] for p in optimizer.parameters]
    updates, since = ({int(s[name].item()) for s in own} for name in ("updates", "since_reset"))
    count, latest, period = max(updates), max(since), settings.spam_reset_steps
    resets = (count - 1) // period if period and count else 0
    expected = (count - 1) % period + 1 if period and count else count
    due, zeroed = (int(x.sum().item()) for x in (optimizer._due, optimizer._zeroed))
    agrees = len(updates) == len(since) == 1 and latest == expected and zeroed == due
    agrees &= (clipped > 0) == (largest > settings.spam_threshold)
    earliest = optimizer._earliest_cut.item()
    agrees &= earliest > settings.spam_grace_steps
    found = f"{resets} resets in {count} updates, {clipped:.0f} gradients cut, size × {factor:.4g} now"
    how = (
        f"counts on the device: {latest} updates since the last reset, {expected} expected; in this process, "
        f"entries without moments at resets, {zeroed} of {due}, gradients that came out changed, and the largest "
        f"g² / v, {largest:.4g}; the earliest cut: {'none' if math.isinf(earliest) else f'update {earliest:.0f}'}"
    )
    return [Line("spam", wanted, found, how, agrees), *_density(settings, optimizer)]


def _density(settings, optimizer: Spam) -> list[Line]:
    """Of matrices the entries that have a second moment, against those that are drawn."""
    if settings.spam_density == 1:
        return []
    drawn_, with_moment, outside, total = 0, 0, 0, 0
    for number, p in enumerate(optimizer.parameters):
        place, state = optimizer._places[number], optimizer.state[p]
        if place is None:
            continue
        moments = local(state["exp_avg_sq"]).flatten()
        resets = ((state["updates"] - 1).clamp(min=0) / (settings.spam_reset_steps or math.inf)).floor()
        base = optimizer._bases[number].to(moments.device)
        key = mixed(base ^ mixed(resets.long().to(moments.device)))
        for first in range(0, moments.numel(), PIECE):
            there = moments[first : first + PIECE] != 0
            entries = torch.arange(first, first + len(there), device=moments.device)
            mask = drawn(entries, key, place, settings.spam_density)
            drawn_ += mask.sum().item()
            with_moment += there.sum().item()
            outside += (there & ~mask).sum().item()
            total += len(there)
    # Five standard deviations of a draw.
    near = abs(drawn_ - settings.spam_density * total) <= 5 * math.sqrt(total) / 2 + 1
    return [
        Line(
            "spam_density",
            f"{settings.spam_density:g} of the entries of matrices",
            f"{drawn_ / total:.4f} drawn, {with_moment / total:.4f} have moments" if total else "no matrices",
            f"second moments that are not 0, on this rank: {outside} where none was drawn",
            total > 0 and near and outside == 0 and with_moment > 0,
        )
    ]
