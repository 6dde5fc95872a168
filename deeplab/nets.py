"""The nets by name."""

from collections.abc import Mapping
from typing import Any

from deeplab.deeplabv2 import DeepLabV2
from deeplab.deeplabv3 import DeepLabV3
from deeplab.pspnet import PSPNet
from deeplab.toolbox import NetWithAuxiliary

Net = DeepLabV2 | NetWithAuxiliary
NETS: dict[str, type[Net]] = {
    "deeplabv2": DeepLabV2,
    "deeplabv3": DeepLabV3,
    "pspnet": PSPNet,
}


def make_net(config: Mapping[str, Any], batch_norm: str = "frozen") -> Net:
    """Build the net that a ``net.config`` describes; a config without a name, as in older snapshots, is a DeepLab-v2's."""
    options = dict(config)
    return NETS[options.pop("net", "deeplabv2")](**options, batch_norm=batch_norm)
