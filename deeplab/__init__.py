"""DeepLab-v2, DeepLabv3 and PSPNet: the nets, their losses, multi-scale prediction, the dense CRF, the published weights."""

from deeplab.batch_norm import BATCH_NORM_MODES, conv_bn, kept_statistics
from deeplab.crf import CRFParams, dense_crf
from deeplab.deeplabv2 import ASPP, ATROUS_RATES, DeepLabV2, deeplabv2
from deeplab.deeplabv3 import DeepLabV3
from deeplab.inference import predict, predict_classes, predict_windows
from deeplab.loss import LOSS_SIZES, multi_scale_loss, resize_labels, single_scale_loss
from deeplab.multiscale import fuse_max, multiscale_logits
from deeplab.nets import NETS, Net, make_net
from deeplab.pspnet import PSPNet
from deeplab.resnet import BACKBONES, fold_batch_norm

__all__ = [
    "ASPP",
    "ATROUS_RATES",
    "BACKBONES",
    "BATCH_NORM_MODES",
    "LOSS_SIZES",
    "NETS",
    "CRFParams",
    "DeepLabV2",
    "DeepLabV3",
    "Net",
    "PSPNet",
    "conv_bn",
    "deeplabv2",
    "dense_crf",
    "fold_batch_norm",
    "fuse_max",
    "kept_statistics",
    "make_net",
    "multi_scale_loss",
    "multiscale_logits",
    "predict",
    "predict_classes",
    "predict_windows",
    "resize_labels",
    "single_scale_loss",
]


def __getattr__(name: str) -> object:
    if name != "load_net":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deeplab.weights import load_net  # imported on first use: few users of the method need it

    return load_net
