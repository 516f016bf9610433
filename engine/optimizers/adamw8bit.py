"""AdamW with 8-bit moments: bitsandbytes (Dettmers et al. 2022, block-wise quantization).

Each block of 256 values is one uint8 a value and one scale. bitsandbytes leaves the moments of a tensor with
fewer than 4,096 elements in 32 bits.
"""

import functools

import torch

from engine.errors import ConfigError
from engine.optimizers import LIBRARIES, adamw, is_installed, missing_library


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    """AdamW8bit, or AdamW where bitsandbytes is missing and that fallback was asked for.

    Raises ConfigError where bitsandbytes is missing without a fallback, and for sharded parameters.
    """
    if problem := missing_library(settings):
        raise ConfigError(problem)
    if not is_installed(LIBRARIES["adamw8bit"]):
        return adamw.build(groups, settings)
    if any(hasattr(p, "to_local") for group in groups for p in group["params"]):
        raise ConfigError(
            "optimizer = 'adamw8bit': bitsandbytes cannot update sharded parameters; use data_parallel = "
            "'ddp' with tensor_parallel = 1, or optimizer = 'adamw'"
        )
    return _unwaiting()(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)


@functools.cache
def _unwaiting() -> type[torch.optim.Optimizer]:
    """bitsandbytes' AdamW8bit, but the host does not wait for the GPU after every parameter.

    Its kernels run on CUDA's default stream, and so does a step: their order needs no waiting.
    """
    from bitsandbytes.optim import AdamW8bit as Waiting

    class AdamW8bit(Waiting):
        @torch.no_grad()
        def step(self, closure=None):
            """Update every parameter that has a gradient; there is no `closure` in the engine."""
            for g, group in enumerate(self.param_groups):
                for i, p in enumerate(group["params"]):
                    if p.grad is None:
                        continue
                    if not self.state[p]:
                        self.init_state(group, p, g, i)
                    self.update_step(group, p, g, i)

    return AdamW8bit
