"""What a model is trained for. An objective returns a sum over targets; the step divides by their count."""

import torch
import torch.nn.functional as F

from engine.data.batches import IGNORED


def next_token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats, in fp32: logits (B, T, V), targets (B, T) → scalar."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
