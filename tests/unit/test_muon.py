"""Muon: its formula against one written out, what it updates, and that everything an optimizer must bear it bears."""

import math

import pytest
import torch
import torch.nn as nn
from engine_runs import assert_same_weights, column, ledger, read_json, untimed, weights

from engine import optimizers, plan
from engine.checkpoint import Checkpoints
from engine.config import Optimizer, resolve
from engine.errors import ConfigError
from engine.guards import step_unless
from engine.offload import offload
from engine.optimizers import groups, muon
from engine.parallel import Ranks

MUON = {"optimizer": "muon", "muon_precision": "fp32"}
ONE = Ranks(0, 1, torch.device("cpu"))


class Model(nn.Module):
    """Two blocks of a wide and a tall matrix and a bias; an embedding, and three-dimensional maps in a block."""

    def __init__(self, seed: int = 1):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(3, 6), "out": nn.Linear(6, 3, bias=False)}) for _ in range(2)
        )
        self.layers[0].maps = nn.Parameter(torch.randn(2, 3, 4))


def built(model: nn.Module, **changes):
    settings = Optimizer(**{**MUON, **changes})
    return muon.build(groups.of(model, settings), settings)


def advance(model: nn.Module, optimizer, steps: int, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
        optimizer.zero_grad()


# --- the formula


def written_out(x: list[list[float]]) -> list[list[float]]:
    """Five Newton–Schulz steps on a matrix of plain numbers, as the source states them."""

    def product(p, q):
        return [
            [sum(a * b for a, b in zip(row, col, strict=True)) for col in zip(*q, strict=True)] for row in p
        ]

    def turned(p):
        return [list(row) for row in zip(*p, strict=True)]

    tall = len(x) > len(x[0])
    x = turned(x) if tall else x
    size = math.sqrt(sum(v * v for row in x for v in row))
    x = [[v / size for v in row] for row in x]
    for _ in range(5):
        gram = product(x, turned(x))
        twice = product(product(gram, gram), x)
        once = product(gram, x)
        x = [
            [3.4445 * v - 4.7750 * o + 2.0315 * t for v, o, t in zip(*rows, strict=True)]
            for rows in zip(x, once, twice, strict=True)
        ]
    return turned(x) if tall else x


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (1, 1), (4, 4)])
def test_newton_schulz_is_what_is_written_out_in_plain_numbers(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = muon.orthogonal(x)
    torch.testing.assert_close(found, torch.tensor(written_out(x.tolist()), dtype=torch.float64))
    assert found.shape == shape


def test_singular_values_come_near_one_and_directions_stay():
    x = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ muon.orthogonal(x) @ v.mT  # U, V of each matrix of its own
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.5 and values.max() < 1.3
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-3


def test_a_gradient_of_nothing_moves_nothing():
    assert torch.equal(muon.orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_three_steps_are_those_of_the_formula():
    """Of a tall matrix, which decays and is scaled by √(6/3); of a wide one, which is not scaled."""
    model, lr, decay, momentum = Model(), 0.1, 0.3, 0.8
    optimizer = built(model, lr=0.01, muon_lr=lr, muon_weight_decay=decay, muon_momentum=momentum)
    draw = torch.Generator().manual_seed(0)
    tall, wide = model.layers[0]["up"].weight, model.layers[1]["out"].weight
    expected = {p: [p.detach().clone().double(), torch.zeros_like(p).double()] for p in (tall, wide)}
    for group in optimizer.param_groups:  # as the step sets them
        group["lr"] = 0.01 * group.get("lr_factor", 1.0)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        for p, (w, m) in expected.items():
            g = p.grad.double()
            m.mul_(momentum).add_((1 - momentum) * g)
            made = torch.tensor(written_out(((1 - momentum) * g + momentum * m).tolist()))
            scale = math.sqrt(2) if p is tall else 1.0
            w.sub_(lr * decay * w).sub_(lr * scale * made.double())
        optimizer.step()
    for p, (w, _) in expected.items():
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")
def test_it_is_torchs_own_where_there_is_one():
    models = Model(), Model()
    matrices = [p for p in models[1].layers.parameters() if p.dim() == 2]
    theirs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95)
    own = built(models[0], lr=0.02, muon_lr=0.02, muon_weight_decay=0.1, muon_precision="bf16")
    for model, optimizer in zip(models, (own, theirs), strict=True):
        advance(model, optimizer, 3)
    for (name, p), q in zip(models[0].layers.named_parameters(), models[1].layers.parameters(), strict=True):
        if p.dim() == 2:  # theirs multiplies one matrix at a time
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4, msg=name)


