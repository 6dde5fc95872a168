"""From a file to the plain dictionary of arrays in it: torch, safetensors and numpy files.

Nothing in a file is ever run: torch files are read with ``weights_only=True``, old pickles by unpicklers that know tensors or
arrays and nothing else. Zip files (torch since 1.6, ``.npz``) hold a check sum for each member, and it is compared before they
are read. Torch files before 1.6, ``.npy``, safetensors and caffemodels hold none: damage to their numbers cannot be seen.
"""

import json
import mmap
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from deeplab.weights.kinds import PlainUnpickler, damaged, holds_objects, pickled_classes
from deeplab.weights.weights import WeightsError, some

_CHUNK = 1 << 20


def check_sums(path: str | Path) -> str:
    """Compare every member of a zip file with the CRC-32 that is stored with it; ``torch.load`` does not.

    Returns:
        "", or one sentence where a torch file was written without sums (``torch.serialization.set_crc32_options(False)``), so
        that none of them fits. A file that is no zip file has no sums: "".

    Raises:
        WeightsError: a member is damaged, or the archive is; without the path.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return ""
    try:
        with zipfile.ZipFile(path) as archive:
            entries, count = len(archive.infolist()), _counted(archive)
            if count not in (entries, 0xFFFF):  # which stands for 65,535 and more
                raise zipfile.BadZipFile(f"its directory has {entries} of {count} entries")
            members = [info for info in archive.infolist() if info.file_size]
            bad = [info.filename for info in members if not _sum_fits(archive, info)]
    except OSError:
        raise
    except Exception as error:
        raise WeightsError(damaged(error)) from None
    if len(bad) == len(members) and any(name.endswith("/data.pkl") for name in bad):
        return "it was written without check sums, so damage to it would not be noticed"
    if bad:
        raise WeightsError(f"it is damaged: {some(bad)} in it does not fit its check sum; fetch or copy it again")
    return ""


def _counted(archive: zipfile.ZipFile) -> int:
    """How many entries the end of a zip file says that its directory has; zipfile reads them as far as it can."""
    assert archive.fp is not None
    archive.fp.seek(archive.start_dir)
    return int.from_bytes(archive.fp.read().rpartition(b"PK\5\6")[2][6:8], "little")


def _sum_fits(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    if info.external_attr & 0x10:  # the mark of a folder: torch would leave the numbers as they lie in memory
        return False
    with archive.open(info) as member:
        try:
            while member.read(_CHUNK):
                pass
        except zipfile.BadZipFile:  # raised at the member's end
            return False
    return True


def read_torch(path: Path, old: bool) -> Any:
    """What ``torch.save`` wrote, on the CPU. Tensors of a file since PyTorch 1.6 are mapped, not read, until they are used.

    Raises:
        WeightsError: damaged, or a file with other things than tensors and plain values.
    """
    try:
        if old:
            with _mapped(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # many kinds, for files that are cut off or scrambled
        match = re.search(r"GLOBAL (\S+)", str(error))
        if match is None:
            raise WeightsError(damaged(error)) from None
        if any(name.startswith("torch.nn.modules.") for name in _classes(path, old)):
            raise WeightsError(
                f"it holds a whole net as a Python object ({match[1]}), and loading it would run foreign code; where you trust "
                "it, load it with the program that saved it and save the net's state_dict()"
            ) from None
        raise WeightsError(holds_objects(match[1])) from None


def _mapped(path: Path) -> mmap.mmap:
    """A file whose ``read(n)`` gives what there is; an open one makes place for n bytes first, however many that are."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _classes(path: Path, old: bool) -> list[str]:
    if old:
        with open(path, "rb") as file:
            for _ in range(3):  # the magic number, the version and the machine
                pickled_classes(file)
            return pickled_classes(file)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as member:
            return pickled_classes(member)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a ``.safetensors`` file, on the CPU, and the snapshot meta in its header ({} without one).

    Raises:
        WeightsError: damaged, or a meta that is not JSON.
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
    """The arrays of a ``.npy`` or ``.npz`` file, and whether they lay in nested dictionaries, ``{layer: {parameter: array}}``.

    Args:
        kind: ``"npy"`` or ``"npz"``.

    Returns:
        ``"layer/parameter"`` -> array, and True for nested dictionaries (as caffe-tensorflow's converter writes them).

    Raises:
        WeightsError: damaged, or a pickle of anything but dictionaries of numpy arrays.
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


class _ArrayUnpickler(PlainUnpickler):
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
