"""Evaluation while a run trains: which rows are scored, the table of their scores, and what it took of memory.

What is scored, and how, is the task's (engine/tasks/); when it is due, the trainer's.
"""

from pathlib import Path

import torch

from engine import parallel, probes, rundir
from engine.config import Config
from engine.data.prepare import Tokens

OF_TRAIN = ("eval_train_loss", "eval_train_accuracy")  # columns of evals.csv, with eval_train_rows


class Evaluations:
    """Those of one run in this process.

    count: of them. dtype: of the newest one's operands of the head's product. peak_bytes: most memory that one took,
    on a GPU. table: evals.csv, of the first rank.
    """

    def __init__(self, config: Config, task, tokens: Tokens, ranks: parallel.Ranks):
        rows = config.evaluation.eval_train_rows
        self.count = 0
        self.dtype: torch.dtype | None = None
        self.peak_bytes: int | None = None
        self._config, self._task, self._ranks = config, task, ranks
        self._validation = tokens.validation
        self._of_train = tokens.train.first(rows) if rows else None

    def open(self, directory: Path) -> None:
        """Begin the table, or go on with it, in a run directory."""
        columns = ["step", "tokens_seen", *self._task.EVAL_COLUMNS]
        columns += [] if self._of_train is None else OF_TRAIN
        self.table = rundir.Table(directory / "evals.csv", columns)

    def add(self, step: int, tokens_seen: int, model: torch.nn.Module) -> dict[str, float]:
        """Score `model` after `step`; its scores by column. Every rank must call this."""
        on_gpu = self._ranks.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._ranks.device)
        scores = self._scores(model)
        self.count += 1
        self.dtype = parallel.unwrapped(model).loss.operand_dtype
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self._ranks.device)
            self.peak_bytes = max(peak, self.peak_bytes or 0)
        if self._ranks.is_first:
            self.table.append([{"step": step, "tokens_seen": tokens_seen, **scores}])
            probes.progress_line(
                event="evaluation",
                run=self._config.run.run,
                seed=self._config.run.seed,
                step=step + 1,
                **{name: round(value, 4) for name, value in scores.items()},
            )
        return scores

    def _scores(self, model: torch.nn.Module) -> dict[str, float]:
        limit = self._config.evaluation.eval_tokens
        scores = self._task.evaluate(model, self._validation, self._config, self._ranks, limit=limit)
        found = {name: scores[name.removeprefix("val_")] for name in self._task.EVAL_COLUMNS}
        if self._of_train is not None:
            scores = self._task.evaluate(model, self._of_train, self._config, self._ranks)
            found |= {name: scores[name.removeprefix("eval_train_")] for name in OF_TRAIN}
        return found
