"""The GPT's parts against formulas written out: attention, latent attention, positions, activations."""

import math

import pytest
import torch
import torch.nn.functional as F

from engine.config import resolve
from engine.errors import ConfigError
from engine.models import gpt
from engine.models.attention import (
    Cache,
    MultiHead,
    kernel_problems,
    manual_attention,
    select_attention,
)
from engine.models.latent import Latent
from engine.models.mlp import MLP, hidden_width, shared_gelu
from engine.models.positions import Rotary, Sinusoids


def settings(**changes):
    return resolve({"heads": 2, "width": 8, "context": 16, "attention": "manual"} | changes, "test").model


def drawn(module: torch.nn.Module, std: float = 1.0, seed: int = 0) -> torch.nn.Module:
    """The module with large random weights, so that an error of the formula cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std, generator=generator)
    return module


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- attention


def test_manual_attention_by_hand():
    """Two positions, one head: the first sees itself; the second weighs both by softmax(q·k / √d)."""
    q = torch.tensor([[[[1.0, 0.0], [2.0, 0.0]]]])
    k = torch.tensor([[[[1.0, 0.0], [3.0, 1.0]]]])
    v = torch.tensor([[[[10.0, 0.0], [0.0, 20.0]]]])
    first = 1 / (1 + math.exp((6 - 2) / math.sqrt(2)))
    expected = torch.tensor([[[[10.0, 0.0], [10 * first, 20 * (1 - first)]]]])
    torch.testing.assert_close(manual_attention(q, k, v, 0.0), expected)


def test_a_part_of_the_rows_of_qkv_is_a_part_of_the_heads():
    """Tensor parallelism gives each rank such a part, and adds what their output projections give."""
    whole, x = drawn(MultiHead(settings(heads=4, bias=False), None), 0.5), normal(2, 5, 8)
    total = 0
    for rank in range(2):
        part = MultiHead(settings(heads=4, bias=False), None)
        part.qkv.weight = torch.nn.Parameter(whole.qkv.weight.chunk(2, 0)[rank])
        part.out.weight = torch.nn.Parameter(whole.out.weight.chunk(2, 1)[rank])
        total = total + part(x)
    torch.testing.assert_close(total, whole(x), rtol=1e-5, atol=1e-5)


@pytest.fixture
def restored():
    yield
    select_attention("sdpa", "cpu")


def kernels(profiled) -> set[str]:
    return {e.name for e in profiled.events() if e.name.startswith("aten::_scaled_dot_product")}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("flash", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("math", "aten::_scaled_dot_product_attention_math"),
        ("sdpa", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_the_selected_kernel_runs(restored, name, kernel):
    select_attention("math", "cpu")  # what was selected before does not matter
    select_attention(name, "cpu")
    for form in (MultiHead, Latent):
        attention = drawn(
            form(settings(attention="sdpa", attention_form="latent", latent_width=4), None), 0.5
        )
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            attention(normal(2, 5, 8))
        assert kernels(profiled) == {kernel}


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_a_kernel_that_the_device_lacks_is_refused(restored, name):
    with pytest.raises(
        ConfigError, match=f"attention = '{name}': a cpu device has no such kernel; it has flash, math"
    ):
        select_attention(name, torch.device("cpu"))
    assert torch.backends.cuda.flash_sdp_enabled()  # and nothing was switched


@pytest.mark.parametrize(
    ("name", "device", "precision", "dropout", "problem"),
    [
        ("flash", "cpu", "fp32", 0.0, None),
        ("flash", "cpu", "fp32", 0.1, "attention = 'flash': has no dropout on a CPU (dropout = 0.1); "),
        ("math", "cpu", "fp32", 0.1, None),
        ("efficient", "cpu", "bf16", 0.0, "attention = 'efficient': a cpu device has no such kernel; "),
        ("flash", "cuda", "fp32", 0.0, "attention = 'flash': multiplies in 16 bits only; "),
        ("cudnn", "cuda", "fp32", 0.0, "attention = 'cudnn': multiplies in 16 bits only; "),
        ("cudnn", "cuda", "bf16", 0.1, None),
        ("efficient", "cuda", "fp32", 0.1, None),
        ("sdpa", "cpu", "fp32", 0.1, None),
        ("manual", "cuda", "fp32", 0.1, None),
    ],
)
def test_a_kernel_that_cannot_take_the_tensors_is_found_before_the_run(
    name, device, precision, dropout, problem
):
    found = kernel_problems(name, device, precision=precision, dropout=dropout)
    assert len(found) == (problem is not None) and all(p.startswith(problem) for p in found)


def test_flash_has_no_dropout_on_a_cpu(restored):
    """What `kernel_problems` says, so that a torch that learns it is noticed."""
    select_attention("flash", "cpu")
    q = normal(1, 2, 5, 4)
    with pytest.warns(UserWarning, match=".*"), pytest.raises(RuntimeError, match="No available kernel"):
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)


# --- latent attention


def latent(**changes) -> Latent:
    return drawn(Latent(settings(**{"attention_form": "latent", "latent_width": 3} | changes), None), 0.7)


def slow_latent(a: Latent, x: torch.Tensor) -> torch.Tensor:
    """SEEDS.md 2.7 one number at a time, in float64, for one sequence x (T, C), values widened before they are
    weighed; the reciprocal term as it is documented."""
    down, size = a.down.weight.double(), a.latent_width
    wide = [(a.query.weight.double() @ row).view(a.heads, a.head_width) for row in x.double()]
    k, v = ([part @ row for row in x.double()] for part in (down[:size], down[size:]))
    q = [[w[h] @ a.query_map[h].double() for h in range(a.heads)] for w in wide]
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(a.heads):
            scores = []
            for j in range(i + 1):
                score = q[i][h].dot(k[j]).item() / math.sqrt(size)
                if i - j <= a.window:
                    score += a.alpha * q[j][h].dot(k[i]).item() / math.sqrt(size)
                scores.append(math.exp(score))
            values = [v[j] @ a.value_map[h].double() for j in range(i + 1)]
            heads.append(sum(s / sum(scores) * value for s, value in zip(scores, values, strict=True)))
        rows.append(a.out.weight.double() @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize(("alpha", "window"), [(0.0, 64), (0.6, 0), (0.6, 3), (-1.5, 64)])
def test_latent_attention_is_its_formula(alpha, window):
    attention, x = latent(reciprocal_alpha=alpha, reciprocal_window=window), normal(2, 9, 8)
    with torch.no_grad():
        expected = torch.stack([slow_latent(attention, row) for row in x])
        torch.testing.assert_close(attention(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_reciprocal_term_matters_within_its_window_alone():
    x = normal(1, 9, 8)
    results = [
        latent(reciprocal_alpha=alpha, reciprocal_window=window)(x)
        for alpha, window in [(0, 64), (1, 0), (1, 2), (1, 8)]
    ]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(results[3], latent(reciprocal_alpha=1.0, reciprocal_window=64)(x))


def test_alpha_zero_is_latent_attention_alone_by_any_kernel():
    """The same numbers as with the scores written out and a reciprocal term of weight (almost) zero."""
    x = normal(2, 9, 8)
    pure = latent(attention="sdpa")(x)
    torch.testing.assert_close(pure, latent(attention="manual")(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pure, latent(reciprocal_alpha=1e-9)(x), rtol=1e-5, atol=1e-5)


def test_the_sizes_of_latent_attention():
    """A layer of GPT-2's width: 2·E² + 2·E·L + 2·H·D·L parameters; and 2·L numbers a token in the cache."""
    sizes = {}
    for form in ("latent", "multi_head"):
        s = resolve({"heads": 12, "width": 768, "context": 64, "attention_form": form}, "test").model
        with torch.device("meta"):
            attention = (Latent if form == "latent" else MultiHead)(s, None)
            cache = Cache()
            attention(torch.empty(1, 10, 768), cache)
        kept = sum(x.numel() for x in cache.kept.values()) / cache.length
        sizes[form] = sum(p.numel() for p in attention.parameters()), kept
    assert sizes == {"latent": (1_572_864, 2 * 128), "multi_head": (2_362_368, 2 * 768)}


