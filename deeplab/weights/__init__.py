"""Published DeepLab-ResNet weights files: recognise, rename to the canonical names, load into a net, and write back."""

from deeplab.weights.apply import LoadReport, apply_weights, build_net, load_net
from deeplab.weights.load import ABN, TRUNKS, load_weights
from deeplab.weights.read import check_sums
from deeplab.weights.weights import CONFIG, VERSION, Weights, WeightsError, check_version
from deeplab.weights.write import EXPORTS, export

__all__ = [
    "ABN",
    "CONFIG",
    "EXPORTS",
    "TRUNKS",
    "VERSION",
    "LoadReport",
    "Weights",
    "WeightsError",
    "apply_weights",
    "build_net",
    "check_sums",
    "check_version",
    "export",
    "load_net",
    "load_weights",
]
