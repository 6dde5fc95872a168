"""Outputs against what the user brought: by other names, links, folders; and files that are written whole."""

import os
from pathlib import Path

import numpy as np
import pytest

from utils import files
from utils.command import UserError
from utils.files import Output, check_outputs, save_json
from utils.visualize import PALETTE, Classes, save_panel, save_prediction


def out(folder: Path, *names: str, option: str = "--save-dir") -> list[Output]:
    return [Output(option, folder, name, f"the mask of {name} by {option}") for name in names]


def test_good_outputs_make_their_folders_and_may_exist(tmp_path):
    """What an earlier run of ours wrote is written over; the test of what that is writes it with the real functions."""
    (tmp_path / "data").mkdir()
    mask = np.zeros((3, 4), dtype=np.uint8)
    save_prediction(tmp_path / "old/a.png", mask)
    classes = Classes(["a", "b"], PALETTE)
    save_panel(tmp_path / "old/p.png", np.zeros((3, 4, 3), dtype=np.uint8), mask, mask, classes)
    save_json(tmp_path / "old/scores.json", {"restore_from": "net.pth"})
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
        ("last.ckpt", b"PK a run's only optimiser state"),
        ("train.txt", b"2007_000032\n"),
        ("scores.json", b'{"mine": 1}'),
        ("scores.json", b"[1, 2]"),
        ("classes", b"sky\n"),
    ],
)
def test_a_file_of_other_origin_is_not_written_over(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}, over a file that is no earlier output"):
        check_outputs(out(tmp_path, name), [])
    assert (tmp_path / name).read_bytes() == content


def test_nothing_is_written_below_the_data_either(tmp_path):
    (tmp_path / "SegmentationClassAug/val").mkdir(parents=True)
    for folder in ("SegmentationClassAug/new", "SegmentationClassAug/val"):
        with pytest.raises(UserError, match=r"among the data of .*SegmentationClassAug"):
            check_outputs(out(tmp_path / folder, "a.png"), [], [tmp_path / "SegmentationClassAug"])


def test_an_output_that_is_an_input_is_refused_by_any_name(tmp_path):
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
    missing = tmp_path / "SegmentationClassAug"  # where it appeared, the next run would read it
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
    monkeypatch.setattr(files, "_ignores_case", lambda folder: True)
    with pytest.raises(UserError, match=r"would both be written to .*A\.png"):
        check_outputs(out(tmp_path, "a.png", "A.png"), [])


def test_whether_case_counts_is_asked_of_the_file_system(tmp_path):
    (tmp_path / "a").touch()
    assert files._ignores_case(tmp_path / "not/yet/there") == (tmp_path / "A").exists()
    assert not files._ignores_case(Path("/"))


def test_places_that_cannot_be_written_are_told_first(tmp_path):
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
