"""Every published DeepLab-ResNet weights file: recognised, brought to the canonical names, put into a net, and written back."""

from deeplab.weights.apply import LoadReport, apply_weights
from deeplab.weights.load import Weights, load_weights
from deeplab.weights.names import WeightsError
from deeplab.weights.write import EXPORTS, export

__all__ = ["EXPORTS", "LoadReport", "Weights", "WeightsError", "apply_weights", "export", "load_weights"]
