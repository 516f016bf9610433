"""How long a finished run's model takes to answer, for one sequence at a time.

    python -m engine.latency RUN_DIRECTORY --lengths 512,1024

For each length n, milliseconds of

    prefill   n tokens at once, without a cache, to the logits of the last one
    token     the n-th token alone, with a cache of the n - 1 before it, to its logits

and the bytes of that cache, of its own tensors. Each is called WARM_UP times, then timed RUNS times by the host's
clock, which waits for the device before and after. The model runs as in generation: uncompiled, under the autocast of
training (its weights are cast once, before anything is timed), with the run's choice of an attention kernel.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from engine import parallel, runtime
from engine.config import Config, Parallel
from engine.errors import ConfigError, command
from engine.evaluate import final_model
from engine.generate import open_run
from engine.ledger import Line
from engine.models.attention import Cache, kernel_problems, select_attention
from engine.operations import Operations
from engine.rules.kept import latency_problems
from engine.rundir import write_json
from engine.scaling import no_garbage
from engine.step import AUTOCAST, autocast

FILE = "latency.json"
WARM_UP, RUNS = 10, 50
PERCENTILES = (50, 95)  # linear between the two nearest


@torch.no_grad()
def measure(model: torch.nn.Module, config: Config, lengths: Sequence[int], device: torch.device) -> dict:
    """The figures of `model`, a GPT on `device` in eval mode: what latency.json holds."""
    began = time.perf_counter()
    _cast_maps(model, config.training.precision)
    draw = torch.Generator().manual_seed(1)
    with autocast(config.training.precision, device), no_garbage():
        found = [
            _of_length(model, torch.randint(model.vocabulary_size, (1, n), generator=draw).to(device), device)
            for n in lengths
        ]
        with Operations() as operations:
            model.features(torch.zeros(1, lengths[-1], dtype=torch.int64, device=device))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": config.training.precision,
        "attention_kernels": sorted(operations.attention_kernels) or ["written out"],
        "warm_up": WARM_UP,
        "runs": RUNS,
        "lengths": found,
        "seconds": time.perf_counter() - began,
    }


def _cast_maps(model: torch.nn.Module, precision: str) -> None:
    """Autocast keeps its copy of a matrix, but not of latent attention's maps, which it sees as views."""
    if precision in AUTOCAST:
        for p in model.parameters():
            if p.dim() == 3:
                p.data = p.data.to(AUTOCAST[precision])


def _of_length(model, text: torch.Tensor, device: torch.device) -> dict[str, float]:
    """The figures for the tokens `text` (1, n)."""
    caches = [Cache() for _ in model.layers]
    model.features(text[:, :-1], caches)
    kept = [dict(cache.kept) for cache in caches]
    before = _bytes(caches)

    def prefill() -> None:
        hidden, _ = model.features(text)
        model.logits(hidden[:, -1])

    def token() -> None:
        for cache, tensors in zip(caches, kept, strict=True):
            cache.kept = dict(tensors)  # as it was: a call leaves new tensors in it, never changed ones
        hidden, _ = model.features(text[:, -1:], caches)
        model.logits(hidden[:, -1])

    figures = {}
    for name, call in (("prefill", prefill), ("token", token)):
        milliseconds = timed(call, device)
        figures |= {f"{name}_p{p}_ms": float(np.percentile(milliseconds, p)) for p in PERCENTILES}
    return {
        "length": text.size(1),
        **figures,
        "cache_bytes": _bytes(caches),
        "cache_bytes_per_token": _bytes(caches) - before,
    }


def timed(call: Callable[[], None], device: torch.device) -> list[float]:
    """Milliseconds of RUNS calls, after WARM_UP more."""

    def settled() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(RUNS):
        start = settled()
        call()
        found.append((settled() - start) * 1000)
    return found


def _bytes(caches: Sequence[Cache]) -> int:
    return sum(x.numel() * x.itemsize for cache in caches for x in cache.kept.values())


def of_run(run) -> tuple[dict[str, float], list[Line]]:
    """Measure the model that `run`, a Trainer, has saved: what metrics.json has of it, and the ledger's line.

    metrics.json has the figures of the longest length; nothing is measured where latency_lengths is empty. Every rank
    must call it; the first measures, on its device.
    """
    lengths = run.config.evaluation.latency_lengths
    if not lengths:
        return {}, []
    found = _measured(run, lengths) if run.ranks.is_first else ({}, [])
    parallel.wait_for_all()
    return found


def _measured(run, lengths: Sequence[int]) -> tuple[dict[str, float], list[Line]]:
    with torch.random.fork_rng(devices=[]):  # building a model draws weights, which are replaced
        model = final_model(run.directory, run.config, run.tokens.meta["vocabulary_size"]).eval()
    try:
        found = measure(model.to(run.ranks.device), run.config, lengths, run.ranks.device)
    except (
        RuntimeError
    ) as error:  # out of memory, or a kernel that refuses: the training is done all the same
        why = str(error).splitlines()[0]
        return {}, [Line("latency_lengths", _words(lengths), "not measured", why, False)]
    write_json(run.directory / FILE, {**run.identity, **found})
    longest = max(found["lengths"], key=lambda one: one["length"])
    figures = {f"latency_{name}": value for name, value in longest.items()}
    figures["latency_seconds"] = found["seconds"]
    measured = [one["length"] for one in found["lengths"]]
    how = f"{FILE}: {RUNS} calls of each kind after {WARM_UP}; attention {', '.join(found['attention_kernels'])}"
    return figures, [
        Line("latency_lengths", _words(lengths), _words(measured), how, measured == list(lengths))
    ]


def _words(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths))


def _lengths(text: str) -> list[int]:
    """`512,1024` as numbers. Raises ConfigError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--lengths: {text!r} must be whole numbers with commas between them, as 512,1024")
    return [int(part) for part in parts]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="RUN_DIRECTORY")
    parser.add_argument("--lengths", required=True, help="tokens of a sequence, as 512,1024")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    a = parser.parse_args()
    lengths = _lengths(a.lengths)
    config, _, model = open_run(a.directory)
    ranks = parallel.start(Parallel(), a.device)
    runtime.after_torch(config.runtime, ranks.device, trains=False)
    wrong = latency_problems("--lengths", lengths, config.model.context)
    wrong += kernel_problems(
        config.model.attention, ranks.device, precision=config.training.precision, dropout=0.0
    )
    if wrong:
        raise ConfigError(wrong)
    select_attention(config.model.attention, ranks.device)
    print(json.dumps(measure(model.to(ranks.device), config, lengths, ranks.device), indent=2))


if __name__ == "__main__":
    main()
