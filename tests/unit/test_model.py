"""Models and optimizers: causal, equal however attention is computed, the right size, and able to learn.

The tests of a registry run over its entries, so that a new line there is tested at once.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from engine.config import resolve
from engine.models import MODELS
from engine.models.gpt import INIT_STD, build, manual_attention
from engine.objectives import next_token
from engine.optimizers import OPTIMIZERS
from engine.optimizers.groups import decay_groups
from engine.parallel import Ranks
from engine.trainer import build_model, build_optimizer

VOCABULARY = 61
ONE = Ranks(0, 1, torch.device("cpu"))
VARIANTS = [
    dict(zip(("norm_placement", "attention"), both, strict=True))
    for both in itertools.product(("pre", "post"), ("sdpa", "manual"))
]


def config(**changes):
    return resolve({"layers": 3, "heads": 2, "width": 32, "context": 16, "device": "cpu"} | changes, "test")


def gpt(seed: int = 5, norm_layers: tuple[int, ...] = (), **changes):
    torch.manual_seed(seed)
    return build(config(**changes).model, VOCABULARY, norm_layers)


def tokens(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- what the GPT computes


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("position", [1, 7, 15])
def test_a_future_token_never_changes_a_past_logit(variant, position):
    model = gpt(**variant)
    before = tokens()
    after = before.clone()
    after[:, position] = (after[:, position] + 1) % VOCABULARY
    with torch.no_grad():
        left, right = model(before)[0], model(after)[0]
    assert left.shape == (2, 16, VOCABULARY)
    torch.testing.assert_close(left[:, :position], right[:, :position], rtol=0, atol=1e-6)
    assert (left - right)[:, position:].abs().amax(-1).min() > 1e-4  # and every later one sees it


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_both_attentions_are_the_same_function(placement):
    results = {}
    for attention in ("sdpa", "manual"):
        model = gpt(norm_placement=placement, attention=attention)
        logits, _ = model(tokens())
        next_token(logits, tokens(seed=1)).backward()
        results[attention] = [logits, *(p.grad for p in model.parameters())]
    for sdpa, manual in zip(results["sdpa"], results["manual"], strict=True):
        torch.testing.assert_close(sdpa, manual, rtol=1e-4, atol=1e-5)


def test_manual_attention_by_hand():
    """Two positions, one head: the first sees itself; the second weighs both by softmax(q·k / √d)."""
    q = torch.tensor([[[[1.0, 0.0], [2.0, 0.0]]]])
    k = torch.tensor([[[[1.0, 0.0], [3.0, 1.0]]]])
    v = torch.tensor([[[[10.0, 0.0], [0.0, 20.0]]]])
    first = 1 / (1 + math.exp((6 - 2) / math.sqrt(2)))
    expected = torch.tensor([[[[10.0, 0.0], [10 * first, 20 * (1 - first)]]]])
    torch.testing.assert_close(manual_attention(q, k, v, 0.0), expected)


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_dropout_acts_in_training_only(attention):
    model = gpt(attention=attention, dropout=0.5)
    assert not torch.equal(model(tokens())[0], model(tokens())[0])
    model.eval()
    torch.testing.assert_close(model(tokens())[0], gpt(attention=attention)(tokens())[0], rtol=0, atol=0)


def test_a_shorter_sequence_gives_the_same_logits():
    model = gpt()
    torch.testing.assert_close(model(tokens())[0][:, :5], model(tokens()[:, :5])[0], rtol=0, atol=1e-6)


def test_norms_are_the_root_mean_square_of_the_blocks_outputs():
    model, seen = gpt(norm_layers=(0, 2)), {}
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda _, __, output, i=i: seen.update({i: output}))
    _, norms = model(tokens())
    expected = [math.sqrt(sum(x * x for x in seen[i].flatten().tolist()) / seen[i].numel()) for i in (0, 2)]
    assert [n.item() for n in norms] == pytest.approx(expected)
    assert not any(n.requires_grad for n in norms)


def test_post_norm_ends_each_block_normalised_and_has_no_last_norm():
    model, outputs = gpt(norm_placement="post"), []
    model.layers[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
    model(tokens())
    assert outputs[0].mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(outputs[0].var(-1, unbiased=False), torch.ones(2, 16), rtol=1e-2, atol=0)
    assert "norm.weight" not in dict(model.named_parameters())


# --- size and initial weights


def test_gpt2_small_has_its_published_size():
    """124,439,808: V·C + T·C + 12 blocks of 12·C² + 13·C + the last norm, with C = 768."""
    settings = config(layers=12, heads=12, width=768, context=1024, tie_embeddings=True, bias=True).model
    with torch.device("meta"):
        model = build(settings, 50257)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert 50257 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768 == 124_439_808


def test_a_tied_head_is_the_token_embedding():
    model, features = gpt(tie_embeddings=True), []
    model.norm.register_forward_hook(lambda _, __, output: features.append(output))
    logits, _ = model(tokens())
    torch.testing.assert_close(logits, features[0] @ model.token_embedding.weight.T)
    untied = gpt(tie_embeddings=False)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (untied, model)]
    assert sizes[0] - sizes[1] == VOCABULARY * 32 and untied.head.weight.shape == (VOCABULARY, 32)


def test_no_bias_means_none_anywhere():
    assert not [n for n, _ in gpt(bias=False, tie_embeddings=False).named_parameters() if n.endswith("bias")]


def test_initial_weights_follow_gpt2_and_depend_on_the_seed_alone():
    model = gpt(width=128)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("attention.out.weight", "mlp.out.weight"))
            expected = INIT_STD / math.sqrt(6) if residual else INIT_STD  # three layers add six times
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < expected / 10, name
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name
    same, other = gpt(width=128), gpt(seed=6, width=128)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.token_embedding.weight, other.token_embedding.weight)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3},
        {"activation_checkpointing": "full"},
        {"attention": "manual"},
        {"norm_placement": "post"},
    ],
)
def test_what_a_run_varies_does_not_change_its_initial_weights(changes):
    """Paired seeds start from the same weights in every run of a study."""
    plain, varied = (build_model(config(**c), VOCABULARY, ONE).state_dict() for c in ({}, changes))
    shared = plain.keys() & varied.keys()
    assert len(shared) >= len(plain) - 2  # post-norm has no last norm
    assert all(torch.equal(plain[name], varied[name]) for name in shared)


def test_every_rank_has_the_same_weights_and_its_own_dropout():
    drawn, models = [], []
    for rank in (0, 1):
        models.append(build_model(config(dropout=0.5), VOCABULARY, Ranks(rank, 1, torch.device("cpu"))))
        drawn.append(torch.rand(5))
    assert not torch.equal(*drawn)
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


# --- parameter groups


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False}, {"bias": False}, {"norm_placement": "post"}]
)
def test_every_parameter_is_in_one_group_and_only_matrices_decay(changes):
    model = gpt(**changes)
    groups = decay_groups(model, 0.3)
    names = {p: name for name, p in model.named_parameters()}
    found = [[names[p] for p in group["params"]] for group in groups]
    assert sorted(found[0] + found[1]) == sorted(names.values())
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("decay", 0.3), ("no_decay", 0.0)]
    undecayed = {n for n in names.values() if n.endswith("bias") or "norm" in n}
    assert set(found[1]) == undecayed


def test_adamw_shrinks_what_decays_and_nothing_else():
    settings = config(lr=0.1, weight_decay=0.5)
    model = build_model(settings, VOCABULARY, ONE)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, settings)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


def test_an_optimizer_is_given_its_own_settings():
    def group(**changes):
        settings = config(lr=0.02, **changes)
        return build_optimizer(gpt(), settings).param_groups[0]

    for name in ("adamw", "adam"):
        adam = group(optimizer=name, beta1=0.8, beta2=0.7, epsilon=1e-6)
        assert (adam["lr"], adam["betas"], adam["eps"], adam["weight_decay"]) == (0.02, (0.8, 0.7), 1e-6, 0.1)
    sgd = group(optimizer="sgd", momentum=0.6, nesterov=True, weight_decay=0.0)
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.02, 0.6, True, 0.0)


# --- the registries


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds_and_has_finite_gradients(name):
    model = build_model(config(model=name), VOCABULARY, ONE)
    logits, norms = model(tokens())
    assert logits.shape == (2, 16, VOCABULARY) and norms == []
    next_token(logits, tokens(seed=1)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_model_and_optimizer_overfits_one_batch(name, optimizer):
    lr = {"sgd": 0.3}.get(optimizer, 1e-2)
    settings = config(model=name, optimizer=optimizer, lr=lr, weight_decay=0.0)
    model = build_model(settings, VOCABULARY, ONE)
    steps = build_optimizer(model, settings)
    inputs, targets = tokens(), tokens(seed=1)
    losses = []
    for _ in range(60):
        loss = next_token(model(inputs)[0], targets) / targets.numel()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert losses[-1] < 0.1 * losses[0]


# --- the objective


def test_next_token_sums_the_valid_targets_in_nats():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [5.0, 1.0]]])
    targets = torch.tensor([[1, 0, -100]])
    assert next_token(logits, targets).item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2))
    assert next_token(logits.bfloat16(), targets).dtype == torch.float32
    assert next_token(logits, torch.full((1, 3), -100)).item() == 0.0
    assert F.cross_entropy(logits[0], targets[0]).item() == pytest.approx(
        next_token(logits, targets).item() / 2
    )
