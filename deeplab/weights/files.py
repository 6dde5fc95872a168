"""From a file to the plain dictionary of arrays in it: torch, safetensors and numpy files, and what is none of them.

The kind of a file is told by its first bytes, not by its name. Nothing in a file is ever run: torch files are read with
``weights_only=True``, old numpy pickles by an unpickler that knows numpy's arrays and nothing else.
"""

import io
import json
import pickle
import re
import struct
import tokenize
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from deeplab.weights.names import WeightsError

_TORCH_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the pickled magic number before PyTorch 1.6
_TABLE_MAGIC = bytes.fromhex("57fb808b247547db")  # ends a LevelDB table: TensorFlow's .ckpt (V1) and .index (V2) files
_ARCHIVES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
_DAMAGED = "it is cut off or damaged ({}); fetch or copy it again"
_BROKEN = (  # what the readers of torch, pickle, zip and numpy raise for files that are cut off or scrambled
    RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OverflowError,
    struct.error, pickle.UnpicklingError, zipfile.BadZipFile, SyntaxError, tokenize.TokenError, AssertionError, MemoryError,
)  # fmt: skip
_TENSORFLOW = (
    "it is a TensorFlow checkpoint, which only TensorFlow reads; give the .npy file it was made from, or save its variables "
    "there: r = tf.train.load_checkpoint(PATH); np.savez(OUT, **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})"
)


def file_kind(path: Path) -> str:
    """``"torch"``, ``"old torch"`` (before 1.6), ``"safetensors"``, ``"npy"``, ``"npz"`` or ``"caffe"``.

    Raises:
        WeightsError: the file is none of them; the message says what it is, as far as that can be seen.
    """
    if path.with_name(path.name + ".index").is_file() or re.search(r"\.data-\d+-of-\d+$", path.name):
        raise WeightsError(_TENSORFLOW)
    if not path.exists():
        raise WeightsError("there is no such file; `python scripts/download.py list` shows what can be fetched")
    if path.is_dir():
        raise WeightsError("it is a folder; name the weights file in it")
    with open(path, "rb") as file:
        head = file.read(1024)
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read()
    if not head.strip(b"\0"):
        what = "empty" if not size else "nothing but zeros"
        raise WeightsError(f"it is {what}; fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError("it is a git-lfs pointer, not the file itself; run `git lfs pull` where it came from")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise WeightsError(
            "it is a web page, not weights: the server (Google Drive does so) answered with a page; fetch it in a browser"
        )
    if path.suffix == ".caffemodel":
        return "caffe"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if _TORCH_MAGIC in head[:20]:
        return "old torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        return "safetensors"
    if tail == _TABLE_MAGIC:
        raise WeightsError(_TENSORFLOW)
    packed = next((name for magic, name in _ARCHIVES.items() if head.startswith(magic)), None)
    if packed or head[257:262] == b"ustar":
        raise WeightsError(f"it is a {packed or 'tar'} archive; unpack it and name the weights file in it")
    start = head[:12].decode("ascii", "backslashreplace").encode("unicode_escape").decode()
    raise WeightsError(
        f"it is no weights file that is known here (it has {size} bytes and begins with {start!r}); "
        "expected a .pth, .safetensors, .caffemodel, .npy or .npz file"
    )


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _BROKEN as error:
        raise WeightsError(_DAMAGED.format(_first_line(error))) from None
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise WeightsError(f"it is a zip archive ({', '.join(names[:3])} ...); unpack it and name the weights file in it")


def read_torch(path: Path, old: bool) -> Any:
    """What ``torch.save`` wrote, on the CPU. Tensors of a file since PyTorch 1.6 are mapped, not read, until they are used.

    Raises:
        WeightsError: damaged, or a file with other things than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=not old)
    except _BROKEN as error:
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"it holds Python objects ({match[1]}) beside tensors, and loading them could run foreign code; "
                "where you trust it, load it yourself and save only its state_dict()"
            ) from None
        raise WeightsError(_DAMAGED.format(_first_line(error))) from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a ``.safetensors`` file, on the CPU, and the snapshot meta in its header ({} without one).

    Raises:
        WeightsError: damaged, or a meta that is not JSON.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dictionary)
            header = file.metadata() or {}
        meta = json.loads(header.get("meta", "{}"))
    except (SafetensorError, ValueError) as error:
        raise WeightsError(_DAMAGED.format(_first_line(error))) from None
    if not isinstance(meta, dict):
        raise WeightsError(f"the meta in its header is {meta!r:.40}; expected a JSON object")
    return tensors, meta


def read_numpy(path: Path, kind: str) -> dict[str, np.ndarray]:
    """The arrays of a ``.npy`` or ``.npz`` file; nested dictionaries become ``"layer/parameter"``.

    Args:
        kind: ``"npy"`` or ``"npz"``.

    Raises:
        WeightsError: damaged, or a pickle of anything but dictionaries of numpy arrays.
    """
    found: dict[str, np.ndarray] = {}
    try:
        if kind == "npy":
            with open(path, "rb") as file:
                _flatten("", _read_npy(file), found)
        else:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    with archive.open(name) as file:
                        value = _read_npy(file)
                    _flatten("" if isinstance(value, dict) else name.removesuffix(".npy"), value, found)
    except WeightsError:
        raise
    except _BROKEN as error:
        raise WeightsError(_DAMAGED.format(_first_line(error))) from None
    return found


def _read_npy(file: IO[bytes]) -> Any:
    """One array of the .npy format (numpy/lib/format.py); an array of one pickled object gives the object."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the npy format")
    shape, fortran_order, dtype = readers[version](file)
    if not dtype.hasobject:
        values = np.frombuffer(file.read(), dtype)
        return values.reshape(shape, order="F" if fortran_order else "C")
    value = _ArrayUnpickler(file, encoding="latin1").load()  # strings of Python 2 are bytes, latin1 keeps them
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler for which numpy arrays, their dtypes and their scalars are the only classes there are."""

    _allowed = {  # noqa: RUF012 (a constant)
        ("multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("multiarray", "scalar"): np.float32(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        short = re.sub(r"^numpy\.(core|_core)\.multiarray$", "multiarray", module)
        if (short, name) not in self._allowed:
            raise WeightsError(f"its pickle holds {module}.{name}; only dictionaries of numpy arrays are read")
        return self._allowed[short, name]


def _flatten(prefix: str, value: Any, found: dict[str, np.ndarray]) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            _flatten(f"{prefix}/{key}" if prefix else str(key), entry, found)
    else:
        found[prefix] = np.asarray(value)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:120].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
