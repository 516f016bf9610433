"""Latent attention beyond its formula (test_model_parts.py): what heads may share, what it costs, and the reciprocal
term by fused kernels."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_model_parts import drawn, latent, normal, settings
from torch.utils.flop_counter import FlopCounterMode

from engine import dry_gpu, observed, plan
from engine.config import resolve
from engine.errors import ConfigError
from engine.models import gpt, reciprocal
from engine.models.attention import MultiHead, attend, kernel_problems, weigh
from engine.models.latent import Latent
from engine.operations import Operations, attention_kernels
from engine.probes import training_flops

FLEX = {
    "attention_form": "latent",
    "latent_width": 16,
    "attention": "flex",
    "reciprocal_alpha": 0.5,
    "reciprocal_window": 3,
    "precision": "bf16",
    "compile": "model",
}


# --- what heads share


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@torch.no_grad()
def test_a_shared_query_is_the_same_query_for_each_head(alpha):
    """As of a layer whose heads each have it: the first L features of each head's query are it, and A takes them."""
    changes = {"latent_width": 3, "reciprocal_alpha": alpha, "reciprocal_window": 4}
    shared, own, x = latent(latent_query="shared", **changes), latent(**changes), normal(2, 9, 8)
    for name in ("down.weight", "value_map", "out.weight"):
        own.get_parameter(name).copy_(shared.get_parameter(name))
    own.query.weight.zero_()
    own.query.weight.view(2, 4, 8)[:, :3] = shared.query.weight
    own.query_map.copy_(torch.eye(4, 3).expand(2, 4, 3))
    torch.testing.assert_close(shared(x), own(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_shared_map_of_the_values_is_the_same_for_each_head():
    shared, own, x = latent(latent_value="shared"), latent(), normal(2, 9, 8)
    for name in ("query.weight", "query_map", "down.weight", "out.weight"):
        own.get_parameter(name).copy_(shared.get_parameter(name))
    own.value_map.copy_(shared.value_map.expand(2, -1, -1))
    assert shared.value_map.shape == (1, 3, 4)
    torch.testing.assert_close(shared(x), own(x), rtol=1e-5, atol=1e-5)


def test_all_heads_alike_are_refused():
    both = {"attention_form": "latent", "latent_query": "shared", "latent_value": "shared", "heads": 2}
    with pytest.raises(ConfigError, match="all 2 heads would be one and the same"):
        resolve(both, "test")
    resolve(both | {"heads": 1}, "test")
    with pytest.raises(ConfigError, match="latent_query = 'shared': would do nothing with attention_form"):
        resolve({"latent_query": "shared"}, "test")


def test_the_parameters_of_a_layer_with_shared_maps():
    """2·E² + 2·E·L, H·D·L for each map that heads have of their own, and D·L for one that they share."""
    e, size = 768, 128
    for changes, expected in (
        ({"latent_query": "shared"}, e * size + 2 * e * size + 12 * 64 * size + e * e),
        ({"latent_value": "shared"}, e * e + 2 * e * size + 12 * 64 * size + 64 * size + e * e),
    ):
        s = resolve({"heads": 12, "width": e, "attention_form": "latent"} | changes, "test").model
        with torch.device("meta"):
            assert sum(p.numel() for p in Latent(s, None).parameters()) == expected


# --- what it is, and what it costs


@torch.no_grad()
def test_an_exact_factorisation_is_multi_head_attention_of_low_rank():
    """Keys of all heads that are maps of one latent: k[h] = A[h] kL √(D / L), and values v[h] = U[h]ᵀ vL."""
    mla, vanilla, x = latent(latent_width=3), MultiHead(settings(bias=False), None), normal(2, 9, 8)
    k, v = mla.down.weight.chunk(2)
    rows = vanilla.qkv.weight.view(2, 3, 4, 8)
    for h in range(2):
        rows[h, 0] = mla.query.weight.view(2, 4, 8)[h]
        rows[h, 1] = mla.query_map[h] @ k * math.sqrt(4 / 3)
        rows[h, 2] = mla.value_map[h].T @ v
    vanilla.out.weight.copy_(mla.out.weight)
    torch.testing.assert_close(mla(x), vanilla(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_alpha_zero_is_latent_attention_bit_for_bit():
    """By its kernel and written out, whatever the window; and the reciprocal code adds exactly nothing."""
    x = normal(2, 9, 8)
    for attention in ("sdpa", "manual"):
        pure = latent(attention=attention)
        assert torch.equal(pure(x), latent(attention=attention, reciprocal_window=3)(x))
        q, k, v = pure.latents(x)
        plain = pure.widened(attend(q, k, v, implementation=attention, dropout=0.0))
        assert torch.equal(pure(x), pure.out(plain.reshape(2, 9, 8)))
    assert torch.equal(pure.widened(weigh(pure.scores(q, k, q), v, 0.0)), plain)


@torch.no_grad()
def test_the_reciprocal_term_sees_nothing_that_comes_later():
    """Bit for bit: the term of i and j ≤ i holds the query of j and the key of i."""
    a, x = latent(reciprocal_alpha=0.9, reciprocal_window=4), normal(1, 9, 8)
    for position in range(9):
        other = x.clone()
        other[:, position:] = normal(1, 9 - position, 8, seed=5)
        before, after = a(x), a(other)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position], after[:, position])


def test_keys_and_values_are_never_widened():
    """A token's products: E² + 2·E·L + H·D·L for the latents, H·L·D + E² after; a pair's: 2·H·L, by all T²."""
    a, (b, t, e, h, d, size) = latent(latent_width=3), (2, 9, 8, 2, 4, 3)
    with FlopCounterMode(display=False) as counted:
        a(normal(b, t, e))
    tokens = 2 * e * e + 2 * e * size + 2 * h * d * size
    assert counted.get_total_flops() == 2 * b * (t * tokens + t * t * 2 * h * size)


def test_the_flops_of_training_count_the_width_of_the_latents():
    m = resolve({"attention_form": "latent", "layers": 2, "heads": 4, "latent_width": 64, "context": 10}, "t")
    assert training_flops(1000, m.model, 30) == 30 * (6 * 1000 + 12 * 2 * (4 * 64) * 10)
    m = resolve(m.flat | {"latent_query": "shared"}, "t")
    assert training_flops(1000, m.model, 30) == 30 * (6 * 1000 + 12 * 2 * 64 * 10)


@pytest.mark.parametrize(
    ("implementation", "dtype", "repeated"),
    [
        ("sdpa", torch.bfloat16, False),
        ("flash", torch.bfloat16, False),
        ("efficient", torch.bfloat16, True),
        ("sdpa", torch.float32, True),
    ],
)
def test_keys_that_heads_share_are_repeated_only_for_kernels_that_cannot_share(
    monkeypatch, implementation, dtype, repeated
):
    """And then as views of no bytes of their own."""
    seen, real = {}, F.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        seen.update(k=k, shared=options.get("enable_gqa", False))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    q, k = normal(2, 4, 6, 8).to(dtype), normal(2, 1, 6, 8).to(dtype)
    y = attend(q, k, k, implementation=implementation, dropout=0.0)
    assert seen["k"].size(1) == (4 if repeated else 1) and seen["shared"] == (not repeated)
    assert seen["k"].untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    expected = attend(q, k, k, implementation="manual", dropout=0.0)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


# --- the reciprocal term by fused kernels


def dense(q, k, v, mask, scale):
    """What reciprocal.fused gives, written out."""
    n = q.size(-2)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    scores = (q @ k.transpose(-2, -1)).float() * scale
    scores = scores.masked_fill(~mask.mask_mod(0, 0, i, j), float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def parts(heads: int, length: int) -> list[torch.Tensor]:
    shapes = [(2, heads, length, 16), (2, 1, length, 16), (2, 1, length, 16)]
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def written_out(q, k, v, alpha, window):
    layer = latent(latent_width=16, reciprocal_alpha=alpha, reciprocal_window=window)
    return weigh(layer.scores(q, k, q), v, 0.0)


def by_parts(q, k, v, alpha, window):
    masks = reciprocal.masks(q.size(-2), window, q.device)
    return reciprocal.attend(q, k, v, alpha=alpha, window=window, masks=masks)


@pytest.mark.parametrize(
    ("heads", "length", "window"), [(3, 40, 7), (1, 33, 0), (2, 20, 64), (2, 12, 11), (2, 12, 10)]
)
def test_two_parts_are_the_whole_in_value_and_gradient(monkeypatch, heads, length, window):
    monkeypatch.setattr(reciprocal, "fused", dense)
    given = parts(heads, length)
    found, expected = by_parts(*given, 0.7, window), written_out(*given, 0.7, window)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    outside = normal(*expected.shape, seed=9)
    for one, other in zip(
        torch.autograd.grad(found, given, outside), torch.autograd.grad(expected, given, outside), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_window_that_reaches_the_first_token_leaves_nothing_before_it():
    for window, rest in ((10, True), (11, False), (64, False)):
        near, before = reciprocal.masks(12, window, torch.device("cpu"))
        assert near.seq_lengths == (12, 12) and (before is not None) == rest
    assert reciprocal.masks(12, 10, torch.device("cpu"))[1].seq_lengths == (1, 1)


@torch.no_grad()
def test_torchs_flex_attention_gives_those_parts_in_one_graph():
    """Its values, with its masks made inside the graph and before; a CPU has no backward pass of it."""
    given = [x.detach() for x in parts(3, 40)]
    expected = written_out(*given, 0.7, 7)
    graph = torch.compile(by_parts, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(graph(*given, 0.7, 7), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_the_kernels_are_used_in_compiled_training_steps_alone(monkeypatch):
    """Evaluation and generation run uncompiled, where the kernels would not be fused."""
    calls = []

    def counted(*args):
        calls.append(args[0].shape)
        return dense(*args)

    monkeypatch.setattr(reciprocal, "fused", counted)
    torch.manual_seed(1)
    config = resolve({"heads": 2, "width": 32, "context": 12, "layers": 1} | FLEX, "test")
    model, tokens = drawn(gpt.build(config.model, 31), 0.1), torch.arange(24).view(2, 12)
    written = model(tokens)[0]
    assert not calls
    features = torch.compile(model.features, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model.logits(features(tokens)[0]), written, rtol=1e-4, atol=1e-5)
    assert [shape[1:] for shape in calls] == [(2, 12, 32), (2, 8, 16)]  # the window's, and 12 - 3 - 1 rows
    model.eval()
    features(tokens)
    assert len(calls) == 2
    torch._dynamo.reset()


def test_flex_is_refused_where_it_cannot_be():
    def problems(**changes):
        with pytest.raises(ConfigError, match="attention = 'flex'") as raised:
            resolve(FLEX | changes, "test")
        return raised.value.problems

    assert problems(reciprocal_alpha=0.0, reciprocal_window=64) == [
        "attention = 'flex': is for the reciprocal term alone; set attention = 'sdpa'"
    ]
    assert problems(compile="none", dropout=0.1, latent_width=8) == [
        "attention = 'flex': is fused in a compiled graph only; set compile = 'model'",
        "attention = 'flex': has no dropout (dropout = 0.1); set attention = 'manual'",
        "attention = 'flex': takes a latent_width from 16 to 128, not 8; set attention = 'manual'",
    ]
    assert problems(precision="fp32") == [
        "attention = 'flex': multiplies in 16 bits only; set precision = 'bf16'"
    ]
    assert problems(latent_width=256)
    found = kernel_problems("flex", "cpu", precision="bf16", dropout=0.0)
    assert found == ["attention = 'flex': has no backward pass on a CPU; set attention = 'manual'"]
    assert not kernel_problems("flex", "cuda", precision="bf16", dropout=0.0)


def test_the_ledger_counts_flex_by_the_names_that_inductor_gives():
    counts = {"triton_tem_fused_flex_attention_0": 2, "triton_tem_fused_flex_attention_backward_3": 1}
    others = {"triton_poi_fused_cat_1": 4, "triton_tem_fused_addmm_2": 5, "aten::mm": 6}
    assert attention_kernels(Counter(counts | others)) == {"flex": 2}


def test_the_plan_knows_what_flex_keeps():
    """Between latent attention alone and scores written out, for one block of GPT-2's width."""
    gpt2 = {"layers": 1, "heads": 12, "width": 768, "context": 1024, "batch_size": 8, "precision": "bf16"}
    gpt2 |= {"attention_form": "latent", "compile": "blocks", "loss_kernel": "fused"}
    kept = {}
    for attention in ("flash", "flex", "manual"):
        alpha = 0.0 if attention == "flash" else 0.5
        run = resolve(gpt2 | {"attention": attention, "reciprocal_alpha": alpha}, "test")
        kept[attention] = plan.estimate(run, 256, "cuda", 1).kept
    assert kept["flash"] < kept["flex"] < 0.7 * kept["manual"]


def test_the_plan_counts_what_flashs_backward_pass_makes_for_each_head():
    flash = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    q, shared = torch.empty(2, 4, 8, 16, dtype=torch.bfloat16), torch.empty(2, 1, 8, 16, dtype=torch.bfloat16)
    assert dry_gpu.work_memory(flash, (q, q, q)) == 4 * q.numel()
    assert dry_gpu.work_memory(flash, (q, q, shared)) == 4 * q.numel() + 2 * 2 * q.numel()


def test_the_ledger_tells_when_fused_kernels_did_not_run():
    """Of a run that asked for flex: one whose scores were written out, or by another kernel, does not agree."""

    def line(**counts):
        operations = Operations()
        operations.counts = Counter(counts)
        config = resolve(FLEX | {"context": 16}, "test")
        (found,) = observed.attention(config, SimpleNamespace(operations=operations))
        return found.in_effect, found.agrees

    assert line(triton_tem_fused_flex_attention_1=4) == ("flex", True)
    assert line(triton_mm_1=4) == ("manual", False)
    assert line(**{"aten::_scaled_dot_product_flash_attention": 2}) == ("sdpa flash", False)
