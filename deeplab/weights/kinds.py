"""What a file is, told by its first bytes and not by its name: a kind that is read here, or words for what else it is."""

import io
import pickle
import pickletools
import re
import tarfile
import zipfile
from pathlib import Path
from typing import IO

from deeplab.weights.weights import WeightsError, some

_TORCH_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the pickled magic number before PyTorch 1.6
_TABLE_MAGIC = bytes.fromhex("57fb808b247547db")  # ends a LevelDB table: TensorFlow's .ckpt (V1) and .index (V2) files
_TAR_TORCH = {"pickle", "storages", "tensors"}  # the members of a torch file before PyTorch 0.1.10, beside sys_info
_TENSORFLOW = (
    "it is a TensorFlow checkpoint, which only TensorFlow reads; give the .npy file it was made from, or save its variables "
    "there: r = tf.train.load_checkpoint(PATH); np.savez(OUT, **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})"
)
_UNPACK = "{} archive; unpack it and name the weights file in it"
_STARTS = {  # first bytes -> what the file is and what to do
    b"\x1f\x8b": _UNPACK.format("a gzip"),
    b"BZh": _UNPACK.format("a bzip2"),
    b"\xfd7zXZ": _UNPACK.format("an xz"),
    b"\x28\xb5\x2f\xfd": _UNPACK.format("a zstd"),
    b"7z\xbc\xaf": _UNPACK.format("a 7z"),
    b"Rar!": _UNPACK.format("a rar"),
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run `git lfs pull` where it came from",
    b"MATLAB 5.0 MAT-file": "a MATLAB file; save its arrays as a PyTorch state_dict",
    b"MATLAB 7.3 MAT-file": "a MATLAB file (7.3, HDF5); save its arrays as a PyTorch state_dict",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras and some Caffe builds write; save its weights as a PyTorch state_dict or, "
    "with Caffe, as a binary .caffemodel",
    b"GGUF": "a GGUF file, which holds language models",
    b"%PDF": "a PDF document, not weights",
    b"\x89PNG": "a PNG picture, not weights",
    b"\xff\xd8\xff": "a JPEG picture, not weights",
}
_ZIP_MEMBERS = (  # a pattern that some member's name matches -> what the archive is and what to do
    (r"(^|/)(archive_format|serialized_exported_program\.json)$", "a program of torch.export, not a state_dict"),
    (
        r"(^|/)(code/|constants\.pkl$|model\.json$)",
        "a TorchScript program, not a state_dict; save torch.jit.load(PATH).state_dict()",
    ),
    (r"(^|/)\.data/extern_modules$", "a torch.package archive, which holds code; save the net's state_dict() from it"),
    (r"^model\.weights\.h5$", "a Keras model; save its weights as a PyTorch state_dict"),
)


def file_kind(path: Path) -> str:
    """``"torch"``, ``"old torch"`` (before 1.6), ``"tar torch"`` (before 0.1.10), ``"safetensors"``, ``"npy"``, ``"npz"`` or
    ``"caffe"``.

    Raises:
        WeightsError: the file is none of them; the message says what it is, as far as that can be seen.
    """
    if Path(f"{path}.index").is_file() or re.search(r"\.data-\d+-of-\d+$", path.name):
        raise WeightsError(_TENSORFLOW)
    if not path.exists():
        raise WeightsError("there is no such file; `python scripts/download.py list` shows what can be fetched")
    if path.is_dir():
        raise WeightsError("it is a folder; name the weights file in it")
    if not path.is_file():
        raise WeightsError("it is a device or a pipe, no file; copy the weights into a file first")
    with open(path, "rb") as file:
        head = file.read(1024)
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read()
    if not head.strip(b"\0"):
        raise WeightsError(f"it {'begins with nothing but zeros' if size else 'is empty'}; fetch or copy it again")
    if what := next((what for start, what in _STARTS.items() if head.startswith(start)), None):
        raise WeightsError(f"it is {what}")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise WeightsError(
            "it is a web page, not weights: the server (Google Drive does so) answered with a page; fetch it in a browser"
        )
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if _TORCH_MAGIC in head[:20]:
        return "old torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        return "safetensors"
    if head[257:262] == b"ustar":
        return _tar_kind(path)
    if path.suffix == ".caffemodel":  # no first bytes of its own
        return "caffe"
    if tail == _TABLE_MAGIC:
        raise WeightsError(_TENSORFLOW)
    raise WeightsError(_in_words(head, size))


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:
        raise WeightsError(damaged(error)) from None
    for pattern, what in _ZIP_MEMBERS:
        if any(re.search(pattern, name) for name in names):
            raise WeightsError(f"it is {what}")
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise WeightsError(f"it is a zip archive ({some(names)}); unpack it and name the weights file in it")


def _tar_kind(path: Path) -> str:
    try:
        with tarfile.open(path, "r:") as archive:
            names = archive.getnames()
    except Exception as error:
        raise WeightsError(damaged(error)) from None
    if set(names) >= _TAR_TORCH:
        return "tar torch"
    if "sys_info" in names:
        lost = ", ".join(sorted(_TAR_TORCH - set(names)))
        raise WeightsError(f"it is a torch file of before PyTorch 0.1.10 that is cut off (no {lost}); fetch it again")
    raise WeightsError(f"it is a tar archive ({some(names)}); unpack it and name the weights file in it")


def _in_words(head: bytes, size: int) -> str:
    """What a file without any known start may be."""
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        made_by = ", a whole model perhaps" if b"torch" in head else ""
        return (
            f"it is a plain Python pickle{made_by}, which is not read, since reading it could run foreign code; where you "
            "trust it, read it yourself and save its arrays as a state_dict with torch.save"
        )
    if b"\n" in head and b'"weight_map"' in head:
        return "it is the index of a safetensors file in several parts; save them as one file"
    if head[:1] == b"\x08" and (b"onnx" in head or b"pytorch" in head):
        return "it is an ONNX graph, not a state_dict; save the state_dict() of the net that it was exported from"
    start = head[:12].decode("ascii", "backslashreplace").encode("unicode_escape").decode()
    text = "a text file, no weights" if re.fullmatch(rb"[\t\r\n -~]+", head) else "no weights file that is known here"
    return (
        f"it is {text} (it has {size} bytes and begins with {start!r}); "
        "expected a .pth, .safetensors, .caffemodel, .npy or .npz file"
    )


class PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler: the one in C allocates as many places as a number in the file says, tens of GB where that is
    damaged. It knows no bytearray, for which Python's does the same, and which no weights file holds.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}  # noqa: RUF012


def pickled_classes(file: IO[bytes]) -> list[str]:
    """The classes and functions that a pickle of torch's (protocol 2) names, ``module.name`` each; runs nothing.

    [] where it is damaged.
    """
    try:
        return [str(value).replace(" ", ".") for opcode, value, _ in pickletools.genops(file) if opcode.name == "GLOBAL"]
    except Exception:
        return []


def damaged(error: Exception) -> str:
    """The sentence for a file that its reader gave up on."""
    text = str(error).strip().split("\n")[0][:120].rstrip(".")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"it is cut off or damaged ({text}); fetch or copy it again"


def holds_objects(name: str) -> str:
    """The sentence for a pickle with other things than tensors and plain values: ``name`` is the first of them."""
    return (
        f"it holds Python objects ({name}) beside tensors, and loading them could run foreign code; "
        "where you trust it, load it yourself and save only its state_dict()"
    )
