"""masks_to_indices.py on masks of every kind, against indices and colours written by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import DatasetError, read_label
from scripts import masks_to_indices
from tests.helpers_pngs import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, png
from utils.command import UserError

SCRIPT = Path(masks_to_indices.__file__)
BLACK, RED, GREY_CAR, PERSON, VOID = (0, 0, 0), (128, 0, 0), (128, 128, 128), (192, 128, 128), (224, 224, 192)
LABELS = [[0, 15, 255], [15, 1, 0]]  # in VOC's colours:
COLORS = [[BLACK, PERSON, VOID], [PERSON, RED, BLACK]]


def put(folder, name, data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def run(source, out, *options):
    return masks_to_indices.main([str(source), str(out), "--workers", "0", *map(str, options)])


KINDS = {
    "rgb": png(COLORS, 8, RGB),
    "rgba": png([[(*color, 255) for color in row] for row in COLORS], 8, RGBA),
    "rgb of 16 bits": png([[tuple(257 * value for value in color) for color in row] for row in COLORS], 16, RGB),
    "palette": png([[3, 2, 0], [2, 1, 3]], 2, PALETTE, [VOID, RED, PERSON, BLACK]),
    "palette of 8 bits": png([[0, 1, 2], [1, 3, 0]], 8, PALETTE, [BLACK, PERSON, VOID, RED]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_colours_become_indices(tmp_path, kind):
    put(tmp_path / "in", "a.png", KINDS[kind])
    put(tmp_path / "in", "sub/b.PNG", KINDS[kind])
    put(tmp_path / "in", "._a.png", b"what macOS leaves")
    put(tmp_path / "in", "notes.txt", b"")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    for name in ("a.png", "sub/b.png"):
        assert read_label(tmp_path / "out" / name, 21).tolist() == LABELS
        with Image.open(tmp_path / "out" / name) as image:
            assert np.asarray(image.convert("RGB")).tolist() == [[list(color) for color in row] for row in COLORS]
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (png([[0, 0]], 1, GREY), [[0, 0]]),  # ImageMagick's output for a mask of only background
        (png([[0, 128]], 8, GREY), [[0, 7]]),
        (png([[0, 1, 20, 255]], 8, GREY), [[0, 1, 20, 255]]),  # no colours: already class indices
        (png([[0, 1, 2]], 2, GREY), [[0, 1, 2]]),
        (png([[(0, 255), (128, 0)]], 8, GREY_ALPHA), [[0, 7]]),
        (png([[(0, 0, 0, 0), (128, 0, 0, 255)]], 8, RGBA), [[0, 1]]),
    ],
)
def test_grey_and_transparent_pixels_have_colours_too(tmp_path, data, labels):
    put(tmp_path / "in", "a.png", data)
    assert run(tmp_path / "in/a.png", tmp_path / "out") == 0
    assert read_label(tmp_path / "out/a.png", 21).tolist() == labels


def test_colours_of_classes_txt(tmp_path):
    (tmp_path / "classes.txt").write_text("sky 0 0 255\nthe road 128 64 128\nunseen\n")
    put(tmp_path / "in", "a.png", png([[(0, 0, 255), (128, 64, 128), (224, 224, 192), (9, 9, 9)]], 8, RGB))
    assert run(tmp_path / "in", tmp_path / "out", "--void", "9,9,9") == 0
    assert read_label(tmp_path / "out/a.png", 3).tolist() == [[0, 1, 255, 255]]
    colors = tmp_path / "colours"
    colors.write_text("a 9 9 9\nb 128 64 128\nc 0 0 255\nd 224 224 192\n")
    assert run(tmp_path / "in", tmp_path / "other", "--classes", colors) == 0
    assert read_label(tmp_path / "other/a.png", 4).tolist() == [[2, 1, 3, 0]]


def test_grey_values_that_may_be_colours_or_indices_are_refused(tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("sky 0 0 255\nroad 0 0 0\nsea 1 1 1\n")
    put(tmp_path / "in", "a.png", png([[0, 1]], 8, GREY))
    with pytest.raises(UserError, match="1 of 1 masks"):
        run(tmp_path / "in", tmp_path / "out")
    assert "is grey, and its values are both colours of classes and class indices" in capsys.readouterr().err


MANY = [[0, 7, 30, 128], [29, 255, 3, 1]]  # indices of 150 classes; 0 and 128 are also grey levels of VOC's colours


def test_indices_stay_indices(tmp_path, capsys):
    """With more classes than VOC's, or only names in the file of classes; colour masks then need colours."""
    put(tmp_path / "in", "a.png", png(MANY, 8, GREY))
    put(tmp_path / "in", "b.png", png([[0, 128]], 8, GREY))
    ramp = [(i, i, i) for i in range(256)]
    put(tmp_path / "in", "c.png", png(MANY, 8, PALETTE, ramp))
    put(tmp_path / "in", "d.png", png([[(value, value, value) for value in row] for row in MANY], 8, RGB))
    expected = {"a": MANY, "b": [[0, 128]], "c": MANY, "d": MANY}
    assert run(tmp_path / "in", tmp_path / "out/SegmentationClass") == 0
    assert "--num-classes 129" in capsys.readouterr().out.splitlines()[-1]
    (tmp_path / "classes.txt").write_text("".join(f"name {chr(97 + i // 26)}{chr(97 + i % 26)}\n" for i in range(150)))
    assert run(tmp_path / "in", tmp_path / "named") == 0
    for out in ("out/SegmentationClass", "named"):
        for name, labels in expected.items():
            assert read_label(tmp_path / out / f"{name}.png", 150, colors={}).tolist() == labels
    put(tmp_path / "in", "e.png", png([[(0, 0, 1)]], 8, RGB))
    with pytest.raises(UserError, match=r"classes\.txt gives no colours, but .*e\.png has some.*`name r g b` per line"):
        run(tmp_path / "in", tmp_path / "drawn")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    (tmp_path / "in/e.png").unlink()
    with pytest.raises(UserError, match="4 of 4 masks"):
        run(tmp_path / "in", tmp_path / "few")
    assert "a.png holds the values 3, 7, 29, 30, 128; expected class indices 0..2" in capsys.readouterr().err
    assert not (tmp_path / "few").exists()


