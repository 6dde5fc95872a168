"""DeepLab-v2: the net, its losses, multi-scale prediction, the dense CRF and the published weights."""

from deeplab.deeplabv2 import ASPP, ATROUS_RATES, OUTPUT_STRIDE, DeepLabV2, deeplabv2
from deeplab.resnet import BACKBONES, BATCH_NORM_MODES, conv_bn

__all__ = ["ASPP", "ATROUS_RATES", "BACKBONES", "BATCH_NORM_MODES", "OUTPUT_STRIDE", "DeepLabV2", "conv_bn", "deeplabv2"]
