"""Pruning in effect: the masks of one run, and what they are applied to in each step.

After the backward pass gradients of pruned weights become zero, before clipping; after the update the weights
themselves do, and under `state` the optimizer's moments too, as AdamWPrune has it. A step that a guard refuses leaves
weights and sums of movement as they are. But when weights are ranked is a matter of the step's number alone: what is
due at such a step takes place all the same, by the scores there are, and prunes what it finds lowest.

Ranking takes 4 bytes a weight, of one tensor at a time, and what a piece of it is scored in: the gradients are used
up by then, and lend theirs for the keys. Without `pruning_regrowth` what is pruned stays so, whatever its score. What
comes back is 0 until its next update.
"""

import torch
import torch.nn as nn

from engine import parallel
from engine.pruning import ranking
from engine.pruning.prunable import prunable
from engine.pruning.ramp import Ramp, pruned_counts
from engine.pruning.scores import MAGNITUDE, SCORES, Parts
from engine.split import local

PIECE = 2**22  # weights that are scored together


class Pruner:
    """Prunes one run; of method none its calls do nothing. Every rank makes the same calls."""

    def __init__(self, model: nn.Module, optimizer, settings, *, steps: int, seed: int):
        """settings: an engine.config.Pruning. Raises ConfigError for what does not fit the model."""
        model = parallel.unwrapped(model)
        self.settings, self.optimizer, self.method, self.seed = settings, optimizer, settings.pruning, seed
        self.tensors = prunable(model, settings) if self.method != "none" else []
        self.sizes = [t.size for t in self.tensors]
        self.ranked = self.applied = 0  # updates after which weights were ranked last; steps with masks since
        self.came_back = 0  # weights of this rank, in this process's newest ranking; then on the device
        self._places, self._weights, self.masks, self._kept = [], [], [], []
        if not self.tensors:
            return
        self.ramp = Ramp.of(settings, steps)
        self._weights = [t.own(t.parameter.detach()) for t in self.tensors]
        self.masks = [torch.ones_like(w, dtype=torch.bool) for w in self._weights]
        if self.method == "movement":
            self._kept = [torch.zeros_like(w) for w in self._weights]  # their scores
        elif self.method == "movement_original":
            self._kept = [w.clone() for w in self._weights]  # as they were at first
        self.shards = ranking.Shards(self.tensors[0].parameter)
        self.device = self._weights[0].device
        places = {p: i for i, p in enumerate(model.parameters())}
        self._places = [places[t.parameter] for t in self.tensors]
        by_layer = settings.pruning_threshold != "global"
        self._groups = torch.tensor([i * by_layer for i in range(len(self.sizes))], device=self.device)

    @property
    def held(self) -> list[torch.Tensor]:
        """Tensors that are there all the time: masks, and what the method must remember."""
        return [*self.masks, *self._kept]

    @property
    def held_bytes(self) -> int:
        """Of this rank."""
        return sum(t.nbytes for t in self.held)

    def pruned_counts(self, updates: int) -> list[int]:
        """How many weights should be pruned after so many updates: [of all], or of each tensor."""
        newest = self.ramp.newest(updates)
        share = self.ramp.target(newest) if newest else 0 * self.ramp.sparsity
        return pruned_counts(share, self.sizes, self.settings.pruning_threshold)

    def mask_gradients(self) -> None:
        """After the backward pass, before clipping."""
        if self.ranked:
            self._mask([t.own(t.parameter.grad) for t in self.tensors])

    @torch.no_grad()
    def before_update(self, grad_norm: torch.Tensor, refused: torch.Tensor | None) -> None:
        """Take the clipped gradients into account, unless the update is `refused` or their norm is not finite."""
        if self.method != "movement":
            return
        good = grad_norm.isfinite() if refused is None else grad_norm.isfinite() & (refused == 0)
        for score, w, t in zip(self._kept, self._weights, self.tensors, strict=True):
            score.sub_(torch.where(good, w * t.own(t.parameter.grad), 0.0))

    @torch.no_grad()
    def after_update(self, step: int) -> bool:
        """Apply the masks, after ranking anew if that is due at `step` (0-based); whether it was.

        It uses up the gradients.
        """
        if not self.tensors:
            return False
        updates = step + 1
        if self.ranked:
            self._mask_all()
        due = updates > self.ranked and self.ramp.is_due(updates)
        if due:
            self._rank(updates)
            self._mask_all()
        self.applied += bool(self.ranked)
        return due

    def mask_copies(self, copies: list[torch.Tensor]) -> None:
        """Apply the masks to `copies` of this rank's parts of all parameters, in their order; none: nothing."""
        if copies and self.ranked:
            self._mask([t.own(copies[i]) for t, i in zip(self.tensors, self._places, strict=True)])

    def _mask(self, tensors: list[torch.Tensor]) -> None:
        torch._foreach_mul_(tensors, self.masks)

    def _mask_all(self) -> None:
        """Weights, and the moments of the method state: every tensor of the state that has the weight's shape."""
        self._mask(self._weights)
        if self.method != "state":
            return
        states = [self.optimizer.state.get(t.parameter, {}) for t in self.tensors]
        for key in sorted({key for state in states for key in state}):
            having = [
                (t.own(state[key]), mask)
                for t, state, mask in zip(self.tensors, states, self.masks, strict=True)
                if isinstance(state.get(key), torch.Tensor) and state[key].shape == t.parameter.shape
            ]
            if having:
                torch._foreach_mul_(*map(list, zip(*having, strict=True)))

    def _rank(self, updates: int) -> None:
        s = self.settings
        self.ranked = updates
        k = ranking.on_device(self.pruned_counts(updates), self.device)
        keys = [self._keys(i) for i in range(len(self.tensors))]
        if s.pruning_sample < 1:
            sizes = [sum(self.sizes)] if len(k) == 1 else self.sizes
            how = {"share": s.pruning_sample, "seed": self.seed * 1_000_003 + updates}
            sizes = ranking.on_device(sizes, self.device)
            masks = ranking.keep_above_sampled(keys, self._groups, k, sizes, self.shards, **how)
        else:
            masks = ranking.keep_all_but_lowest(keys, self._groups, k, self.shards)
        self.came_back = 0
        for mask, new in zip(self.masks, masks, strict=True):
            self.came_back = self.came_back + (new > mask).sum()
            mask.copy_(new)

    def _keys(self, i: int) -> torch.Tensor:
        """The keys of tensor i's scores, in the memory of its gradient; made some rows at a time."""
        tensor, weight = self.tensors[i], self._weights[i]
        gradient = tensor.parameter.grad
        keys = torch.empty_like(weight) if gradient is None else tensor.own(gradient)
        count = max(PIECE // weight.size(1), 1)
        for first in range(0, len(weight), count):
            part = slice(first, first + count)
            self._keys_of_rows(i, part, keys[part])
        return keys.view(torch.int32)

    def _keys_of_rows(self, i: int, rows: slice, memory: torch.Tensor) -> None:
        keys = ranking.to_keys(memory.copy_(self._scores(i, rows)))
        if not self.settings.pruning_regrowth:
            keys.masked_fill_(~self.masks[i][rows], ranking.LOWEST)
        if self.settings.pruning_pattern == "2:4":
            ranking.only_two_of_four(keys)

    def _scores(self, i: int, rows: slice) -> torch.Tensor:
        tensor, weight = self.tensors[i], self._weights[i][rows]
        if self.method == "movement":
            return self._kept[i][rows]
        if self.method == "movement_original":
            return weight * (weight - self._kept[i][rows])
        if self.method == "magnitude":
            return MAGNITUDE(Parts(weight))
        state = self.optimizer.state.get(tensor.parameter, {})
        if "exp_avg" not in state:
            return SCORES[self.settings.pruning_score](Parts(weight))
        m, v = tensor.own(state["exp_avg"])[rows], tensor.own(state["exp_avg_sq"])[rows]
        beta1 = next(g["betas"][0] for g in self.optimizer.param_groups if _has(g, tensor.parameter))
        return SCORES[self.settings.pruning_score](Parts(weight, m, v, local(state["step"]), beta1))

    def state_dict(self) -> dict:
        """For a checkpoint: this rank's part."""
        return {"held": self.held, "ranked": self.ranked, "applied": self.applied}

    def load_state_dict(self, state: dict) -> None:
        """Take over a `state_dict`, from any device."""
        for mine, saved in zip(self.held, state["held"], strict=True):
            mine.copy_(saved)
        self.ranked, self.applied = state["ranked"], state["applied"]


def _has(group: dict, parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in group["params"])
