"""torchtitan 0.2.2's own Trainer with its own Llama 3 in the size of GPT-2 124M: compiled blocks, bf16 autocast.

Its SwiGLU is 8/3 wide, so that a layer's products are GPT-2's, and its head is not tied, which adds no product.
Only the loader is replaced, because its own reads text through the `datasets` library.
"""

import dataclasses
import os
import sys
import types

import torch

from benchmarks.batches import RandomWindows
from benchmarks.measure import Meter
from benchmarks.task import Missing, Task

ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def measure(task: Task) -> dict:
    if task.size.device == "cpu":
        raise Missing("torchtitan's Trainer needs a GPU")
    os.environ |= ENVIRONMENT
    without_datasets()
    import torchtitan.train
    from torchtitan.models import llama3
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.protocols.train_spec import register_train_spec

    size = task.size
    shape = TransformerModelArgs(
        dim=size.width,
        n_layers=size.layers,
        n_heads=size.heads,
        vocab_size=size.rows(task.vocabulary),
        max_seq_len=size.context,
    )
    spec = dataclasses.replace(
        llama3.get_train_spec(),
        model_args={"benchmark": shape},
        build_dataloader_fn=lambda **_: Loader(RandomWindows(task)),
        build_tokenizer_fn=None,
        build_validator_fn=None,
        state_dict_adapter=None,
    )
    register_train_spec("benchmark", spec)
    meter = Meter(size.device, size.warmup)
    trainer = timed(torchtitan.train.Trainer, meter)(job(size))
    meter.start()
    trainer.train()
    torch.distributed.destroy_process_group()
    return meter.result(
        parameters=sum(p.numel() for p in trainer.model_parts[0].parameters()),
        settings={"torchtitan": "0.2.2", "compile": "blocks", "precision": "bf16"},
    )


def without_datasets() -> None:
    """Stand-ins for the library that only its text loader needs, where that is missing."""
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError:
        root, distributed = types.ModuleType("datasets"), types.ModuleType("datasets.distributed")
        root.Dataset = root.load_dataset = distributed.split_dataset_by_node = None
        sys.modules.update({"datasets": root, "datasets.distributed": distributed})


def job(size):
    """Its configuration."""
    from torchtitan.config import JobConfig

    job = JobConfig()
    job.job.dump_folder = "titan"
    job.model.name, job.model.flavor = "benchmark", "benchmark"
    job.training.local_batch_size = size.micro_batch
    job.training.global_batch_size = size.micro_batch * size.accumulation
    job.training.seq_len = size.context
    job.training.steps = size.total_steps
    job.optimizer.lr = size.lr
    job.lr_scheduler.warmup_steps = size.lr_warmup_steps
    job.metrics.log_freq = 10**9  # a report would start its count of peak memory anew
    job.checkpoint.enable = False
    job.activation_checkpoint.mode = "none"
    job.compile.enable = True
    return job


class Loader:
    """What its Trainer asks of a data loader."""

    def __init__(self, batch: RandomWindows):
        self.batch = batch

    def __iter__(self):
        while True:
            inputs, targets = self.batch.on_host()
            yield {"input": inputs}, targets

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def timed(base: type, meter: Meter) -> type:
    """Its Trainer (`base`) with a meter."""

    class Timed(base):
        def forward_backward_step(self, **arguments):
            loss = super().forward_backward_step(**arguments)
            self.step_losses.append(loss.detach())
            return loss

        def train_step(self, batches):
            self.step_losses = []
            super().train_step(batches)
            meter.step_done(torch.stack(self.step_losses).sum())

    return Timed
