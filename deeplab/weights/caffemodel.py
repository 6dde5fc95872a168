"""Read official ``.caffemodel`` files without Caffe.

A caffemodel is one serialised ``NetParameter`` of ``caffe.proto`` in protobuf's wire format
(protobuf.dev/programming-guides/encoding). The field numbers used here are the same in BVLC's Caffe and DeepLab-v2's fork. Only
the fields that hold weights are read, one layer at a time, so reading needs little more memory than the arrays that are kept.
"""

import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deeplab.weights.names import IN_CAFFE_BACKBONE, canonical_from_caffe, refuse_extras
from deeplab.weights.weights import NO_PLACE, Weights, WeightsError

CAFFE_EPS = 1e-5  # Caffe's default, and that of all published nets except TensorFlow's
COCO_HEAD = (
    "a net trained on COCO with another head (one 1x1 convolution, 91 classes), which is left out: the head is untrained"
)
_TWIN = re.compile(r"_res(?:05|075)(?=_|$)")  # the copies of a layer for the 0.5x and 0.75x images
_CUT_OFF = "it ends in the middle of a field: the file is cut off, or not a caffemodel; fetch it again"


@dataclass
class Layer:
    """One layer of a caffemodel: its name, type and arrays; for a batch norm also its epsilon, by default Caffe's."""

    name: str
    type: str = ""
    blobs: list[np.ndarray] = field(default_factory=list)
    eps: float | None = None


