"""What an optimizer counts in every update: columns of steps.csv, and figures of metrics.json.

An optimizer that counts has COUNTERS, {name: how ranks put theirs together}, `take_counters(world_size)` and
`note_counters(of all ranks together)`: see engine/optimizers/spam.py. Nothing here waits for the device.
"""

from collections.abc import Mapping, Sequence

import torch

from engine import parallel


def names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of what `optimizer` counts."""
    return tuple(getattr(optimizer, "COUNTERS", ()))


def of_update(optimizer: torch.optim.Optimizer, ranks: parallel.Ranks) -> torch.Tensor:
    """(names,) float64, on the device: of the newest update on all ranks, each of which must call this."""
    ways = getattr(optimizer, "COUNTERS", {})
    if not ways:
        return torch.zeros(0, dtype=torch.float64, device=ranks.device)
    own = optimizer.take_counters(ranks.world_size)
    found = parallel.of_all_ranks(own).view(-1, len(ways))
    together = {"sum": found.sum(0), "largest": found.amax(0), "same": own}
    values = torch.stack([together[way][place] for place, way in enumerate(ways.values())])
    optimizer.note_counters(values)
    return values


def figures(rows: Sequence[Mapping[str, str]], counted: Sequence[str], parameters: int) -> dict[str, float]:
    """For metrics.json, of all rows of steps.csv: coordinates cut, in all and a share; the largest g² / v.

    parameters: of the model. `clipped_fraction` is of all its coordinates in all of these steps, whether they could
    be cut or not: entries that spam_density does not draw, those without a second moment to compare with, and steps
    that were refused are in what it is divided by. Resets and spikes are counts. Nothing of an optimizer that does
    not count.
    """
    found: dict[str, float] = {}
    of = {name: [float(row[name]) for row in rows] for name in counted}
    if "clipped_coordinates" in of:
        total = sum(of["clipped_coordinates"])
        found["clipped_coordinates"] = round(total)
        found["clipped_fraction"] = total / (parameters * len(rows))
        found["largest_square_ratio"] = max(of["largest_square_ratio"])
        found["optimizer_resets"] = round(of["optimizer_resets"][-1])
    if "optimizer_spikes" in of:
        found["optimizer_spikes"] = round(sum(of["optimizer_spikes"]))
    return found
