"""What a step minimises: the net and its loss as one module, and the options of the loss."""

from argparse import Namespace
from collections.abc import Callable

from torch import Tensor, nn

from deeplab.loss import Ohem

LossFunction = Callable[..., dict[str, Tensor]]


class Objective(nn.Module):
    """The net and its loss as one module, so that DistributedDataParallel sees one forward pass whatever the scales."""

    def __init__(self, net: nn.Module, loss_function: LossFunction, **options: object) -> None:
        super().__init__()
        self.net, self.loss_function, self.options = net, loss_function, options

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) mean-subtracted BGR and (N, H, W) int64 -> the losses, scalars, ``"loss"`` among them."""
        return self.loss_function(self.net, images, labels, **self.options)


def loss_options(args: Namespace) -> dict[str, object]:
    """What a loss function takes beside net, images and labels."""
    options: dict[str, object] = {"size": args.loss_size, "aux_weight": args.aux_weight or 0.0}
    if args.ohem:
        options["ohem"] = Ohem(args.ohem_threshold, args.ohem_keep)
    if getattr(args, "one_scale_at_a_time", False):
        options["one_scale_at_a_time"] = True
    return options
