"""Read the arrays of torch, safetensors and numpy files into a plain dictionary, and name other kinds of files in errors.

No code in a file is ever run: torch files are read with ``weights_only=True``, old pickles by unpicklers that allow only
tensors or arrays. Zip files (torch since 1.6, ``.npz``) store a checksum for each member, which is compared before they are
read. Torch files before 1.6, ``.npy``, safetensors and caffemodels store none, so damage to their numbers is not noticed.
"""

import io
import json
import mmap
import pickle
import pickletools
import re
import tarfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from deeplab.weights.weights import WeightsError, some

_CHUNK = 1 << 20
_TABLE_MAGIC = bytes.fromhex("57fb808b247547db")  # the last bytes of a LevelDB table: TensorFlow's .ckpt (V1), .index (V2)
_TAR_TORCH = {"pickle", "storages", "tensors"}  # the members of a torch file before PyTorch 0.1.10, besides sys_info
_TENSORFLOW = (
    "it is a TensorFlow checkpoint, which only TensorFlow reads; give the .npy file it was made from, or save its variables "
    "there: r = tf.train.load_checkpoint(PATH); np.savez(OUT, **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})"
)
_PICKLE = (
    "it is a plain Python pickle{}, which is not read, since that could run foreign code; if you trust it, save its arrays as "
    "a state_dict with torch.save"
)
_UNPACK = "it is {} archive; unpack it and name the weights file in it"
_FIRST_BYTES = (  # a pattern for the first 1,024 bytes -> the kind of a readable file, or the sentence for another
    (rb"PK", "zip"),
    (rb"\x93NUMPY", "npy"),
    (rb".{,7}" + re.escape(bytes.fromhex("8a0a6cfc9c46f9206aa850192e")), "old torch"),  # the pickled magic number
    (rb".{3}[\0-\7]\0{4}\{", "safetensors"),  # the length of its header, and the header
    (rb".{257}ustar", "tar"),
    (rb"\x1f\x8b", _UNPACK.format("a gzip")),
    (rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", _UNPACK.format("a bzip2, xz, zstd, 7z or rar")),
    (rb"version https://git-lfs", "it is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository"),
    (rb"MATLAB [57]\.\d MAT-file", "it is a MATLAB file; save its arrays as a PyTorch state_dict"),
    (
        rb"\x89HDF\r\n\x1a\n",
        "it is an HDF5 file, from Keras or some builds of Caffe; save its weights as a PyTorch state_dict or, with Caffe, as a "
        "binary .caffemodel",
    ),
    (rb"GGUF", "it is a GGUF file, which holds language models"),
    (rb"%PDF", "it is a PDF document, not weights"),
    (rb"\x89PNG", "it is a PNG image, not weights"),
    (rb"\xff\xd8\xff", "it is a JPEG image, not weights"),
    (rb"[\xef\xbb\xbf \t\r\n]*<", "it is a web page, not weights (Google Drive may send one); fetch the file in a browser"),
    (rb"\x80[\2-\5].*torch", _PICKLE.format(", perhaps a whole model")),
    (rb"\x80[\2-\5]", _PICKLE.format("")),
    (rb'(?=.*\n).*"weight_map"', "it is the index of a safetensors file in several parts; save them as one file"),
    (rb"\x08.*(onnx|pytorch)", "it is an ONNX graph, not a state_dict; save the state_dict() of the original net"),
)
_ZIP_MEMBERS = (  # a pattern for the name of one member -> the kind, or the sentence
    (r"(^|/)(archive_format|serialized_exported_program\.json)$", "it is a program of torch.export, not a state_dict"),
    (r"(^|/)(code/|constants\.pkl$|model\.json$)", "it is a TorchScript program; save torch.jit.load(PATH).state_dict()"),
    (r"(^|/)\.data/extern_modules$", "it is a torch.package archive, which holds code; save the state_dict() of its net"),
    (r"^model\.weights\.h5$", "it is a Keras model; save its weights as a PyTorch state_dict"),
    (r"/data\.pkl$", "torch"),
)


def file_kind(path: Path) -> str:
    """``"torch"``, ``"old torch"`` (before 1.6), ``"tar torch"`` (before 0.1.10), ``"safetensors"``, ``"npy"``, ``"npz"`` or
    ``"caffe"``: by the first bytes, not by the name.

    Raises:
        WeightsError: another kind of file; the message names it if it is known.
    """
    if Path(f"{path}.index").is_file() or re.search(r"\.data-\d+-of-\d+$", path.name):
        raise WeightsError(_TENSORFLOW)
    if not path.exists():
        raise WeightsError("there is no such file; `python scripts/download.py list` lists what can be fetched")
    if path.suffix == ".distcp" or (path.is_dir() and (path / ".metadata").is_file()):
        folder = path if path.is_dir() else path.parent
        raise WeightsError(
            "it is a checkpoint of torch.distributed in several files; convert it to one file: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pth"
        )
    if (part := re.search(r"-(\d{5})-of-(\d{5})\.(safetensors|bin|pth?)$", path.name)) and int(part[2]) > 1:
        raise WeightsError(
            f"it is part {int(part[1])} of {int(part[2])} of a file that was saved in parts; load all parts with the program "
            "that saved them and save them as one file"
        )
    if path.is_dir():
        raise WeightsError("it is a folder; name the weights file in it")
    if not path.is_file():
        raise WeightsError("it is a device or a pipe, not a file; copy the weights into a file first")
    with open(path, "rb") as file:
        head = file.read(1024)
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read()
    if not head.strip(b"\0"):
        raise WeightsError(f"it {'begins with nothing but zeros' if size else 'is empty'}; fetch or copy it again")
    what = next((what for pattern, what in _FIRST_BYTES if re.match(pattern, head, re.DOTALL)), "")
    if what in ("zip", "tar"):
        return _archive_kind(path, what)
    if what in ("npy", "old torch", "safetensors"):
        return what
    if what:
        raise WeightsError(what)
    if path.suffix == ".caffemodel":  # a caffemodel has no signature
        return "caffe"
    if tail == _TABLE_MAGIC:
        raise WeightsError(_TENSORFLOW)
    start = head[:12].decode("ascii", "backslashreplace").encode("unicode_escape").decode()
    text = "a text file, not weights" if re.fullmatch(rb"[\t\r\n -~]+", head) else "no known kind of weights file"
    expected = "expected a .pth, .safetensors, .caffemodel, .npy or .npz file"
    raise WeightsError(f"it is {text} (it has {size} bytes and begins with {start!r}); {expected}")


def _archive_kind(path: Path, kind: str) -> str:
    """:func:`file_kind` of a ``"zip"`` or ``"tar"``, by the names of its members."""
    try:
        if kind == "zip":
            with zipfile.ZipFile(path) as package:
                names = package.namelist()
        else:
            with tarfile.open(path, "r:") as archive:
                names = archive.getnames()
    except Exception as error:
        if str(error) == "File is not a zip file" and _starts_as_torch(path):  # no directory at the end
            raise WeightsError(
                "it is a torch file whose end is missing: torch.save, or a copy, broke off; save, fetch or copy it again"
            ) from None
        raise WeightsError(damaged(error)) from None
    if kind == "zip":
        what = next((what for pattern, what in _ZIP_MEMBERS if any(re.search(pattern, name) for name in names)), "")
        if what == "torch":
            return what
        if what:
            raise WeightsError(what)
        if names and all(name.endswith(".npy") for name in names):
            return "npz"
    elif set(names) >= _TAR_TORCH:
        return "tar torch"
    elif "sys_info" in names:
        lost = ", ".join(sorted(_TAR_TORCH - set(names)))
        raise WeightsError(f"it is a torch file from before PyTorch 0.1.10 that is cut off (no {lost}); fetch it again")
    raise WeightsError(_UNPACK.format(f"a {kind}").replace(" archive;", f" archive ({some(names)});"))


def _starts_as_torch(path: Path) -> bool:
    """Whether a zip file, which may be cut off, begins with the first member of a torch file."""
    with open(path, "rb") as file:
        return re.match(rb"PK.{28}[^/]+/data\.pkl", file.read(300), re.DOTALL) is not None


def check_sums(path: str | Path) -> str:
    """Compare every member of a zip file with its stored CRC-32, which ``torch.load`` does not do.

    Returns:
        "", also for a file that is not a zip file and so has no checksums; or one sentence if a torch file was written without
        them (``torch.serialization.set_crc32_options(False)``), so that none is right.

    Raises:
        WeightsError: the archive or a member is damaged; the message does not name the path.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return ""
    try:
        with zipfile.ZipFile(path) as archive:
            assert archive.fp is not None
            archive.fp.seek(archive.start_dir)  # zipfile reads as many entries as it can; the end of the directory counts them
            entries, count = len(archive.infolist()), int.from_bytes(archive.fp.read().rpartition(b"PK\5\6")[2][6:8], "little")
            if count not in (entries, 0xFFFF):  # 0xFFFF: 65,535 or more
                raise zipfile.BadZipFile(f"its directory has {entries} of {count} entries")
            members = [info for info in archive.infolist() if info.file_size]
            bad = [info.filename for info in members if not _sum_fits(archive, info)]
    except OSError:
        raise
    except Exception as error:
        raise WeightsError(damaged(error)) from None
    if len(bad) == len(members) and any(name.endswith("/data.pkl") for name in bad):
        return "it was written without checksums, so damage to it would not be noticed"
    if bad:
        raise WeightsError(f"it is damaged: {some(bad)} in it does not match its checksum; fetch or copy it again")
    return ""


def _sum_fits(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    if info.external_attr & 0x10:  # the flag of a folder: torch would leave the numbers uninitialised
        return False
    with archive.open(info) as member:
        try:
            while member.read(_CHUNK):
                pass
        except zipfile.BadZipFile:  # raised at the member's end
            return False
    return True


def read_torch(path: Path, old: bool) -> Any:
    """The object that ``torch.save`` wrote, on the CPU. Since PyTorch 1.6, tensors are mapped and only read when used.

    Raises:
        WeightsError: the file is damaged, or holds anything but tensors and plain values.
    """
    try:
        if old:
            with _mapped(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # files that are cut off or scrambled raise many kinds
        match = re.search(r"GLOBAL (\S+)", str(error))
        if match is None:
            raise WeightsError(damaged(error)) from None
        if any(name.startswith("torch.nn.modules.") for name in _pickled_classes(path, old)):
            raise WeightsError(
                f"it holds a whole net as a Python object ({match[1]}), and loading it would run foreign code; if you trust "
                "it, load it with the program that saved it and save the state_dict() of the net"
            ) from None
        raise WeightsError(holds_objects(match[1])) from None


def _mapped(path: Path) -> mmap.mmap:
    """The file as a memory map: its ``read(n)`` does not allocate n bytes first, and n may be wrong in a damaged file."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _pickled_classes(path: Path, old: bool) -> list[str]:
    """The classes and functions named in a torch file, as ``module.name``; [] if it is damaged. Nothing is run."""
    try:
        if old:
            pickles: Any = _mapped(path)
            for _ in range(3):  # skip the magic number, the version and the machine
                list(pickletools.genops(pickles))
        else:
            with zipfile.ZipFile(path) as archive:
                pickles = archive.open(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
        return [str(value).replace(" ", ".") for opcode, value, _ in pickletools.genops(pickles) if opcode.name == "GLOBAL"]
    except Exception:
        return []


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a ``.safetensors`` file, on the CPU, and the snapshot meta in its header ({} without one).

    Raises:
        WeightsError: the file is damaged, or its meta is not JSON.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dictionary)
            header = file.metadata() or {}
        meta = json.loads(header.get("meta", "{}"))
    except OSError:
        raise
    except Exception as error:
        raise WeightsError(damaged(error)) from None
    if not isinstance(meta, dict):
        raise WeightsError(f"the meta in its header is {meta!r:.40}; expected a JSON object")
    return tensors, meta


def read_numpy(path: Path, kind: str) -> tuple[dict[str, np.ndarray], bool]:
    """The arrays of a ``.npy`` or ``.npz`` file, and whether they were in nested dictionaries, ``{layer: {parameter: array}}``.

    Args:
        kind: ``"npy"`` or ``"npz"``.

    Returns:
        ``"layer/parameter"`` -> array, and True for nested dictionaries (as caffe-tensorflow's converter writes them).

    Raises:
        WeightsError: the file is damaged, or a pickle of anything but dictionaries of numpy arrays.
    """
    found: dict[str, np.ndarray] = {}
    values = {}
    try:
        if kind == "npy":
            with _mapped(path) as file:
                values[""] = _read_npy(file)
        else:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    with archive.open(name) as member:
                        values[name.removesuffix(".npy")] = _read_npy(member)
        dictionaries = [value for value in values.values() if isinstance(value, dict)]
        for name, value in values.items():
            _flatten("" if isinstance(value, dict) else name, value, found)
    except (WeightsError, OSError):
        raise
    except Exception as error:
        raise WeightsError(damaged(error)) from None
    return found, any(isinstance(entry, dict) for value in dictionaries for entry in value.values())


def _read_npy(file: IO[bytes] | mmap.mmap) -> Any:
    """One array in the .npy format (numpy/lib/format.py), or the object in an array of one pickled object."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the npy format")
    shape, fortran_order, dtype = readers[version](file)
    if not dtype.hasobject:
        values = np.frombuffer(file.read(), dtype)
        return values.reshape(shape, order="F" if fortran_order else "C")
    value = _ArrayUnpickler(file, encoding="latin1").load()  # strings of Python 2 are bytes; latin1 keeps them
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value


class PlainUnpickler(pickle._Unpickler):
    """The unpickler in Python: the one in C allocates as much as a number in the file says, tens of GB if that is damaged.

    It refuses bytearrays, for which the one in Python does the same; no weights file holds any.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}  # noqa: RUF012


class _ArrayUnpickler(PlainUnpickler):
    """An unpickler that allows only numpy arrays, dtypes and scalars."""

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


def damaged(error: Exception) -> str:
    """The sentence for a file that could not be read because of ``error``."""
    text = str(error).strip().split("\n")[0][:120].rstrip(".")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"it is cut off or damaged ({text}); fetch or copy it again"


def holds_objects(name: str) -> str:
    """The sentence for a pickle that holds more than tensors and plain values; ``name`` is the class of the first object."""
    return (
        f"it holds Python objects ({name}) besides tensors, and loading them could run foreign code; "
        "if you trust it, load it yourself and save only its state_dict()"
    )
