"""Gradients summed in place by the products that make them: the same as autograd's, in fp32, and found out if not."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from engine_runs import column, ledger, read_json
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from engine import gradient_sums
from engine.config import resolve
from engine.errors import ConfigError
from engine.gradient_sums import GradientSums, add_product_, gelu, linear
from engine.models import gpt
from engine.operations import Operations

VOCABULARY = 61
FUSED = {"precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused"}


def build(**changes):
    settings = {"layers": 2, "heads": 2, "width": 32, "context": 16, "pad_vocabulary_to": 8, **changes}
    torch.manual_seed(1)
    model = gpt.build(resolve(settings, "test").model, VOCABULARY)
    model.loss = gpt.NextToken(VOCABULARY, kernel="fused")
    return model


def gradients(model, micro_batches: int = 3) -> dict[str, torch.Tensor]:
    """Of so many random micro-batches, in fp32 throughout: then only the order of sums differs."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(micro_batches):
        inputs, targets = (torch.randint(VOCABULARY, (4, 16), generator=draw) for _ in range(2))
        model(inputs, targets, torch.tensor(0.25))[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu_tanh"},
        {"bias": False},
        {"tie_embeddings": False, "bias": False, "activation": "swiglu"},
    ],
)
def test_sums_are_those_of_autograd(changes):
    expected = gradients(build(**changes))
    model = build(**changes)
    sums = GradientSums(model, torch.float32, 1)
    sums.refresh()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_product_of_small_numbers_is_not_lost_in_the_sum():
    """In bf16 1 + 2⁻⁹ is 1; the sum is in fp32, so is the product. By hand: 1 × 1 + 1 × 2⁻⁹, and 1 that was there."""
    x = torch.tensor([[1.0], [2.0**-9]], dtype=torch.bfloat16, requires_grad=True)
    weight, total = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1)
    linear(x, weight, total).sum().backward()
    assert total.item() == 2 + 2.0**-9
    assert x.grad.tolist() == [[1.0]] * 2


def test_a_bias_is_in_the_product_and_its_gradient_is_summed_in_fp32():
    """By hand: 1 × 1 + 1 × 1 + 2; and rows of 1 and 2⁻⁹, which in bf16 sum to 1, beside the 1 that was there."""
    x = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(1, 2, dtype=torch.bfloat16), torch.full((1,), 2.0, dtype=torch.bfloat16)
    total, bias_total = torch.zeros(1, 2), torch.ones(1)
    y = linear(x, weight, total, bias, bias_total)
    y.backward(torch.tensor([[1.0], [2.0**-9]]).bfloat16())
    assert y.tolist() == [[4.0]] * 2
    assert bias_total.item() == 2 + 2.0**-9 and total.tolist() == [[1 + 2.0**-9] * 2]


def test_gelu_sums_the_gradient_of_the_bias_before_it_in_fp32():
    """By hand: gelu'(0) = Φ(0) = 0.5, gelu'(1) = Φ(1) + φ(1) = 0.84134 + 0.24197; times 1 and 2, plus 3."""
    x, total = torch.tensor([[[0.0], [1.0]]], requires_grad=True), torch.full((1,), 3.0)
    y = gelu(x, total)
    y.backward(torch.tensor([[[1.0], [2.0]]]))
    assert y.flatten().tolist() == pytest.approx([0.0, 0.84134], abs=1e-5)
    assert x.grad.flatten().tolist() == pytest.approx([0.5, 2.16663], abs=1e-5)
    assert total.item() == pytest.approx(3 + 0.5 + 2.16663, abs=1e-5)


@pytest.mark.parametrize(
    "changes, by_gelu", [({}, 2), ({"activation": "gelu_tanh"}, 0), ({"bias": False}, 0)]
)
def test_a_bias_before_a_gelu_is_summed_by_it_and_by_nothing_else(changes, by_gelu):
    """Two layers of four biases."""
    model = build(**changes)
    sums = GradientSums(model, torch.float32, 1)
    sums.refresh()
    with Operations() as seen:
        gradients(model, micro_batches=1)
    biases = 8 if changes.get("bias", True) else 0
    assert seen.counts["plumbline::gelu_gradient_"] == by_gelu
    assert seen.counts["plumbline::add_columns_"] == biases - by_gelu


def test_evaluation_reads_the_weights_themselves():
    model = build()
    GradientSums(model, torch.bfloat16, 1).refresh()
    layer, x = model.layers[0].mlp.up, torch.randn(2, 32)
    with torch.no_grad():
        layer.weight.mul_(2)  # an update; the copy is of the weight before
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


