"""Official ``.caffemodel`` files, read without Caffe.

A caffemodel is one serialised ``NetParameter`` of ``caffe.proto`` (DeepLab-v2's fork and BVLC's have the same numbers here).
Only the fields that hold weights are declared. Its layers are found by walking the outermost fields, and one layer at a time
is parsed, so a file needs little more memory than the arrays that are kept.
"""

import functools
import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeplab.weights.names import IN_CAFFE_BACKBONE, canonical_from_caffe, refuse_extras
from deeplab.weights.weights import NO_PLACE, WeightsError

_TWIN = re.compile(r"_res(?:05|075)(?=_|$)")  # the copies of a layer for the 0.5x and 0.75x pictures
_CUT_OFF = "it ends in the middle of a field: the file is cut off or no caffemodel; fetch it again"


@dataclass
class Layer:
    """One layer of a caffemodel: its name, type, arrays and, where the file states it, the epsilon of its batch norm."""

    name: str
    type: str
    blobs: list[np.ndarray]
    eps: float | None = None


class CaffeModel:
    """The layers of a caffemodel that hold weights; ``names`` in the order of the file, ``read(name)`` for one of them.

    Args:
        source: the file's path or its bytes.

    Raises:
        WeightsError: cut off, not a caffemodel, or in Caffe's old V1 format; reading a layer may raise it as well.
    """

    def __init__(self, source: str | Path | bytes) -> None:
        if isinstance(source, bytes):
            self._view = memoryview(source)
        else:
            with open(source, "rb") as file:
                self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._spans: dict[str, tuple[int, int]] = {}
        legacy = 0
        for number, start, end in _fields(self._view, 0, len(self._view)):
            legacy += number == 2
            if number == 100:  # NetParameter.layer
                self._add(start, end)
        if not self._spans:
            if legacy:
                raise WeightsError(
                    f"it has {legacy} layers in Caffe's old V1 format, which knows no batch norm, so it is no DeepLab-ResNet"
                )
            raise WeightsError("it is a caffemodel without any weights")

    def _add(self, start: int, end: int) -> None:
        name, has_blobs = "", False
        for number, first, last in _fields(self._view, start, end):
            if number == 1:
                name = bytes(self._view[first:last]).decode("utf-8", "replace")
            has_blobs |= number == 7
        if not has_blobs:
            return
        if name in self._spans:
            raise WeightsError(f"it has two layers named {name!r}; expected one")
        self._spans[name] = (start, end)

    @property
    def names(self) -> list[str]:
        return list(self._spans)

    def read(self, name: str) -> Layer:
        from google.protobuf.message import DecodeError

        start, end = self._spans[name]
        messages = _messages()
        try:
            layer = messages["Layer"].FromString(bytes(self._view[start:end]))
            blobs = [_array(blob, messages) for blob in layer.blobs]
        except (DecodeError, UnicodeDecodeError, ValueError) as error:
            raise WeightsError(f"its layer {name!r} is damaged ({error}); fetch the file again") from None
        eps = None
        if layer.type == "BatchNorm":
            eps = float(str(np.float32(layer.batch_norm_param.eps)))  # the short decimal: 1e-05, not 9.99999975e-06
        return Layer(name, layer.type, blobs, eps)


def caffe_state(model: CaffeModel) -> tuple[dict[str, Tensor], dict[str, str], float]:
    """The weights of a DeepLab-ResNet caffemodel under their canonical names.

    Batch norm keeps its mean and variance multiplied by a factor (its third blob; a factor of 0 stands for zeros) and its
    weight and bias in a Scale layer. The 0.75x and 0.5x copies of the layers must equal the 1x ones and are dropped.

    Returns:
        The state (float32, CPU), {layer: why it was not used}, and the epsilon of the batch norms.

    Raises:
        WeightsError: copies that differ, blobs that do not fit their layer, layers inside the trunk that a plain ResNet lacks,
            or more than one epsilon.
    """
    state: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    epsilons: dict[float, str] = {}
    twins: dict[str, list[str]] = {}
    for name in model.names:
        if (base := _TWIN.sub("", name)) != name:
            twins.setdefault(base, []).append(name)
    for name in model.names:
        if _TWIN.search(name):
            if _TWIN.sub("", name) not in model.names:
                skipped[name] = "a copy for scaled pictures whose 1x layer is not in the file"
            continue
        layer = model.read(name)
        for twin in twins.get(name, ()):
            _check_twin(layer, model.read(twin))
            skipped[twin] = "equal to the 1x layer"
        module = canonical_from_caffe(name)
        if module is None:
            shape = "x".join(map(str, layer.blobs[0].shape))
            skipped[name] = f"{NO_PLACE} ({layer.type} of {shape})"
            continue
        _add_layer(state, module, layer)
        if layer.eps is not None:
            epsilons.setdefault(layer.eps, name)
    refuse_extras(name for name, reason in skipped.items() if reason.startswith(NO_PLACE) and IN_CAFFE_BACKBONE.match(name))
    if len(epsilons) > 1:
        found = ", ".join(f"{eps:g} in {name}" for eps, name in epsilons.items())
        raise WeightsError(f"its batch norms have different epsilons ({found}); expected one for the whole net")
    return state, skipped, next(iter(epsilons), 1e-5)


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
        f"its layers {layer.name!r} and {twin.name!r} differ, so its scales do not share their weights; "
        "one DeepLab-v2 net cannot hold them"
    )


