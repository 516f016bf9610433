"""Weights to start from: a finished run's, or a GPT-2's in Hugging Face format. They fit exactly, or are refused.

It must never change the model's shape to fit weights, nor cut or fill weights to fit the model. Only padding rows of
the vocabulary differ, because they mean nothing: they are left out of the source and are zero in the model. A model
with two heads has more than a GPT has: engine/models/double_heads.py says what is done then, and so does the ledger.
"""

from pathlib import Path

import torch
import torch.nn as nn

from engine import starts, vocabulary
from engine.config import Model, load
from engine.digest import sha256
from engine.errors import ConfigError
from engine.ledger import Line
from engine.models import double_heads, gpt2
from engine.starts import WEIGHTS

VOCABULARY_ROWS = ("token_embedding.weight", "head.weight")
# Settings that decide what a model computes and that the shapes of its tensors may not show.
FUNCTION = (
    "model",
    "layers",
    "heads",
    "width",
    "norm_placement",
    "attention_form",
    "latent_width",
    "latent_query",
    "latent_value",
    "reciprocal_alpha",
    "reciprocal_window",
    "activation",
    "positions",
    "tie_embeddings",
    "bias",
)


def load_into(model: nn.Module, settings: Model, tokens: Path | None = None) -> list[Line]:
    """Give `model`, whole and on the CPU, the weights in settings.init_from; the ledger's line about it.

    tokens: the directory of those that it will be trained on, whose vocabulary must be a run's own.

    Raises ConfigError with every problem: a directory that is neither kind, another vocabulary, settings that make
    another function of the weights, tensors that are missing, unknown or of another shape.
    """
    directory, kind = Path(settings.init_from), starts.kind(settings.init_from)
    padded_to = 1
    if kind == starts.RUN:
        theirs = finished(directory).model
        if tokens:
            vocabulary.require_same(directory, tokens)
        found = _of_run(directory, theirs, settings)
        padded_to = theirs.pad_vocabulary_to
    else:
        found = _of_gpt2(directory, settings)
    if settings.tie_embeddings:
        found.pop("head.weight", None)
    made = ""
    if isinstance(model, double_heads.DoubleHeads):
        for name in VOCABULARY_ROWS:
            if name in found:
                found[name] = found[name][: true_rows(found[name], padded_to)]
        found, words = double_heads.completed(model, found)
        made = "".join(f"; {one}" for one in words)
    _fill(model, found, padded_to, settings.init_from)
    equal, sizes = _equal(model, found), [p.numel() for p in model.parameters()]
    digest = sha256(directory / WEIGHTS)
    return [
        Line(
            "init_from",
            settings.init_from,
            f"{kind}: {equal} tensors{made}",
            f"tensors equal to those of the {len(sizes)} parameters, which have {sum(sizes):,} elements; sha256 of "
            f"{WEIGHTS} {digest}",
            equal == len(sizes),
        )
    ]


def lines(model: nn.Module, settings: Model) -> list[Line]:
    """What `load_into` said when the run began; a line that disagrees where it should have and did not."""
    if settings.init_from and not model.given_weights:
        return [Line("init_from", settings.init_from, "seeded weights", "no weights were loaded", False)]
    return model.given_weights


def true_rows(weight: torch.Tensor, padded_to: int) -> int:
    """The rows of a vocabulary's matrix (rows, C) without its padding, which is exactly zero, if it has any."""
    if padded_to == 1:
        return len(weight)
    used = weight.any(1).nonzero()
    return int(used.max()) + 1 if len(used) else 0


def read_weights(directory: Path, name: str = WEIGHTS) -> dict[str, torch.Tensor]:
    """The tensors of a directory's file `name`. Raises ConfigError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (directory / name).is_file():
        raise ConfigError(f"no {name}", str(directory))
    try:
        return load_file(directory / name)
    except SafetensorError as error:
        raise ConfigError(f"{name} cannot be read: {error}", str(directory)) from None


def finished(directory: Path):
    """The configuration of a finished run. Raises ConfigError if it is not complete."""
    starts.require_complete(directory)
    return load(directory / "config.toml")


def _of_run(directory: Path, theirs: Model, settings: Model) -> dict[str, torch.Tensor]:
    names = (*FUNCTION, "context") if settings.positions == "learned" else FUNCTION
    if settings.model == "double_heads":  # is a GPT with more; positions that it does not reach are left out
        own = {"model": ("gpt", "double_heads"), "context": range(settings.context, theirs.context + 1)}
        names = [name for name in names if getattr(theirs, name) not in own.get(name, ())]
    different = [
        f"{name} = {getattr(settings, name)!r}: the weights are for {getattr(theirs, name)!r}"
        for name in names
        if getattr(settings, name) != getattr(theirs, name)
    ]
    if different:
        raise ConfigError(different, f"init_from = {settings.init_from!r}")
    return read_weights(directory)


def _of_gpt2(directory: Path, settings: Model) -> dict[str, torch.Tensor]:
    where = f"init_from = {settings.init_from!r}"
    config = starts.gpt2_config(directory)
    # An untied model may start from a tied one: its head is then a copy.
    passed = ("tie_embeddings", "model") if settings.model == "double_heads" else ("tie_embeddings",)
    problems = [p for p in gpt2.problems(settings) if not p.startswith(tuple(f"{name} =" for name in passed))]
    problems += gpt2.configuration_problems(config, settings)
    if problems:
        raise ConfigError(problems, where)
    state = gpt2.from_gpt2(read_weights(directory), settings.heads)
    head = state.get("head.weight")
    if (
        settings.tie_embeddings
        and head is not None
        and not torch.equal(head, state["token_embedding.weight"])
    ):
        raise ConfigError("its head is not its token embedding; set tie_embeddings = false", where)
    return state


def _equal(model: nn.Module, found: dict[str, torch.Tensor]) -> int:
    """How many parameters hold what was `found` under their name; padding left out."""
    equal = 0
    for name, p in model.named_parameters():
        rows = model.vocabulary_size if name in VOCABULARY_ROWS else len(p)
        equal += name in found and torch.equal(p[:rows], found[name][:rows].to(p.dtype))
    return equal


@torch.no_grad()
def _fill(model: nn.Module, found: dict[str, torch.Tensor], padded_to: int, init_from: str) -> None:
    """Copy `found` into the parameters of the same names, all or none."""
    parameters = dict(model.named_parameters())
    real, given = dict(parameters), dict(found)
    for name in VOCABULARY_ROWS:
        if name in real:
            real[name] = real[name][: model.vocabulary_size]
        if name in given:
            given[name] = given[name][: true_rows(given[name], padded_to)]
    problems = [f"{name}: missing there" for name in real.keys() - given.keys()]
    problems += [f"{name}: unknown here" for name in given.keys() - real.keys()]
    problems += [
        f"{name}: {tuple(p.shape)} here, {tuple(given[name].shape)} there"
        for name, p in real.items()
        if name in given and p.shape != given[name].shape
    ]
    if problems:
        raise ConfigError(sorted(problems), f"init_from = {init_from!r}")
    for name, p in real.items():
        p.copy_(given[name])
        parameters[name][len(p) :] = 0.0