def test_a_map_of_each_head_is_a_matrix_of_its_own():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    together = muon.orthogonal(torch.stack([x, 2 * x]))
    for head in range(2):
        for scaled in range(2):
            torch.testing.assert_close(together[scaled, head], muon.orthogonal(x[head]), rtol=1e-4, atol=1e-6)


def test_the_rest_is_adamws_bit_for_bit():
    models = Model(), Model()
    own = built(models[0], lr=0.02)
    adamw = torch.optim.AdamW(models[1].parameters(), lr=0.02, betas=(0.9, 0.95), fused=True)
    for group in own.param_groups:
        group["weight_decay"] = 0.0
    adamw.param_groups[0]["weight_decay"] = 0.0
    for model, optimizer in zip(models, (own, adamw), strict=True):
        advance(model, optimizer, 3)
    first, second = models
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert torch.equal(first.layers[0]["up"].bias, second.layers[0]["up"].bias)
    assert not torch.equal(first.layers[0]["up"].weight, second.layers[0]["up"].weight)


# --- what goes where


def test_blocks_matrices_are_muons_and_have_their_own_lr_and_decay():
    model = Model()
    found = groups.of(
        model, Optimizer(**MUON, lr=0.001, muon_lr=0.03, weight_decay=0.2, muon_weight_decay=0.4)
    )
    names = {p: n for n, p in model.named_parameters()}
    assert [(g["name"], sorted(names[p] for p in g["params"]), g["weight_decay"]) for g in found] == [
        (
            "matrices",
            ["layers.0.maps", *(f"layers.{i}.{m}.weight" for i in (0, 1) for m in ("out", "up"))],
            0.4,
        ),
        ("decay", ["embedding.weight"], 0.2),
        ("no_decay", ["layers.0.up.bias", "layers.1.up.bias"], 0.0),
    ]
    assert found[0]["lr_factor"] * 0.001 == pytest.approx(0.03)


def test_every_group_follows_the_schedule_with_its_own_peak(lab):
    run = lab.train(**MUON, lr=0.002, muon_lr=0.05, warmup_steps=3, lr_rule="linear", lr_batch_size=2)
    lines = ledger(run)
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert (lines["lr"]["requested"], lines["lr"]["in_effect"]) == ("0.004 = 0.002 × (4 / 2)", "0.004")
    assert "times 25 in the group matrices" in lines["lr"]["how"]
    assert column(run, "lr")[2] == pytest.approx(0.004)


def test_a_group_without_its_own_lr_disagrees(lab, monkeypatch):
    own = groups.of
    monkeypatch.setattr(
        groups,
        "of",
        lambda *a, **k: [{x: v for x, v in g.items() if x != "lr_factor"} for g in own(*a, **k)],
    )
    assert [w for w, line in ledger(lab.train(**MUON)).items() if not line["agrees"]] == ["lr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"muon_lr": 0.1},
            "muon_lr = 0.1: would do nothing with optimizer = adamw; it needs optimizer = muon",
        ),
        ({"optimizer": "muon", "muon_lr": 0}, "muon_lr = 0: must be a number > 0"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, "muon_momentum = 1.0: must be a number ≥ 0 and < 1"),
        ({"optimizer": "muon", "momentum": 0.5}, "momentum = 0.5: would do nothing with optimizer = muon"),
    ],
)
def test_settings_that_would_do_nothing_or_are_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        resolve(changes, "test")
    assert message in str(caught.value)


# --- the ledger


def lines(optimizer, **changes) -> dict:
    return {line.what: line for line in optimizers.lines(Optimizer(**{**MUON, **changes}), optimizer)}


def test_the_ledger_says_what_went_where_and_what_the_state_takes():
    model = Model()
    optimizer = built(model)
    advance(model, optimizer, 1)
    found = lines(optimizer)
    assert [what for what, line in found.items() if not line.agrees] == []
    assert found["muon"].in_effect == "5 of 5 matrices of the blocks, in float32"
    # 4 matrices of 18 elements, maps of 24; an embedding of 15, two biases of 6
    assert found["muon"].how.endswith("Muon: 96 parameters, AdamW: 27 of 3 other tensors")
    # one fp32 moment of 96, two of 27, three step counts: (4·96 + 8·27 + 3·4) / 123
    assert found["optimizer_state"].in_effect == f"{612 / 123:.2f} bytes a parameter"
    assert found["weight_decay"].in_effect == "0.1 of embeddings, 0.01 of matrices, 0 of vectors"


