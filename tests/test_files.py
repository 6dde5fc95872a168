"""Outputs never overwrite the user's files, under other names, links or folders; files are written completely or not at all."""

import gzip
import io
import json
import os
import re
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset import CityscapesSegmentation, VOCSegmentation
from scripts.predict import write_probabilities
from utils import files, outputs
from utils.command import UserError
from utils.evaluation.images import NamedImage
from utils.evaluation.submission import pack
from utils.evaluation.video import VideoFile
from utils.files import remove_torn, remove_torn_files, save_json, write_atomically
from utils.outputs import OUTPUT_MARK, Output, check_outputs
from utils.training.lock import FolderLock
from utils.training.log import RunLog
from utils.visualize import PALETTE, Classes, indexed_png, save_image, save_panel, save_prediction


def out(folder: Path, *names: str, option: str = "--save-dir") -> list[Output]:
    return [Output(option, folder, name, f"the mask of {name} by {option}") for name in names]


def test_good_outputs_create_their_folders_and_may_exist(tmp_path):
    """Outputs of an earlier run are overwritten; the real functions write them here."""
    (tmp_path / "data").mkdir()
    mask = np.zeros((3, 4), dtype=np.uint8)
    save_prediction(tmp_path / "old/a.png", mask)
    classes = Classes(["a", "b"], PALETTE)
    save_panel(tmp_path / "old/p.png", np.zeros((3, 4, 3), dtype=np.uint8), mask, mask, classes)
    save_json(tmp_path / "old/scores.json", {"made_by": OUTPUT_MARK, "restore_from": "net.pth"})
    outputs = out(tmp_path / "old", "a.png", "p.png", "scores.json", "b.png")
    outputs += out(tmp_path / "new/deep", "city/a.png", option="--save-panels")
    before = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    check_outputs(outputs + outputs[:1], [tmp_path / "missing.jpg"], [tmp_path / "data"])
    assert (tmp_path / "new/deep/city").is_dir()
    assert {path: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n somebody's photo or label"),
        ("a.jpg", b"\xff\xd8\xff\xe0 a photo"),
        ("film.mp4", b"\0\0\0\x1cftypisom a film"),
        ("a.npz", b"PK\3\4 somebody's arrays"),
        ("index.html", b"<!doctype html><p>a page on DeepLab-ResNet prediction</p>"),
        ("test.tgz", b"\x1f\x8b\x08\0 somebody's archive"),
        ("scores.json", b'{"restore_from": "as versions before have it"}'),
        ("scores.json", b'{"runs": [{"made_by": "DeepLab-ResNet prediction"}]}'),
        ("empty.json", b""),
        ("last.ckpt", b"PK a run's only optimiser state"),
        ("train.txt", b"2007_000032\n"),
        ("scores.json", b'{"mine": 1}'),
        ("scores.json", b"[1, 2]"),
        ("classes", b"sky\n"),
    ],
)
def test_a_file_of_another_program_is_not_overwritten(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}, over a file that is no earlier output"):
        check_outputs(out(tmp_path, name), [])
    assert (tmp_path / name).read_bytes() == content


def write_each_kind(folder: Path) -> list[Path]:
    """One file of each kind that the commands write with these functions; tests of the commands write the others."""
    pixels = np.full((34, 48, 3), 90, np.uint8)
    sample = NamedImage("a", pixels)
    sample.logits = torch.zeros(2, 5, 6)
    save_prediction(folder / "a.png", pixels[..., 0])
    save_image(folder / "b.png", pixels)
    save_image(folder / "a.jpg", pixels)
    write_probabilities(folder / "a.npz", sample, ["x", "y"], 8)
    with VideoFile(folder / "a.mp4", 5.0) as film:
        film.write(pixels)
    grey = io.BytesIO()
    Image.fromarray(np.full((34, 48), 7, np.uint8)).save(grey, "PNG")
    pack(folder / "a.tgz", {"a": indexed_png(pixels[..., 0] * 0)}, {"a": folder / "a.jpg"}, VOCSegmentation.SERVER)
    pack(folder / "a.zip", {"a": grey.getvalue()}, {"a": folder / "a.jpg"}, CityscapesSegmentation.SERVER)
    save_json(folder / "a.json", {"made_by": OUTPUT_MARK, "a": 1})
    return sorted(folder.iterdir())


