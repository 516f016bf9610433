"""Where the threshold is: exactly the k lowest scores, over tensors and over ranks that hold parts of them.

A float's bits, read as a whole number, have the order of floats (negative ones turned round). So the k-th lowest is
found by halving 32 times the range of these keys, and counting each time how many are not above the middle: exact,
without sorting, without joining tensors, and without the host having to wait. Ties are pruned in the order of the
tensors and of their elements, however these are split over ranks.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from engine import parallel

BITS = 32
LOWEST, HIGHEST = -(2**31), 2**31 - 1


class Shards:
    """The ranks that hold the parts of each tensor between them; of tensors that are whole, this one alone."""

    def __init__(self, parameter: torch.Tensor):
        self.group, self.size, self.rank = None, 1, 0
        for i, placement in enumerate(getattr(parameter, "placements", ())):
            if placement.is_shard() and parameter.device_mesh.size(i) > 1:
                self.group = parameter.device_mesh.get_group(i)
                self.size, self.rank = self.group.size(), self.group.rank()

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over these ranks, in place."""
        return parallel.summed(tensor, self.group)


def on_device(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64, without the host waiting for the device."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_keys(scores: torch.Tensor) -> torch.Tensor:
    """int32 keys with the order of the fp32 `scores`, in their memory; -0 and 0 are equal."""
    scores.add_(0.0)
    keys = scores.view(torch.int32)
    return keys.bitwise_xor_((keys >> (BITS - 1)).bitwise_and_(HIGHEST))


def only_two_of_four(keys: torch.Tensor) -> torch.Tensor:
    """Make the two higher of every four neighbours in a row of `keys` (n, 4 m) the highest there is, in place."""
    four = keys.view(*keys.shape[:-1], -1, 4)
    ranks = torch.zeros(four.shape, dtype=torch.int8, device=keys.device)
    for i in range(4):
        for j in range(i + 1, 4):
            first = four[..., i] <= four[..., j]
            ranks[..., j] += first
            ranks[..., i] += ~first
    return four.masked_fill_(ranks >= 2, HIGHEST).view_as(keys)  # noqa: PLR2004


def _counts(parts: Iterable[torch.Tensor], groups: torch.Tensor, count: int, shards: Shards) -> torch.Tensor:
    """(count,): of boolean tensors, how many elements are true in those of each group, over all shards.

    Given one by one, they are never there together.
    """
    own = torch.stack([part.sum() for part in parts])
    return shards.summed(torch.zeros(count, dtype=torch.int64, device=own.device).index_add_(0, groups, own))


def kth_lowest(
    keys: Sequence[torch.Tensor], groups: torch.Tensor, k: torch.Tensor, shards: Shards
) -> torch.Tensor:
    """(groups,): of each group the smallest key with at least k keys at or below it.

    groups: of which group each tensor is; k (groups,) int64.
    """
    low, high = torch.full_like(k, LOWEST), torch.full_like(k, HIGHEST)
    for _ in range(BITS):
        middle = (low + high).div(2, rounding_mode="floor")
        limits = middle.to(torch.int32)[groups].unbind()
        counted = _counts((x <= t for x, t in zip(keys, limits, strict=True)), groups, len(k), shards)
        enough = counted >= k
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return high


def keep_all_but_lowest(
    keys: Sequence[torch.Tensor], groups: torch.Tensor, k: torch.Tensor, shards: Shards
) -> Iterator[torch.Tensor]:
    """Masks that are false for exactly the k lowest keys of each group, one tensor's after the other.

    It uses up the keys: the places of ties are counted in their memory, so that 3 bytes an element of one tensor at a
    time are all that it takes beside the mask before.
    """
    thresholds = kth_lowest(keys, groups, k, shards)
    limits = thresholds.to(torch.int32)[groups].unbind()
    below = (x < t for x, t in zip(keys, limits, strict=True))
    left = k - _counts(below, groups, len(k), shards)  # of ties, so many are pruned
    ties = torch.stack([(x == t).sum() for x, t in zip(keys, limits, strict=True)])
    before = _ties_before(ties, groups, shards)
    for x, t, allowed in zip(keys, limits, (left[groups] - before).unbind(), strict=True):
        mask, tie = x > t, x == t
        order = x.copy_(tie).flatten().cumsum_(0).view_as(x)
        yield mask.logical_or_(tie.logical_and_(order > allowed))


def _ties_before(own: torch.Tensor, groups: torch.Tensor, shards: Shards) -> torch.Tensor:
    """(tensors,): the ties in tensors of its group before each, and in the parts of it that earlier ranks have.

    own: how many ties each tensor's part has here.
    """
    every = torch.zeros(shards.size, len(own), dtype=torch.int64, device=own.device)
    every[shards.rank] = own
    of_tensor = shards.summed(every).sum(0)
    same = (groups[:, None] == groups[None, :]).tril(-1)  # (tensor, an earlier one of its group)
    return (same * of_tensor).sum(1) + every[: shards.rank].sum(0)


def keep_above_sampled(  # noqa: PLR0913
    keys: Sequence[torch.Tensor],
    groups: torch.Tensor,
    k: torch.Tensor,
    sizes: torch.Tensor,
    shards: Shards,
    *,
    share: float,
    seed: int,
) -> Iterator[torch.Tensor]:
    """Masks by thresholds that are found in a random `share` of each tensor: about k of each group are false.

    One tensor's after the other. sizes (groups,): how many elements a group has, over all shards.
    """
    device = k.device
    generator = torch.Generator(device).manual_seed(seed * shards.size + shards.rank)
    drawn = []
    for x in keys:
        count = -int(-x.numel() * share // 1)  # rounded up
        places = torch.randint(max(x.numel(), 1), (count,), device=device, generator=generator)
        drawn.append(x.flatten()[places])
    counts = on_device([len(x) for x in drawn], device)
    sampled = shards.summed(torch.zeros_like(sizes).index_add_(0, groups, counts))
    thresholds = kth_lowest(drawn, groups, k * sampled // sizes, shards)
    limits = thresholds.to(torch.int32)[groups].unbind()
    yield from (x > t for x, t in zip(keys, limits, strict=True))
