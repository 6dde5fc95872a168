"""Files that run code when they are unpickled: an unsafe reader runs it, the project's readers do not."""

import ast
import io
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from deeplab.weights import WeightsError, load_weights
from scripts.data.archive import unpack
from scripts.data.catalogue import Item
from tests.helpers import ROOT
from tests.helpers_legacy_tar import tar_torch
from utils.checkpoint import _is_snapshot, load_checkpoint
from utils.command import UserError
from utils.training.start import _step_of
from utils.training.validation import mean_iou_of


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def torch_file(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def tar_file(path, evil, member):
    path.write_bytes(tar_torch({"conv1.weight": torch.rand(3)}, **{member: pickle.dumps(evil, protocol=2)}))


def plain(path):
    """Unsafe loading, as torch did before 2.6, and longer for tar files."""
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            return pickle.load(archive.extractfile("pickle"))
    return torch.load(path, weights_only=False)


def checkpoint(evil):
    return {
        "model": {"conv1.weight": torch.rand(3)},
        "meta": evil,
        "optimizer": {},
        "scaler": {},
        "step": 1,
    }


FILES = {  # file name -> how it is made, how it is loaded unsafely, the project's readers of it
    "zip.pth": (lambda p, evil: torch_file(p, {"conv1.weight": evil}), plain, [load_weights]),
    "legacy.pth": (lambda p, evil: torch_file(p, {"conv1.weight": evil}, zipped=False), plain, [load_weights]),
    "list.pth": (lambda p, evil: torch_file(p, [torch.rand(2), evil]), plain, [load_weights]),
    "tar.pth": (lambda p, evil: tar_file(p, evil, "pickle"), plain, [load_weights]),
    "pickle.pth": (lambda p, evil: p.write_bytes(pickle.dumps(evil)), lambda p: pickle.loads(p.read_bytes()), [load_weights]),
    "a.npy": (
        lambda p, evil: np.save(p, np.array(evil, dtype=object)),
        lambda p: np.load(p, allow_pickle=True),
        [load_weights],
    ),
    "a.npz": (
        lambda p, evil: np.savez(p, conv1=np.array({"weights": evil}, dtype=object)),
        lambda p: np.load(p, allow_pickle=True)["conv1"],
        [load_weights],
    ),
    "last.ckpt": (lambda p, evil: torch_file(p, checkpoint(evil)), plain, [load_weights, load_checkpoint, mean_iou_of]),
    "legacy.ckpt": (
        lambda p, evil: torch_file(p, checkpoint(evil), zipped=False),
        plain,
        [load_weights, load_checkpoint, mean_iou_of],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_nothing_in_a_file_is_run(tmp_path, name):
    make, unsafe, readers = FILES[name]
    path, made = tmp_path / name, tmp_path / "made by the file"
    make(path, Evil(made))
    for read in readers:
        with pytest.raises((WeightsError, UserError), match=re.escape(str(path))):
            read(path)
    assert _step_of(path) == 0  # a checkpoint that cannot be read
    assert not _is_snapshot(path, 1)
    assert not made.exists()
    unsafe(path)
    assert made.exists()  # proves that the assertion above can fail


def tar_of(info, data=b""):
    info.size = len(data)
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as archive:
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def zip_of(name):
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        archive.writestr(name, "x")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.tgz", tar_of(tarfile.TarInfo("../made"), b"x")),
        ("a.tgz", tar_of(tarfile.TarInfo("in/../../../made"), b"x")),
        ("a.tgz", tar_of(link("link", "/etc"))),
        ("a.tgz", tar_of(link("link", "../../.."))),
        ("a.zip", zip_of("../made")),
        ("a.zip", zip_of("in/../../made")),
        ("a.zip", zip_of("C:\\made")),
    ],
    ids=["tgz-up", "tgz-through-a-folder", "tgz-link-to-etc", "tgz-link-up", "zip-up", "zip-through-a-folder", "zip-drive"],
)
def test_no_member_of_an_archive_is_written_outside_its_folder(tmp_path, name, data):
    place = tmp_path / "place"
    place.mkdir()
    (place / name).write_bytes(data)
    with pytest.raises(UserError, match="damaged or unsafe"):
        unpack(Item("x", name, "data", "", unpack="in", holds="in"), place)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert {str(path.relative_to(place)) for path in place.rglob("*")} == {name, "in"}


def test_the_code_has_no_unsafe_calls():
    """No eval, no shell, no unpickling, and torch.load only with weights_only=True."""
    loads = 0
    for path in sorted(ROOT.glob("*.py")) + [
        p for name in ("deeplab", "dataset", "utils", "scripts") for p in ROOT.glob(f"{name}/**/*.py")
    ]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name, options = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            where = f"{path}:{call.lineno}: {name}"
            assert name not in ("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "np.load"), where
            assert options.get("shell", "False") == "False", where
            assert options.get("allow_pickle", "False") == "False", where
            if name == "torch.load":
                loads += 1
                assert options.get("weights_only") == "True", where
    assert loads >= 4
