"""A plain loader of nanoGPT's kind: random windows of the token file, copied while the device computes."""

import numpy as np
import torch


class RandomWindows:
    """Callable () → inputs and targets, int64 of shape (B, T) on the device."""

    def __init__(self, task):
        self.path, self.dtype, self.size = task.tokens / "train.bin", task.token_dtype, task.size

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.on_host()
        device = self.size.device
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def on_host(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets in host memory, pinned where there is a GPU to copy them to."""
        tokens = np.memmap(self.path, dtype=self.dtype, mode="r")
        context = self.size.context
        starts = torch.randint(len(tokens) - context, (self.size.micro_batch,)).tolist()
        inputs = torch.stack([torch.from_numpy(tokens[i : i + context].astype(np.int64)) for i in starts])
        targets = torch.stack(
            [torch.from_numpy(tokens[i + 1 : i + 1 + context].astype(np.int64)) for i in starts]
        )
        return (inputs, targets) if self.size.device == "cpu" else (inputs.pin_memory(), targets.pin_memory())
