"""The three kernels of the loss: what they compute, what they keep in memory, and the proof in the ledger.

The reference is plain cross-entropy in float64, differentiated by autograd.
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine import losses, objectives
from engine.config import Training
from engine.data.batches import IGNORED
from engine.errors import ConfigError
from engine.objectives import KERNELS, NextToken

V, C = 61, 16
IN_PLACE = ("fused", "chunked")
UPSTREAM = 0.37  # gradient of what is made of the loss
# Relative error in the 2-norm. Half precision rounds operands, logits and their gradient (2⁻⁹, 2⁻¹²).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
LOSS_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-4, torch.float16: 1e-4}


def case(rows: int = V, tokens: tuple[int, int] = (3, 11), ignored: int = 4, classes: int = V):
    """hidden (B, T, C), weight (rows, C), targets (B, T), of which the first `ignored` do not count."""
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(*tokens, C, generator=draw)
    weight = 0.3 * torch.randn(rows, C, generator=draw)
    targets = torch.randint(classes, tokens, generator=draw)
    targets.view(-1)[:ignored] = IGNORED
    return hidden, weight, targets


def reference(hidden, weight, targets, classes: int = V, upstream: float = UPSTREAM):
    """Loss, and the gradients for hidden and weight, in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = (hidden @ weight.t())[..., :classes].flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    (upstream * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def computed(objective: NextToken, hidden, weight, targets, upstream: float = UPSTREAM):
    """What `objective` gives for leaves with these values."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    loss = objective(hidden, weight, targets)
    (upstream * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_close(found, expected, dtype: torch.dtype = torch.float32) -> None:
    assert error(found[0], expected[0]) <= LOSS_TOLERANCE[dtype]
    assert [error(*pair) <= TOLERANCE[dtype] for pair in zip(found[1:], expected[1:], strict=True)] == [
        True
    ] * 2


# --- what it computes


@pytest.mark.parametrize("chunk", [1, 8, 11, 33, 100])
def test_chunks_of_any_size_give_the_loss_and_gradients_of_plain_cross_entropy(chunk):
    objective, inputs = NextToken(V, "chunked", chunk), case()
    assert_close(computed(objective, *inputs), reference(*inputs))
    assert objective.passes == {"in place": math.ceil(33 / chunk)}
    assert objective.largest_logits == (min(chunk, 33), V)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_scale_multiplies_the_gradients_and_not_the_loss(kernel):
    objective, inputs = NextToken(V, kernel, 8), case(64)
    hidden, weight = (t.clone().requires_grad_() for t in inputs[:2])
    loss = objective(hidden, weight, inputs[2], torch.tensor(UPSTREAM))
    loss.backward()
    assert_close((loss.detach(), hidden.grad, weight.grad), reference(*inputs))


@pytest.mark.parametrize("ignored", [0, 4, 32])
@pytest.mark.parametrize("rows", [V, 64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_ignored_targets_and_padding_rows_count_as_if_absent(kernel, rows, ignored):
    inputs = case(rows, ignored=ignored)
    inputs[1][V:] = 50.0  # a head that would predict nothing but padding
    found = computed(NextToken(V, kernel, 8), *inputs)
    assert_close(found, reference(*inputs))
    assert found[1].view(-1, C)[:ignored].count_nonzero() == 0
    assert found[2].shape == (rows, C) and found[2][V:].count_nonzero() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_any_target_that_counts_everything_is_zero(kernel):
    loss, *gradients = computed(NextToken(V, kernel, 8), *case(64, ignored=33))
    assert loss == 0 and all(g.count_nonzero() == 0 for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_computes_in_half_precision_over_fp32_leaves(kernel, dtype):
    objective, inputs = NextToken(V, kernel, 8), case(64)
    with torch.autocast("cpu", dtype):
        found = computed(objective, *inputs)
    assert objective.operand_dtype is dtype
    assert [t.dtype for t in found] == [torch.float32] * 3
    assert_close(found, reference(*inputs), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bf16_stream_gets_a_bf16_gradient_and_the_master_weight_an_fp32_one(kernel):
    objective, (hidden, weight, targets) = NextToken(V, kernel, 8), case(64)
    found = computed(objective, hidden.bfloat16(), weight, targets)
    assert objective.operand_dtype is torch.bfloat16
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert_close(found, reference(hidden, weight, targets), torch.bfloat16)


def test_chunks_in_bf16_add_the_weights_gradient_in_fp32():
    """512 chunks of one token, the same one: in bf16 the sum would stop growing at 256 times a summand."""
    hidden, weight, targets = case(tokens=(1, 1), ignored=0)
    hidden, targets = hidden.expand(1, 512, C), targets.expand(1, 512)
    with torch.autocast("cpu", torch.bfloat16):
        found = computed(NextToken(V, "chunked", 1), hidden, weight, targets)
    assert error(found[2], reference(hidden, weight, targets)[2]) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_logits_do_not_overflow(kernel):
    hidden, weight, targets = case()
    inputs = 100 * hidden, weight, targets
    assert_close(computed(NextToken(V, kernel, 8), *inputs), reference(*inputs))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tied_weight_gets_the_sum_of_both_gradients(kernel):
    hidden, weight, targets = case()
    weight.requires_grad_()
    tokens = torch.arange(33).view(3, 11)
    embedded = F.embedding(tokens, weight)
    (UPSTREAM * NextToken(V, kernel, 8)(hidden + embedded, weight, targets)).backward()
    expected = weight.detach().double().requires_grad_()
    embedded = F.embedding(tokens, expected)
    logits = ((hidden + embedded) @ expected.t()).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    (UPSTREAM * loss).backward()
    assert error(weight.grad, expected.grad) <= 1e-6


@pytest.mark.parametrize("kernel", IN_PLACE)
def test_gradients_add_up_over_micro_batches(kernel):
    objective, (hidden, weight, targets) = NextToken(V, kernel, 8), case()
    weight.requires_grad_()
    for part in (slice(0, 1), slice(1, 3)):
        (UPSTREAM * objective(hidden[part], weight, targets[part])).backward()
    assert error(weight.grad, reference(hidden, weight, targets)[2]) <= 1e-6


@pytest.mark.parametrize("kernel", IN_PLACE)
def test_a_target_that_is_no_class_makes_the_loss_nan(kernel):
    hidden, weight, targets = case(64)
    for wrong in (V, 64, 1000, -1):
        targets[2, 3] = wrong
        loss, *gradients = computed(NextToken(V, kernel, 8), hidden, weight, targets)
        assert loss.isnan() and all(g.isnan().any() for g in gradients)


@pytest.mark.parametrize("kernel", IN_PLACE)
def test_inputs_that_are_not_contiguous(kernel):
    hidden, weight, targets = case()
    inputs = hidden.transpose(0, 1)[:, ::2], weight.t().contiguous().t(), targets.t()[:, ::2]
    assert_close(computed(NextToken(V, kernel, 8), *inputs), reference(*inputs))


# --- only what is needed


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_gradients_there_is_only_the_loss(kernel, monkeypatch):
    inputs = case(64)
    expected = reference(*inputs)[0]
    monkeypatch.setattr(losses, "add_product", None)  # would fail
    objective = NextToken(V, kernel, 8)
    assert error(objective(*inputs), expected) <= 1e-6  # nothing requires a gradient
    inputs[1].requires_grad_()
    with torch.no_grad():
        loss = objective(*inputs)
    assert error(loss, expected) <= 1e-6 and not loss.requires_grad
    with torch.inference_mode():
        assert error(objective(*inputs), expected) <= 1e-6
    assert objective.largest_logits == ((33, 64) if kernel == "full" else (8, 64))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wanted", [0, 1], ids=["hidden", "weight"])
def test_only_the_wanted_gradient_is_made(kernel, wanted):
    inputs = case()
    inputs[wanted].requires_grad_()
    with Largest() as seen:
        loss = NextToken(V, kernel, 8)(*inputs)
    products = sum(name.startswith(("mm", "addmm")) for name in seen.names)
    if kernel != "full":
        assert products == 2 * (1 if kernel == "fused" else 5)  # of three
    (UPSTREAM * loss).backward()
    assert error(inputs[wanted].grad, reference(*inputs)[1 + wanted]) <= 1e-6
    assert inputs[1 - wanted].grad is None


def test_no_tokens_have_no_loss():
    with torch.no_grad():
        for kernel in KERNELS:
            assert NextToken(V, kernel, 8)(*case(tokens=(0, 11), ignored=0)) == 0


class Largest(TorchDispatchMode):
    """While active, notes the names of the operations and the most elements that one of their results had."""

    def __init__(self):
        super().__init__()
        self.elements, self.names = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        sizes = [t.numel() for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("kernel", KERNELS)
def test_chunks_of_a_large_vocabulary_never_make_the_logits_whole(kernel):
    classes, tokens, chunk = 50_257, 96, 32
    inputs = case(50_304, (1, tokens), classes=classes)
    with Largest() as seen:
        found = computed(NextToken(classes, kernel, chunk), *inputs)
    rows = chunk if kernel == "chunked" else tokens
    assert seen.elements == rows * 50_304  # the head and its gradient are half of a chunk's logits
    assert_close(found, reference(*inputs, classes))


@pytest.mark.parametrize("kernel", KERNELS)
def test_logits_exist_once_with_their_gradient_over_them(kernel):
    """In fp32 the largest results that are new tensors, not written over a given one: one, or several."""
    inputs = case(1000, (1, 40), classes=1000)

    class New(Largest):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            given = {t.data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
            result = super().__torch_dispatch__(function, types, args, kwargs)
            for t in tree_iter(result):
                if isinstance(t, torch.Tensor) and t.numel() == 40 * 1000 and t.data_ptr() not in given:
                    self.made = getattr(self, "made", 0) + 1
            return result

    with New() as seen:
        computed(NextToken(1000, kernel, 40), *inputs)
    assert seen.made == 1 if kernel in IN_PLACE else seen.made > 2


# --- how it is used


@pytest.mark.parametrize("kernel", IN_PLACE)
def test_a_second_backward_pass_is_an_error(kernel):
    hidden, weight, targets = case()
    loss = NextToken(V, kernel, 8)(hidden, weight.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="kernel = 'fusd': must be one of full, fused, chunked"):
        NextToken(V, "fusd")
    for kernel in KERNELS:
        with pytest.raises(ValueError, match="a head of 1 × 60 rows is too small for 61 classes"):
            NextToken(V, kernel)(*case(60))


def test_it_adds_nothing_to_a_models_state():
    assert NextToken(V).state_dict() == {}


def test_on_a_gpu_without_triton_the_kernels_are_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "engine.kernels.cross_entropy", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="fused and chunked need triton on a GPU, and it is not installed"):
        losses._gpu_kernel()


@pytest.mark.slow
def test_compile_compiles_the_full_loss_and_nothing_else():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    for kernel in (*IN_PLACE, "full"):
        assert graphs["unique_graphs"] == 0
        objective, inputs = NextToken(V, kernel, 8), case(64)
        objective.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        assert_close(computed(objective, *inputs), reference(*inputs))
    assert graphs["unique_graphs"] == 1


# --- the ledger


def line(objective: NextToken, kernel: str, chunk: int = 4096):
    return losses.lines(objective, Training(loss_kernel=kernel, loss_chunk_tokens=chunk), 33)[0]


def line_after_a_step(kernel: str, chunk: int = 8):
    objective = NextToken(V, kernel, chunk)
    computed(objective, *case(64))
    return line(objective, kernel, chunk)


@pytest.mark.parametrize(
    ("kernel", "requested", "in_effect", "passes"),
    [
        ("full", "full", "full, largest logits 33 × 64", "1 full"),
        ("fused", "fused", "fused, largest logits 33 × 64", "1 in place"),
        ("chunked", "chunked, 8 tokens", "chunked, largest logits 8 × 64", "5 in place"),
    ],
)
def test_the_ledger_tells_the_kernel_that_ran(kernel, requested, in_effect, passes):
    found = line_after_a_step(kernel)
    assert (found.what, found.requested, found.in_effect) == ("loss_kernel", requested, in_effect)
    assert found.agrees and f"{passes}; 33 tokens" in found.how


def test_a_chunk_larger_than_the_forward_pass_is_told():
    found = line_after_a_step("chunked", 4096)
    assert found.agrees and found.in_effect == "fused, largest logits 33 × 64"


@pytest.mark.parametrize("kernel", IN_PLACE)
def test_the_ledger_disagrees_if_the_full_loss_ran(kernel, monkeypatch):
    monkeypatch.setattr(NextToken, "_in_place", NextToken._full)
    found = line_after_a_step(kernel)
    assert not found.agrees and found.in_effect == "full, largest logits 33 × 64"


def test_the_ledger_disagrees_if_chunks_were_not_made(monkeypatch):
    monkeypatch.setattr(losses, "Plan", Whole)
    found = line_after_a_step("chunked")
    assert not found.agrees and found.in_effect == "fused, largest logits 33 × 64"


class Whole(losses.Plan):
    """A plan that takes all tokens at a time, whatever it was told."""

    def __init__(self, vocabulary, dtype, _chunk, saw, scale):
        super().__init__(vocabulary, dtype, 10**6, saw, scale)


def test_the_ledger_disagrees_if_fused_was_chunked_or_nothing_ran(monkeypatch):
    objective = NextToken(V, "fused")
    assert not line(objective, "fused").agrees
    objective.chunk_tokens = 8
    with torch.no_grad():
        objective(*case(64))
    found = line(objective, "fused")
    assert not found.agrees and found.in_effect == "chunked, largest logits 8 × 64"


def test_the_ledger_disagrees_if_full_was_fused(monkeypatch):
    monkeypatch.setattr(NextToken, "_full", NextToken._in_place)
    assert not line_after_a_step("full").agrees


def test_the_plain_loss_is_torchs_own():
    hidden, weight, targets = case()
    found = objectives.next_token(hidden @ weight.t(), targets)
    assert found.dtype == torch.float32 and error(found, reference(hidden, weight, targets)[0]) <= 1e-6