class CaffeModel:
    """The layers of a caffemodel that hold weights: ``names`` in the order of the file, ``read(name)`` for one layer.

    Args:
        source: the path or the bytes of the file.

    Raises:
        WeightsError: the file is cut off, not a caffemodel, or in Caffe's old V1 format; also when reading a layer.
    """

    def __init__(self, source: str | Path | bytes) -> None:
        data: bytes | mmap.mmap
        if isinstance(source, bytes):
            data = source
        else:
            with open(source, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._layers: dict[str, memoryview] = {}
        legacy = 0
        for number, value in _fields(memoryview(data)):
            legacy += number == 2
            if number != 100:  # NetParameter.layer
                continue
            found = dict(_fields(value))
            if 7 not in found:  # no blobs
                continue
            name = _text(found.get(1, b""))
            if name in self._layers:
                raise WeightsError(f"it has two layers named {name!r}; expected one")
            self._layers[name] = value
        if not self._layers and legacy:
            raise WeightsError(
                f"it has {legacy} layers in Caffe's old V1 format, which has no batch norm, so it is not a DeepLab-ResNet; "
                "use the caffemodel of one"
            )
        if not self._layers:
            raise WeightsError("it is a caffemodel without any weights; fetch it again")

    @property
    def names(self) -> list[str]:
        return list(self._layers)

    def read(self, name: str) -> Layer:
        layer, eps = Layer(name), CAFFE_EPS
        try:
            for number, value in _fields(self._layers[name]):
                if number == 2:
                    layer.type = _text(value)
                elif number == 7:
                    layer.blobs.append(_array(value))
                elif number == 139:  # batch_norm_param; the shortest decimal: 1e-05, not 9.99999975e-06
                    eps = next((float(str(np.frombuffer(v, "<f4")[0])) for n, v in _fields(value) if n == 3), eps)
        except ValueError as error:
            raise WeightsError(f"its layer {name!r} is damaged ({error}); fetch the file again") from None
        if layer.type == "BatchNorm":
            layer.eps = eps
        return layer


def from_caffe(model: CaffeModel) -> Weights:
    """A DeepLab-ResNet caffemodel with the canonical names.

    Caffe stores the mean and variance of batch norm multiplied by a factor, the third blob; with factor 0 they are zeros. The
    weight and bias are in a Scale layer. The 0.75x and 0.5x copies of a layer must equal the 1x layer and are dropped.

    Raises:
        WeightsError: copies that differ, blobs that do not fit their layer, layers in the backbone that a plain ResNet lacks,
            or more than one epsilon.
    """
    weights = Weights({}, "Caffe DeepLab-v2", {"stride_in_3x3": False})
    skipped, epsilons = weights.skipped, dict[float, str]()
    for name in model.names:
        layer, base = model.read(name), _TWIN.sub("", name)
        if base != name and base in model.names:
            _check_twin(model.read(base), layer)
            skipped[name] = "equal to the 1x layer"
        elif base != name:
            skipped[name] = "a copy for scaled images, without its 1x layer in the file"
        elif module := canonical_from_caffe(name):
            _add_layer(weights.state, module, layer)
            if layer.eps is not None:
                epsilons.setdefault(layer.eps, name)
        elif "fc" in name and layer.type == "InnerProduct":
            skipped[name] = "the image classifier"
            weights.notes.append("a plain image classifier: only its backbone is used, the head is untrained")
        elif "fc" in name and layer.type == "Convolution" and layer.blobs[0].shape[:1] == (91,):
            skipped[name] = "the head of another net"
            weights.notes.append(COCO_HEAD)
        else:
            skipped[name] = f"{NO_PLACE} ({layer.type} of {'x'.join(map(str, layer.blobs[0].shape))})"
    refuse_extras(name for name, reason in skipped.items() if reason.startswith(NO_PLACE) and IN_CAFFE_BACKBONE.match(name))
    if len(epsilons) > 1:
        found = ", ".join(f"{eps:g} in {name}" for eps, name in epsilons.items())
        raise WeightsError(f"its batch norms have different epsilons ({found}); expected a single one")
    weights.config["batch_norm_eps"] = next(iter(epsilons), CAFFE_EPS)
    return weights


def _add_layer(state: dict[str, Tensor], module: str, layer: Layer) -> None:
    blobs = layer.blobs
    head = module.startswith("layer5.")
    kind = "BatchNorm" if layer.name.startswith("bn") else "Scale" if layer.name.startswith("scale") else "Convolution"
    expected = {"BatchNorm": 3, "Scale": 2, "Convolution": 1 + head}[kind]
    if layer.type != kind or len(blobs) != expected:
        raise WeightsError(
            f"its layer {layer.name!r} is a {layer.type} with {len(blobs)} blobs; expected a {kind} with {expected}"
        )
    if kind == "Convolution":
        state[f"{module}.weight"] = torch.from_numpy(blobs[0])
        if head:
            state[f"{module}.bias"] = torch.from_numpy(blobs[1].reshape(-1))
    elif kind == "Scale":
        state[f"{module}.weight"] = torch.from_numpy(blobs[0].reshape(-1))
        state[f"{module}.bias"] = torch.from_numpy(blobs[1].reshape(-1))
    else:
        factor = float(blobs[2].reshape(-1)[0]) if blobs[2].size else 0.0
        for leaf, blob in zip(("running_mean", "running_var"), blobs):
            values = blob.reshape(-1).astype(np.float64) / factor if factor else np.zeros(blob.size)
            state[f"{module}.{leaf}"] = torch.from_numpy(values.astype(np.float32))


def _check_twin(layer: Layer, twin: Layer) -> None:
    if len(layer.blobs) == len(twin.blobs) and all(map(np.array_equal, layer.blobs, twin.blobs)):
        return
    raise WeightsError(
        f"its layers {layer.name!r} and {twin.name!r} differ; expected equal ones, since the scales of DeepLab-v2 share their "
        "weights"
    )


def _array(blob: memoryview) -> np.ndarray:
    """A BlobProto as a new float32 array. Packed floats and single floats have the same bytes."""
    pieces: list[np.ndarray] = []
    old, shape = [0] * 4, None  # num, channels, height, width; the current format
    for number, value in _fields(blob):
        if number in (5, 8):  # data, double_data
            pieces.append(np.frombuffer(value, "<f4" if number == 5 else "<f8"))
        elif number == 7:
            shape = [side for n, dims in _fields(value) if n == 1 for side in _integers(dims)]
        elif number <= 4:
            (old[number - 1],) = _integers(value)
    shape = old if shape is None else shape
    values = np.concatenate([np.empty(0, np.float32), *pieces], dtype=np.float32, casting="same_kind")
    if values.size != math.prod(shape):
        raise ValueError(f"{values.size} numbers for a blob of shape {tuple(shape)}")
    return values.reshape(shape)


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, bytes) of each field of a message; nested messages are not parsed."""
    at = 0
    while at < len(view):
        tag, at = _varint(view, at)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            length, at = _varint(view, at)
        elif wire == 0:
            length = _varint(view, at)[1] - at
        else:
            length = {1: 8, 5: 4}.get(wire, len(view))
        if number == 0 or at + length > len(view):
            raise WeightsError(_CUT_OFF)
        yield number, view[at : at + length]
        at += length


def _integers(view: memoryview) -> list[int]:
    """One integer, or several packed ones."""
    found, at = [], 0
    while at < len(view):
        number, at = _varint(view, at)
        found.append(number)
    return found


def _varint(view: memoryview, start: int) -> tuple[int, int]:
    """A number with 7 bits per byte, and the position after it."""
    value = 0
    for shift, position in zip(range(0, 70, 7), range(start, len(view))):
        value |= (view[position] & 127) << shift
        if view[position] < 128:
            return value, position + 1
    raise WeightsError(_CUT_OFF)


def _text(view: memoryview | bytes) -> str:
    return bytes(view).decode("utf-8", "replace")
