"""Torch files from before PyTorch 0.1.10 (March 2017): tar archives, such as torchvision's first weights.

PyTorch no longer writes this format; ``legacy_load`` in ``torch/serialization.py`` still reads it, but not with
``weights_only=True``. The members ``storages`` and ``tensors`` are a pickled count, then for each entry a pickled description
followed by raw little-endian numbers. The member ``pickle`` is the saved object, with the number of an entry in place of each
tensor. Storages that are parts of other storages are listed after them.
"""

import io
import math
import re
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from deeplab.weights.read import PlainUnpickler, damaged, holds_objects
from deeplab.weights.weights import WeightsError

_TYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "Long": torch.int64, "Int": torch.int32,
    "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
}  # fmt: skip


def read_tar_torch(path: Path) -> Any:
    """The object that ``torch.save`` wrote into a tar archive, on the CPU; no code in it is run.

    Raises:
        WeightsError: the file is damaged, or holds anything but tensors and plain values.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            storages = _read_storages(_member(archive, "storages"))
            tensors = _read_tensors(_member(archive, "tensors"), storages)
            return _without_parameters(_TensorUnpickler(_member(archive, "pickle"), tensors).load())
    except (WeightsError, OSError):
        raise
    except Exception as error:
        raise WeightsError(damaged(error)) from None


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a file")
    return io.BytesIO(file.read())  # its read(n) returns what there is; that of the archive allocates n bytes first


def _read_storages(file: IO[bytes]) -> dict[Any, Tensor]:
    """The storages by their numbers, as one-dimensional tensors."""
    storages = {}
    for _ in range(_plain(file)):
        key, _, kind = _plain(file)
        (count,) = struct.unpack("<q", _exactly(file, 8))
        numbers = bytearray(_exactly(file, count * torch.empty(0, dtype=kind.dtype).element_size()))
        storages[key] = torch.frombuffer(numbers, dtype=kind.dtype) if count else torch.empty(0, dtype=kind.dtype)
    for key, root, offset, count in _plain(file):
        storages[key] = storages[root].narrow(0, offset, count)
    return storages


def _read_tensors(file: IO[bytes], storages: dict[Any, Tensor]) -> dict[str, Tensor]:
    """The tensors by their numbers, which are text in the pickle."""
    tensors = {}
    for _ in range(_plain(file)):
        key, storage, kind = _plain(file)
        (dimensions,) = struct.unpack("<ixxxx", _exactly(file, 8))
        *layout, offset = struct.unpack(f"<{2 * dimensions + 1}q", _exactly(file, 8 * (2 * dimensions + 1)))
        shape, strides = layout[:dimensions], layout[dimensions:]
        if dimensions == 0 or math.prod(shape) == 0:  # PyTorch had no scalars then: no dimensions mean an empty tensor
            tensors[str(key)] = torch.empty(0, dtype=kind.dtype)
        else:
            numbers = storages[storage]
            tensors[str(key)] = numbers.as_strided(shape, strides, numbers.storage_offset() + offset)
    return tensors


def _plain(file: IO[bytes]) -> Any:
    return _TensorUnpickler(file, {}).load()


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count) if count >= 0 else b""
    if len(data) != count:
        raise EOFError(f"{len(data)} of {count} bytes")
    return data


class _Kind:
    """Stands for ``torch.FloatTensor``, ``torch.FloatStorage`` and similar types."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Parameter:
    """Stands for the ``Parameter`` and ``Variable`` of that time; the tensor is an argument or the first entry of the state."""

    data: Tensor | None = None  # for an object made without arguments

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __setstate__(self, state: Any) -> None:
        if self.data is None:
            self.data = state[0]


class _TensorUnpickler(PlainUnpickler):
    """An unpickler that allows only the stand-ins above and ordered dictionaries."""

    def __init__(self, file: IO[bytes], tensors: dict[str, Tensor]) -> None:
        super().__init__(file, encoding="latin1")  # strings of Python 2 are bytes; latin1 keeps them
        self._tensors = tensors

    def find_class(self, module: str, name: str) -> Any:
        match = re.fullmatch(r"([A-Z][a-z]+)(Tensor|Storage)", name)
        if module in ("torch", "torch.cuda") and match and match[1] in _TYPES:
            return _Kind(_TYPES[match[1]])
        if (module, name) in (("torch.nn.parameter", "Parameter"), ("torch.autograd.variable", "Variable")):
            return _Parameter
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise WeightsError(holds_objects(f"{module}.{name}"))

    def persistent_load(self, key: Any) -> Tensor:
        return self._tensors[key]


def _without_parameters(value: Any) -> Any:
    if isinstance(value, _Parameter):
        return value.data
    if isinstance(value, dict):
        return {key: _without_parameters(entry) for key, entry in value.items()}
    return [_without_parameters(entry) for entry in value] if isinstance(value, (list, tuple)) else value
