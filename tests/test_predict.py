"""scripts/predict.py as a user calls it: masks of photos, and nothing lost."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab import dense_crf
from scripts import predict
from tests.test_evaluation import evaluate, snapshot  # noqa: F401
from utils.command import UserError
from utils.visualize import GAP


def run(snapshot: Path, *options: object) -> None:  # noqa: F811
    assert predict.main([*map(str, options), "--restore-from", str(snapshot), "--device", "cpu"]) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("options", [(), ("--scales", "1,0.5", "--mirror"), ("--crf",)])
def test_masks_are_those_of_the_evaluation(toy_voc, snapshot, tmp_path, options):  # noqa: F811
    evaluate(toy_voc, snapshot, "--save-dir", str(tmp_path / "masks"), *options)
    run(snapshot, toy_voc / "JPEGImages", "--save-dir", tmp_path / "out", "--panels", *options)
    masks, out = contents(tmp_path / "masks"), contents(tmp_path / "out")
    assert masks == {name: content for name, content in out.items() if not name.endswith("_panel.png")}
    assert len(out) == 2 * len(masks) == 12
    assert Image.open(tmp_path / "out/toy_1_panel.png").width == 2 * 3 * 47 + GAP


def test_a_folder_without_what_is_no_picture(toy_voc, snapshot, tmp_path, capsys):  # noqa: F811
    folder = toy_voc / "JPEGImages"
    (folder / "._toy_0.jpg").write_bytes(b"what macOS leaves on foreign disks")
    (folder / ".DS_Store").touch()
    (folder / "more").mkdir()
    for name in ("a.heic", "b.heic", "README"):
        (folder / name).touch()
    (folder / "toy_1.jpg").rename(folder / "toy_1.JPG")
    run(snapshot, folder, folder / "toy_0.jpg", "--save-dir", tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [f"toy_{i}.png" for i in range(6)]
    assert f"{folder}: 6 pictures; left out: 1 without suffix, 2 .heic, 1 sub-folder\n" in capsys.readouterr().out
    (tmp_path / "empty/sub").mkdir(parents=True)
    with pytest.raises(UserError, match=r"empty holds no picture \(only 1 sub-folder\)"):
        predict.main([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="nowhere does not exist"):
        predict.main([str(tmp_path / "nowhere")])


def test_a_turned_photo_is_predicted_as_it_is_looked_at(toy_voc, snapshot, tmp_path):  # noqa: F811
    """EXIF orientation 6: the camera was held upright; the mask is that of the picture with its pixels turned."""
    pixels = cv2.imread(str(toy_voc / "JPEGImages/toy_0.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[:, :, ::-1]).save(tmp_path / "turned.png", exif=exif)
    cv2.imwrite(str(tmp_path / "upright.png"), np.rot90(pixels, -1))
    run(snapshot, tmp_path / "turned.png", tmp_path / "upright.png", "--save-dir", tmp_path / "out")
    turned, upright = (np.array(Image.open(tmp_path / f"out/{name}.png")) for name in ("turned", "upright"))
    assert turned.shape == (55, 40)
    assert (turned == upright).all()


def test_photos_are_never_written_over(snapshot, tmp_path, monkeypatch):  # noqa: F811
    pics = tmp_path / "pics"
    pics.mkdir()
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(pics / name), np.zeros((9, 9, 3), np.uint8))
    for name in ("x.jpg", "x_panel.jpg", "y.jpg", "y.webp"):
        cv2.imwrite(str(tmp_path / name), np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "link").symlink_to(pics)
    (tmp_path / "x.png").write_bytes(snapshot.read_bytes())  # weights, by an unlucky name
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    for options, message in (
        (["--save-dir", "pics", "pics"], r"the mask of pics/a\.png would be written to pics/a\.png, over pics/a\.png"),
        (["--save-dir", "link", "pics"], r"to link/a\.png, over pics/a\.png"),
        (["--save-dir", "pics/../pics", str(pics / "b.png")], r"b\.png would be written to .*, over .*b\.png"),
        (["--panels", "x.jpg", "x_panel.jpg"], r"the panel of x\.jpg .* the mask of x_panel\.jpg .* both .*x_panel\.png"),
        (["x.jpg", "--save-dir", "."], r"the mask of x\.jpg would be written to x\.png, over x\.png, which is read"),
        (
            ["y.jpg", "--panels", "y.webp"],
            r"the mask of y\.jpg .* and the mask of y\.webp .* both be written to predictions/y\.png",
        ),
    ):
        with pytest.raises(UserError, match=message):
            predict.main([*options, "--restore-from", "x.png", "--device", "cpu"])
    assert contents(tmp_path) == before


def test_the_crf_sees_the_photo_in_its_colours(toy_voc, snapshot, tmp_path, monkeypatch):  # noqa: F811
    """Its picture is the raw one, red first."""
    seen = []

    def spy(image, probabilities, **options):
        seen.append(image)
        return dense_crf(image, probabilities, **options)

    monkeypatch.setattr("utils.crf_pool.dense_crf", spy)
    run(snapshot, toy_voc / "JPEGImages/toy_2.jpg", "--save-dir", tmp_path / "out", "--crf")
    assert (seen[0] == np.array(Image.open(toy_voc / "JPEGImages/toy_2.jpg"))).mean() > 0.9  # two JPEG decoders
    np.testing.assert_allclose(
        seen[0].mean((0, 1)), np.array(Image.open(toy_voc / "JPEGImages/toy_2.jpg")).mean((0, 1)), atol=1
    )
