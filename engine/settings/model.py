"""What is trained: the shape of the model and what it is started from."""

from dataclasses import dataclass

from engine.declare import setting
from engine.models import MODELS


@dataclass(frozen=True)
class Model:
    model: str = setting("gpt", "architecture", choices=MODELS)
    layers: int = setting(4, "transformer blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    width: int = setting(128, "model width", unit="features", at_least=1)
    mlp_width: int = setting(
        0,
        "inner width of the MLP; 0: 4 × width, or of gated ones the width with as many parameters",
        unit="features",
        at_least=0,
    )
    context: int = setting(128, "sequence length", unit="tokens", at_least=1)
    norm_placement: str = setting("pre", "layer norm before or after each sublayer", choices=("pre", "post"))
    attention: str = setting(
        "sdpa",
        "attention implementation: torch's choice of kernel, one of its kernels, or written out; flex: the kernels "
        "of the reciprocal term, in compiled graphs",
        choices=("sdpa", "flash", "cudnn", "efficient", "math", "manual", "flex"),
    )
    attention_form: str = setting(
        "multi_head",
        "multi-head attention, or latent attention (MLA)",
        choices=("multi_head", "latent"),
        only_if={"model": ("gpt",)},
    )
    padding_mask: bool = setting(
        True,
        "attention and pooling leave padding out; false: they see it",
        only_if={"model": ("classifier",)},
    )
    latent_width: int = setting(
        128,
        "width of the latent keys and values, shared by the heads",
        unit="features",
        at_least=1,
        only_if={"attention_form": ("latent",)},
    )
    latent_query: str = setting(
        "per_head",
        "each head has its own latent query, or all share one",
        choices=("per_head", "shared"),
        only_if={"attention_form": ("latent",)},
    )
    latent_value: str = setting(
        "per_head",
        "each head has its own map of the latent values to its width, or all share one",
        choices=("per_head", "shared"),
        only_if={"attention_form": ("latent",)},
    )
    reciprocal_alpha: float = setting(
        0.0, "weight of the reciprocal term; 0: none", only_if={"attention_form": ("latent",)}
    )
    reciprocal_window: int = setting(
        64,
        "how far back the reciprocal term reaches",
        unit="tokens",
        at_least=0,
        only_if={"attention_form": ("latent",)},
    )
    activation: str = setting(
        "gelu",
        "non-linearity of the MLP; gated ones (swiglu, geglu) are 8/3 wide, so that the parameters stay equal",
        choices=("gelu", "gelu_tanh", "relu", "relu_squared", "swiglu", "geglu"),
    )
    positions: str = setting(
        "learned", "how a token's position is known", choices=("learned", "sinusoidal", "rotary")
    )
    residual_precision: str = setting(
        "fp32",
        "precision of the residual stream under precision = bf16",
        choices=("fp32", "bf16"),
        only_if={"precision": ("bf16",)},
    )
    pad_vocabulary_to: int = setting(
        1,
        "embedding rows are padded to a multiple of this, for speed; padding is never predicted",
        unit="rows",
        at_least=1,
        only_if={"model": ("gpt", "double_heads")},
    )
    shared_context: bool = setting(
        False,
        "what was said before the candidates is computed once for all of them; false: once for each",
        only_if={"model": ("double_heads",)},
    )
    init_from: str = setting(
        "",
        "directory of a finished run, or of a GPT-2 in Hugging Face format, to start from; empty: seeded",
        only_if={"model": ("gpt", "double_heads")},
    )
    tie_embeddings: bool = setting(
        True, "output head shares the token embedding's weight", only_if={"model": ("gpt", "double_heads")}
    )
    bias: bool = setting(True, "biases in linear layers and layer norms")
    dropout: float = setting(0.0, "dropout probability", at_least=0, below=1)
    embedding_dropout: float = setting(
        0.0, "dropout probability of the embedding", at_least=0, below=1, only_if={"model": ("classifier",)}
    )
    token_dropout: float = setting(
        0.0,
        "probability that a training token's embedding is left out",
        at_least=0,
        below=1,
    )
    output_dropout: float = setting(
        0.0,
        "dropout probability of what the output head reads",
        at_least=0,
        below=1,
        only_if={"model": ("gpt", "double_heads")},
    )
