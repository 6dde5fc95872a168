"""The optimiser's groups and its learning rate, as published for DeepLab-v2."""

from torch import nn, optim


def param_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """The learnable parameters in the published groups (``lr_mult`` and ``decay_mult`` of the official train.prototxt).

    Trunk: rate x1. ASPP weights: x10. ASPP biases: x20 and no weight decay. Parameters that are fixed by the batch-norm mode
    are in no group.

    Args:
        net: a net whose head is called ``layer5``.
        weight_decay: for the groups that have any.

    Returns:
        Groups for ``torch.optim.SGD``; ``lr_scale`` is read by :func:`set_lr`.
    """
    trunk, head_weights, head_biases = [], [], []
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        if not name.startswith("layer5."):
            trunk.append(parameter)
        elif name.endswith(".bias"):
            head_biases.append(parameter)
        else:
            head_weights.append(parameter)
    return [
        {"params": trunk, "lr_scale": 1.0, "weight_decay": weight_decay},
        {"params": head_weights, "lr_scale": 10.0, "weight_decay": weight_decay},
        {"params": head_biases, "lr_scale": 20.0, "weight_decay": 0.0},
    ]


def poly_lr(base: float, step: int, total: int, power: float = 0.9) -> float:
    """The rate of step ``step`` (from 0) of ``total``: base * (1 - step / total) ** power."""
    return base * (1 - step / total) ** power


def set_lr(optimizer: optim.Optimizer, lr: float) -> None:
    """Give every group its multiple of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
