"""Entropy, reciprocity and the signal-to-noise of heads: by hand, for all kinds of attention, and in a run."""

import itertools
import math
from statistics import median

import pytest
import torch
from engine_runs import ledger, rows
from test_model_parts import drawn, latent, normal, settings

from engine import attention_metrics
from engine.attention_metrics import Layer
from engine.errors import ConfigError
from engine.head_snr import head_snr
from engine.models.attention import MultiHead
from engine.models.latent import Latent
from engine.models.positions import Rotary

LATENT = {"attention_form": "latent", "latent_width": 8}
KINDS = {
    "multi_head": {},
    "latent": LATENT,
    "one-query": {**LATENT, "latent_query": "shared"},
    "reciprocal": {**LATENT, "attention": "manual", "reciprocal_alpha": 0.5, "reciprocal_window": 3},
}


def correlation(x: list[float], y: list[float]) -> float:
    a, b = sum(x) / len(x), sum(y) / len(y)
    xy = sum((p - a) * (q - b) for p, q in zip(x, y, strict=True))
    return xy / math.sqrt(sum((p - a) ** 2 for p in x) * sum((q - b) ** 2 for q in y))


def test_entropy_by_hand():
    """Rows that see one, two and three tokens: all alike, and one of which all but one score is -∞ as good as."""
    scores = torch.zeros(1, 2, 3, 3)
    scores[0, 1, 2] = torch.tensor([0.0, 99.0, 0.0])
    layer = Layer(window=2)
    layer.add(torch.randn(1, 2, 3, 3), scores)
    assert layer.figures()["entropy"] == pytest.approx((math.log(2) + math.log(3) + math.log(2)) / 6)


@pytest.mark.parametrize("window", [1, 2, 9])
def test_reciprocity_by_hand(window):
    """Of the pairs within the window, of all sequences together, whether given at once or one by one."""
    scores = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(2))
    of_heads = []
    for h in range(2):
        pairs = [(b, i, j) for b in range(3) for i in range(5) for j in range(i) if i - j <= window]
        of_heads.append(
            correlation(
                [scores[b, h, i, j].item() for b, i, j in pairs],
                [scores[b, h, j, i].item() for b, i, j in pairs],
            )
        )
    whole, single = Layer(window), Layer(window)
    whole.add(scores, scores)
    for one in scores.split(1):
        single.add(one, one)
    for layer in (whole, single):
        assert layer.figures()["reciprocity"] == pytest.approx(sum(of_heads) / 2, abs=1e-6)