def test_the_reciprocal_term_keeps_the_last_queries_only():
    attention, cache = latent(reciprocal_alpha=0.5, reciprocal_window=4), Cache()
    attention(normal(1, 9, 8), cache)
    assert {name: tuple(x.shape) for name, x in cache.kept.items()} == {
        "k": (1, 1, 9, 3),
        "v": (1, 1, 9, 3),
        "queries": (1, 2, 4, 3),
    }


def test_the_maps_of_latent_attention_keep_the_variance_of_plain_attention():
    """Scores and values begin as large as with multi-head attention; a wide layer makes it visible."""
    torch.manual_seed(0)
    x, found = normal(64, 512), {}
    for form in ("multi_head", "latent"):
        s = settings(
            width=512, heads=8, attention_form=form, **({"latent_width": 128} if form == "latent" else {})
        )
        a = gpt.build(s, 17).layers[0].attention
        if form == "latent":
            k, v = a.down(x).chunk(2, -1)
            q = (a.query(x).view(64, 8, 64)[:, 0] @ a.query_map[0]).detach()
            found[form] = (q @ k.T / math.sqrt(128)).std().item(), (v @ a.value_map[0]).std().item()
        else:
            q, k, v = a.qkv(x).view(64, 8, 3, 64)[:, 0].unbind(1)
            found[form] = (q @ k.T / math.sqrt(64)).std().item(), v.std().item()
    assert found["latent"] == pytest.approx(found["multi_head"], rel=0.15)


