"""The labels of COCO-Stuff 10k: all .mat files become PNGs, or none."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from dataset import DatasetError, voc_palette
from scripts import prepare_cocostuff
from tests.helpers_cocostuff import IDS_10K, SIZE, make_10k, make_164k
from utils.command import UserError

IDS = (*IDS_10K["train"], *IDS_10K["test"])


def prepare(root, workers="0") -> int:
    return prepare_cocostuff.main(["--data-dir", str(root), "--workers", workers])


def files(root) -> dict:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("dtype", "workers"), [(np.uint16, "0"), (np.uint8, "1"), (np.float64, "0")])
def test_labels_are_one_less(tmp_path, dtype, workers, capsys):
    """Class k is stored as k + 1, and 0 is unlabelled."""
    root = make_10k(tmp_path / "ten", dtype)
    values = np.resize([0, 1, 2, 92, 182], SIZE)
    savemat(root / f"annotations/{IDS[0]}.mat", {"S": values.astype(dtype)})
    assert prepare(root, workers) == 0
    for id in IDS:
        stored = loadmat(root / f"annotations/{id}.mat")["S"].astype(int)
        assert (np.array(Image.open(root / f"annotations_png/{id}.png")) == np.where(stored == 0, 255, stored - 1)).all()
    png = Image.open(root / f"annotations_png/{IDS[0]}.png")
    assert np.array(png)[0, :5].tolist() == [255, 0, 1, 91, 181]
    assert png.getpalette() == voc_palette().ravel().tolist()
    captured = capsys.readouterr()
    assert "3 labels written" in captured.out
    assert "warped to 513x513" in captured.out
    assert "train.txt names 2 images, expected 9000 as published" in captured.err


def test_a_second_run_changes_nothing(tmp_path, capsys):
    root = make_10k(tmp_path / "ten")
    (root / ".annotations_png.tmp").mkdir()  # left by a run that was killed
    (root / ".annotations_png.tmp/x.png").write_bytes(b"half")
    assert prepare(root) == 0
    before = files(root)
    assert len(before) == 3 + 3 + 3 + 3
    assert prepare(root) == 0
    assert "3 labels already there" in capsys.readouterr().out
    assert files(root) == before
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(root / f"annotations_png/{IDS[1]}.png")
    (root / f"annotations_png/{IDS[2]}.png").unlink()
    before = files(root)
    with pytest.raises(UserError, match=r"2 of 3 labels cannot be used, see above; move .*annotations_png away"):
        prepare(root)
    assert files(root) == before
    errors = capsys.readouterr().err
    assert f"{IDS[1]}.png differs from" in errors
    assert f"{IDS[2]}.png does not exist" in errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"S": np.full(SIZE, 183, np.uint8)}, r"holds 183; expected 0\.\.182 in S"),
        ({"S": np.full(SIZE, 0.5)}, r"holds 0\.5; expected"),
        ({"S": np.full(SIZE, -1, np.int16)}, r"holds -1; expected"),
        ({"S": np.ones((8, 9), np.uint8)}, "is 9x8 pixels, its image 32x24"),
        ({"S": np.ones((*SIZE, 3), np.uint8)}, r"is an array \(24, 32, 3\)"),
        ({"S": np.array(["a"], dtype=object)}, "holds S of type object"),
        ({"S": np.ones(SIZE, np.uint8), "names": np.array(["x"] * 172, dtype=object)}, "is of version 1.0, whose classes"),
        ({"LabelMap": np.ones(SIZE, np.uint8)}, "holds LabelMap, expected S, as in version 1.1"),
        (b"MATLAB 7.3 MAT-file", "is not a readable MATLAB file"),
        (None, r"\.mat does not exist"),
    ],
)
def test_a_bad_file_leaves_nothing_behind(tmp_path, content, message, capsys):
    root = make_10k(tmp_path / "ten")
    path = root / f"annotations/{IDS[1]}.mat"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        savemat(path, content)
    before = files(root)
    with pytest.raises(UserError, match="1 of 3 labels cannot be used, see above; nothing was written"):
        prepare(root)
    assert re.search(message, capsys.readouterr().err)
    assert files(root) == before
    assert sorted(path.name for path in root.iterdir()) == ["annotations", "imageLists", "images"]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"needs no preparation: .* --dataset cocostuff"):
        prepare(make_164k(tmp_path / "coco"))
    with pytest.raises(DatasetError, match=r"images does not exist; expected COCO-Stuff's 10k, .*download\.py cocostuff10k"):
        prepare(tmp_path / "nowhere")
    root = make_10k(tmp_path / "ten")
    (root / "imageLists/test.txt").write_text(f"{IDS[0]}\n")
    with pytest.raises(DatasetError, match=r"names 2 ids in train\.txt, 1 in test\.txt, 1 in both and 3 in all\.txt; expected"):
        prepare(root)
    shutil.rmtree(root / "annotations")
    with pytest.raises(DatasetError, match="annotations does not exist"):
        prepare(root)