def _array(blob: bytes, messages: dict[str, Any]) -> np.ndarray:
    """A BlobProto as a float32 array of its own."""
    message = messages["Blob"].FromString(blob)
    packed, kind = (message.data, "<f4") if message.data else (message.double_data, "<f8")
    values = np.frombuffer(packed[0] if len(packed) == 1 else b"".join(packed), kind).astype(np.float32)
    if message.HasField("shape"):
        shape = tuple(message.shape.dim)
    else:
        shape = (message.num, message.channels, message.height, message.width)
    if values.size == 0:  # written number by number, which no Caffe does but the format allows
        loose = messages["LooseBlob"].FromString(blob)
        values = np.array(loose.data or loose.double_data, np.float32)
    if values.size != math.prod(shape):
        raise ValueError(f"{values.size} numbers for a blob of shape {shape}")
    return values.reshape(shape)


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of each field of the message in ``view[start:end]``, without looking inside."""
    while start < end:
        tag, start = _varint(view, start, end)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            length, start = _varint(view, start, end)
        elif wire == 0:
            length = _varint(view, start, end)[1] - start
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise WeightsError(_CUT_OFF)
        if number == 0 or start + length > end:
            raise WeightsError(_CUT_OFF)
        yield number, start, start + length
        start += length


def _varint(view: memoryview, start: int, end: int) -> tuple[int, int]:
    value = 0
    for shift, position in zip(range(0, 70, 7), range(start, end)):
        value |= (view[position] & 127) << shift
        if view[position] < 128:
            return value, position + 1
    raise WeightsError(_CUT_OFF)


@functools.cache
def _messages() -> dict[str, Any]:
    """The message classes, declared by field number (DeepLab-v2's ``src/caffe/proto/caffe.proto``).

    A packed array and a nested message look like a string of bytes on disk, so blobs and their numbers are declared as bytes:
    numpy takes the numbers as they lie. ``LooseBlob`` is the same message with the numbers declared as numbers.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    def field(name: str, number: int, kind: str, repeated: bool = False, **more: Any) -> Any:
        proto = descriptor_pb2.FieldDescriptorProto
        label = proto.LABEL_REPEATED if repeated else proto.LABEL_OPTIONAL
        return proto(name=name, number=number, type=getattr(proto, f"TYPE_{kind}"), label=label, **more)

    declared = {
        "Layer": [
            field("name", 1, "STRING"),
            field("type", 2, "STRING"),
            field("blobs", 7, "BYTES", repeated=True),
            field("batch_norm_param", 139, "MESSAGE", type_name=".deeplab.BatchNorm"),
        ],
        "BatchNorm": [field("eps", 3, "FLOAT", default_value="1e-5")],
        "Shape": [field("dim", 1, "INT64", repeated=True)],
        "Blob": [
            *(field(name, number, "INT32") for number, name in enumerate(("num", "channels", "height", "width"), 1)),
            field("data", 5, "BYTES", repeated=True),
            field("shape", 7, "MESSAGE", type_name=".deeplab.Shape"),
            field("double_data", 8, "BYTES", repeated=True),
        ],
        "LooseBlob": [field("data", 5, "FLOAT", repeated=True), field("double_data", 8, "DOUBLE", repeated=True)],
    }
    file = descriptor_pb2.FileDescriptorProto(name="deeplab/caffemodel.proto", package="deeplab", syntax="proto2")
    for name, fields in declared.items():
        file.message_type.append(descriptor_pb2.DescriptorProto(name=name, field=fields))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"deeplab.{name}")) for name in declared}
