"""Hugging Face's Trainer with GPT2LMHeadModel: bf16, fused AdamW and torch_compile on a GPU, its defaults on a CPU.

Its GPT-2 has biases, tanh-GELU and no padded rows. Its Trainer reports the loss as a mean since its last report.
"""

import os

import numpy as np
import torch

from benchmarks.measure import Meter
from benchmarks.task import Task


def measure(task: Task) -> dict:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    import transformers

    size, on_gpu = task.size, task.size.device == "cuda"
    torch.manual_seed(1337)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=task.vocabulary,
            n_positions=size.context,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
    )
    meter = Meter(size.device, size.warmup)
    arguments = transformers.TrainingArguments(
        output_dir="hf",
        per_device_train_batch_size=size.micro_batch,
        gradient_accumulation_steps=size.accumulation,
        max_steps=size.total_steps,
        learning_rate=size.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=size.lr_warmup_steps,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=on_gpu,
        tf32=True if on_gpu else None,
        torch_compile=on_gpu,
        use_cpu=not on_gpu,
        dataloader_num_workers=4 if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        logging_steps=10,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(task),
        callbacks=[callback(transformers.TrainerCallback, meter)],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return meter.result(
        loss_first=losses[0],
        loss_last=losses[-1],
        parameters=sum(p.numel() for p in model.parameters()),
        settings={"transformers": transformers.__version__, "compile": on_gpu, "bf16": on_gpu},
    )


class Windows(torch.utils.data.Dataset):
    """Consecutive windows of the token file; the model shifts the targets itself."""

    def __init__(self, task: Task):
        self.tokens = np.memmap(task.tokens / "train.bin", dtype=task.token_dtype, mode="r")
        self.context = task.size.context

    def __len__(self) -> int:
        return len(self.tokens) // self.context

    def __getitem__(self, i: int) -> dict:
        window = self.tokens[i * self.context : (i + 1) * self.context]
        ids = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def callback(base: type, meter: Meter):
    """A TrainerCallback (`base`) that tells the meter where steps begin and end."""

    class Steps(base):
        def on_train_begin(self, args, state, control, **_):
            meter.start()

        def on_step_end(self, args, state, control, **_):
            meter.step_done()

    return Steps()
