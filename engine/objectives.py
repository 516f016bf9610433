"""What a model is trained for. An objective returns a sum over targets; the step divides by their count."""

import dataclasses
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine import losses, split_vocabulary
from engine.config import SETTINGS, Training
from engine.data.batches import IGNORED

KERNELS = SETTINGS["loss_kernel"].rule["choices"]


def next_token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats, in fp32: logits (B, T, V), targets (B, T) → scalar."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


class OneSum:
    """What the step must know of an objective that is one sum over targets."""

    PARTS: tuple[str, ...] = ()  # names of an objective's sums, where it has several

    def counts(self, targets: torch.Tensor) -> torch.Tensor:
        """How many of `targets` count: a scalar, or one number a part."""
        return (targets != IGNORED).sum()

    def weighed(self, sums: torch.Tensor | float, counts: torch.Tensor) -> torch.Tensor:
        """sums / counts, of several parts each times its weight: their sum is the loss."""
        return sums / counts

    def samples(self, counts: torch.Tensor) -> torch.Tensor:
        """Of `counts` what says how many samples there were."""
        return counts


class NextToken(OneSum, nn.Module):
    """(hidden (B, T, C), weight (rows, C), targets (B, T)) → summed cross-entropy, an fp32 scalar.

    The weight's rows from `vocabulary_size` on are padding: probability and gradient exactly 0. With a
    tensor-parallel `group` the weight is this process's share of the rows, in the order of ranks, and hidden
    is the same in all processes. The head's product is in autocast's dtype, or hidden's if autocast is off.
    gradient_scale, a scalar on the device, multiplies the gradients: then call backward() on the loss itself.

    kernel: full: logits and gradient whole, by autograd; fused: the gradient overwrites the logits; chunked:
    the same with at most `chunk_tokens` rows of logits at a time. Where no gradient is needed, fused is
    chunked too.

    What it did is noted for the ledger: operand_dtype of the last product; largest_logits (rows, columns) of
    all; passes, products counted by the path that computed their loss ("full", "in place").
    """

    def __init__(
        self,
        vocabulary_size: int,
        kernel: str = Training.loss_kernel,
        chunk_tokens: int = Training.loss_chunk_tokens,
        group=None,
    ):
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"kernel = {kernel!r}: must be one of {', '.join(KERNELS)}")
        self.vocabulary = losses.Vocabulary(vocabulary_size, group)
        self.kernel, self.chunk_tokens = kernel, chunk_tokens
        self.operand_dtype: torch.dtype | None = None
        self.forget()
        self._whole = _whole
        # (the head's weight in the operands' dtype, the sum that takes its gradient); None: autograd has both
        self.summed_head: tuple[torch.Tensor, torch.Tensor] | None = None

    def forget(self) -> None:
        """Start the notes anew: what follows is one step."""
        self.largest_logits, self.passes, self.head_sums = (0, 0), Counter(), 0

    def compile(self, **options) -> None:
        """torch.compile what there is to fuse: the full loss of one process.

        The other kernels are fused already, and collectives stay outside of graphs.
        """
        if self.kernel == "full" and self.vocabulary.group is None:
            self._whole = torch.compile(_whole, **options)

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        gradient_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden, weight = _local(hidden), _local(weight)
        self.vocabulary.check(len(weight))
        dtype, device = hidden.dtype, hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        path = self._full if self.kernel == "full" else self._in_place
        return path(hidden, weight, targets, dtype, gradient_scale)

    def _full(self, hidden, weight, targets, dtype, gradient_scale) -> torch.Tensor:
        loss = self._unscaled(hidden, weight, targets, dtype)
        return loss if gradient_scale is None else losses.ScaledGradient.apply(loss, gradient_scale)

    def _unscaled(self, hidden, weight, targets, dtype) -> torch.Tensor:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        self._note("full", targets.numel(), len(weight), hidden.dtype)
        if self.vocabulary.group is None:
            return self._whole(hidden, weight, targets, self.vocabulary.size)
        with torch.autocast(hidden.device.type, enabled=False):
            return split_vocabulary.cross_entropy(
                hidden.flatten(0, 1), weight, targets.flatten(), self.vocabulary
            )

    def _in_place(self, hidden, weight, targets, dtype, gradient_scale) -> torch.Tensor:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        chunk = len(hidden) if self.kernel == "fused" and differentiable else self.chunk_tokens
        plan = losses.Plan(self.vocabulary, dtype, max(chunk, 1), self._saw, gradient_scale)
        if differentiable and self.summed_head:
            self.head_sums += 1
            weight, plan = self.summed_head[0], dataclasses.replace(plan, weight_sum=self.summed_head[1])
        if differentiable:
            return losses.LinearCrossEntropy.apply(hidden, weight, targets, plan)
        return losses.loss_and_gradients(hidden, weight, targets, plan)[0]

    def _saw(self, logits: torch.Tensor) -> None:
        self._note("in place", *logits.shape, logits.dtype)

    def _note(self, path: str, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.passes[path] += 1
        self.operand_dtype = dtype
        self.largest_logits = max(self.largest_logits, (rows, columns))


class ReplyAndChoice(NextToken):
    """The summed cross-entropy of true replies' tokens and of choices, in nats, and how many choices were right.

    (hidden (B, R, C), head_weight, scores of the candidates (B, choices), targets (B, 1 + R)) → (3,) in fp32. Targets
    are the number of the true candidate and, of each of its tokens, the one that follows. With their counts the loss
    is (λ · tokens + choice) / (λ + 1), each a mean over its own targets, of which a reply has many and a row one.
    gradient_scale (3,), or a scalar, multiplies the gradients of each part.
    """

    PARTS = ("lm_loss", "mc_loss", "accuracy")

    def __init__(self, vocabulary_size: int, lm_weight: float = Training.lm_loss_weight, **options):
        super().__init__(vocabulary_size, **options)
        self.weights = (lm_weight / (lm_weight + 1), 1 / (lm_weight + 1), 0.0)

    def counts(self, targets: torch.Tensor) -> torch.Tensor:
        real = targets != IGNORED
        return torch.stack([real[:, 1:].sum(), real[:, 0].sum(), real[:, 0].sum()])

    def weighed(self, sums: torch.Tensor | float, counts: torch.Tensor) -> torch.Tensor:
        means = (sums / counts).unbind()
        return torch.stack([mean * weight for mean, weight in zip(means, self.weights, strict=True)])

    def samples(self, counts: torch.Tensor) -> torch.Tensor:
        return counts[1]

    def forward(
        self, hidden, weight, scores, targets, gradient_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        scales = (
            (None, None) if gradient_scale is None else gradient_scale.expand(len(self.PARTS))[:2].unbind()
        )
        tokens = super().forward(hidden, weight, targets[:, 1:], scales[0])
        true, scores = targets[:, 0], scores.float()
        choice = F.cross_entropy(scores, true, ignore_index=IGNORED, reduction="sum")
        if gradient_scale is not None:
            choice = losses.ScaledGradient.apply(choice, scales[1])
        right = (scores.detach().argmax(-1) == true).sum().float()  # no candidate is the ignored one
        return torch.stack([tokens, choice, right])


def scalar(loss: torch.Tensor) -> torch.Tensor:
    """What backward() is called on: the loss, or the sum of its parts."""
    return loss if loss.dim() == 0 else loss.sum()


class ClassLabel(OneSum, nn.Module):
    """(logits (B, classes), targets (B,)) → summed cross-entropy in nats, an fp32 scalar.

    gradient_scale, a scalar on the device, multiplies the gradients: then call backward() on the loss itself.
    operand_dtype: of the head's last product, for the ledger.
    """

    head_sums = 0  # the head's gradient is autograd's

    def __init__(self):
        super().__init__()
        self.operand_dtype: torch.dtype | None = None

    def forget(self) -> None:
        """Nothing of one step is noted."""

    def compile(self, **options) -> None:
        """There is nothing to fuse."""

    def note(self, logits: torch.Tensor) -> None:
        """What the head made, whether or not a loss is made of it."""
        self.operand_dtype = logits.dtype

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, gradient_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        return loss if gradient_scale is None else losses.ScaledGradient.apply(loss, gradient_scale)


def _whole(hidden, weight, targets, vocabulary_size: int) -> torch.Tensor:
    """The full loss of operands that have their dtype; logits (B, T, rows) without the padding."""
    return next_token(F.linear(hidden, weight)[..., :vocabulary_size], targets)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor, differentiably; a plain tensor as it is.

    Raises ValueError for a tensor whose rows are not split evenly: a class could not be told from its row.
    """
    if not hasattr(tensor, "to_local"):
        return tensor
    if any(
        p.is_shard() and tensor.shape[p.dim] % n
        for p, n in zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    ):
        raise ValueError(
            f"{tuple(tensor.shape)} does not split evenly over {tensor.device_mesh.size()} processes"
        )
    return tensor.to_local()
