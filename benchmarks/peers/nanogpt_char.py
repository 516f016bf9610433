"""nanoGPT's own character recipe, from a checkout: its model, its optimizer, its config/train_shakespeare_char.py.

The values are read from that file and from the defaults of its train.py. Two things are in its favour: it never
reads the training loss, for which its loop waits every `log_interval` steps; and its evaluations, more frequent here,
are in no time. They score every character of the validation text once, as the engine's do; its own draw 200 random
batches.
"""

import math
import runpy

import torch

from benchmarks.batches import RandomWindows
from benchmarks.peers.nanogpt import load
from benchmarks.race import evaluations
from benchmarks.task import Missing, Task
from engine.data.batches import IGNORED, eval_batches
from engine.data.prepare import open_tokens
from engine.probes import StepClock

CONFIG = "config/train_shakespeare_char.py"
DEFAULTS = {"weight_decay": 0.1, "beta1": 0.9, "grad_clip": 1.0, "bias": False}  # of its train.py


def measure(task: Task) -> dict:
    size, on_gpu = task.size, task.size.device == "cuda"
    values = recipe(task.nanogpt, size)
    module = load(task.nanogpt)
    torch.manual_seed(1336 + task.seed)  # its own seed is 1337
    torch.set_float32_matmul_precision("high")  # TF32 as its train.py allows it
    shape = {name: values[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")}
    model = module.GPT(module.GPTConfig(vocab_size=task.vocabulary, **shape)).to(size.device)
    betas = (values["beta1"], values["beta2"])
    optimizer = model.configure_optimizers(
        values["weight_decay"], values["learning_rate"], betas, size.device
    )
    context = torch.autocast(size.device, torch.bfloat16, enabled=on_gpu)
    step_model = torch.compile(model) if on_gpu else model
    batch, clock, validation = RandomWindows(task), StepClock(torch.device(size.device)), validation_of(task)
    moments, found, losses = [], [], []
    inputs, targets = batch()
    for step in range(size.total_steps):
        start = clock.now()
        for group in optimizer.param_groups:
            group["lr"] = lr(step, values)
        with context:
            loss = step_model(inputs, targets)[1]
        inputs, targets = batch()  # while the device computes
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), values["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moments.append((start, clock.now()))
        losses.append(loss.detach())
        if (step + 1) % size.eval_interval == 0:
            found.append((step + 1, evaluate(model, validation, size, context)))
    seconds = [clock.seconds(*pair) for pair in moments]
    return {
        "step_seconds": seconds[size.warmup :],
        "first_step_seconds": seconds[0],
        "step_tokens": values["batch_size"] * values["block_size"],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
        "loss_first": float(losses[0]),
        "loss_last": float(losses[-1]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": {**values, "compile": on_gpu, "precision": "bf16" if on_gpu else "fp32"},
        "evals": evaluations(found, seconds),
    }


def recipe(checkout, size) -> dict:
    """The values of its file and of its defaults. Raises Missing without the file, ValueError for another model."""
    path = checkout / CONFIG if checkout else None
    if path is None or not path.is_file():
        raise Missing(f"no {CONFIG}: --nanogpt PATH of a checkout of nanoGPT")
    values = DEFAULTS | {name: v for name, v in runpy.run_path(str(path)).items() if not name.startswith("_")}
    wanted = {
        "n_layer": size.layers,
        "n_head": size.heads,
        "n_embd": size.width,
        "block_size": size.context,
        "batch_size": size.micro_batch,
    }
    if size.device == "cuda" and (other := {k: values[k] for k, v in wanted.items() if values[k] != v}):
        raise ValueError(f"{CONFIG} has {other}, and --size {size.name} {wanted}")
    return values | wanted  # on a CPU, where only the code is tried, a smaller model


def lr(step: int, values: dict) -> float:
    """Its schedule: linear warm-up, then a cosine to min_lr at lr_decay_iters."""
    warmup, last = values["warmup_iters"], values["lr_decay_iters"]
    if step < warmup:
        return values["learning_rate"] * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / (last - warmup))
    scale = 0.5 * (1 + math.cos(math.pi * progress))
    return values["min_lr"] + scale * (values["learning_rate"] - values["min_lr"])


def validation_of(task: Task) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, (B, T) each, on the device; what is not scored is -1, as its loss ignores it."""
    size = task.size
    tokens = open_tokens(task.tokens).validation
    return [
        (x.to(size.device), torch.where(y == IGNORED, -1, y).to(size.device))
        for x, y in eval_batches(tokens, size.context, size.micro_batch)
    ]


@torch.no_grad()
def evaluate(model, batches, size, context) -> float:
    """Nats per character over the whole validation text, uncompiled."""
    model.eval()
    total = count = 0
    for inputs, targets in batches:
        scored = (targets != -1).sum()
        with context:
            total = total + model(inputs, targets)[1].double() * scored
        count = count + scored
    model.train()
    return float(total / count)
