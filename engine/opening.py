"""How a run begins in its directory: anew, or as it was at the newest checkpoint. Its end is in engine/outcome.py."""

from engine import compiling, epochs, parallel, preflight, probes, rundir, vocabulary
from engine.environment import describe
from engine.optimizers import counters


def open_directory(run) -> int:
    """Make the directory of `run`, a Trainer, and its recorder; the first step to take. Every rank calls this."""
    if run.ranks.is_first:
        rundir.make_anew(run.directory)
    parallel.wait_for_all()
    done = 0
    if run.config.saving.checkpoint_interval:
        done = run.checkpoints.restore(run.model, run.optimizer, run.directory, run.stateful)
    if run.ranks.is_first:
        _write_what_it_is(run)
        run.evaluations.open(run.directory)
        length = epochs.length(run.config, run.order.samples_per_epoch)
        probes.progress_line(event="length", run=run.config.run.run, seed=run.config.run.seed, **length)
        run.recorder = _recorder(run)
    return done


def _write_what_it_is(run) -> None:
    for event in run.events:
        rundir.append_event(run.directory, **event)
    devices = preflight.device_map(run.ranks.places)
    environment = describe(run.ranks.device, run.ranks.world_size, devices)
    rundir.write_json(run.directory / "env.json", environment)
    (run.directory / "config.toml").write_text(rundir.toml(run.config), encoding="utf-8")
    vocabulary.keep(run.tokens.directory, run.directory)


def _recorder(run) -> probes.Recorder:
    return probes.Recorder(
        run.directory,
        run.ranks.device,
        batch_tokens=run.tokens_seen(0),
        targets_per_sample=run.task.targets_per_sample(run.config),
        context=run.task.tokens_per_sample(run.config),
        norm_layers=run.config.logging.activation_norm_layers,
        gradient_layers=run.config.logging.gradient_norm_layers,
        counters=counters.names(run.optimizer),
        parts=run.step.objective.PARTS,
        sees_memory=not compiling.keeps_gradients(run.config.compile),
        recorded_bytes=lambda: run.step.graph.peak_bytes if run.step.graph else 0,
    )
