"""Units of language-model loss: perplexity and bits per byte.

Must not cap: a loss too large for a float gives infinity, which every table shows as such.
"""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """Perplexity exp(loss) of a mean loss in nats per token; `math.inf` where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Bits per byte of text, from a mean loss in nats per token and the mean bytes of text per token.

    It does not depend on the tokenizer's vocabulary, so runs with different tokenizers can be compared.

    Raises:
        ValueError: `bytes_per_token` is not a positive finite number.
    """
    if not (bytes_per_token > 0 and math.isfinite(bytes_per_token)):
        raise ValueError(f"bytes_per_token must be a positive number, got {bytes_per_token}")
    return loss / math.log(2) / bytes_per_token
