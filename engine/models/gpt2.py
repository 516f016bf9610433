"""GPT-2 in Hugging Face's format: what it can express, and the names and layouts of its tensors.

It has our matrices transposed (its Conv1D), and the columns of `c_attn` in the order (q, k, v), then head; ours are
rows in the order head, then (q, k, v).
"""

import re

import torch

ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}  # our name → theirs
NORM_EPSILON = 1e-5  # of torch.nn.LayerNorm, and of GPT-2

_NAMES = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "norm": "ln_f",
    "norm1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.out": "mlp.c_proj",
}
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # buffers that old files hold


def problems(settings) -> list[str]:
    """What of a model (engine.config.Model) GPT-2 cannot express."""
    wanted = {
        "model": ("gpt",),
        "norm_placement": ("pre",),
        "positions": ("learned",),
        "attention_form": ("multi_head",),
        "activation": tuple(ACTIVATIONS),
        "bias": (True,),
        "tie_embeddings": (True,),
    }
    return [
        f"{name} = {getattr(settings, name)!r}: GPT-2 has {' or '.join(repr(v) for v in allowed)}"
        for name, allowed in wanted.items()
        if getattr(settings, name) not in allowed
    ]


def configuration(settings, vocabulary_size: int, end_of_text: int | None) -> dict:
    """The content of config.json for a model that GPT-2 can express."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocabulary_size,
        "n_positions": settings.context,
        "n_embd": settings.width,
        "n_layer": settings.layers,
        "n_head": settings.heads,
        "n_inner": settings.mlp_width or None,  # None: 4 × n_embd
        "activation_function": ACTIVATIONS[settings.activation],
        "layer_norm_epsilon": NORM_EPSILON,
        "resid_pdrop": settings.dropout,
        "embd_pdrop": settings.dropout,
        "attn_pdrop": settings.dropout,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def configuration_problems(config: dict, settings) -> list[str]:
    """Where a config.json describes another function than `settings`, beyond what the tensors' shapes tell.

    Absent entries have GPT-2's defaults.
    """
    theirs = config.get("activation_function", "gelu_new")
    ours = {their: our for our, their in ACTIVATIONS.items()}
    found = []
    if ACTIVATIONS.get(settings.activation) != theirs:
        cure = f"set activation = {ours[theirs]!r}" if theirs in ours else "there is no such activation here"
        found.append(f"activation = {settings.activation!r}: the weights are for {theirs!r}; {cure}")
    if config.get("n_head", 12) != settings.heads:
        found.append(f"heads = {settings.heads}: the weights are for {config.get('n_head', 12)}")
    if config.get("layer_norm_epsilon", NORM_EPSILON) != NORM_EPSILON:
        found.append(
            f"layer_norm_epsilon = {config['layer_norm_epsilon']}: only {NORM_EPSILON} is known here"
        )
    scaling = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    found += [
        f"{name} = {config[name]}: only {default} is known here"
        for name, default in scaling.items()
        if config.get(name, default) != default
    ]
    return found


def their_name(name: str) -> str:
    """'layers.3.attention.qkv.weight' → 'h.3.attn.c_attn.weight'."""
    module, _, kind = name.rpartition(".")
    layer = re.match(r"layers\.(\d+)\.", module)
    prefix = f"h.{layer[1]}." if layer else ""
    return f"{prefix}{_NAMES[module[layer.end() :] if layer else module]}.{kind}"


def to_gpt2(state: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """Our tensors under their names and in their layouts, with GPT2LMHeadModel's prefix."""
    return {
        f"transformer.{their_name(name)}": _to_theirs(their_name(name), tensor, heads).contiguous()
        for name, tensor in state.items()
    }


def from_gpt2(theirs: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """Their tensors, with or without the prefix, under our names and in our layouts; unknown names stay as they are.

    `head.weight` comes from their head or, where it is tied, from their token embedding.
    """
    plain = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    ours = {their: our for our, their in _NAMES.items()}
    state = {}
    for name, tensor in plain.items():
        if _MASK.fullmatch(name) or name == "lm_head.weight":
            continue
        module, _, kind = name.rpartition(".")
        layer = re.match(r"h\.(\d+)\.", module)
        known = ours.get(module[layer.end() :] if layer else module)
        full = f"layers.{layer[1]}.{known}.{kind}" if layer else f"{known}.{kind}"
        state[full if known else name] = _to_ours(name, tensor, heads) if known else tensor
    if "wte.weight" in plain:
        state["head.weight"] = plain.get("lm_head.weight", plain["wte.weight"])
    return state


def _to_theirs(name: str, tensor: torch.Tensor, heads: int) -> torch.Tensor:
    if ".c_attn." in name:
        tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return tensor.T if name.endswith(_TRANSPOSED) else tensor


def _to_ours(name: str, tensor: torch.Tensor, heads: int) -> torch.Tensor:
    tensor = tensor.T if name.endswith(_TRANSPOSED) else tensor
    if (
        ".c_attn." in name and tensor.size(0) % (3 * heads) == 0
    ):  # a wrong shape is reported where all are compared
        tensor = tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    return tensor
