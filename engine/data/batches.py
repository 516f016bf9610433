"""Batches: which windows of the token array a step trains on and an evaluation scores, and batches made ahead.

The samples of a training step follow from (seed, step) alone (engine/data/order.py). Nothing here may keep a
position, or draw from a random state that outlives a call.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
import torch

from engine.data.examples import IGNORED
from engine.data.order import Order, windows
from engine.errors import ConfigError
from engine.ledger import Line
from engine.profiling import part


class TrainOrder(Order):
    """Training windows of `context` + 1 tokens.

    An epoch starts at a random offset, cuts the tokens into windows that share one token (the last target of
    one is the first input of the next) and goes through them in a random order.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seed: int):
        """`tokens` has shape (tokens,); `batch_size` counts the windows of a step over all ranks.

        Raises ConfigError if there are too few tokens for one window.
        """
        if len(tokens) < context + 1:
            raise ConfigError(
                f"the training split has {len(tokens)} tokens; context = {context} needs "
                f"at least {context + 1}"
            )
        super().__init__(windows(len(tokens), context), context, batch_size, seed)
        self.tokens = tokens
        self._offsets = min(context, len(tokens) - self.samples_per_epoch * context)

    def epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """The offset, in tokens, and the order of the windows, a permutation of shape (samples_per_epoch,)."""
        word, windows = self.draw(epoch)
        return word % self._offsets, windows

    def starts(self, sample_ids: np.ndarray) -> np.ndarray:
        """The position in the token array where each sample begins, same shape as `sample_ids`."""
        epochs, windows = np.divmod(sample_ids, self.samples_per_epoch)
        distinct, inverse = np.unique(epochs, return_inverse=True)
        offsets = np.array([self.epoch(e)[0] for e in distinct.tolist()], dtype=np.int64)
        return offsets[inverse] + windows * self.context

    def gather(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 of shape (B, T) each, of the windows at `starts` of shape (B,)."""
        windows = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)  # (B, T + 1)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def batch(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 of shape (B, context) each, of the windows `sample_ids` of shape (B,)."""
        return self.gather(self.starts(sample_ids))


class Drawn:
    """A fingerprint of the samples that were really trained on, step by step, the same for any number of ranks.

    Within a step the order does not count, because it changes nothing but rounding. `sums` is this rank's part, two
    int64 words: the ranks' parts are added, wrapping around, before `digest`.
    """

    def __init__(self, order: Order):
        self.order, self.sums = order, np.zeros(2, dtype=np.int64)
        self.count = 0  # samples of this rank

    def resumed(self, steps: int, rank: int, world: int) -> None:
        """Add what an interrupted run drew in its first `steps` steps; they follow from the seed alone."""
        for step in range(steps):
            self.add(step, self.order.rank_slice(step, rank, world))

    def add(self, step: int, sample_ids: np.ndarray) -> None:
        """Add the samples that this rank trained on in `step`, ids of shape (B,)."""
        self.count += len(sample_ids)
        for lane in range(2):
            start = np.array([2 * step + lane], dtype=np.uint64)
            words = _mixed(sample_ids.astype(np.uint64) ^ _mixed(start))
            self.sums[lane : lane + 1] += words.sum(keepdims=True).view(np.int64)

    def digest(self, sums: np.ndarray, tokens_sha256: str) -> str:
        """sha256, in hex, of the `sums` of all ranks and of where the samples lie in which tokens."""
        parts = [tokens_sha256, self.order.context, *sums.tolist()]
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def _mixed(words: np.ndarray) -> np.ndarray:
    """Every bit of a uint64 word spread over all of them. Source: splitmix64 (Steele, Lea and Flood, 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Batch(NamedTuple):
    """One rank's part of one step.

    int64 tensors in host memory: `inputs` of shape (B, T), `targets` of shape (B, T), or (B,) of labelled rows.
    """

    step: int
    sample_ids: np.ndarray  # (B,)
    inputs: torch.Tensor
    targets: torch.Tensor
    wait_seconds: float = 0.0  # host time that the consumer waited for it


class Prefetcher:
    """Iterates over the batches of steps first_step .. last_step - 1, preparing `depth` ahead in a thread.

    For a CUDA device the tensors are in pinned memory, so that `.to(device, non_blocking=True)` overlaps with
    compute. An exception in the thread is raised again where the batch is asked for. Use it in a `with`
    block, or call `close()`.
    """

    def __init__(
        self,
        order: Order,
        *,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        depth: int = 2,
    ):
        device = torch.device(device)
        self._cuda = None
        if device.type == "cuda":  # a new thread would otherwise pin through GPU 0
            self._cuda = torch.cuda.current_device() if device.index is None else device.index
        self._order, self._steps, self._rank, self._world = order, range(first_step, last_step), rank, world
        self.depth = depth
        self.most_ahead = self._made = self._taken = 0  # batches; most_ahead: made and not yet taken
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._free = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._stopped.is_set():
            raise StopIteration
        start = time.perf_counter()
        with part("data"):
            item = self._ready.get()
        if isinstance(item, Batch):
            self._taken += 1
            self._free.release()
            return item._replace(wait_seconds=time.perf_counter() - start)
        self.close()
        raise StopIteration if item is None else item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for it. May be called more than once."""
        self._stopped.set()
        self._free.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._cuda is not None:
                torch.cuda.set_device(self._cuda)
            for step in self._steps:
                self._free.acquire()
                if self._stopped.is_set():
                    return
                batch = self._make(step)
                self._made += 1
                self.most_ahead = max(self.most_ahead, self._made - self._taken)
                self._ready.put(batch)
            self._ready.put(None)
        except BaseException as error:  # the consumer raises it
            self._ready.put(error)

    def _make(self, step: int) -> Batch:
        ids = self._order.rank_slice(step, self._rank, self._world)
        inputs, targets = (torch.from_numpy(a) for a in self._order.batch(ids))
        if self._cuda is not None:
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return Batch(step, ids, inputs, targets)

    def lines(self, wanted: int) -> list[Line]:
        """How many batches are prepared ahead, against the `wanted`."""
        how = f"batches that may wait; at most {self.most_ahead} did, made and not yet taken"
        agrees = 1 <= self.most_ahead <= self.depth == wanted
        return [Line("prefetch", str(wanted), str(self.depth), how, agrees)]


def eval_windows(n_tokens: int, context: int, stride: int) -> np.ndarray:
    """Where the windows of an evaluation begin, shape (windows,): every token but the first is scored once.

    Window k begins at k * stride. The first scores all its targets; a later one only those that no earlier
    window scored, which are its last `stride` (fewer at the end of the text). With stride < context each of
    them has at least context - stride tokens before it (a sliding window): dearer and lower in loss than
    stride = context. Raises ConfigError for fewer than two tokens.
    """
    assert 1 <= stride <= context, (stride, context)
    if n_tokens < 2:
        raise ConfigError(f"an evaluation needs at least 2 tokens, there are {n_tokens}")
    later = max(0, -(-(n_tokens - 1 - context) // stride))
    return np.arange(1 + later, dtype=np.int64) * stride


def eval_batches(
    tokens: np.ndarray, context: int, batch_size: int, *, stride: int = 0, rank: int = 0, world: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, int64 of shape (batch_size, context) each, of one rank's part of an evaluation.

    `tokens` has shape (tokens,); stride 0 means context. Targets to leave out are -100: what an earlier
    window scored, the padding of a short last window, and whole padding rows. Every rank gets the same number
    of batches of the same shape, so collectives line up; the scored targets of all ranks together are tokens
    - 1.
    """
    stride = stride or context
    starts = eval_windows(len(tokens), context, stride)
    columns = np.arange(context)
    for first in range(0, len(starts), batch_size * world):
        mine = np.arange(batch_size) + first + rank * batch_size  # (B,) window numbers, some beyond the last
        begin = np.where(mine < len(starts), starts[np.minimum(mine, len(starts) - 1)], len(tokens))[:, None]
        position = begin + columns  # (B, T) of the inputs; a target is one further
        scored = (position + 1 < len(tokens)) & ((mine[:, None] == 0) | (columns >= context - stride))
        inputs = np.where(position < len(tokens), tokens[np.minimum(position, len(tokens) - 1)], 0)
        following = tokens[np.minimum(position + 1, len(tokens) - 1)].astype(np.int64)
        targets = np.where(scored, following, IGNORED)
        yield torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets)
