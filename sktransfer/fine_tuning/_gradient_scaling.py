"""Gradients of a float16 network, scaled up so that small ones do not become zero."""

from __future__ import annotations

from typing import Any

import torch
from skorch.callbacks import Callback

# Lower than torch's own: a fine-tuning has hundreds of steps rather than the many thousands among
# which those that overflow until the scale is right do not count.
_START = 2.0**12


class GradientScaling(Callback):
    """Scales gradients on their way down and back again before anybody looks at them.

    A step whose gradients overflow is left out, and the scale halved, as
    :class:`torch.amp.GradScaler` does. skorch gives the optimizer a closure, so that the
    scaler's own ``step`` has no place: a parameter without a gradient is not moved either.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device):
        self.scaler = torch.amp.GradScaler(device.type, init_scale=_START)

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        # The loss itself stays what it is; what flows back from it is scaled.
        net.criterion_.scale_gradient = self.scaler.scale

    def on_grad_computed(self, net: Any, **kwargs: Any) -> None:
        self.scaler.unscale_(net.optimizer_)
        before = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() < before:
            net.optimizer_.zero_grad(set_to_none=True)

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        net.criterion_.scale_gradient = None