def test_scores_that_must_be_written_out_are_not_left_to_a_kernel():
    s = {"attention_form": "latent", "reciprocal_alpha": 0.5, "positions": "rotary", "latent_width": 3}
    with pytest.raises(ConfigError, match="2 problems") as raised:
        resolve(s, "test")
    assert raised.value.problems == [
        "positions = 'rotary': latent_width = 3: must be even, because features turn in pairs",
        "reciprocal_alpha = 0.5: no kernel of SDPA has the reciprocal term; set attention = 'manual' (its scores "
        "written out) or 'flex' (a GPU's compiled kernels), not 'sdpa'",
    ]
    with pytest.raises(ConfigError, match=r"positions = 'rotary': width / heads = 3: must be even"):
        resolve({"width": 12, "positions": "rotary"}, "test")


def test_torchs_cache_of_compiled_graphs_is_keyed_by_the_kernel():
    """It does not see the switches: a graph compiled for another kernel would come back."""
    try:
        select_attention("math", "cpu")
        assert torch.compiler.config.cache_key_tag.endswith("attention=math")
    finally:
        select_attention("sdpa", "cpu")
    assert torch.compiler.config.cache_key_tag.endswith("attention=sdpa")


def test_gelu_with_one_exponential_is_gelu():
    """Value and derivative, over all that 16 bits can tell apart from 0 and from x."""
    x = torch.linspace(-12, 12, 20001, dtype=torch.float32)
    exact, found = x.double().requires_grad_(), x.clone().requires_grad_()
    F.gelu(exact).sum().backward()
    value = shared_gelu(found)
    value.sum().backward()
    torch.testing.assert_close(value.double(), F.gelu(x.double()), rtol=0, atol=2e-6)
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=0, atol=2e-6)
    assert shared_gelu(x.bfloat16()).dtype == torch.bfloat16


# --- positions


def test_sinusoids_by_their_formula():
    """sin(p / 10000^(2i/C)) in feature 2i, cos in 2i + 1, scaled to the root mean square asked for."""
    module = Sinusoids(50, 6, rms=0.02)
    found = module(torch.tensor([0, 7, 49]))
    for row, p in zip(found.tolist(), (0, 7, 49), strict=True):
        angles = [p / 10000 ** (2 * i / 6) for i in range(3)]
        expected = [f(a) * 0.02 * math.sqrt(2) for a in angles for f in (math.sin, math.cos)]
        assert row == pytest.approx(expected, abs=1e-7)
    assert found.square().mean().sqrt().item() == pytest.approx(0.02)
    assert not list(module.parameters()) and not module.state_dict()
    assert Sinusoids(50, 7, rms=1.0)(torch.tensor([3])).shape == (1, 7)


