"""An optimizer that works on the gradients before they are clipped too, and says so by its base class."""

from abc import ABC, abstractmethod

import torch


class AroundClipping(ABC):
    """The step calls `before_clipping`, then clips, then sets `grad_norm`, then calls `step`.

    history: what it remembers beside each parameter's state, with `state_dict` and `load_state_dict`; checkpoints
    hold it.
    """

    history: object
    grad_norm: torch.Tensor | None = None  # of all gradients as `before_clipping` left them, a scalar

    @abstractmethod
    def before_clipping(self) -> None:
        """Change the gradients, in place."""
