"""From an image id to a batch: the data sets and their classes, the transforms and the sampler."""

from dataset.cityscapes import CityscapesSegmentation
from dataset.classes import (
    IGNORE_LABEL,
    MEAN_BGR,
    VOC_CLASSES,
    absent_classes,
    count_classes,
    default_names,
    one_class_warning,
    read_class_names,
    voc_palette,
)
from dataset.cocostuff import COCOStuffSegmentation
from dataset.images import DatasetError, read_image
from dataset.labels import read_label
from dataset.lists import read_ids, read_list
from dataset.sampler import StepSampler
from dataset.transforms import ColorJitter, Crop, Pad, RandomCrop, RandomMirror, RandomScale, TrainTransform, to_input
from dataset.voc import VOCSegmentation, find_list

DATASETS: dict[str, type[VOCSegmentation]] = {
    "voc": VOCSegmentation,
    "cityscapes": CityscapesSegmentation,
    "cocostuff": COCOStuffSegmentation,
}
"""The choices of --dataset; README.md says how to add one."""

__all__ = [
    "DATASETS",
    "IGNORE_LABEL",
    "MEAN_BGR",
    "VOC_CLASSES",
    "COCOStuffSegmentation",
    "CityscapesSegmentation",
    "ColorJitter",
    "Crop",
    "DatasetError",
    "Pad",
    "RandomCrop",
    "RandomMirror",
    "RandomScale",
    "StepSampler",
    "TrainTransform",
    "VOCSegmentation",
    "absent_classes",
    "count_classes",
    "default_names",
    "find_list",
    "one_class_warning",
    "read_class_names",
    "read_ids",
    "read_image",
    "read_label",
    "read_list",
    "to_input",
    "voc_palette",
]