def test_what_reciprocity_means():
    """1 where scores are symmetric, -1 where antisymmetric, nothing where all are equal."""
    s = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    for scores, expected in (
        (s + s.mT, pytest.approx(1)),
        (s - s.mT, pytest.approx(-1)),
        (torch.ones_like(s), None),
    ):
        layer = Layer(window=5)
        layer.add(scores, scores)
        assert layer.figures()["reciprocity"] == expected


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_that_are_looked_at_are_those_that_attention_weighs_by(kind, positions):
    changes = {"positions": positions, "bias": False, "heads": 2, "width": 16} | KINDS[kind]
    s = settings(**changes)
    rotary = Rotary(16, 8) if positions == "rotary" else None  # heads and latents are 8 wide
    a, x = drawn((Latent if "latent" in s.attention_form else MultiHead)(s, rotary), 0.4), normal(2, 7, 16)
    plain, scores = a.looked_at(x)
    p = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    is_latent = isinstance(a, Latent)
    y = a.widened(p @ a.latents(x)[2]) if is_latent else (p @ a.heads_of(x)[2]).transpose(1, 2)
    torch.testing.assert_close(a.out(y.reshape(2, 7, 16)), a(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(plain, scores) == (kind != "reciprocal")
    with torch.autocast("cpu", torch.bfloat16):
        assert {part.dtype for part in a.looked_at(x)} == {torch.float32}


def test_head_snr_is_the_median_of_a_heads_own_weights():
    a = drawn(MultiHead(settings(heads=2, width=4, bias=True), None))
    state = {
        p: {"exp_avg": normal(*p.shape), "exp_avg_sq": normal(*p.shape).square()} for p in a.parameters()
    }
    found = head_snr(a, state, gamma=1.5, delta=0.25, epsilon=0.1)
    for h in range(2):
        values = []
        for p, mine in (
            (a.qkv.weight, lambda r, c, h=h: r // 6 == h),
            (a.out.weight, lambda r, c, h=h: c // 2 == h),
        ):
            m, v = state[p]["exp_avg"], state[p]["exp_avg_sq"]
            for r in range(p.size(0)):
                for c in range(p.size(1)):
                    if mine(r, c):
                        values.append(abs(m[r, c].item()) ** 1.5 / (v[r, c].item() + 0.1) ** 0.25)
        assert len(values) == 6 * 4 + 4 * 2
        assert found[h].item() == pytest.approx(sorted(values)[(len(values) - 1) // 2], rel=1e-5)
        assert found[h].item() <= median(values)


def test_head_snr_of_latent_attention_takes_what_heads_have_of_their_own():
    """A head whose moments are ten times the others' stands out tenfold, wherever its weights are."""
    for changes in ({}, {"latent_query": "shared"}, {"latent_value": "shared"}):
        a = latent(**changes)
        state = {}
        for p, of_heads in a.weights_of_heads():
            m, v = torch.ones_like(p), torch.ones_like(p)
            numbers = of_heads(torch.arange(p.numel(), dtype=torch.float64).view_as(p))[1].long()
            m.view(-1)[numbers] = 10.0
            state[p] = {"exp_avg": m, "exp_avg_sq": v}
        assert head_snr(a, state, epsilon=0.0).tolist() == [1.0, 10.0]
        names = {n for n, p in a.named_parameters() if any(p is q for q, _ in a.weights_of_heads())}
        assert names == {
            "out.weight",
            *({"query.weight", "query_map"} if changes.get("latent_query") != "shared" else ()),
            *({"value_map"} if changes.get("latent_value") != "shared" else ()),
        }
        del state[p]
        assert head_snr(a, state) is None


def test_head_snr_is_of_weights_that_are_not_pruned():
    """Of either head's weights two thirds are 0, with moments that are 0 or fade; of one head all, then of both."""
    a = drawn(MultiHead(settings(heads=2, width=4), None))
    state = {p: {"exp_avg": 3 * torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)} for p in a.parameters()}
    with torch.no_grad():
        for p, _ in a.weights_of_heads():
            pruned = torch.arange(p.numel()).view_as(p) % 3 > 0
            p[pruned] = 0.0
            for moment in state[p].values():
                moment[pruned] *= torch.arange(int(pruned.sum())) % 2 * 1e-6
        assert head_snr(a, state, epsilon=0.0).tolist() == [3.0, 3.0]
        a.qkv.weight[:6], a.out.weight[:, :2] = 0.0, 0.0
        found = head_snr(a, state, epsilon=0.0).tolist()
        assert math.isnan(found[0]) and found[1] == 3.0


def test_the_part_of_an_output_projection_that_reads_a_head():
    a = latent()
    weight, of_heads = a.weights_of_heads()[-1]
    other = weight.detach().clone()
    other[:, 4:] = 0.0  # of the second of two heads, 4 wide
    changed = (of_heads(weight) != of_heads(other)).all(1)
    assert changed.tolist() == [False, True]


# --- in a run

RUN = {"eval_interval": 2, "attention_sequences": 3, "reciprocity_window": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_a_row_at_each_evaluation_and_trains_as_without(lab, kind):
    plain = lab.train(**KINDS[kind], eval_interval=2)
    losses = [row["train_loss"] for row in rows(plain / "steps.csv")]
    assert not (plain / attention_metrics.AttentionMetrics.FILE).exists()
    run = lab.train(**KINDS[kind], **RUN)
    assert [row["train_loss"] for row in rows(run / "steps.csv")] == losses
    found = rows(run / attention_metrics.AttentionMetrics.FILE)
    assert (
        [row["step"] for row in found] == [row["step"] for row in rows(run / "evals.csv")] == ["1", "3", "5"]
    )
    for row in found:
        for layer in range(2):
            assert 0 < float(row[f"entropy_{layer}"]) < sum(math.log(i + 1) for i in range(16)) / 16 + 1e-6
            assert -1 <= float(row[f"reciprocity_{layer}"]) <= 1
            assert row[f"weakest_head_{layer}"] in ("0", "1") and float(row[f"weakest_head_snr_{layer}"]) > 0
    line = ledger(run)["attention_sequences"]
    assert line["agrees"] and line["in_effect"] == "3 at 3 of 3 evaluations"


def test_a_compiled_run_is_looked_at_uncompiled_and_compiles_nothing_more(lab, recwarn):
    torch._dynamo.reset()  # what other tests compiled in this process is not recompiled here
    run = lab.train(**RUN, compile="blocks", activation_checkpointing="full")
    assert len(rows(run / attention_metrics.AttentionMetrics.FILE)) == 3
    assert "0 recompiles" in ledger(run)["compile"]["in_effect"]


def test_moments_that_an_optimizer_does_not_keep_leave_cells_empty(lab):
    run = lab.train(**RUN, optimizer="sgd", lr=0.1)
    assert {row["weakest_head_0"] for row in rows(run / attention_metrics.AttentionMetrics.FILE)} == {""}


def test_what_cannot_be_measured_is_refused(lab):
    with pytest.raises(
        ConfigError, match="reciprocity_window = 4: would do nothing with attention_sequences = 0"
    ):
        lab.config(reciprocity_window=4)
    with pytest.raises(ConfigError, match="attention_sequences = 2: not with tensor_parallel = 2"):
        lab.config(attention_sequences=2, tensor_parallel=2)
    with pytest.raises(ConfigError, match="needs 900 × 16 validation tokens, and there are"):
        lab.train(attention_sequences=900)


def test_a_resumed_run_has_every_row_once(lab, interrupt):
    settings = {**RUN, "checkpoint_interval": 3}
    whole = rows(lab.train(run="whole", **settings) / attention_metrics.AttentionMetrics.FILE)
    interrupt(4, run="cut", **settings)
    again = lab.train(run="cut", **settings)
    assert rows(again / attention_metrics.AttentionMetrics.FILE) == whole and len(whole) == 3
    assert ledger(again)["attention_sequences"]["agrees"]


def test_heads_that_are_pruned_away_are_not_the_weakest(lab, monkeypatch):
    turns = itertools.cycle([torch.tensor([math.nan, 2.0]), torch.tensor([math.nan, math.nan])])
    monkeypatch.setattr(attention_metrics, "head_snr", lambda *_: next(turns))
    row = rows(lab.train(**RUN) / attention_metrics.AttentionMetrics.FILE)[0]
    assert (row["weakest_head_0"], row["weakest_head_snr_0"]) == ("1", "2.0")
    assert (row["weakest_head_1"], row["weakest_head_snr_1"]) == ("", "")


def test_a_pruned_run_has_heads_that_stand_out(lab):
    run = lab.train(**RUN, pruning="state", sparsity=0.9, pruning_interval=1, pruning_hold=3, steps=8)
    assert float(rows(run / attention_metrics.AttentionMetrics.FILE)[-1]["weakest_head_snr_0"]) > 1e-3
