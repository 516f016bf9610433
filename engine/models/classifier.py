"""An encoder that names the class of a text: every token sees every other, and their mean decides.

Token id 0 is padding. With `padding_mask` neither attention nor the mean sees it; without, both do, as in the system
that this one is measured against. Pre-norm has a last layer norm before the mean, post-norm has none.
"""

import torch
import torch.nn as nn

from engine.models.block import INIT_STD, Block, as_operand, draw_weights
from engine.models.positions import Rotary, Sinusoids
from engine.objectives import ClassLabel

TASK = "engine.tasks.classes"
PADDING = 0


class Classifier(nn.Module):
    """Token ids (B, T) → logits (B, classes), or with targets (B,) their summed loss, in nats; and the output RMS of
    the blocks in `norm_layers`.

    `loss` is a module (logits (B, classes), targets (B,)) → scalar; the trainer installs the run's.
    """

    def __init__(self, s, vocabulary_size: int, norm_layers: tuple[int, ...], classes: int):
        super().__init__()
        # Before torch's own initial weights draw as many numbers as there are elements.
        seed = torch.randint(2**31, (), device="cpu").item()
        self.context, self.norm_layers, self.vocabulary_size = s.context, norm_layers, vocabulary_size
        self.padding_mask, self.token_dropout = s.padding_mask, s.token_dropout
        self.token_embedding = nn.Embedding(vocabulary_size, s.width)
        self.position_embedding = {
            "learned": lambda: nn.Embedding(s.context, s.width),
            "sinusoidal": lambda: Sinusoids(s.context, s.width, rms=INIT_STD),
            "rotary": lambda: None,
        }[s.positions]()
        rotary = Rotary(s.context, s.width // s.heads) if s.positions == "rotary" else None
        self.embedding_dropout, self.dropout = nn.Dropout(s.embedding_dropout), nn.Dropout(s.dropout)
        self.layers = nn.ModuleList(Block(s, rotary, causal=False) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width, bias=s.bias) if s.norm_placement == "pre" else nn.Identity()
        self.head = nn.Linear(s.width, classes)
        self.stream_in_bf16 = s.residual_precision == "bf16"
        self.stream_dtype: torch.dtype | None = None  # of the stream, as last seen before the last norm
        self.loss = ClassLabel()
        self.gradient_sums = None
        draw_weights(self, seed, {})

    def features(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tokens (B, T) → (the mean of the stream after the last norm (B, C), norms)."""
        real = tokens != PADDING
        real[:, 0] = True  # of rows that are nothing but padding, so that a mean exists: no loss counts them
        x = self._embedded(self._spread(tokens, real) if self.padding_mask else tokens)
        mask = real[:, None, None, :] if self.padding_mask else None
        norms = []
        for i, block in enumerate(self.layers):
            x = block(x, None, mask)
            if i in self.norm_layers:
                norms.append(x.detach().float().square().mean().sqrt())
        self.stream_dtype = x.dtype
        return as_operand(self._mean(self.norm(x).float(), real)), norms

    def _spread(self, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Padding looks up rows all over the table: its gradients, all 0, are else added to one row one by one.

        Most of a batch may be padding, and additions to the same address wait for each other.
        """
        own = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens) % self.vocabulary_size
        return torch.where(real, tokens, own)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, T) → (B, T, C)
        x = self.token_embedding(tokens)
        if self.training and self.token_dropout:
            kept = torch.rand(tokens.shape, device=tokens.device) >= self.token_dropout
            x = x * kept[..., None]
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(tokens.size(1), device=tokens.device))
        return self.embedding_dropout(x.bfloat16() if self.stream_in_bf16 else x)

    def _mean(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:  # (B, T, C), (B, T) → (B, C)
        if not self.padding_mask:
            return x.mean(1)
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        gradient_scale: torch.Tensor | None = None,
    ):
        """gradient_scale: multiplies the loss's gradients, not the loss; then call backward() on it itself."""
        pooled, norms = self.features(tokens)
        logits = self.head(self.dropout(pooled))
        self.loss.note(logits)
        return (logits if targets is None else self.loss(logits, targets, gradient_scale)), norms


def build(settings, vocabulary_size: int, norm_layers: tuple[int, ...] = (), classes: int = 0) -> Classifier:
    """A classifier with weights drawn from torch's global generator: seed it first."""
    return Classifier(settings, vocabulary_size, norm_layers, classes)