def test_each_kind_has_the_mark_where_other_programs_read_it(tmp_path):
    written = write_each_kind(tmp_path)
    assert len(written) == 8
    assert all(map(outputs.is_output, written))
    with Image.open(tmp_path / "a.png") as mask, Image.open(tmp_path / "a.jpg") as photo:
        assert mask.info["Software"] == OUTPUT_MARK
        assert photo.info["comment"] == OUTPUT_MARK.encode()
        assert np.abs(np.asarray(photo).astype(int) - 90).max() <= 1
    for name in ("a.npz", "a.zip"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert archive.comment == OUTPUT_MARK.encode()
            assert archive.testzip() is None
    assert np.load(tmp_path / "a.npz")["probabilities"].shape == (2, 34, 48)
    with tarfile.open(tmp_path / "a.tgz") as archive:
        assert archive.getnames() == ["results/VOC2012/Segmentation/comp6_test_cls/a.png"]
    data = (tmp_path / "a.tgz").read_bytes()
    assert data[3] == 16  # only FCOMMENT (RFC 1952)
    assert data[10 : data.index(b"\0", 10)] == OUTPUT_MARK.encode()
    film = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert [film.read()[0], film.read()[0]] == [True, False]
    data, boxes = (tmp_path / "a.mp4").read_bytes(), []
    while data:
        size = int.from_bytes(data[:4], "big")
        boxes.append((data[4:8], data[8:size]))
        data = data[size:]
    assert boxes[-1] == (b"free", OUTPUT_MARK.encode())
    assert json.loads((tmp_path / "a.json").read_text())["made_by"] == OUTPUT_MARK


def test_a_file_that_contains_an_output_is_not_an_output(tmp_path):
    """The user's files with outputs inside, and outputs that other programs saved again without the mark."""
    ours, mine = tmp_path / "ours", tmp_path / "mine"
    mine.mkdir()
    written = write_each_kind(ours)
    with zipfile.ZipFile(mine / "a.zip", "w") as archive:
        for path in written:
            archive.write(path, path.name)
    with tarfile.open(mine / "a.tgz", "w:gz") as archive:
        archive.add(ours, "ours")
    (mine / "b.gz").write_bytes(gzip.compress((ours / "a.tgz").read_bytes()))
    np.savez(mine / "a.npz", **np.load(ours / "a.npz"))
    for name in ("a.png", "a.jpg"):
        Image.open(ours / name).convert("RGB").save(mine / name, **({"comment": b"mine"} if name == "a.jpg" else {}))
    (mine / "a.mp4").write_bytes((ours / "a.mp4").read_bytes() + b"\0\0\0\x0cfreemine")
    (mine / "a.json").write_text(json.dumps([json.loads((ours / "a.json").read_text())]))
    (mine / "list.html").write_bytes(
        b"<!doctype html>" + b" " * 5000 + b'<meta name="generator" content="DeepLab-ResNet prediction">'
    )
    found = sorted(mine.iterdir())
    assert len(found) == 9
    assert not any(map(outputs.is_output, found))
    os.mkfifo(mine / "pipe.json")  # reading it would block
    assert not outputs.is_output(mine / "pipe.json")


def test_a_dangling_link_belongs_to_the_user(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "an unmounted disk/a.png")
    with pytest.raises(UserError, match="no earlier output"):
        check_outputs(out(tmp_path, "a.png"), [])


@pytest.mark.parametrize("name", ["a.png", "x" * 251 + ".png", "ü" * 125 + ".jpg", "a.mp4", ".hidden", "no suffix"])
def test_temporary_names(tmp_path, name):
    """Hidden, at most 255 bytes, always different, and recognised for removal, like those of earlier versions."""
    seen = []

    def write(file):
        file.write(b"whole")
        seen.append(Path(file.name).name)

    for _ in range(2):
        write_atomically(tmp_path / name, write)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    first, second = seen
    assert first != second
    assert all(re.fullmatch(r"\..+\.[0-9a-f]{8}\.[0-9a-f]{8}\.tmp", text) and len(text.encode()) <= 143 for text in seen)
    torn = [tmp_path / first, tmp_path / second] + [tmp_path / f".{name}.77.tmp"] * (len(name.encode()) < 200)
    if name == "a.mp4":
        torn += [files.temporary_beside(tmp_path / name, ".mp4"), tmp_path / ".a.77.tmp.mp4"]
    kept = [files.temporary_beside(tmp_path / f"y{name[1:]}"), tmp_path / ".mine.tmp", tmp_path / "mine.tmp"]
    for path in (*torn, *kept):
        path.touch()
    remove_torn_files([tmp_path / name])
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / name, *kept])
    for path in torn:
        path.touch()
    remove_torn(tmp_path, lambda found: name.endswith(found) or found == name.removesuffix(".mp4"))
    assert not [path for path in torn if path.exists()]


def test_a_temporary_file_is_opened_through_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 8)
    (tmp_path / "mine").write_text("mine")
    for suffix in ("", ".mp4"):
        files.temporary_beside(tmp_path / "a.mp4", suffix).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path / "a.mp4", lambda file: file.write(b"theirs"))
    with pytest.raises(UserError, match="cannot be written"), VideoFile(tmp_path / "a.mp4", 5.0) as film:
        film.write(np.zeros((32, 32, 3), np.uint8))
    assert (tmp_path / "mine").read_text() == "mine"


