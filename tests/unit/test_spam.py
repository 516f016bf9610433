"""SPAM: every update against one of plain numbers, what it counts, which entries it draws, and what it must bear."""

import math
import sys

import pytest
import torch
import torch.nn as nn
from engine_runs import assert_same_weights

from engine import kernels, optimizers
from engine.checkpoint import Checkpoints
from engine.config import Optimizer
from engine.errors import ConfigError
from engine.guards import step_unless
from engine.offload import offload
from engine.optimizers import groups, spam
from engine.parallel import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))
QUICK = {  # resets, warm-up and cuts within a few updates
    "optimizer": "spam",
    "lr": 0.1,
    "weight_decay": 0.3,
    "beta1": 0.8,
    "beta2": 0.9,
    "epsilon": 1e-3,
    "spam_threshold": 20.0,
    "spam_reset_steps": 4,
    "spam_warmup_steps": 3,
    "spam_first_warmup": True,
    "spam_grace_steps": 0,
}
GRADIENTS = (0.5, -0.25, 2.0, 0.1, -3.0, 0.0, 40.0, 0.2, 0.3, -9.0)  # some of them spikes


class Model(nn.Module):
    """A matrix whose entries can be drawn, three-dimensional maps and a bias."""

    def __init__(self, seed: int = 1, rows: int = 40, columns: int = 30):
        super().__init__()
        torch.manual_seed(seed)
        self.matrix = nn.Linear(columns, rows)
        self.maps = nn.Parameter(torch.randn(2, 3, 4))


def built(model: nn.Module, seed: int = 7, **changes) -> spam.Spam:
    settings = Optimizer(**{**QUICK, **changes})
    return spam.build(groups.of(model, settings, seed=seed), settings)


def advance(model: nn.Module, optimizer, steps: int, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
        optimizer.zero_grad()


def lines(optimizer, **changes) -> dict:
    found = optimizers.lines(Optimizer(**{**QUICK, **changes}), optimizer)
    return {line.what: line for line in found}


def disagreeing(found: dict) -> list[str]:
    return [what for what, line in found.items() if not line.agrees]


def counters(optimizer) -> dict[str, float]:
    found = optimizer.take_counters(1)
    optimizer.note_counters(found)
    return dict(zip(optimizer.COUNTERS, found.tolist(), strict=True))


# --- the formula


def scalar(w: float, gradients, decay: float, s: Optimizer) -> list[dict]:
    """One coordinate's updates in plain numbers, as the algorithm is stated: what each left, and what it cut."""
    m = v = 0.0
    k, left = 0, []
    for t, g in enumerate(gradients):
        if s.spam_reset_steps and t % s.spam_reset_steps == 0:
            m = v = 0.0
            k = 0
        k += 1
        cuts = v != 0 and k > s.spam_grace_steps
        ratio = g * g / v if cuts else 0.0
        spike = cuts and g * g > s.spam_threshold * v
        cut = math.copysign(math.sqrt(s.spam_threshold * v), g) if spike else g
        m = s.beta1 * m + (1 - s.beta1) * cut
        v = s.beta2 * v + (1 - s.beta2) * cut * cut
        m_hat, v_hat = m / (1 - s.beta1**k), v / (1 - s.beta2**k)
        n = s.spam_warmup_steps
        resets = t // s.spam_reset_steps if s.spam_reset_steps else 0
        warming = n and (resets or s.spam_first_warmup)
        size = 0.5 * (1 - math.cos(math.pi * min(k, n) / n)) if warming else 1.0
        w = w - s.lr * decay * w - s.lr * size * m_hat / (math.sqrt(v_hat) + s.epsilon)
        left.append({"w": w, "m": m, "v": v, "spike": spike, "ratio": ratio, "size": size, "resets": resets})
    return left


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"spam_warmup_steps": 0},
        {"spam_reset_steps": 0},
        {"spam_threshold": 1e6, "spam_reset_steps": 3},
        {"spam_threshold": 0.5, "beta1": 0.0},
        {"spam_first_warmup": False},
        {"spam_threshold": 0.1, "spam_grace_steps": 2},
        {"spam_threshold": 0.5, "spam_grace_steps": 2, "spam_reset_steps": 0, "spam_first_warmup": False},
    ],
    ids=str,
)
def test_every_update_is_that_of_the_formula_and_so_is_what_it_counts(changes):
    settings = Optimizer(**{**QUICK, **changes})
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.5)
    nn.init.constant_(model.bias, -0.7)
    optimizer = built(model, **changes)
    expected = [scalar(1.5, GRADIENTS, 0.3, settings), scalar(-0.7, GRADIENTS, 0.0, settings)]
    for g, *both in zip(GRADIENTS, *expected, strict=True):
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        optimizer.step()
        for p, want in zip(model.parameters(), both, strict=True):
            state = optimizer.state[p]
            assert p.item() == pytest.approx(want["w"], rel=1e-5)
            assert state["exp_avg"].item() == pytest.approx(want["m"], rel=1e-5)
            assert state["exp_avg_sq"].item() == pytest.approx(want["v"], rel=1e-5)
        found, want = counters(optimizer), both[0]
        assert found["clipped_coordinates"] == 2 * want["spike"]
        assert found["largest_square_ratio"] == pytest.approx(want["ratio"], rel=1e-5)
        assert found["optimizer_resets"] == want["resets"]
        assert found["update_factor"] == pytest.approx(want["size"], rel=1e-6)
    assert settings.spam_threshold > 20 or sum(one["spike"] for one in expected[0]) >= 3


