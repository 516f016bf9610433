"""What pruning came to: measured from the weights that are zero.

sparsity.csv has a row whenever weights were ranked and at every evaluation, of the weights that it had: the share
that should be zero by then, the share that is, how many are, and how many masks say. How far the threshold was off
is of the masks: weights that `pruning_regrowth` brought back are 0 until their next update.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from engine import parallel, world
from engine.ledger import Line
from engine.pruning.masks import Pruner
from engine.pruning.ramp import pruned_counts
from engine.pruning.scores import definition
from engine.rundir import Table
from engine.side_table import SideTable

SAMPLED_ERROR = 0.005  # of a share: how far a sampled threshold may miss, and still count as at its target
BY_CHANCE = 1e-6  # of all weights: an update may come out at exactly 0


class Sparsity(SideTable):
    """Measures one run. Every rank makes the same calls."""

    FILE = "sparsity.csv"
    columns = ["step", "tokens_seen", "target", "sparsity", "zeros", "masked"]

    def __init__(self, pruner: Pruner, tokens_seen: Callable[[int], int]):
        """tokens_seen: of a step, the tokens trained on up to its end."""
        self.pruner, self._tokens_seen = pruner, tokens_seen
        self.final: dict[str, int] = {}  # zeros of each tensor, when the run is over
        self._rows: dict[int, torch.Tensor] = {}  # step → zeros, and what is masked, on the device

    @torch.no_grad()
    def zeros(self) -> torch.Tensor:
        """(tensors,): weights of each prunable tensor that are zero, over all ranks that have parts of it."""
        p = self.pruner
        return p.shards.summed(torch.stack([(w == 0).sum() for w in p._weights]))

    def note(self, step: int) -> None:
        """Measure now, for a row of `step`; the device is not waited for."""
        if self.pruner.tensors:
            p = self.pruner
            masked = p.shards.summed(torch.stack([(~mask).sum() for mask in p.masks]).sum())
            self._rows[step] = torch.stack([self.zeros().sum(), masked])

    def take_rows(self) -> list[dict]:
        p, total = self.pruner, sum(self.pruner.sizes)
        rows = []
        for step, counted in self._rows.items():
            count, masked = counted.tolist()
            target = sum(p.pruned_counts(step + 1)) / total
            row = {"step": step, "tokens_seen": self._tokens_seen(step), "target": target}
            rows.append({**row, "sparsity": count / total, "zeros": count, "masked": masked})
        self._rows = {}
        return rows

    def enough(self) -> int:
        """Zeros from which the run is at its final sparsity."""
        p = self.pruner
        wanted = sum(p.pruned_counts(p.ramp.end))
        return wanted - int(SAMPLED_ERROR * sum(p.sizes)) * (p.settings.pruning_sample < 1)

    def figures(self, directory: Path, evals: list[dict], parameters: int) -> dict:
        """For metrics.json, at a run's end; nothing without pruning.

        evals: rows of evals.csv. parameters: of the whole model. Raises RuntimeError if one was not measured.
        """
        p = self.pruner
        if not p.tensors:
            return {}
        rows = Table(directory / self.FILE, self.columns).read()
        found, zeros = {int(row["step"]): int(row["zeros"]) for row in rows}, self.final
        if missing := [row["step"] for row in evals if int(row["step"]) not in found]:
            raise RuntimeError(f"{self.FILE}: no sparsity of the evaluation at step {missing[0]}")
        at_target = [float(row["val_loss"]) for row in evals if found[int(row["step"])] >= self.enough()]
        total, count = sum(p.sizes), sum(zeros.values())
        name, version, formula = definition(p.method, p.settings.pruning_score)
        targets = self._targets()
        return {
            "pruning": {
                "method": p.method,
                "score": name,
                "version": version,
                "formula": formula,
                "ramp": p.settings.pruning_ramp,
                "threshold": p.settings.pruning_threshold,
                "threshold_error": max(abs(int(r["masked"]) / total - float(r["target"])) for r in rows),
            },
            "sparsity": count / total,
            "sparsity_target": sum(p.pruned_counts(p.ramp.end)) / total,
            "sparsity_of_all_parameters": count / parameters,
            "pruning_held_bytes": p.held_bytes,
            "best_val_loss_at_target": min(at_target, default=None),
            "sparsity_layers": [
                {"name": t.name, "weights": t.size, "zeros": zeros[t.name], "target": targets[i]}
                for i, t in enumerate(p.tensors)
            ],
        }

    def finish(self) -> None:
        """Measure the weights as they are saved."""
        if self.pruner.tensors:
            names = [t.name for t in self.pruner.tensors]
            self.final = dict(zip(names, self.zeros().tolist(), strict=True))

    def _targets(self) -> list[int | None]:
        """Of each tensor, how many weights should be zero at the end; None where the threshold is global."""
        p = self.pruner
        if p.settings.pruning_threshold == "global":
            return [None] * len(p.sizes)
        return list(pruned_counts(p.ramp.sparsity, p.sizes, p.settings.pruning_threshold))

    def lines(self, settings, steps_taken: int, ranks: parallel.Ranks, parallel_settings) -> list[Line]:
        """Whether as many weights are zero as the settings ask for by now, where the masks say, on all ranks alike.

        settings: an engine.config.Pruning, of which a broken run may have another pruner.
        """
        p = self.pruner
        if settings.pruning == "none" and not p.tensors:
            return []
        name, version, formula = definition(settings.pruning, settings.pruning_score)
        asked = f"{settings.pruning}, {name} version {version}, to {settings.sparsity:g}"
        if not p.tensors:
            return [Line("pruning", asked, "none", "the run has no masks", False)]
        wanted, total = sum(p.pruned_counts(steps_taken)), sum(p.sizes)
        zeros, pruned, outside, came_back = self._now()
        # Not at the ramp's end, by when a run should be at its sparsity.
        waiting = came_back if p.ranked == steps_taken < p.ramp.end else 0
        more = zeros - (pruned - outside)  # weights that are zero and not masked
        due = max(steps_taken - p.ramp.first + 1, 0)
        alike = self._alike(ranks, parallel_settings)
        dense = "; a mask only: products stay dense" * (settings.pruning_pattern == "2:4")
        by_chance = int(BY_CHANCE * total)
        how = (
            f"weights that are zero, {zeros} of {total} in {len(p.tensors)} tensors, where {wanted} should be; masks "
            f"say {pruned}, of which {outside} are not zero; {more} zeros are not masked, where {waiting} came "
            f"back in the newest step and {by_chance} may be by chance; applied in {p.applied} of {due} steps, "
            f"{'alike' if alike else 'different'} on all ranks; score {formula}; ranked after "
            f"{p.ramp.newest(steps_taken)} updates{dense}"
        )
        error = int(SAMPLED_ERROR * total) if settings.pruning_sample < 1 else 0
        agrees = abs(pruned - wanted) <= error and outside == 0 and p.applied == due and alike
        agrees = agrees and more <= waiting + by_chance and p.method == settings.pruning
        in_effect = f"{p.method}, {zeros / total:.4f} of its weights zero"
        return [Line("pruning", asked, in_effect, how, agrees)]

    @torch.no_grad()
    def _now(self) -> list[int]:
        """Over all ranks: weights that are zero, masked, masked without being zero, back since the newest ranking."""
        p = self.pruner
        own = torch.zeros(4, dtype=torch.int64, device=p.device)
        for w, mask in zip(p._weights, p.masks, strict=True):
            own[:3] += torch.stack([(w == 0).sum(), (~mask).sum(), ((w != 0) & ~mask).sum()])
        own[3] = p.came_back
        return p.shards.summed(own).tolist()

    @torch.no_grad()
    def _alike(self, ranks: parallel.Ranks, settings) -> bool:
        """Whether ranks that hold the same parts have the same masks."""
        p = self.pruner
        sums = [
            (m.flatten() * torch.arange(1, m.numel() + 1, device=p.device)).sum() for m in p.masks
        ]  # of the places of what is kept
        _replicas, shards, _tensor = world.sizes(settings, ranks.world_size)
        of_all = parallel.of_all_ranks(torch.stack(sums)).view(-1, shards, len(sums))
        return bool((of_all == of_all[:1]).all())
