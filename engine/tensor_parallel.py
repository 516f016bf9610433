"""Tensor parallel for models.gpt: which matrices are split, and how, over one group of ranks.

Megatron's plan (Shoeybi et al. 2019): qkv and the MLP's first matrices are split by output, so that a rank has whole
heads and whole features; the projections back into the residual stream are split by input and their results added
over the group. Token embedding and head are split over the vocabulary, which the loss knows (NextToken's group). All
else is replicated, as DTensors, so that one gradient norm covers every parameter.

The residual stream is the same on all ranks of the group, bit for bit; sequence parallel is not used.
"""

import torch.nn as nn

from engine.config import Config
from engine.errors import ConfigError
from engine.models.mlp import hidden_width

COLUMNS = ("attention.qkv", "mlp.up", "mlp.gate")  # of a block; split by output
ROWS = ("attention.out", "mlp.out")  # split by input, results added
VOCABULARY = ("token_embedding", "head")


def check(config: Config) -> list[str]:
    """Problems of the settings with tensor_parallel > 1."""
    m, size = config.model, config.parallel.tensor_parallel
    hidden = hidden_width(m.width, m.activation, bias=m.bias, asked=m.mlp_width)
    with_it = f"with tensor_parallel = {size}"
    checks = [
        (m.heads % size, f"heads = {m.heads}: must be a multiple of tensor_parallel = {size}"),
        (
            m.attention_form != "multi_head",
            f"attention_form = {m.attention_form!r}: not supported {with_it}; use 'multi_head'",
        ),
        (
            m.dropout > 0,
            f"dropout = {m.dropout}: not supported {with_it}, where split and replicated activations would need "
            "different random streams; use 0",
        ),
        (
            m.token_dropout > 0,
            f"token_dropout = {m.token_dropout}: not supported {with_it}, where every rank would leave out others; "
            "use 0",
        ),
        (
            m.output_dropout > 0,
            f"output_dropout = {m.output_dropout}: not supported {with_it}, where every rank would drop others; "
            "use 0",
        ),
        (
            hidden % size,
            f"activation = {m.activation!r}: its {hidden} inner features must be a multiple of tensor_parallel = "
            f"{size}; use another width or activation",
        ),
        (config.training.float8, f"float8 = true: not supported {with_it}; use false"),
    ]
    return [message for broken, message in checks if broken]


def _modules(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """The full names of the linear layers and embeddings of `model` that are called one of `names`."""
    found = []
    for full, module in model.named_modules():
        plain = full.replace("._checkpoint_wrapped_module", "")  # what activation checkpointing adds
        if isinstance(module, nn.Linear | nn.Embedding) and f".{plain}".endswith(
            tuple(f".{n}" for n in names)
        ):
            found.append(full)
    return found


def split_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that the plan splits: all matrices, and the biases of those split by output."""
    parameters = dict(model.named_parameters())
    split = [f"{name}.weight" for name in _modules(model, (*COLUMNS, *ROWS, *VOCABULARY))]
    split += [f"{name}.bias" for name in _modules(model, COLUMNS)]
    return [name for name in split if name in parameters]


def plan(model: nn.Module) -> dict:
    """The style of every module that has parameters of its own, by its name."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from engine import titan

    styles = {name: ColwiseParallel() for name in _modules(model, COLUMNS)}
    styles |= {name: RowwiseParallel() for name in _modules(model, ROWS)}
    for name in _modules(model, VOCABULARY):
        embeds = isinstance(model.get_submodule(name), nn.Embedding)
        styles[name] = RowwiseParallel(input_layouts=Replicate()) if embeds else ColwiseParallel()
    others = [
        name for name, m in model.named_modules() if name not in styles and list(m.parameters(recurse=False))
    ]
    return styles | {name: titan.NoParallel() for name in others}


def apply(model: nn.Module, mesh) -> None:
    """Split `model` over the one-dimensional device mesh `mesh`, in place.

    The head's weight is then a DTensor, of which `model.loss` takes this rank's rows.

    Raises ConfigError where the vocabulary cannot be split evenly, which only shows once the tokens are known.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    rows, size = model.head_weight.shape[0], mesh.size()
    if rows % size:
        raise ConfigError(
            f"tensor_parallel = {size}: must divide the {rows} rows of the vocabulary; set pad_vocabulary_to to a "
            f"multiple of {size}"
        )
    parallelize_module(model, mesh, plan(model))
