"""Masks of one tensor by hand, which tensors are pruned, and the settings that are refused."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn as nn

from engine.config import Optimizer, Parallel, Pruning, resolve
from engine.errors import ConfigError
from engine.guards import step_unless
from engine.memory import TensorBytes
from engine.optimizers import adamw, adamwprune, groups
from engine.parallel import Ranks
from engine.pruning import masks
from engine.pruning.masks import Pruner
from engine.pruning.prunable import prunable
from engine.pruning.scores import SCORES
from engine.pruning.sparsity import Sparsity


class Line(nn.Module):
    """One row of weights, and a bias."""

    def __init__(self, values: list[float]):
        super().__init__()
        self.line = nn.Linear(len(values), 1)
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([values]))


def pruner_of(model: nn.Module, optimizer=None, steps: int = 4, **settings) -> Pruner:
    settings = {"pruning": "magnitude", "pruning_interval": 1, **settings}
    return Pruner(model, optimizer, Pruning(**settings), steps=steps, seed=1)


def adam_for(model: nn.Module, build=adamwprune.build) -> torch.optim.Optimizer:
    settings = Optimizer(lr=0.1, weight_decay=0.0)
    return build(groups.of(model, settings), settings)


# --- one tensor, by hand


def test_magnitude_prunes_the_smallest_and_gradients_of_the_pruned_are_zero():
    """0.5 of 4 in 2 updates: the smallest after the first, the two smallest after the second."""
    model = Line([3.0, -1.0, 0.5, -2.0])
    pruner, weight = pruner_of(model, steps=2), model.line.weight
    assert pruner.after_update(0)
    assert weight.tolist() == [[3.0, -1.0, 0.0, -2.0]]
    weight.grad = torch.ones_like(weight)
    pruner.mask_gradients()
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0, 1.0]]
    with torch.no_grad():
        weight.add_(
            torch.tensor([[-2.5, 0.0, 9.0, 0.0]])
        )  # the update of a momentum, say: it does not come back
    assert pruner.after_update(1)
    assert weight.tolist() == [[0.0, -1.0, 0.0, -2.0]] and not pruner.after_update(1)


def test_movement_by_hand_leaves_refused_updates_out():
    """-Σ w g: of 1 with 1 and 2, -3; of -1 with 1 and 2, 3; of 0.5 with -4 and 0, 2; of 2 with 0 and 0.5, -1."""
    model = Line([1.0, -1.0, 0.5, 2.0])
    pruner, weight, yes = pruner_of(model, pruning="movement", steps=3), model.line.weight, torch.ones(())
    for gradient in ([1.0, 1.0, -4.0, 0.0], [2.0, 2.0, 0.0, 0.5]):
        weight.grad = torch.tensor([gradient])
        pruner.before_update(yes, torch.zeros(()))
        weight.grad = torch.full_like(weight, torch.nan)
        pruner.before_update(yes, torch.ones(()))  # a guard's refusal
        pruner.before_update(torch.tensor(torch.nan), None)  # a loss scale's
    assert pruner._kept[0].tolist() == [[-3.0, 3.0, 2.0, -1.0]]
    pruner.after_update(2)
    assert weight.tolist() == [[0.0, -1.0, 0.5, 0.0]]


def test_movement_as_the_original_has_it_by_hand():
    """w (w - w₀): from 1, -1, 0.5, 2 to 0.5, -2, 0.6, 2: -0.25, 2, 0.06, 0."""
    model = Line([1.0, -1.0, 0.5, 2.0])
    pruner, weight = (
        pruner_of(model, pruning="movement_original", steps=1, pruning_interval=1),
        model.line.weight,
    )
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.5, -2.0, 0.6, 2.0]]))
    pruner.after_update(0)
    assert weight.tolist() == [[0.0, -2.0, pytest.approx(0.6), 0.0]]


def test_state_by_hand_masks_the_moments_too():
    """|w| √|m| after one update with β1 = 0.9: m = g / 10. 1·√0.9, 2·√0.1, 3·√0.01, 4·√0.001: the last two fall."""
    model = Line([1.0, 2.0, 3.0, 4.0])
    optimizer, weight = adam_for(model), model.line.weight
    pruner = pruner_of(model, optimizer, steps=1, pruning="state")
    weight.grad, model.line.bias.grad = torch.tensor([[9.0, 1.0, 0.1, 0.01]]), torch.ones(1)
    optimizer.step()
    pruner.after_update(0)
    state = optimizer.state[weight]
    assert (weight == 0).tolist() == [[False, False, True, True]]
    assert state["exp_avg"].tolist() == [pytest.approx([0.9, 0.1, 0.0, 0.0])]
    assert (state["exp_avg_sq"] == 0).tolist() == [[False, False, True, True]]
    assert optimizer.state[model.line.bias]["exp_avg"].item() == pytest.approx(0.1)


def test_a_score_is_given_the_count_of_steps_and_the_decay_of_its_own_group(monkeypatch):
    model, seen = Line([1.0, 2.0]), []
    optimizer, weight = adam_for(model), model.line.weight

    def noting(parts):
        seen.append((parts.t.item(), parts.beta1, parts.m_hat.tolist()))
        return parts.magnitude

    monkeypatch.setitem(SCORES, "bitter8", noting)
    for group, beta1 in zip(optimizer.param_groups, (0.75, 0.5), strict=True):
        group["betas"] = (beta1, 0.9)
    pruner = pruner_of(
        model, optimizer, steps=3, pruning="state", pruning_score="bitter8", pruning_interval=3
    )
    for step in range(3):
        weight.grad, model.line.bias.grad = torch.ones_like(weight), torch.ones(1)
        optimizer.step()
        pruner.after_update(step)
    assert seen == [(3, 0.75, [pytest.approx([1.0, 1.0])])]  # m̂ of a constant gradient is that gradient


def test_without_masked_moments_a_momentum_brings_nothing_back_either():
    model = Line([1.0, 2.0])
    optimizer = adam_for(model, adamw.build)
    pruner, weight = (
        pruner_of(model, optimizer, steps=2, pruning_interval=2, pruning_start=0),
        model.line.weight,
    )
    for step in range(4):
        weight.grad, model.line.bias.grad = torch.ones_like(weight), torch.ones(1)
        pruner.mask_gradients()
        optimizer.step()
        pruner.after_update(step)
    assert weight[0, 0] == 0 != weight[0, 1] and optimizer.state[weight]["exp_avg"][0, 0] != 0


def test_a_refused_step_changes_neither_weights_nor_masks():
    model = Line([1.0, 2.0, 3.0, 4.0])
    optimizer, weight = adam_for(model), model.line.weight
    pruner = pruner_of(model, optimizer, steps=1, pruning="state")
    weight.grad, model.line.bias.grad = torch.ones_like(weight), torch.ones(1)
    optimizer.step()
    pruner.after_update(0)
    before, mask = weight.clone(), pruner.masks[0].clone()
    weight.grad = torch.full_like(weight, torch.nan)
    pruner.mask_gradients()
    step_unless(torch.ones(()), optimizer)
    pruner.after_update(1)
    assert torch.equal(weight, before) and torch.equal(pruner.masks[0], mask)


@pytest.mark.parametrize("regrowth", [False, True])
def test_pruned_weights_come_back_only_if_they_may(regrowth):
    """bitter5 of what moves away from zero is below 0, the score of the pruned."""
    model = Line([1.0, 2.0, 3.0, 4.0])
    optimizer, weight = adam_for(model), model.line.weight
    settings = {
        "pruning": "state",
        "pruning_score": "bitter5",
        "sparsity": 0.25,
        "pruning_regrowth": regrowth,
    }
    pruner = pruner_of(model, optimizer, steps=2, pruning_ramp="cubic_early", **settings)
    pruner.ramp = type(pruner.ramp)(
        "linear", pruner.ramp.sparsity * 2, 0, 2, 1
    )  # one after each update: 1, then 2
    for step, gradients in enumerate(([-1.0, 1.0, 1.0, 1.0], [0.0, -9.0, -9.0, 1.0])):
        weight.grad, model.line.bias.grad = torch.tensor([gradients]), torch.ones(1)
        pruner.mask_gradients()
        optimizer.step()
        pruner.after_update(step)
    pruned = [[False, True, True, False]] if regrowth else [[True, True, False, False]]
    assert (~pruner.masks[0]).tolist() == pruned


@pytest.mark.parametrize("end", [2, 3])
def test_what_came_back_may_be_zero_until_its_next_update_but_not_when_the_ramp_is_over(end):
    model = Line([1.0, 2.0, 3.0, 4.0])
    optimizer, weight = adam_for(model), model.line.weight
    settings = {"pruning": "state", "pruning_score": "bitter5", "pruning_regrowth": True}
    pruner = pruner_of(model, optimizer, steps=3, **settings)
    pruner.ramp = replace(pruner.ramp, sparsity=Fraction(end, 4), end=end)  # one after each update
    for step, gradients in enumerate(([-1.0, 1.0, 1.0, 1.0], [0.0, -9.0, -9.0, 1.0])):
        weight.grad, model.line.bias.grad = torch.tensor([gradients]), torch.ones(1)
        pruner.mask_gradients()
        optimizer.step()
        pruner.after_update(step)
    assert weight[0, 0] == 0 and pruner.masks[0][0, 0]
    (line,) = Sparsity(pruner, lambda _: 0).lines(
        Pruning(**settings), 2, Ranks(0, 1, torch.device("cpu")), Parallel()
    )
    assert f"1 zeros are not masked, where {end - 2} came back in the newest step" in line.how
    assert line.agrees == (end == 3)


@pytest.mark.parametrize("method", ["magnitude", "state"])
def test_a_ranking_that_falls_on_a_refused_step_takes_place(method):
    """Of a state whose moments are all 0, so that its scores are: the first two."""
    model = Line([1.0, 2.0, 3.0, 4.0])
    optimizer, weight = adam_for(model), model.line.weight
    pruner = pruner_of(model, optimizer, steps=1, pruning=method, pruning_score="bitter0")
    weight.grad, model.line.bias.grad = torch.full_like(weight, torch.nan), torch.ones(1)
    step_unless(torch.ones(()), optimizer)
    assert pruner.after_update(0) and weight.tolist() == [[0.0, 0.0, 3.0, 4.0]]


@pytest.mark.parametrize("sample", [1.0, 0.1])
def test_a_ranking_takes_memory_of_one_tensor_at_a_time(sample, monkeypatch):
    """20 matrices of 10,000 weights: 4 bytes each of one, and some numbers; beside them a sample of all."""
    monkeypatch.setattr(masks, "PIECE", 1000)
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(20)))
    optimizer = adam_for(model)
    pruner = pruner_of(model, optimizer, steps=4, pruning="state", pruning_sample=sample)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    count = TensorBytes([*model.parameters(), *(p.grad for p in model.parameters()), *states, *pruner.held])
    before = count.current
    with count, torch.no_grad():
        pruner._rank(4)
    of_sample = 4 * 20_000 + 8 * 1000 if sample < 1 else 0  # keys, and places in one tensor
    assert 0 <= count.peak - before - of_sample < 41_000


# --- which tensors


def model_of(**changes):
    from engine.models import gpt

    torch.manual_seed(1)
    settings = {"layers": 2, "heads": 2, "width": 32, "context": 16, **changes}
    return gpt.build(resolve(settings, "test").model, 250)


NAMES = [
    f"layers.{i}.{part}.weight"
    for i in range(2)
    for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.out")
]


@pytest.mark.parametrize(
    ("changes", "excluded", "names"),
    [
        ({}, "", [*NAMES, "token_embedding.weight"]),
        ({"tie_embeddings": False}, "", [*NAMES, "head.weight"]),
        ({}, "token_embedding", NAMES),
        ({}, "token_embedding, layers.0,mlp", NAMES[4:6]),
    ],
)
def test_what_is_pruned(changes, excluded, names):
    found = prunable(model_of(**changes), Pruning(pruning="magnitude", pruning_exclude=excluded))
    assert [one.name for one in found] == names


def test_rows_that_pad_a_vocabulary_do_not_count():
    model = model_of(pad_vocabulary_to=64)
    embedding = prunable(model, Pruning(pruning="magnitude"))[-1]
    assert len(embedding.parameter) == 256 and embedding.shape == (250, 32) and embedding.size == 8000
    pruner = pruner_of(model, steps=1)
    pruner.after_update(0)
    assert sum((~m).sum().item() for m in pruner.masks) == sum(pruner.sizes) // 2
    assert not (model.token_embedding.weight[:250] == 0).all() and len(pruner.masks[-1]) == 250


@pytest.mark.parametrize(
    ("excluded", "message"),
    [
        (
            "embedding",
            "pruning_exclude: 'embedding' is no part of the name .* those are made of 0, 1, attention",
        ),
        ("layers,token_embedding", "pruning_exclude: leaves no tensor to prune"),
    ],
)
def test_an_exclusion_that_names_nothing_or_leaves_nothing_is_refused(excluded, message):
    with pytest.raises(ConfigError, match=message):
        prunable(model_of(), Pruning(pruning="magnitude", pruning_exclude=excluded))


def test_a_pattern_that_does_not_fit_is_refused():
    settings = Pruning(pruning="magnitude", pruning_pattern="2:4")
    with pytest.raises(
        ConfigError, match="multiple of 4, which those of layers.0.attention.qkv.weight are not"
    ):
        prunable(model_of(width=30), settings)


# --- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adamwprune"}, "set pruning = 'state', not 'none', or optimizer = 'adamw'"),
        ({"pruning": "state", "optimizer": "sgd"}, "optimizer = 'sgd' does not keep .* one of adamw, adam, "),
        ({"pruning": "state", "optimizer_offload": True}, "set optimizer_offload = false"),
        ({"pruning": "magnitude", "tensor_parallel": 2}, "matrices that are split; set tensor_parallel = 1"),
        (
            {"pruning": "magnitude", "pruning_start": 60, "pruning_hold": 40},
            r"pruning_start \+ pruning_hold = 60 \+ 40: must be < steps = 100",
        ),
        (
            {"pruning": "magnitude", "pruning_start": 60, "pruning_interval": 41},
            "pruning_interval = 41: must be ≤ the 40 steps",
        ),
        (
            {"pruning": "magnitude", "step_graph": True},
            "step_graph = true: not with pruning = 'magnitude': the host knows when",
        ),
        ({"pruning": "state", "pruning_score": "bitter4"}, "set pruning_threshold = 'layer_ramp'"),
        ({"pruning": "magnitude", "pruning_score": "bitter4"}, "would do nothing with pruning = magnitude"),
        ({"sparsity": 0.9}, "sparsity = 0.9: would do nothing with pruning = none"),
        (
            {"pruning": "state", "pruning_regrowth": True},
            "pruning_regrowth = true: would do nothing where no score",
        ),
        (
            {"pruning": "movement", "pruning_regrowth": True},
            "with pruning_hold = 0 there is none, .* set pruning_hold ≥ 1",
        ),
        (
            {"pruning": "magnitude", "pruning_pattern": "2:4", "sparsity": 0.75, "pruning_sample": 0.1},
            r"(?s)'2:4': needs sparsity = 0.5, not 0.75.*needs pruning_sample = 1.0, not 0.1",
        ),
        (
            {"pruning": "magnitude", "pruning_pattern": "2:4", "pruning_threshold": "layer_ramp"},
            "prunes half of every layer",
        ),
        (
            {"pruning": "state", "pruning_score": "bitter11"},
            "pruning_score = 'bitter11': must be one of bitter0",
        ),
    ],
)
def test_what_cannot_be_together_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        resolve(values, "test")
