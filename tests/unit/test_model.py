"""Models and optimizers: causal, equal however attention is computed, the right size, and able to learn.

The tests of a registry run over its entries, so that a new line there is tested at once. The parts of the GPT are in
test_model_parts.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from engine_runs import NEEDS

from engine import tasks
from engine.build import build_model, build_optimizer
from engine.config import resolve
from engine.models import MODELS
from engine.models.gpt import INIT_STD, build
from engine.objectives import next_token, scalar
from engine.optimizers import OPTIMIZERS, missing_library
from engine.optimizers.groups import decay_groups
from engine.parallel import Ranks

VOCABULARY, CLASSES = 61, 5
OF_MODEL = {
    "gpt": {},
    "classifier": {"dataset": "synthetic", "tokenizer": "frequent_words"},
    "double_heads": {"dataset": "dialogues", "candidates": CLASSES, "max_reply_tokens": 4},
}
ONE = Ranks(0, 1, torch.device("cpu"))
LATENT = {"attention_form": "latent", "latent_width": 12}
RECIPROCAL = {**LATENT, "attention": "manual", "reciprocal_alpha": 0.7, "reciprocal_window": 5}
VARIANTS = {
    "pre-sdpa": {},
    "pre-manual": {"attention": "manual"},
    "post-sdpa": {"norm_placement": "post"},
    "post-manual": {"norm_placement": "post", "attention": "manual"},
    "sinusoidal-relu": {"positions": "sinusoidal", "activation": "relu"},
    "rotary-relu-squared": {"positions": "rotary", "activation": "relu_squared"},
    "rotary-swiglu": {"positions": "rotary", "activation": "swiglu"},
    "geglu-padded": {"activation": "geglu", "pad_vocabulary_to": 64, "tie_embeddings": False},
    "latent": LATENT,
    "latent-rotary": {**LATENT, "positions": "rotary", "activation": "gelu_tanh", "bias": False},
    "latent-one-query": {**LATENT, "latent_query": "shared"},
    "latent-one-value": {**LATENT, "latent_value": "shared", "attention": "manual"},
    "reciprocal": RECIPROCAL,
    "reciprocal-one-query": {**RECIPROCAL, "latent_query": "shared"},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def config(**changes):
    return resolve({"layers": 3, "heads": 2, "width": 32, "context": 16, "device": "cpu"} | changes, "test")


def gpt(seed: int = 5, norm_layers: tuple[int, ...] = (), **changes):
    torch.manual_seed(seed)
    return build(config(**changes).model, VOCABULARY, norm_layers)


def tokens(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- what the GPT computes


@variants
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


@pytest.mark.parametrize("variant", ["pre-sdpa", "post-sdpa", "rotary-swiglu", "latent", "latent-rotary"])
def test_both_attentions_are_the_same_function(variant):
    results = {}
    for attention in ("sdpa", "manual"):
        model = gpt(**VARIANTS[variant] | {"attention": attention})
        loss, _ = model(tokens(), tokens(seed=1))
        loss.backward()
        results[attention] = [model(tokens())[0], *(p.grad for p in model.parameters())]
    for sdpa, manual in zip(results["sdpa"], results["manual"], strict=True):
        torch.testing.assert_close(sdpa, manual, rtol=1e-4, atol=1e-5)


@variants
def test_every_variant_has_finite_gradients_and_overfits_one_batch(variant):
    model = gpt(**variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    inputs, targets = tokens(), tokens(seed=1)
    losses = []
    for _ in range(60):
        loss, norms = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item() / targets.numel())
    assert norms == []
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert losses[-1] < 0.1 * losses[0]


@variants
def test_with_targets_a_model_gives_the_loss_of_its_logits(variant):
    model, targets = gpt(**variant), tokens(seed=1)
    targets[0, :5] = -100
    logits, loss = model(tokens())[0], model(tokens(), targets)[0]
    assert logits.shape == (2, 16, VOCABULARY) and loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, next_token(logits, targets))
    hidden, _ = model.features(tokens())
    torch.testing.assert_close(hidden @ model.head_weight[:VOCABULARY].T, logits)
    given = []
    model.loss.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    model(tokens(), targets)
    assert given[0].shape == (2, 16, 32) and given[1] is model.head_weight and given[2] is targets


def test_a_training_token_that_is_dropped_leaves_its_position_alone():
    """About a quarter of the tokens, in training only; what is left of a dropped one is where it stands."""
    model, seen = gpt(token_dropout=0.25), []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    words = torch.randint(VOCABULARY, (64, 12), generator=torch.Generator().manual_seed(1))
    positions = model.position_embedding(torch.arange(12)).expand(64, -1, -1)
    with torch.no_grad():
        model.train()(words)
        model.eval()(words)
    dropped = (seen[0] == positions).all(-1)
    assert 0.2 < dropped.float().mean() < 0.3 and 0 < dropped[0].sum() < 12
    torch.testing.assert_close(seen[0][~dropped], seen[1][~dropped], rtol=0, atol=0)
    assert not (seen[1] == positions).all(-1).any()


def test_what_the_head_reads_is_dropped_in_training_only():
    """A quarter of its numbers, the others 4/3 as large: the head sees nothing else of the dropout."""
    model = gpt(output_dropout=0.25)
    with torch.no_grad():
        dropped, whole = model.train().features(tokens())[0], model.eval().features(tokens())[0]
        torch.testing.assert_close(model(tokens())[0], gpt()(tokens())[0], rtol=0, atol=0)
    kept = dropped != 0
    assert 0.2 < 1 - kept.float().mean() < 0.3
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


@pytest.mark.parametrize("variant", ["pre-sdpa", "pre-manual", "latent", "reciprocal"])
def test_dropout_acts_in_training_only(variant):
    model, plain = gpt(**VARIANTS[variant], dropout=0.5), gpt(**VARIANTS[variant])
    assert not torch.equal(model(tokens())[0], model(tokens())[0])
    model.eval()
    torch.testing.assert_close(model(tokens())[0], plain(tokens())[0], rtol=0, atol=0)


@variants
def test_a_shorter_sequence_gives_the_same_logits(variant):
    model = gpt(**variant)
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


GPT2 = {  # (layers, heads, width): parameters as published, with vocabulary 50,257 and context 1,024
    "small": (12, 12, 768, 124_439_808),
    "medium": (24, 16, 1024, 354_823_168),
    "large": (36, 20, 1280, 774_030_080),
    "xl": (48, 25, 1600, 1_557_611_200),
}


@pytest.mark.parametrize(("layers", "heads", "width", "published"), GPT2.values(), ids=GPT2)
def test_gpt2_has_its_published_sizes(layers, heads, width, published):
    """V·C + T·C + the blocks, each 12·C² + 13·C, + the last norm; no memory is allocated."""
    settings = config(layers=layers, heads=heads, width=width, context=1024).model
    with torch.device("meta"):
        model = build(settings, 50257)
    assert sum(p.numel() for p in model.parameters()) == published
    assert 50257 * width + 1024 * width + layers * (12 * width**2 + 13 * width) + 2 * width == published


def test_a_tied_head_is_the_token_embedding():
    model, features = gpt(tie_embeddings=True), []
    model.norm.register_forward_hook(lambda _, __, output: features.append(output))
    logits, _ = model(tokens())
    torch.testing.assert_close(logits, features[0] @ model.token_embedding.weight.T)
    assert model.head_weight is model.token_embedding.weight
    untied = gpt(tie_embeddings=False)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (untied, model)]
    assert sizes[0] - sizes[1] == VOCABULARY * 32 and untied.head.weight.shape == (VOCABULARY, 32)
    assert untied.head_weight is untied.head.weight


def test_padding_of_the_vocabulary_changes_nothing():
    """Rows of zeros that are never predicted and have no gradient."""
    plain, padded = gpt(tie_embeddings=False), gpt(tie_embeddings=False, pad_vocabulary_to=64)
    assert padded.vocabulary_size == VOCABULARY == 61 and padded.head_weight.shape == (64, 32)
    for model in (plain, padded):
        model(tokens(), tokens(seed=1))[0].backward()
    torch.testing.assert_close(plain(tokens())[0], padded(tokens())[0], rtol=0, atol=1e-7)
    for name, p in padded.named_parameters():
        expected = dict(plain.named_parameters())[name]
        torch.testing.assert_close(p.grad[: len(expected)], expected.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(p[: len(expected)], expected)
        assert not p[len(expected) :].any() and not p.grad[len(expected) :].any()


def test_the_residual_stream_has_the_precision_asked_for():
    for placement in ("pre", "post"):
        for wanted, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            model = gpt(norm_placement=placement, precision="bf16", residual_precision=wanted)
            outputs = []
            for block in model.layers:
                block.register_forward_hook(lambda _, given, output, o=outputs: o.extend([given[0], output]))
            with torch.autocast("cpu", torch.bfloat16):
                hidden, _ = model.features(tokens())
            assert {x.dtype for x in outputs} == {dtype} and model.stream_dtype is dtype
            assert hidden.dtype is torch.bfloat16  # what the head's product would cast it to
    plain = gpt()
    plain(tokens())
    assert plain.stream_dtype is torch.float32


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
        {"activation": "geglu"},
        {"attention_form": "latent"},
        {"positions": "rotary"},
        {"pad_vocabulary_to": 64},
        {"layers": 4},
        {"bias": False},
    ],
)
def test_what_a_run_varies_does_not_change_its_initial_weights(changes):
    """Paired seeds start from the same weights in every run of a study."""
    plain, varied = (build_model(config(**c), VOCABULARY, ONE).state_dict() for c in ({}, changes))
    shared = plain.keys() & varied.keys()
    assert len(shared) >= 20  # of the 40 tensors of three layers
    for name in shared:
        if plain[name].shape == varied[name].shape and not ("layers" in changes and ".out." in name):
            assert torch.equal(plain[name], varied[name]), name
        elif "pad_vocabulary_to" in changes:
            assert torch.equal(plain[name], varied[name][:VOCABULARY]), name


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


def shape_of_outputs(name: str, targets: torch.Tensor) -> tuple[int, ...]:
    """Of what a model says without targets: logits for each of them; of a row of dialogues, scores."""
    return {"classifier": (2, CLASSES), "double_heads": (2, CLASSES)}.get(name, (*targets.shape, VOCABULARY))


def batch_of(settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples of the model's task."""
    inputs, targets = tasks.of(settings).empty_batch(settings, 2)
    if settings.model.model == "double_heads":  # no special token
        inputs = torch.randint(VOCABULARY - 5, inputs.shape, generator=torch.Generator().manual_seed(0))
    else:
        inputs = tokens(seed=0)
    limit = VOCABULARY if settings.model.model == "gpt" else CLASSES
    return inputs, torch.randint(limit, targets.shape, generator=torch.Generator().manual_seed(1))


