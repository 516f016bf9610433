"""How much the gradient of one micro-batch says about that of a step: gradient noise scale and coherence.

    |G|² ≈ (B |G_B|² - b |G_b|²) / (B - b)     S ≈ (|G_b|² - |G_B|²) / (1/b - 1/B)     noise scale = S / |G|²

G_b is the gradient of b samples (one micro-batch of all ranks), G_B that of the step's B; S is the trace of the
covariance of single samples' gradients. A batch far below the noise scale S / |G|² is mostly noise, one far above
it learns little more a step (McCandlish et al. 2018, appendix A). Single measurements scatter, and |G|² may even
come out negative: averages are taken of S and |G|², never of their quotient. Coherence is |G_B|² over the mean
|G_b|²: 1 if all micro-batches say the same, b / B if they have nothing in common.

It is measured apart from training, by passes of its own with the random numbers that the step will have, so that a
run that measures ends with the same bits as one that does not.
"""

from collections.abc import Sequence

import torch

from engine.ledger import Line
from engine.side_table import SideTable
from engine.step import Step


def estimates(small: Sequence[float], large: float, b: int, B: int) -> dict[str, float]:  # noqa: N803
    """What a step's gradients say; small: squared norms of the gradients of parts of b samples, large: of all B."""
    mean = sum(small) / len(small)
    gradient, noise = (B * large - b * mean) / (B - b), (mean - large) / (1 / b - 1 / B)
    return {
        "small_batch": b,
        "large_batch": B,
        "small_square_norm": mean,
        "large_square_norm": large,
        "gradient_square": gradient,
        "noise": noise,
        "noise_scale": noise / gradient if gradient else float("nan"),
        "coherence": large / mean if mean else float("nan"),
    }


class NoiseScale(SideTable):
    """Measures one run's gradients at every n-th step, and keeps the rows until they are written."""

    FILE = "noise_scale.csv"
    columns = [
        "step",
        "tokens_seen",
        "small_batch",
        "large_batch",
        "small_square_norm",
        "large_square_norm",
        "gradient_square",
        "noise",
        "noise_scale",
        "coherence",
    ]

    def __init__(self, step: Step, interval: int, large_batch: int):
        """interval: n; 0: never."""
        self.step, self.interval, self.large_batch = step, interval, large_batch
        self.measured = 0  # steps, in this process
        self._rows: list[tuple] = []

    def due(self, number: int) -> bool:
        """Whether the step `number` is one of those."""
        return bool(self.interval) and (number + 1) % self.interval == 0

    def squares(self, micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """|G_b|² of each of this rank's micro-batches, together with those of the other ranks: (n,)."""
        self.measured += 1
        device = self.step.ranks.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return torch.stack([self.step.gradient_norm(*one) for one in micro_batches]).square()

    def add(self, number: int, tokens_seen: int, squares: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Note a measured step, whose own gradient had this norm; the device is not waited for."""
        self._rows.append((number, tokens_seen, squares, grad_norm))

    def take_rows(self) -> list[dict]:
        rows, self._rows = [self._row(*one) for one in self._rows], []
        return rows

    def _row(self, number: int, tokens_seen: int, squares: torch.Tensor, grad_norm: torch.Tensor) -> dict:
        small, large = squares.tolist(), grad_norm.item() ** 2
        found = estimates(small, large, self.large_batch // len(small), self.large_batch)
        return {"step": number, "tokens_seen": tokens_seen, **found}

    def lines(self, first: int, taken: int) -> list[Line]:
        """The ledger's line: how many of the steps from `first` on, of those taken, were measured."""
        if not self.interval:
            return []
        due = sum(map(self.due, range(first, taken)))
        how = f"steps whose micro-batches had passes of their own, since step {first}"
        return [
            Line(
                "noise_scale_interval",
                f"every {self.interval} steps",
                f"{self.measured} steps measured",
                how,
                self.measured == due,
            )
        ]