def test_the_ledger_tells_what_was_silently_off(monkeypatch):
    model = Model()
    optimizer = built(model, muon_precision="bf16")
    advance(model, optimizer, 1)
    assert [w for w, line in lines(optimizer).items() if not line.agrees] == [
        "muon"
    ]  # had fp32 been asked for
    adamw = torch.optim.AdamW(groups.decay_groups(model, 0.1), fused=True)
    advance(model, adamw, 1)
    found = lines(adamw)
    assert {"optimizer", "muon"} <= {what for what, line in found.items() if not line.agrees}
    skipped = Model()
    optimizer = built(skipped)
    monkeypatch.setattr(optimizer, "_update", lambda alike, group: None)
    advance(skipped, optimizer, 1)
    assert lines(optimizer)["muon"].in_effect == "0 of 5 matrices of the blocks, in none yet"


# --- what an optimizer must bear


@pytest.mark.parametrize("gradient", [1.0, math.nan])
def test_a_refused_step_changes_nothing(gradient):
    model = Model()
    optimizer = built(model)
    advance(model, optimizer, 2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    moments = [
        optimizer.state[p]["momentum_buffer"].clone() for p in model.layers.parameters() if p.dim() > 1
    ]
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    step_unless(torch.tensor(1.0), optimizer)
    assert_same_weights(model.state_dict(), before)
    kept = [optimizer.state[p]["momentum_buffer"] for p in model.layers.parameters() if p.dim() > 1]
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))
    step_unless(torch.tensor(0.0), optimizer)
    assert not torch.equal(model.layers[0]["up"].weight, before["layers.0.up.weight"])


def test_a_first_step_that_is_refused_leaves_a_momentum_of_nothing():
    model = Model()
    optimizer = built(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    step_unless(torch.tensor(1.0), optimizer)
    assert not optimizer.state[model.layers[0]["up"].weight]["momentum_buffer"].any()


def test_a_checkpoint_brings_every_state_tensor_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    checkpoints, model, other = Checkpoints("name", ONE), Model(1), Model(2)
    optimizer, resumed = built(model), built(other)
    advance(model, optimizer, 3)
    checkpoints.save(3, model, optimizer, tmp_path, {})
    assert checkpoints.restore(other, resumed, tmp_path, {}) == 3
    for m, o in ((model, optimizer), (other, resumed)):
        advance(m, o, 2, seed=5)
    assert_same_weights(model.state_dict(), other.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(v, resumed.state[q][k]) for k, v in optimizer.state[p].items())


def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(lab, interrupt):
    settings = {**MUON, "muon_precision": "bf16", "checkpoint_interval": 2}
    whole = lab.train(run="whole", **settings)
    interrupt(5, run="cut", **settings)
    again = lab.train(run="cut", **settings)
    assert untimed(again / "steps.csv") == untimed(whole / "steps.csv")
    assert_same_weights(weights(again), weights(whole))


def test_state_in_host_memory_changes_no_bit():
    models = Model(), Model()
    plain = built(models[0])
    moved = offload(built(models[1]), chunk_bytes=8 * 40)
    for model, optimizer in zip(models, (plain, moved), strict=True):
        advance(model, optimizer, 3)
    assert moved.offload.chunks > 2
    assert_same_weights(models[0].state_dict(), models[1].state_dict())
    assert lines(moved)["muon"].agrees


@pytest.mark.parametrize(
    "changes",
    [{}, {"micro_batch_size": 2, "precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused"}],
    ids=str,
)
def test_the_memory_plan_is_what_a_real_run_measures(lab, changes):
    sizes = {"layers": 2, "heads": 2, "width": 128, "context": 16, "batch_size": 4, "steps": 4}
    settings = {**sizes, **MUON, "muon_precision": "bf16", **changes}
    run = lab.train(**settings)
    planned = plan.estimate(lab.config(**settings), 256, "cpu", 1)
    assert planned.peak / 2**30 == pytest.approx(read_json(run / "metrics.json")["peak_memory_gib"], rel=0.02)
    parameters = 2 * (12 * 128**2)
    assert planned.optimizer == pytest.approx(4 * parameters + 8 * (256 + 16) * 128, rel=0.02)


def test_latent_attention_and_activation_checkpointing_are_muons_too(lab):
    run = lab.train(**MUON, attention_form="latent", latent_width=8, activation_checkpointing="full")
    lines = ledger(run)
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["muon"]["in_effect"] == "14 of 14 matrices of the blocks, in float32"
