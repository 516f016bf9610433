"""The weights of a run's best evaluation, kept beside its final ones as best.safetensors (keep_best).

Best is the lowest validation loss, of labelled rows the highest validation accuracy; of a run that prunes only among
evaluations at its target sparsity; the first of equal ones. The weights are those that were evaluated: with
average_decay the average. The file says its step and its figure, is replaced whole, and is part of each checkpoint.
"""

import json
import math
import os
from pathlib import Path

import torch

from engine import parallel
from engine.config import Config
from engine.errors import ConfigError
from engine.ledger import Line
from engine.pretrained import WEIGHTS, read_weights
from engine.pruning.sparsity import Sparsity
from engine.rundir import Table

FILE = "best.safetensors"
KINDS = ("final", "best")  # of a run's weights


def add_argument(parser) -> None:
    """--weights, for a command that reads a finished run."""
    parser.add_argument(
        "--weights",
        choices=KINDS,
        default="final",
        help="of the last step, or of the best evaluation, where the run has keep_best (%(default)s)",
    )


def read(directory: Path, which: str) -> dict[str, torch.Tensor]:
    """A run's `which` of KINDS, by name. Raises ConfigError if they are missing or damaged."""
    if which == "best" and not (directory / FILE).is_file():
        raise ConfigError(
            f"--weights best: no {FILE}; the run kept none: use --weights final, or train it with keep_best = true",
            str(directory),
        )
    return read_weights(directory, FILE if which == "best" else WEIGHTS)


def step_of(directory: Path) -> int | None:
    """The step, from 0, whose evaluation a run's best weights had; None without any."""
    return _said(directory).get("step")


def _said(directory: Path) -> dict:
    from safetensors import safe_open

    if not (directory / FILE).is_file():
        return {}
    with safe_open(directory / FILE, "pt") as file:
        return json.loads(file.metadata()["evaluation"])


class Best:
    """Keeps those of one run; without keep_best its calls do nothing. Every rank makes the same calls."""

    def __init__(self, config: Config, task, sparsity: Sparsity, ranks: parallel.Ranks):
        self.on, self._sparsity, self._ranks = config.saving.keep_best, sparsity, ranks
        self.column = "val_accuracy" if "val_accuracy" in task.EVAL_COLUMNS else "val_loss"
        self.value: float | None = None  # of the best so far, as the first rank has it

    def consider(self, step: int, scores: dict[str, float], model: torch.nn.Module, directory: Path) -> None:
        """Keep the weights that `model` has, if the evaluation of `step` is the best so far."""
        if not self.on or not self._counts():
            return
        own = torch.tensor([scores[self.column]], dtype=torch.float64, device=self._ranks.device)
        value = parallel.of_all_ranks(own)[0].item()  # the first rank's, so that all decide alike
        if not math.isfinite(value) or (self.value is not None and not self._better(value, self.value)):
            return
        self.value = value
        weights = parallel.full_weights(model)
        if self._ranks.is_first:
            from safetensors.torch import save_file

            partial = directory / f"{FILE}.partial"
            # One key: the order of several in the file is not always the same.
            save_file(weights, partial, {"evaluation": json.dumps({"step": step, self.column: value})})
            os.replace(partial, directory / FILE)

    def _better(self, value: float, other: float) -> bool:
        return value > other if self.column == "val_accuracy" else value < other

    def _counts(self) -> bool:
        """Whether the weights are sparse enough."""
        s = self._sparsity
        return not s.pruner.tensors or int(s.zeros().sum()) >= s.enough()

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]

    def discard(self, directory: Path) -> None:
        """Remove the file, of a run that leaves no model."""
        (directory / FILE).unlink(missing_ok=True)

    def lines(self, wanted: bool, directory: Path, evaluations) -> list[Line]:
        """Whether the file is of the best evaluation so far; nothing where none is asked, or before there was one.

        wanted: keep_best as the settings have it. evaluations: the run's engine.evaluations.Evaluations.
        """
        if not wanted or not self._ranks.is_first or not evaluations.count:
            return []
        rows, s = evaluations.table.read(), self._sparsity
        if s.pruner.tensors:
            zeros = {int(r["step"]): int(r["zeros"]) for r in Table(directory / s.FILE, s.columns).read()}
            rows = [r for r in rows if zeros[int(r["step"])] >= s.enough()]
        rows = [r for r in rows if math.isfinite(float(r[self.column]))]
        sign = -1 if self.column == "val_accuracy" else 1
        best = min(rows, key=lambda r: sign * float(r[self.column]), default=None)  # the first of equal ones
        expected = (
            f"{self.column} {float(best[self.column])} at step {best['step']}" if best else "none counts"
        )
        said = _said(directory)
        found = f"{self.column} {said.get(self.column)} at step {said['step']}" if said else "no file"
        asked = "highest" if sign < 0 else "lowest"
        at = " at the target sparsity" * bool(s.pruner.tensors)
        how = f"what {FILE} says of itself; of {len(rows)} evaluations in evals.csv that count the best: {expected}"
        return [Line("keep_best", f"{asked} {self.column}{at}", found, how, found == expected)]
