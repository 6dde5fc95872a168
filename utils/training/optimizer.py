"""The optimiser and its learning rate, as published for DeepLab-v2."""

from typing import Any

import torch
from torch import Tensor, nn, optim

from deeplab import Net


class GuardedSGD(optim.SGD):
    """SGD in one fused kernel. Its steps do nothing while ``bad`` is 1; the device decides this, without a host sync.

    The momentum buffers start as zeros. Otherwise the fused kernel would allocate them uninitialised in its first step and, if
    loss scaling skips that step, go on with their contents.

    Args:
        net: on the device; its ``parameter_groups()`` says which parameters are in which group.
        lr: base learning rate; each group has a multiple of it, see :func:`set_lr`.
        momentum: of all groups.
        weight_decay: multiplied by each group's ``decay_scale``.

    Attributes:
        bad: scalar float32 tensor on the device, 0 or 1.
    """

    def __init__(self, net: Net, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        groups = [{**group, "weight_decay": weight_decay * group["decay_scale"]} for group in net.parameter_groups()]
        super().__init__(groups, lr=lr, momentum=momentum, fused=True)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if momentum:
            for parameter in parameters:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.bad: Tensor = torch.zeros((), device=parameters[0].device)

    def load_momentum(self, saved: dict[str, Any]) -> None:
        """Copy the momentum buffers from a ``state_dict()``, and nothing else: the hyperparameters stay this optimiser's."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            if buffers := self.state.get(parameter):
                buffers["momentum_buffer"].copy_(saved["state"][number]["momentum_buffer"])

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        # A GradScaler sets `found_inf` to its own finding before the step and removes it afterwards.
        scaler_found = getattr(self, "found_inf", None)
        self.found_inf = self.bad if scaler_found is None else torch.maximum(self.bad, scaler_found)
        super().step()
        if scaler_found is None:
            del self.found_inf


def poly_lr(base: float, step: int, total: int, power: float = 0.9, warmup: int = 0) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``: base * (1 - step / total) ** power.

    In the first ``warmup`` steps this is multiplied by (step + 1) / warmup (Goyal et al., arXiv:1706.02677).
    """
    lr = base * (1 - step / total) ** power
    return lr * (step + 1) / warmup if step < warmup else lr


def clip_gradients(optimizer: optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float) -> None:
    """Scale all gradients down so that their total norm is at most ``max_norm``; no host sync.

    Call it between the backward pass and ``scaler.step``: DDP has then reduced the gradients. They are unscaled here first.
    """
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, max_norm)


def set_lr(optimizer: optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to its multiple of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
