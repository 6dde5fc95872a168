"""Outputs against what the user brought: by other names, links, folders; and files that are written whole."""

import os
from pathlib import Path

import pytest

from utils import files
from utils.command import UserError
from utils.files import Output, check_outputs, save_json


def out(folder: Path, *names: str, option: str = "--save-dir") -> list[Output]:
    return [Output(option, folder, name, f"the mask of {name} by {option}") for name in names]


def test_good_outputs_make_their_folders_and_may_exist(tmp_path):
    (tmp_path / "photo.jpg").write_text("a photo")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/a.png").write_text("of an earlier run")
    outputs = out(tmp_path / "old", "a.png", "b.png") + out(tmp_path / "new/deep", "city/a.png", option="--save-panels")
    check_outputs(outputs + outputs[:1], [tmp_path / "photo.jpg", tmp_path / "missing.jpg"], [tmp_path])
    assert (tmp_path / "new/deep/city").is_dir()
    assert (tmp_path / "old/a.png").read_text() == "of an earlier run"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "city", "deep", "new", "old", "photo.jpg"]


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