def test_a_trace_by_hand():
    """θ = 4, β1 = β2 = 1/2, a reset every 3 updates, 2 to warm up, no decay, lr 1, ε as good as 0.

    t  g    cut   m       v        k  m̂      v̂        s    w
    0  1    1     1/2     1/2      1  1      1        1/2  -1/2
    1  4    √2    0.9571  1.25     2  1.2761 5/3      1    -1/2 - 1.2761 / 1.2910 = -1.4885
    2  1    1     0.9786  1.125    3  1.1183 9/7      1    -1.4885 - 1.1183 / 1.1339 = -2.4748
    3  100  100   50      5000     1  100    10000    1/2  -2.9748
    4  100  100   75      7500     2  100    10000    1    -3.9748

    (16 > 4 · 1/2, so √(4 · 1/2) = √2 of 4 is left; at t = 3 there is no v to compare 100 with; 10000 < 4 · 5000.)
    """
    changes = {"lr": 1.0, "beta1": 0.5, "beta2": 0.5, "epsilon": 1e-9, "spam_threshold": 4.0}
    changes |= {"spam_reset_steps": 3, "spam_warmup_steps": 2}
    model = nn.ParameterList([torch.zeros(1)])
    optimizer, left, cut = built(model, **changes), [], []
    for g in (1.0, 4.0, 1.0, 100.0, 100.0):
        model[0].grad = torch.tensor([g])
        optimizer.step()
        left.append(model[0].item())
        cut.append(counters(optimizer)["clipped_coordinates"])
    assert left == pytest.approx([-0.5, -1.488496, -2.474785, -2.974785, -3.974785], abs=2e-6)
    assert cut == [0, 1, 0, 0, 0]


def test_a_trace_by_hand_of_a_start_at_full_size_and_of_updates_in_which_nothing_is_cut():
    """The same settings, but for 2 updates of grace and a full size before the first reset.

    t  g    cut   m       v           k  m̂       v̂           s    w
    0  1    1     1/2     1/2         1  1       1           1    -1
    1  4    4     2.25    8.25        2  3       11          1    -1 - 3 / 3.3166 = -1.9045
    2  100  √33   3.9973  20.625      3  4.5683  23.5714     1    -1.9045 - 4.5683 / 4.8550 = -2.8455
    3  100  100   50      5000        1  100     10000       1/2  -3.3455
    4  10⁵  10⁵   50025   5000002500  2  66700   6666670000  1    -3.3455 - 0.8169 = -4.1624

    (16 > 4 · 1/2 and 10¹⁰ > 4 · 5000, and neither is cut; 10000 > 4 · 8.25, so √33 is left.)
    """
    changes = {"lr": 1.0, "beta1": 0.5, "beta2": 0.5, "epsilon": 1e-9, "spam_threshold": 4.0}
    changes |= {
        "spam_reset_steps": 3,
        "spam_warmup_steps": 2,
        "spam_first_warmup": False,
        "spam_grace_steps": 2,
    }
    model = nn.ParameterList([torch.zeros(1)])
    optimizer, left, found = built(model, **changes), [], []
    for g in (1.0, 4.0, 100.0, 100.0, 1e5):
        model[0].grad = torch.tensor([g])
        optimizer.step()
        left.append(model[0].item())
        found.append(counters(optimizer))
    assert left == pytest.approx([-1, -1.904534, -2.845478, -3.345478, -4.162382], abs=2e-6)
    assert [one["clipped_coordinates"] for one in found] == [0, 0, 1, 0, 0]
    # A spike that is let through is none: it is not compared.
    assert [one["largest_square_ratio"] for one in found] == pytest.approx([0, 0, 10000 / 8.25, 0, 0])
    assert disagreeing(lines(optimizer, **changes)) == []