def test_rotary_turns_each_pair_by_its_position():
    """As complex numbers: feature i and i + d/2 times exp(√-1 · p / 10000^(2i/d))."""
    rotary, x = Rotary(32, 6), normal(2, 3, 5, 6)
    expected = torch.empty_like(x)
    for p in range(5):
        for i in range(3):
            z = torch.complex(x[..., p, i], x[..., p, i + 3]) * complex(
                math.cos((p + 9) / 10000 ** (i / 3)), math.sin((p + 9) / 10000 ** (i / 3))
            )
            expected[..., p, i], expected[..., p, i + 3] = z.real, z.imag
    torch.testing.assert_close(rotary(x, start=9), expected)
    assert not list(rotary.parameters()) and not rotary.state_dict()
    assert rotary(x.bfloat16()).dtype is torch.bfloat16


def test_rotated_products_see_the_distance_alone():
    rotary, q, k = Rotary(64, 8), normal(1, 8), normal(1, 8, seed=2)
    products = [(rotary(q, start=p) * rotary(k, start=p - 5)).sum().item() for p in (5, 20, 63)]
    assert products == pytest.approx([products[0]] * 3, abs=1e-5)
    assert (rotary(q, start=20) * rotary(k, start=16)).sum().item() != pytest.approx(products[0], abs=1e-3)


@pytest.mark.parametrize(
    ("positions", "embeds"), [("learned", True), ("sinusoidal", True), ("rotary", False)]
)
def test_a_model_knows_the_order_of_its_tokens(positions, embeds):
    """Without positions the last output would not change when the tokens before it are exchanged."""
    torch.manual_seed(3)
    model = drawn(gpt.build(settings(positions=positions, layers=1), 17), 0.5)
    assert (model.position_embedding is not None) == embeds
    learned = [n for n, _ in model.named_parameters() if "position" in n]
    assert learned == (["position_embedding.weight"] if positions == "learned" else [])
    ordered, exchanged = model(torch.tensor([[1, 2, 3, 4]]))[0], model(torch.tensor([[2, 1, 3, 4]]))[0]
    assert (ordered - exchanged)[0, -1].abs().max() > 1e-3


# --- activations

FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "swiglu": lambda x: x / (1 + math.exp(-x)),
    "geglu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_an_activation_by_its_formula(activation):
    mlp, x = drawn(MLP(6, activation, bias=True), 0.8), normal(4, 6)
    with torch.no_grad():
        up = F.linear(x, mlp.up.weight, mlp.up.bias)
        gated = activation in ("swiglu", "geglu")
        inner = F.linear(x, mlp.gate.weight, mlp.gate.bias) if gated else up
        inner = torch.tensor([[FORMULAS[activation](v) for v in row] for row in inner.tolist()])
        expected = F.linear(inner * up if gated else inner, mlp.out.weight, mlp.out.bias)
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [32, 100, 768, 1600])
def test_a_gated_mlp_is_as_large_as_a_plain_one(width, bias):
    """No other whole number of inner features comes nearer."""
    with torch.device("meta"):
        plain, gated = (MLP(width, a, bias=bias) for a in ("gelu", "swiglu"))
    wanted, found = (sum(p.numel() for p in m.parameters()) for m in (plain, gated))
    one_feature = 3 * width + 2 * bias
    assert abs(found - wanted) <= one_feature / 2
    assert (
        gated.up.weight.shape == gated.gate.weight.shape == (hidden_width(width, "swiglu", bias=bias), width)
    )
    assert hidden_width(768, "swiglu", bias=False) == 2048  # 8/3 · 768
