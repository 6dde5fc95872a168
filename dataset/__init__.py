"""From an image id to a batch: the VOC data set and its classes, the transforms and the sampler."""

from dataset.classes import IGNORE_LABEL, MEAN_BGR, VOC_CLASSES, voc_palette
from dataset.sampler import StepSampler
from dataset.transforms import Crop, PadCrop, RandomMirror, RandomScale, TrainTransform, to_input
from dataset.voc import DatasetError, VOCSegmentation, read_class_names, read_ids, read_image, read_label

__all__ = [
    "IGNORE_LABEL",
    "MEAN_BGR",
    "VOC_CLASSES",
    "Crop",
    "DatasetError",
    "PadCrop",
    "RandomMirror",
    "RandomScale",
    "StepSampler",
    "TrainTransform",
    "VOCSegmentation",
    "read_class_names",
    "read_ids",
    "read_image",
    "read_label",
    "to_input",
    "voc_palette",
]
