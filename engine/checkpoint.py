"""What survives a restart: weights, optimizer, random states, step and rows, with checksums.

Checkpoints live outside the run directory and outside DVC, under a name made from everything that decides the
run's numbers (`fingerprint`), so one run can never pick up another's. A step's checkpoint is written beside its
final name and renamed when whole. Damaged files are found by their checksums, named, and never loaded.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from engine import parallel
from engine.attention_metrics import AttentionMetrics
from engine.config import Config, tables
from engine.digest import sha256
from engine.ledger import Line
from engine.noise_scale import NoiseScale
from engine.pruning.sparsity import Sparsity
from engine.rundir import append_event

KEPT = 2  # checkpoints of a run on disk: the newest, and one more in case it is damaged
ROWS = (
    "steps.csv",
    "evals.csv",
    "events.jsonl",
    "samples.jsonl",
    "best.safetensors",
    *(beside.FILE for beside in (NoiseScale, AttentionMetrics, Sparsity)),
)  # what the run directory must hold again after a restart


def fingerprint(
    config: Config, token_hashes: dict[str, str], ranks: parallel.Ranks, given_weights: Sequence[Line] = ()
) -> str:
    """A name for all that decides the run's numbers: settings, data, engine code, processes, device, torch."""
    settings = tables(config)
    del settings["logging"]["log_interval"]
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    given = [line.how for line in given_weights]  # it holds their checksum
    machine = [ranks.world_size, ranks.device.type, torch.__version__]
    parts = [settings, token_hashes, code.hexdigest(), given, *machine]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def root() -> Path:
    """Where checkpoints live: $PLUMBLINE_CHECKPOINTS, else plumbline/ in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PLUMBLINE_CHECKPOINTS") or Path(cache) / "plumbline" / "checkpoints")


class Checkpoints:
    """The checkpoints of one run. Every rank makes the same calls."""

    def __init__(self, name: str, ranks: parallel.Ranks):
        self.directory, self.ranks = root() / name, ranks

    def save(self, step: int, model, optimizer, run_directory: Path, extra: Mapping) -> None:
        """Write the state after `step` steps; `extra`: more objects with a state_dict, by name."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        final = self.directory / f"step-{step:08d}"
        partial = final.with_suffix(".partial")
        if self.ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        parallel.wait_for_all()
        weights, state = get_state_dict(model, optimizer)
        with self._one_process_is_fine():
            dcp.save(
                {"model": weights, "optimizer": state},
                checkpoint_id=partial,
                no_dist=self.ranks.world_size == 1,
            )
        own = _random_states(self.ranks.device) | {name: e.state_dict() for name, e in extra.items()}
        torch.save(own, partial / f"rank-{self.ranks.rank}.pt")
        parallel.wait_for_all()
        if self.ranks.is_first:
            for name in ROWS:
                if (run_directory / name).exists():
                    shutil.copyfile(run_directory / name, partial / name)
            manifest = {p.name: sha256(p) for p in sorted(partial.iterdir())}
            (partial / "manifest.json").write_text(json.dumps({"step": step, "sha256": manifest}))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in sorted(self.directory.glob("step-????????"))[:-KEPT]:
                shutil.rmtree(old)
        parallel.wait_for_all()

    def restore(self, model, optimizer, run_directory: Path, extra: Mapping) -> int:
        """Load the newest whole checkpoint and its rows; return the steps already done (0: none).

        A damaged checkpoint is skipped, and named in the run's events.
        """
        step, damage = 0, []
        for path in sorted(self.directory.glob("step-????????"), reverse=True):
            problem = _damage(path)
            if problem is None:
                step = self._load(path, model, optimizer, run_directory, extra)
                break
            damage.append({"checkpoint": path.name, "problem": problem})
        if self.ranks.is_first:  # only now: the checkpoint brought its own events.jsonl
            for details in damage:
                append_event(run_directory, "damaged_checkpoint", **details)
            if step:
                append_event(run_directory, "resumed", step=step)
        return step

    def _load(self, path: Path, model, optimizer, run_directory: Path, extra: Mapping) -> int:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        kept = [p.grad for p in model.parameters()]  # torch makes no empty state for what has a gradient
        optimizer.zero_grad(set_to_none=True)
        weights, state = get_state_dict(model, optimizer)
        loaded = {"model": weights, "optimizer": state}
        with self._one_process_is_fine():
            dcp.load(loaded, checkpoint_id=path, no_dist=self.ranks.world_size == 1)
        set_state_dict(
            model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
        for p, gradient in zip(model.parameters(), kept, strict=True):
            p.grad = gradient
        own = torch.load(path / f"rank-{self.ranks.rank}.pt", weights_only=True, map_location="cpu")
        _restore_random(own)
        for name, e in extra.items():
            e.load_state_dict(own[name])
        step = json.loads((path / "manifest.json").read_text())["step"]
        if self.ranks.is_first:
            for name in ROWS:
                if (path / name).exists():
                    shutil.copyfile(path / name, run_directory / name)
        return step

    @contextlib.contextmanager
    def _one_process_is_fine(self):
        """Without torch's warning that it saves and loads for a single process, where there is only one."""
        with warnings.catch_warnings():
            if self.ranks.world_size == 1:
                warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
            yield

    def discard(self) -> None:
        """Remove this run's checkpoints: it is complete."""
        if self.ranks.is_first:
            shutil.rmtree(self.directory, ignore_errors=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected = json.loads((path / "manifest.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json: {error}"
    for name, digest in expected.items():
        if not (path / name).exists():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} is not what was written (sha256 differs)"
    return None


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