def loss_of(model, inputs, targets) -> torch.Tensor:
    """The mean loss, as a step has it."""
    return scalar(model.loss.weighed(model(inputs, targets)[0], model.loss.counts(targets)))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds_and_has_finite_gradients(name):
    settings = config(model=name, **OF_MODEL[name])
    model = build_model(settings, VOCABULARY, ONE, CLASSES)
    inputs, targets = batch_of(settings)
    logits, norms = model(inputs)
    assert logits.shape == shape_of_outputs(name, targets) and norms == []
    scalar(model(inputs, targets)[0]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_model_and_optimizer_overfits_one_batch(name, optimizer):
    own = {"sgd": {"lr": 0.3}, "spam": {"lr": 1e-2, "spam_warmup_steps": 10}}.get(optimizer, {"lr": 1e-2})
    own |= NEEDS.get(optimizer, {})
    settings = config(model=name, **OF_MODEL[name], optimizer=optimizer, **own, weight_decay=0.0)
    if problem := missing_library(settings.optimizer):
        pytest.skip(problem)
    model = build_model(settings, VOCABULARY, ONE, CLASSES)
    steps = build_optimizer(model, settings)
    inputs, targets = batch_of(settings)
    losses = []
    for _ in range(60):
        loss = loss_of(model, inputs, targets)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    at_first = {"gpt": math.log(VOCABULARY), "classifier": math.log(CLASSES)}
    both = (math.log(VOCABULARY) + math.log(CLASSES)) / 2
    assert losses[0] == pytest.approx(at_first.get(name, both), rel=0.05)
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