def test_names_and_weights_stay_and_copies_are_not_saved():
    model = build()
    names = list(model.state_dict())
    GradientSums(model, torch.bfloat16, 1)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_run_trains_as_with_autograd_and_its_ledger_says_how(lab, checkpointing):
    settings = {
        "precision": "bf16",
        "loss_kernel": "fused",
        "micro_batch_size": 2,
        "activation_checkpointing": checkpointing,
    }
    plain = lab.train(run="plain", **settings)
    run = lab.train(run="fused", **settings, gradient_sums="fused")
    assert column(run, "train_loss") == pytest.approx(column(plain, "train_loss"), rel=1e-3)
    assert column(run, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=2e-2)
    assert [what for what, line in ledger(run).items() if not line["agrees"]] == []
    line = ledger(run)["gradient_sums"]
    assert line["in_effect"] == "fused"
    # 2 blocks of 4 linear layers, and the embedding, in each of 2 micro-batches
    assert (
        "16 of 16 gradients of linear layers, 16 of 16 of their biases, 2 of 2 of the embedding, 2 of 2 of the head"
    ) in line["how"]
    assert "gradient_sums" not in ledger(plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be:DeprecationWarning"
)  # dynamo
def test_compiled_it_is_the_same_operation(lab):
    eager = lab.train(run="eager", **FUSED)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = lab.train(run="compiled", **FUSED, compile="model")
    assert column(run, "train_loss") == pytest.approx(column(eager, "train_loss"), rel=1e-3)
    assert ledger(run)["gradient_sums"]["agrees"] and ledger(run)["compile"]["agrees"]


def test_the_line_tells_when_it_is_silently_off():
    """All of it, some of the linear layers, a bias, the head, or the new copies of the weights."""
    sums = GradientSums(build(), torch.bfloat16, 1)
    counts = Counter(
        {
            "plumbline::add_product_": 16,
            "plumbline::add_columns_": 12,
            "plumbline::gelu_gradient_": 4,
            "plumbline::add_rows_": 2,
        }
    )
    none = Counter()
    found = {}
    for name, counted, head, steps in (
        ("all", counts, 2, 3),
        ("none", none, 0, 3),
        ("some", counts - Counter({"plumbline::add_product_": 1}), 2, 3),
        ("not a bias", counts - Counter({"plumbline::add_columns_": 1}), 2, 3),
        ("not a bias before a GELU", counts - Counter({"plumbline::gelu_gradient_": 1}), 2, 3),
        ("not the head", counts, 0, 3),
        ("old copies", counts, 2, 2),
    ):
        sums.steps = steps
        (line,) = gradient_sums.lines(sums, "fused", counted, head=head, accumulation=2, steps=3)
        found[name] = (line.in_effect, line.agrees)
    off = ("not all fused", False)
    assert found == {
        "all": ("fused", True),
        "none": ("autograd", False),
        "some": off,
        "not a bias": off,
        "not a bias before a GELU": off,
        "not the head": off,
        "old copies": off,
    }
    of_none = {"head": 0, "accumulation": 2, "steps": 3}
    assert gradient_sums.lines(None, "autograd", none, **of_none) == []
    (line,) = gradient_sums.lines(None, "autograd", counts, **of_none)
    assert not line.agrees


def test_the_compiler_weighs_it_as_it_weighs_a_linear_layer():
    x, weight, total = torch.randn(4, 8, 16), torch.randn(32, 16), torch.zeros(32, 16)
    with FlopCounterMode(display=False) as one:
        F.linear(x, weight)
    with FlopCounterMode(display=False) as other:
        linear(x, weight, total)
    assert one.get_total_flops() == other.get_total_flops() == 2 * 4 * 8 * 16 * 32


def test_sums_and_copies_are_in_the_measured_memory(lab):
    settings = {"precision": "bf16", "loss_kernel": "fused", "width": 64}
    plain, fused = (
        read_json(lab.train(run=name, **settings, **more) / "metrics.json")
        for name, more in (("plain", {}), ("fused", {"gradient_sums": "fused"}))
    )
    # Gradients are held from the step's start, beside 2 bytes for each weight of the layers and the head.
    assert fused["peak_memory_gib"] > plain["peak_memory_gib"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_kernel": "full"}, "not with loss_kernel as it is: the head's is made by the loss"),
        ({"data_parallel": "fsdp"}, "not with data_parallel as it is: FSDP2 sums gradients of shards itself"),
        ({"tensor_parallel": 2, "processes": 2}, "not with tensor_parallel as it is: matrices are split"),
        ({"float8": True}, "not with float8 as it is"),
        ({"compile": "model", "compile_mode": "reduce-overhead"}, "the CUDA graphs of 'reduce-overhead'"),
        ({"precision": "fp32"}, "would do nothing with precision = fp32"),
    ],
)
def test_what_it_cannot_be_together_with_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve({**FUSED, **changes}, "test")


def test_the_compiler_can_trace_what_a_gpu_sums_in_place():
    """With operands in half precision: torch 2.11 had no decomposition of the product that sums in fp32."""
    with FakeTensorMode():
        total = torch.empty(4, 6, device="cuda")
        a, b = (torch.empty(n, m, device="cuda", dtype=torch.bfloat16) for n, m in ((4, 5), (5, 6)))
        traced = make_fx(add_product_, decomposition_table=select_decomp_table())(total, a, b)
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [
        torch.ops.plumbline.add_product_.default
    ]