def test_names_that_are_too_long_are_refused_before_any_work(tmp_path):
    for name in ("x" * 252 + ".png", "x" * 300 + "/a.png", "deep/" * 900 + "a.png"):
        with pytest.raises(UserError, match="File name too long"):
            check_outputs(out(tmp_path / "new", name), [tmp_path / ("y" * 300)], [tmp_path / ("z" * 300)])
    with pytest.raises(UserError, match=r"cannot be written .*shorter name"):
        write_atomically(tmp_path / ("x" * 256), lambda file: None)


def test_nothing_is_written_to_folders_in_the_data(tmp_path):
    (tmp_path / "SegmentationClassAug/val").mkdir(parents=True)
    for folder in ("SegmentationClassAug/new", "SegmentationClassAug/val"):
        with pytest.raises(UserError, match=r"among the data of .*SegmentationClassAug"):
            check_outputs(out(tmp_path / folder, "a.png"), [], [tmp_path / "SegmentationClassAug"])


def test_an_output_that_is_an_input_is_refused_under_any_name(tmp_path):
    source = tmp_path / "pics" / "a.png"
    source.parent.mkdir()
    source.write_text("a photo")
    (tmp_path / "link").symlink_to(source.parent, target_is_directory=True)
    (tmp_path / "other").mkdir()
    os.link(source, tmp_path / "other/hard.png")
    (tmp_path / "other/soft.png").symlink_to(source)
    places = [(source.parent, "a.png"), (tmp_path / "link", "a.png"), (tmp_path / "pics/../pics", "a.png")]
    places += [(tmp_path / "other", "hard.png"), (tmp_path / "other", "soft.png")]
    for folder, name in places:
        with pytest.raises(UserError, match=rf"--save-dir: the mask of {name}.* over .*a\.png, which is read"):
            check_outputs(out(folder, "fine.png", name), [source])
    with pytest.raises(UserError, match="which is read"):
        check_outputs(out(source.parent, "a.png"), [Path(os.path.relpath(source))])
    assert source.read_text() == "a photo"


def test_nothing_is_written_among_the_data(tmp_path):
    (tmp_path / "labels/city").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "labels")
    missing = tmp_path / "SegmentationClassAug"  # if it existed, the next run would read it
    for folder in (tmp_path / "labels", tmp_path / "link", missing, tmp_path / "labels/../labels"):
        with pytest.raises(UserError, match=r"among the data of .*; choose a folder of its own"):
            check_outputs(out(folder, "new.png", "city/new.png"), [], [tmp_path / "labels", missing])
    assert not missing.exists()


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/elsewhere/a.png", "away/a.png"])
def test_nothing_leaves_the_folder(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/away").symlink_to(tmp_path / "elsewhere")
    name = name.replace("/elsewhere", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"--save-dir: the mask of .* outside .*out"):
        check_outputs(out(tmp_path / "out", name), [])
    assert not list((tmp_path / "elsewhere").iterdir())


def test_two_outputs_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    panels = out(tmp_path / "link", "a.png", option="--save-panels")
    with pytest.raises(UserError, match=r"\(--save-dir\) and .* \(--save-panels\) would both be written to .*a\.png"):
        check_outputs(out(tmp_path, "a.png") + panels, [])
    check_outputs(out(tmp_path, "a.png", "A.png"), [])
    monkeypatch.setattr(outputs, "_ignores_case", lambda folder: True)
    with pytest.raises(UserError, match=r"would both be written to .*A\.png"):
        check_outputs(out(tmp_path, "a.png", "A.png"), [])


def test_the_file_system_decides_whether_case_matters(tmp_path):
    (tmp_path / "a").touch()
    assert outputs._ignores_case(tmp_path / "not/yet/there") == (tmp_path / "A").exists()
    assert not outputs._ignores_case(Path("/"))


def test_paths_that_cannot_be_written_are_refused_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"nothing can be written to .*file"):
        check_outputs(out(tmp_path / "file", "a.png"), [])
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match=r"a\.png, which is a folder"):
        check_outputs(out(tmp_path, "a.png"), [])


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    save_json(tmp_path / "deep/a.json", {"a": 1})
    assert (tmp_path / "deep/a.json").read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(UserError, match="cannot be written"):
        save_json(tmp_path / "deep", {})
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_images_of_training_have_short_names_and_replace_no_file_of_the_user(tmp_path):
    options = {"num_steps": 9, "batch_size": 1, "iter_size": 1, "tensorboard": False}
    pixels = np.zeros((4, 5, 3), np.uint8)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/000003_mine.png").write_bytes(b"a photo")
    with RunLog(FolderLock(tmp_path), options) as log:
        log.image("city/" + "ü" * 125, 3, pixels)
        for _ in range(2):
            log.image("a", 3, pixels)
        with pytest.raises(UserError, match=r"000003_mine\.png was not written by a run"):
            log.image("mine", 3, pixels)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["000003_a.png", "000003_mine.png", f"000003_{'ü' * 100}.png"]
    assert (tmp_path / "images/000003_mine.png").read_bytes() == b"a photo"
