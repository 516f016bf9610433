"""nanoGPT (github.com/karpathy/nanoGPT), from a checkout: its model, its optimizer, the loop of its train.py.

Compiled whole under bf16 autocast on a GPU; eager and fp32 on a CPU, as its README says. Its loop reads the loss
every `log_interval` steps, which waits for the device; here it never does, which favours it.
"""

import contextlib
import importlib.util
import sys

import torch

from benchmarks.batches import RandomWindows
from benchmarks.measure import Meter
from benchmarks.task import Missing, Task


def measure(task: Task) -> dict:
    size, on_gpu = task.size, task.size.device == "cuda"
    module = load(task.nanogpt)
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")  # TF32 as its train.py allows it
    model = module.GPT(
        module.GPTConfig(
            block_size=size.context,
            vocab_size=size.rows(task.vocabulary),
            n_layer=size.layers,
            n_head=size.heads,
            n_embd=size.width,
            dropout=0.0,
            bias=False,
        )
    ).to(size.device)
    optimizer = model.configure_optimizers(0.1, size.lr, (0.9, 0.95), size.device)
    scaler = torch.amp.GradScaler(size.device, enabled=False)
    context = torch.autocast(size.device, torch.bfloat16) if on_gpu else contextlib.nullcontext()
    step_model = torch.compile(model) if on_gpu else model
    batch, meter = RandomWindows(task), Meter(size.device, size.warmup)
    inputs, targets = batch()
    meter.start()
    for step in range(size.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = size.lr * min(1, (step + 1) / size.lr_warmup_steps)
        total = 0
        for _ in range(size.accumulation):
            with context:
                loss = step_model(inputs, targets)[1] / size.accumulation
            inputs, targets = batch()  # while the device computes
            scaler.scale(loss).backward()
            total = total + loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        meter.step_done(total)
    return meter.result(
        parameters=sum(p.numel() for p in model.parameters()),
        settings={"compile": on_gpu, "precision": "bf16" if on_gpu else "fp32", "fused_adamw": on_gpu},
    )


def load(checkout):
    """model.py of a checkout, as a module. Raises Missing."""
    if checkout is None:
        raise Missing("no checkout of nanoGPT: --nanogpt PATH")
    path = checkout / "model.py"
    if not path.is_file():
        raise Missing(f"no {path.name} in the checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
