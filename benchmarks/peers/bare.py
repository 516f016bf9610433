"""A bare loop on the engine's own model, loss and optimizer: what the engine's trainer costs is the difference to it.

No trainer, no ledger, no progress, no checkpoint, no prefetching; garbage is collected once, after the warm-up.
"""

import gc

from benchmarks.task import Task
from engine import runtime
from engine.config import Config, resolve


def measure(task: Task) -> dict:
    config = resolve(task.settings, "benchmark")
    runtime.before_torch(config.runtime)
    return _train(task, config)


def _train(task: Task, config: Config) -> dict:
    import torch  # after the allocator's settings

    from benchmarks.batches import RandomWindows
    from benchmarks.measure import Meter
    from engine import parallel
    from engine.build import build_model, build_optimizer
    from engine.step import autocast

    size, training = task.size, config.training
    ranks = parallel.start(config.parallel, config.run.device)
    runtime.after_torch(config.runtime, ranks.device)
    model = build_model(config, task.vocabulary, ranks)
    optimizer = build_optimizer(model, config)
    parameters, sums = list(model.parameters()), model.gradient_sums
    batch, meter = RandomWindows(task), Meter(size.device, size.warmup)
    tokens = size.step_tokens
    scale = torch.tensor(1 / tokens, device=ranks.device)  # of the gradients
    meter.start()
    for step in range(size.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = size.lr * min(1, (step + 1) / size.lr_warmup_steps)
        total = 0
        if sums:
            sums.refresh()
        for _ in range(size.accumulation):
            inputs, targets = batch()
            with autocast(training.precision, ranks.device):
                loss = model(inputs, targets, scale)[0]
            loss.backward()
            total = total + loss.detach() / tokens
        torch.nn.utils.clip_grad_norm_(parameters, training.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=sums is None)
        meter.step_done(total)
        if step + 1 == size.warmup:
            gc.collect()
            gc.disable()
    parallel.stop()
    return meter.result(parameters=sum(p.numel() for p in parameters))
