"""Progressive sequence length: a step's samples read as shorter sequences at first, of the same tokens.

A sample stays a window of `context` tokens. While sequences are short, each window is cut into as many of them as it
holds, so a step has the same samples, tokens and targets as without; only how far a token sees is less. The data
order, and every count of samples and tokens, is therefore that of a run with whole sequences. (Staged training of
Shortformer: Press, Smith and Lewis, 2021.) The length of a step follows from its number alone.
"""

import torch

from engine import compiling
from engine.config import Training
from engine.ledger import Line


def stages(settings: Training, context: int) -> list[tuple[int, int]]:
    """(first step, tokens of a sequence) of each stage: lengths double up to `context`, in equal parts of
    lengthening_steps; one stage where first_length is 0."""
    shorter, length = [], settings.first_length
    while length and length < context:
        shorter.append(length)
        length *= 2
    starts = [i * settings.lengthening_steps // len(shorter) for i in range(len(shorter))]
    last = settings.lengthening_steps if shorter else 0
    return [*zip(starts, shorter, strict=True), (last, context)]


def of_step(settings: Training, context: int, step: int) -> int:
    """Tokens of one sequence at `step`."""
    return next(length for first, length in reversed(stages(settings, context)) if step >= first)


def cut(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Samples (B, T) as sequences (B · T / length, length), a sample's own in their order."""
    return tensor.view(-1, length)


def steps_at(settings: Training, context: int, steps: int) -> dict[int, int]:
    """How many of a run's first `steps` steps have sequences of each length."""
    found = stages(settings, context)
    ends = [first for first, _ in found[1:]] + [steps]
    return {
        length: max(0, min(end, steps) - min(first, steps))
        for (first, length), end in zip(found, ends, strict=True)
    }


class Lengths:
    """Cuts a run's samples, and notes what lengths the model was really given, by the step from which on it was."""

    def __init__(self, settings: Training, context: int):
        self.settings, self.context = settings, context
        self.seen: list[tuple[int, int]] = []  # (step, length) whenever the length changed
        self._last = -1

    def cut(self, step: int, micro_batches: list[tuple]) -> list[tuple]:
        """The micro-batches of `step`, (inputs, targets) of (b, context), as sequences of its length."""
        if not self.settings.first_length:
            return micro_batches
        length = of_step(self.settings, self.context, step)
        return [tuple(cut(tensor, length) for tensor in pair) for pair in micro_batches]

    def add(self, step: int, inputs: torch.Tensor) -> None:
        """Note the micro-batch `inputs` of `step`: (b, length), or anything of a task without lengths."""
        if not self.seen or self.seen[-1][1] != inputs.size(1):
            self.seen.append((step, inputs.size(1)))
        self._last = step

    def lines(self) -> list[Line]:
        """What was asked for against what was given, as far as the run is; nothing where nothing was asked."""
        if not self.settings.first_length or not self.seen:
            return []
        first, planned = self.seen[0][0], stages(self.settings, self.context)
        due = [
            (max(start, first), length)
            for (start, length), end in zip(planned, [s for s, _ in planned[1:]] + [None], strict=True)
            if start <= self._last and (end is None or end > first)
        ]
        how = f"shapes of the micro-batches of steps {first} to {self._last}; {len(self.seen)} lengths so far"
        if graphs := compiling.proof().graphs:
            how += f", {graphs} graphs, {compiling.proof().recompiles} recompiles"
        return [Line("first_length", _words(planned), _words(self.seen), how, self.seen == due)]


def _words(found: list[tuple[int, int]]) -> str:
    return ", ".join(f"{length} from step {step}" for step, length in found)