def test_differing_palettes_need_colours(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    put(tmp_path / "in", "a.png", png([[0, 1]], 1, PALETTE, [(9, 8, 7), RED]))
    put(tmp_path / "in", "b.png", png([[0, 1, 1]], 1, PALETTE, [RED, (9, 8, 7)]))
    with pytest.raises(
        UserError, match=r"the palettes of .*a\.png and .*b\.png differ: index 0 is \(9, 8, 7\) and \(128, 0, 0\)"
    ):
        run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/b.png").unlink()
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert read_label(tmp_path / "out/a.png", 2).tolist() == [[0, 1]]
    put(tmp_path / "in", "a.png", png([[0, 1]], 1, PALETTE, [RED, BLACK]))  # a single mask, but with labelme's colour map
    with pytest.raises(UserError, match=r"the palette of .*a\.png has VOC's colours in another order"):
        run(tmp_path / "in", tmp_path / "other")
    put(tmp_path / "in", "b.png", png([[0, 0]], 1, PALETTE, [RED, BLACK]))  # as in CamVid; masks of various colours agree
    assert run(tmp_path / "in", tmp_path / "other") == 0
    assert read_label(tmp_path / "other/a.png", 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("names", ["", "ground\nthing\n"])
def test_binary_masks_need_the_option(tmp_path, names):
    put(tmp_path / "in", "a.png", png([[0, 255]], 8, GREY))
    put(tmp_path / "in", "b.png", png([[0, 0]], 8, GREY))
    if names:
        (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(UserError, match=r"hold only 0 and 255, and 255 is the ignore label: .* add --binary"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "data",
    [
        png([[0, 255]], 8, GREY),
        png([[0, 1]], 8, GREY),
        png([[0, 1]], 1, GREY),
        png([[BLACK, (255, 255, 255)]], 8, RGB),
        png([[1, 0]], 1, PALETTE, [(255, 255, 255), BLACK]),
    ],
)
def test_binary_masks_become_two_classes(tmp_path, data):
    put(tmp_path / "in", "a.png", data)
    put(tmp_path / "in", "b.png", png([[0, 0]], 8, GREY))
    run(tmp_path / "in", tmp_path / "mine/SegmentationClass", "--binary")
    assert read_label(tmp_path / "mine/SegmentationClass/a.png", 2).tolist() == [[0, 1]]
    assert (tmp_path / "mine/classes.txt").read_text() == "background 0 0 0\nobject 255 255 255\n"


def test_binary_takes_the_names_of_two_classes(tmp_path):
    put(tmp_path / "in", "a.png", png([[0, 255], [255, 3]], 8, GREY))
    with pytest.raises(UserError, match="1 of 1 masks could not be converted"):
        run(tmp_path / "in", tmp_path / "out", "--binary")
    put(tmp_path / "in", "a.png", png([[0, 255]], 8, GREY))
    (tmp_path / "classes.txt").write_text("ground\nthing\nother\n")
    with pytest.raises(UserError, match=r"--binary makes two classes, but .*classes\.txt names 3"):
        run(tmp_path / "in", tmp_path / "out", "--binary")
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    run(tmp_path / "in", tmp_path / "mine/SegmentationClass", "--binary")
    assert (tmp_path / "mine/classes.txt").read_text() == "ground 0 0 0\nthing 255 255 255\n"
    put(tmp_path / "white", "a.png", png([[BLACK, (255, 255, 255)]], 8, RGB))
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UserError, match="add --binary"):
        run(tmp_path / "white", tmp_path / "other")


def test_unknown_colours_are_refused_with_their_counts_and_nothing_is_written(tmp_path, capsys):
    put(tmp_path / "in", "good.png", KINDS["rgb"])
    put(tmp_path / "in", "bad.png", png([[BLACK, (1, 2, 3), (1, 2, 3), (9, 8, 7)]], 8, RGB))
    put(tmp_path / "in", "half.png", png([[(0, 0, 0, 127)]], 8, RGBA))
    put(tmp_path / "in", "grey.png", png([[0, 1, 128]], 8, GREY))
    put(tmp_path / "in", "damaged.png", KINDS["rgb"][:-20])
    put(tmp_path / "in", "short.png", png([[0, 3]], 8, PALETTE, [BLACK, RED]))
    with pytest.raises(UserError, match="5 of 6 masks could not be converted"):
        run(tmp_path / "in", tmp_path / "out")
    out, err = capsys.readouterr()
    assert "bad.png holds 2 colours of no class: (1, 2, 3) on 2 pixels, (9, 8, 7) on 1 pixels" in err
    assert "half.png holds 1 semi-transparent pixels" in err
    assert "grey.png is grey and holds values above 20, while other masks have VOC's colours" in err
    assert "damaged.png is damaged" in err
    assert "short.png holds the index 3, but its palette has 2 colours" in err
    assert "written" not in out
    assert not (tmp_path / "out").exists()


def test_existing_files_do_not_change(tmp_path, capsys):
    put(tmp_path / "in", "a.png", KINDS["rgb"])
    put(tmp_path / "in", "b.png", KINDS["palette"])
    put(tmp_path / "out", "b.png", b"the user's own")
    with pytest.raises(UserError, match="1 of 2 masks"):
        run(tmp_path / "in", tmp_path / "out")
    assert "b.png, which holds something else: choose another folder" in capsys.readouterr().err
    assert (tmp_path / "out/b.png").read_bytes() == b"the user's own"
    assert not (tmp_path / "out/a.png").exists()
    (tmp_path / "out/b.png").unlink()
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert "2 masks written" in capsys.readouterr().out
    before = (tmp_path / "out/a.png").stat().st_mtime_ns
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert "0 masks written to" in capsys.readouterr().out
    assert (tmp_path / "out/a.png").stat().st_mtime_ns == before


def test_misuse(tmp_path):
    source = tmp_path / "in"
    put(source, "a.png", KINDS["rgb"])
    link = tmp_path / "link"
    link.symlink_to(source)
    for out in (source, source / "indices", source / "../in", link, link / "x"):
        with pytest.raises(UserError, match="is inside the source folder"):
            run(source, out)
    with pytest.raises(UserError, match="is inside the source folder"):
        run(source / "a.png", source)
    with pytest.raises(UserError, match="nowhere does not exist"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no PNG"):
        run(tmp_path / "empty", tmp_path / "out")
    put(tmp_path, "file", b"")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        run(source, tmp_path / "file")
    with pytest.raises(UserError, match="--void 128,0,0 is the colour of class 1"):
        run(source, tmp_path / "out", "--void", "128,0,0")
    for text, message in (("a\nb\n", "gives no colours"), ("a 1 2 3\nb 1 2 3\n", "gives a and b the same colour")):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            run(source, tmp_path / "out")
    with pytest.raises(DatasetError, match="missing does not exist"):
        run(source, tmp_path / "out", "--classes", tmp_path / "missing")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path):
    for k in range(6):
        put(tmp_path / "in", f"{k}.png", KINDS["rgb"])
    put(tmp_path / "in", "bad.png", png([[(1, 2, 3)]], 8, RGB))
    words = [sys.executable, str(SCRIPT), str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()
    assert "1 of 7 masks could not be converted" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mask_of_another_size_than_its_image_is_refused(tmp_path):
    for name, size in (("a", (5, 7)), ("b", (5, 6))):
        (tmp_path / "e/images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "e/masks").mkdir(exist_ok=True)
        Image.new("RGB", (7, 5)).save(tmp_path / f"e/images/{name}.png")
        Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) % 2).save(tmp_path / f"e/masks/{name}.png")
    (tmp_path / "e/classes.txt").write_text("sky\nroad\n")
    with pytest.raises(UserError, match="1 of 2 masks"):
        masks_to_indices.main([str(tmp_path / "e"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
