"""Rules between the settings of data and of the model that learns from it."""

from engine.data import DIALOGUES, DOCUMENTS, LABELLED, PADDED, SEPARATING, TEXTS, TOKENIZERS, UTTERING
from engine.rules.check import Check


def checks(c) -> list[Check]:
    """The rules of this file, for a Config."""
    return [*_data(c), *_model(c.model), *_reciprocal(c)]


def _data(c) -> list[Check]:
    """Which data sets a model is for, and which tokenizers a data set is for."""
    d, labelled = c.data, c.data.dataset in LABELLED
    wanted = {"classifier": LABELLED, "double_heads": DIALOGUES}.get(c.model.model, TEXTS)
    words = PADDED if labelled else [name for name in TOKENIZERS if name not in PADDED]
    kind = "rows are padded with id 0" if labelled else "text is not padded"
    if d.dataset in DOCUMENTS:
        words, kind = SEPARATING, "documents are divided by an end-of-text token"
    if d.dataset in DIALOGUES:
        words, kind = UTTERING, "utterances have no line ends"
    return [
        (
            ("model", "dataset"),
            d.dataset not in wanted,
            f"model = {c.model.model!r}: cannot learn from dataset = {d.dataset!r}; it needs one of "
            f"{', '.join(wanted)}",
        ),
        (
            ("dataset", "tokenizer"),
            d.tokenizer not in words,
            f"tokenizer = {d.tokenizer!r}: not for dataset = {d.dataset!r}, because its {kind}; set it to one of "
            f"{', '.join(words)}",
        ),
        (
            ("model", "context", "max_reply_tokens"),
            c.model.model == "double_heads" and c.model.context <= d.max_reply_tokens,
            f"context = {c.model.context}: must be more than max_reply_tokens = {d.max_reply_tokens}, which are "
            "behind what was said before",
        ),
        (
            ("hits_candidates", "candidates"),
            0 < c.evaluation.hits_candidates <= d.candidates,
            f"hits_candidates = {c.evaluation.hits_candidates}: must be more than candidates = {d.candidates}, or 0",
        ),
        (
            ("shared_context", "positions"),
            c.model.shared_context and c.model.positions == "rotary",
            "shared_context = true: candidates stand at the same positions, and positions = 'rotary' are those of "
            "the tensor; set positions = 'learned'",
        ),
        (
            ("text_column",),
            not all(name.strip() for name in d.text_column.split(",")),
            f"text_column = {d.text_column!r}: must be names of columns with commas between them",
        ),
        (
            ("text_column", "label_column"),
            d.label_column in [name.strip() for name in d.text_column.split(",")],
            f"label_column = {d.label_column!r}: is a text_column too, so the model would read the answer",
        ),
    ]


def _model(m) -> list[Check]:
    latent = m.attention_form == "latent"
    rotated_name, rotated = (
        ("latent_width", m.latent_width) if latent else ("width / heads", m.width // m.heads)
    )
    return [
        (
            ("width", "heads"),
            m.width % m.heads != 0,
            f"width = {m.width}: must be a multiple of heads = {m.heads}",
        ),
        (
            ("positions", "attention_form", "width", "heads", "latent_width"),
            m.positions == "rotary" and rotated % 2 != 0,
            f"positions = 'rotary': {rotated_name} = {rotated}: must be even, because features turn in pairs",
        ),
        (
            ("attention_form", "latent_query", "latent_value", "heads"),
            latent and m.heads > 1 and m.latent_query == m.latent_value == "shared",
            f"latent_query and latent_value = 'shared': all {m.heads} heads would be one and the same; share one "
            "of the two, or set heads = 1",
        ),
    ]


def _reciprocal(c) -> list[Check]:
    """Which implementations have the reciprocal term, and what flex cannot."""
    m, alpha = c.model, c.model.reciprocal_alpha
    asked = "attention = 'flex'"
    cannot = [
        ("reciprocal_alpha", not alpha, "is for the reciprocal term alone; set attention = 'sdpa'"),
        ("compile", c.compile.compile == "none", "is fused in a compiled graph only; set compile = 'model'"),
        ("precision", c.training.precision == "fp32", "multiplies in 16 bits only; set precision = 'bf16'"),
        ("dropout", m.dropout > 0, f"has no dropout (dropout = {m.dropout}); set attention = 'manual'"),
        (
            "latent_width",
            bool(alpha) and not 16 <= m.latent_width <= 128,
            f"takes a latent_width from 16 to 128, not {m.latent_width}; set attention = 'manual'",
        ),
    ]
    return [
        (
            ("reciprocal_alpha", "attention"),
            alpha != 0 and m.attention not in ("manual", "flex"),
            f"reciprocal_alpha = {alpha}: no kernel of SDPA has the reciprocal term; set attention = 'manual' (its "
            f"scores written out) or 'flex' (a GPU's compiled kernels), not {m.attention!r}",
        ),
        *(
            (("attention", name), m.attention == "flex" and broken, f"{asked}: {why}")
            for name, broken, why in cannot
        ),
    ]