def test_where_nothing_is_cut_reset_or_warmed_up_it_is_adamw():
    own, theirs = Model(), Model()
    off = {"spam_threshold": 1e30, "spam_reset_steps": 0, "spam_warmup_steps": 0}
    advance(own, built(own, **off), 5)
    adamw = torch.optim.AdamW(
        groups.decay_groups(theirs, 0.3), lr=0.1, betas=(0.8, 0.9), eps=1e-3, fused=True
    )
    advance(theirs, adamw, 5)
    for name, tensor in own.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-5, atol=1e-6)


# --- drawn entries


def mixed(x: int) -> int:
    """murmur3's finalizer, as published, of a 32-bit number."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def drawn(seed: int, number: int, resets: int, rows: int, columns: int, density: float) -> torch.Tensor:
    key = mixed(mixed(mixed(seed) ^ number) ^ mixed(resets))
    hashed = [[mixed(mixed(r * columns + c) ^ key) for c in range(columns)] for r in range(rows)]
    return torch.tensor(hashed, dtype=torch.float64) < density * 2**32


def test_only_drawn_entries_of_matrices_have_moments_and_others_are_drawn_after_a_reset():
    model = Model()
    optimizer, start = built(model, spam_density=0.3), model.matrix.weight.detach().clone()
    masks = [drawn(7, 1, resets, 40, 30, 0.3) for resets in range(2)]
    for updates, mask in ((3, masks[0]), (2, masks[1])):  # a reset at the fifth
        advance(model, optimizer, updates)
        optimizer_state = optimizer.state[model.matrix.weight]
        assert torch.equal(optimizer_state["exp_avg_sq"] != 0, mask)
        assert torch.equal(optimizer_state["exp_avg"] != 0, mask)
        if updates == 3:
            decayed = start * (1 - 0.1 * 0.3) ** 3
            torch.testing.assert_close(model.matrix.weight[~mask], decayed[~mask])
            assert not torch.isclose(model.matrix.weight[mask], decayed[mask]).any()
            advance(model, optimizer, 1)
    assert 0.2 < masks[0].double().mean() < 0.4 and 0.05 < (masks[0] & masks[1]).double().mean() < 0.13
    assert (optimizer.state[model.maps]["exp_avg_sq"] != 0).all()  # neither a matrix
    assert (optimizer.state[model.matrix.bias]["exp_avg_sq"] != 0).all()


def test_the_draw_hangs_on_the_seed_and_on_the_parameter():
    models = [nn.Sequential(nn.Linear(30, 40), nn.Linear(30, 40)) for _ in range(3)]
    having = []
    for model, seed in zip(models, (1, 1, 2), strict=True):
        optimizer = built(model, seed=seed, spam_density=0.5)
        advance(model, optimizer, 1)
        having.append([optimizer.state[layer.weight]["exp_avg"] != 0 for layer in model])
    assert torch.equal(having[0][0], having[1][0]) and torch.equal(having[0][1], having[1][1])
    assert not torch.equal(having[0][0], having[0][1]) and not torch.equal(having[0][0], having[2][0])


def test_a_part_of_a_matrix_has_the_draw_of_its_place_in_the_whole():
    """Rows 2 and 3, columns 10 to 14 of a matrix of 30 columns."""
    key, place = torch.tensor(123), spam.Place(columns=5, whole_columns=30, first_row=2, first_column=10)
    whole = spam.drawn(torch.arange(4 * 30).view(4, 30), key, spam.Place(30, 30, 0, 0), 0.5)
    assert torch.equal(spam.drawn(torch.arange(10).view(2, 5), key, place, 0.5), whole[2:4, 10:15])


# --- the ledger


def test_an_honest_optimizer_agrees():
    model = Model()
    optimizer = built(model, spam_density=0.5)
    cut = 0
    for seed in range(6):
        advance(model, optimizer, 1, seed)
        cut += counters(optimizer)["clipped_coordinates"]
    found = lines(optimizer, spam_density=0.5)
    assert disagreeing(found) == []
    assert found["optimizer"].in_effect == "spam" and found["optimizer_kernel"].in_effect == "plain"
    wanted = "cut above 20 v after 0 updates, reset every 4 updates, 3 to warm up, at the start too"
    assert found["spam"].requested == wanted
    assert found["spam"].in_effect == f"1 resets in 6 updates, {cut:.0f} gradients cut, size × 0.75 now"
    assert cut > 9
    assert "2 updates since the last reset, 2 expected" in found["spam"].how
    assert "entries without moments at resets, 1264 of 1264" in found["spam"].how  # of all parameters
    share = drawn(7, 1, 1, 40, 30, 0.5).double().mean()
    assert found["spam_density"].in_effect == f"{share:.4f} drawn, {share:.4f} have moments"
    # Two fp32 moments of 1200 + 24 + 40 entries, and two counts a parameter.
    assert found["optimizer_state"].in_effect == f"{8 + 8 * 3 / 1264:.2f} bytes a parameter"


def spikes(optimizer, model, *, at: int, steps: int) -> None:
    """Gradients of 1, and one of 1000 in update `at`."""
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if step == at:
            model.matrix.bias.grad[3] = 1000.0
        optimizer.step()
        counters(optimizer)


def test_spikes_that_are_cut_are_told_and_those_that_are_not_disagree(monkeypatch):
    model = Model()
    optimizer = built(model)
    spikes(optimizer, model, at=2, steps=3)
    found = lines(optimizer)
    assert disagreeing(found) == [] and "1 gradients cut" in found["spam"].in_effect
    assert f"{1000**2 / (1 - 0.9**2):.4g}" in found["spam"].how  # v = 1 - β2² after two gradients of 1
    monkeypatch.setattr(spam.torch, "clamp", lambda g, *_: g)  # as if there were no cutting
    model = Model()
    optimizer = built(model)
    spikes(optimizer, model, at=2, steps=3)
    assert disagreeing(lines(optimizer)) == ["spam"]


def test_a_cut_in_the_grace_disagrees():
    """The spike is in the third update since the start: late enough for 2 updates of grace, and not for 3."""
    for grace, wrong in ((2, []), (3, ["spam"])):
        model = Model()
        optimizer = built(model, spam_grace_steps=grace)
        optimizer.param_groups[0]["grace_steps"] = optimizer.param_groups[1]["grace_steps"] = (
            0  # as if it were off
        )
        spikes(optimizer, model, at=2, steps=4)
        found = lines(optimizer, spam_grace_steps=grace)
        assert disagreeing(found) == wrong and found["spam"].how.endswith("the earliest cut: update 3")
    model = Model()
    optimizer = built(model, spam_grace_steps=3)
    spikes(optimizer, model, at=2, steps=4)
    found = lines(optimizer, spam_grace_steps=3)
    assert disagreeing(found) == [] and found["spam"].how.endswith("the earliest cut: none")


def test_resets_that_do_not_come_disagree():
    model = Model()
    optimizer = built(model, spam_reset_steps=0)
    advance(model, optimizer, 4)
    assert disagreeing(lines(optimizer)) == []  # none was due
    advance(model, optimizer, 1)
    assert disagreeing(lines(optimizer)) == ["spam"]


def keeping(p, g, m, v, scalars, *others) -> None:
    """Plain operations that always keep moments."""
    scalars = scalars.clone()
    scalars[:, 1] = 1.0
    spam.plain(p, g, m, v, scalars, *others)


def test_a_kernel_that_never_zeroes_moments_disagrees_and_so_does_one_that_zeroes_only_some(monkeypatch):
    model, where = Model(), torch.where
    optimizer = built(model)
    with monkeypatch.context() as patched:
        patched.setattr(spam, "kernel", lambda _: keeping)
        advance(model, optimizer, 4)
        assert lines(optimizer)["spam"].agrees  # none was due
        advance(model, optimizer, 1)
    found = lines(optimizer)["spam"]
    assert not found.agrees and "entries without moments at resets, 0 of 1264" in found.how

    class Kept:
        """A module torch in which nothing is zeroed because it is not kept."""

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def where(condition, value, other):
            is_reset = condition.dim() == 0 and isinstance(other, float) and value.dim() == 2
            return value if is_reset else where(condition, value, other)

    model = Model()
    optimizer = built(model)
    monkeypatch.setattr(spam, "torch", Kept())
    advance(model, optimizer, 5)  # of the matrix, 1200 entries, moments stay
    found = lines(optimizer)["spam"]
    assert not found.agrees and "entries without moments at resets, 64 of 1264" in found.how


def test_without_triton_a_gpu_is_refused_before_the_first_update(monkeypatch):
    class OnAGpu:
        """As much of a tensor as is asked."""

        is_cuda = True

        @staticmethod
        def is_contiguous():
            return True

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "engine.kernels.spam", raising=False)
    monkeypatch.delattr(kernels, "spam", raising=False)
    own = spam.kernel
    monkeypatch.setattr(spam, "kernel", lambda _: own(OnAGpu()))
    with pytest.raises(ConfigError, match="optimizer = 'spam': needs triton on a GPU"):
        built(Model())


def test_entries_that_are_not_drawn_and_another_optimizer_disagree():
    model = Model()
    optimizer = built(model)
    advance(model, optimizer, 1)
    assert disagreeing(lines(optimizer, spam_density=0.5)) == ["spam_density"]
    adamw = torch.optim.AdamW(groups.decay_groups(model, 0.3), fused=True)
    advance(model, adamw, 1)
    assert {"optimizer", "spam"} <= set(disagreeing(lines(adamw)))


# --- what an optimizer must bear


@pytest.mark.parametrize("gradient", [1.0, math.nan])
@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_refused_update_changes_nothing_and_counts_nothing(gradient, after):
    """Before the first, in between, and where a reset is due."""
    model = Model()
    optimizer = built(model, spam_density=0.7)
    advance(model, optimizer, after)
    counters(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    kept = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    step_unless(torch.tensor(1.0), optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for p, state in kept.items():
        assert all(torch.equal(state[key], value) for key, value in optimizer.state[p].items())
    found = counters(optimizer)
    assert (found["clipped_coordinates"], found["largest_square_ratio"], found["optimizer_resets"]) == (
        0,
        0,
        0,
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step_unless(torch.tensor(0.0), optimizer)
    assert not torch.equal(model.maps, before[0])
    assert counters(optimizer)["optimizer_resets"] == (after == 4)


def test_a_checkpoint_brings_counts_and_draw_back(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    checkpoints, model, other = Checkpoints("name", ONE), Model(1), Model(2)
    optimizer, resumed = (built(m, spam_density=0.6) for m in (model, other))
    advance(model, optimizer, 3)
    checkpoints.save(3, model, optimizer, tmp_path, {})
    assert checkpoints.restore(other, resumed, tmp_path, {}) == 3
    for m, o in ((model, optimizer), (other, resumed)):
        counters(o)
        advance(m, o, 3, seed=5)  # over a reset
    assert_same_weights(model.state_dict(), other.state_dict())
    assert counters(optimizer) == counters(resumed)


def test_state_in_host_memory_changes_no_bit_and_no_count():
    models = Model(), Model()
    plain = built(models[0], spam_density=0.5)
    moved = offload(built(models[1], spam_density=0.5), chunk_bytes=8 * 40)
    for model, optimizer in zip(models, (plain, moved), strict=True):
        advance(model, optimizer, 5)
    assert moved.offload.chunks > 2
    assert_same_weights(models[0].state_dict(), models[1].state_dict())
    assert counters(plain) == counters(moved)
    assert disagreeing(lines(moved, spam_density=0.5, optimizer_offload=True)) == []
