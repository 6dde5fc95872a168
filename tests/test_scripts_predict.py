"""scripts/predict.py as a user calls it: masks of photos and videos, and no file of the user is lost."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from scripts import predict
from tests.helpers_nets import naive_logits
from tests.helpers_runs import evaluate
from utils import distributed
from utils.command import UserError
from utils.evaluation.video import BrokenVideo, VideoFile, check_frames, describe, open_video, read_frames
from utils.visualize import GAP, Classes, blend, panel


def run(snapshot: Path, *options: object) -> None:
    assert predict.main([*map(str, options), "--restore-from", str(snapshot), "--device", "cpu", "--num-workers", "0"]) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "options", [(), ("--scales", "1,0.5", "--mirror"), ("--crf", "--crf-workers", "1"), ("--batch-size", "3")]
)
def test_masks_equal_those_of_the_evaluation(toy_voc, snapshot, tmp_path, options):
    evaluate(toy_voc, snapshot, "--save-dir", str(tmp_path / "masks"), *options)
    run(snapshot, toy_voc / "JPEGImages", "--save-dir", tmp_path / "out", "--panels", *options)
    masks, out = contents(tmp_path / "masks"), contents(tmp_path / "out")
    assert masks == {name: content for name, content in out.items() if not name.endswith("_panel.png")}
    assert len(out) == 2 * len(masks) == 12
    assert Image.open(tmp_path / "out/toy_1_panel.png").width == 2 * 3 * 47 + GAP


def test_other_files_in_a_folder_are_left_out(toy_voc, snapshot, tmp_path, capsys):
    folder = toy_voc / "JPEGImages"
    (folder / "._toy_0.jpg").write_bytes(b"macOS writes such files to other disks")
    (folder / ".DS_Store").touch()
    (folder / "more").mkdir()
    for name in ("a.heic", "b.heic", "README"):
        (folder / name).touch()
    (folder / "toy_1.jpg").rename(folder / "toy_1.JPG")
    run(snapshot, folder, folder / "toy_0.jpg", "--save-dir", tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [f"toy_{i}.png" for i in range(6)]
    assert f"{folder}: 6 images; left out: 1 without suffix, 2 .heic, 1 sub-folder\n" in capsys.readouterr().out
    (tmp_path / "empty/sub").mkdir(parents=True)
    with pytest.raises(UserError, match=r"empty holds no image \(only 1 sub-folder\)"):
        predict.main([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="nowhere does not exist"):
        predict.main([str(tmp_path / "nowhere")])


def test_a_rotated_photo_is_predicted_as_displayed(toy_voc, snapshot, tmp_path):
    """EXIF orientation 6, of an upright camera: the mask equals that of the image with rotated pixels."""
    pixels = cv2.imread(str(toy_voc / "JPEGImages/toy_0.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[:, :, ::-1]).save(tmp_path / "turned.png", exif=exif)
    cv2.imwrite(str(tmp_path / "upright.png"), np.rot90(pixels, -1))
    run(snapshot, tmp_path / "turned.png", tmp_path / "upright.png", "--save-dir", tmp_path / "out")
    turned, upright = (np.array(Image.open(tmp_path / f"out/{name}.png")) for name in ("turned", "upright"))
    assert turned.shape == (55, 40)
    assert (turned == upright).all()


def test_photos_are_never_overwritten(snapshot, tmp_path, monkeypatch):
    pics = tmp_path / "pics"
    pics.mkdir()
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(pics / name), np.zeros((9, 9, 3), np.uint8))
    for name in ("x.jpg", "x_panel.jpg", "y.jpg", "y.webp"):
        cv2.imwrite(str(tmp_path / name), np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "link").symlink_to(pics)
    (tmp_path / "x.png").write_bytes(snapshot.read_bytes())  # weights with an unlucky name
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


def test_videos_arrays_and_frames_of_the_user_are_never_overwritten(snapshot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "film.avi.mp4", [np.zeros((48, 64, 3), np.uint8)] * 3)
    (tmp_path / "film.avi.mp4").rename("film.avi")
    (tmp_path / "film").mkdir()
    cv2.imwrite("x.jpg", np.zeros((9, 9, 3), np.uint8))
    cv2.imwrite("film/000001.png", np.zeros((9, 9, 3), np.uint8))  # a frame, numbered as by ffmpeg
    (tmp_path / "film.mp4").write_bytes((tmp_path / "film.avi").read_bytes())
    np.savez("x.npz", mine=np.arange(3))
    before = contents(tmp_path)
    common = ["--save-dir", ".", "--restore-from", str(snapshot), "--device", "cpu"]
    for options, message in (
        (["x.jpg", "--probabilities"], r"to x\.npz, over a file that is no earlier output"),
        (["film.avi"], r"to film/000001\.png, over a file that is no earlier output"),
    ):
        with pytest.raises(UserError, match=message):
            predict.main([*options, *common])
    assert contents(tmp_path) == before
    (tmp_path / "film/000001.png").unlink()
    with pytest.raises(UserError, match=r"to film\.mp4, over a file that is no earlier output"):
        predict.main(["film.avi", *common])
    (tmp_path / "film.mp4").unlink()
    (tmp_path / "x.npz").unlink()
    for _ in range(2):  # the second overwrites the outputs of the first
        run(snapshot, "film.avi", "--save-dir", ".")
        run(snapshot, "x.jpg", "--probabilities", "--save-dir", ".")


def test_patterns_keep_sub_folders(toy_voc, snapshot, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    for folder in ("a", "b/c"):
        (photos / folder).mkdir(parents=True)
        (photos / folder / "1.jpg").write_bytes((toy_voc / "JPEGImages/toy_0.jpg").read_bytes())
    (photos / "a/notes.txt").touch()
    (photos / "odd[1].jpg").write_bytes((toy_voc / "JPEGImages/toy_1.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    run(snapshot, "photos/**/*", "photos/odd[1].jpg", "--save-dir", "out", "--overlays")
    names = ["a/1", "b/c/1", "odd[1]"]
    assert sorted(contents(tmp_path / "out")) == sorted(f"{name}{end}" for name in names for end in (".png", "_overlay.png"))
    assert "photos/**/*: 3 images; left out: 3 sub-folder, 1 .txt" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"the pattern photos/\*\.tiff matches no image"):
        predict.main(["photos/*.tiff"])


def test_overlays_have_the_colours_of_the_snapshot(toy_voc, snapshot, tmp_path):
    content = torch.load(snapshot, weights_only=True)
    content["meta"]["colors"] = [[9, 9, 9], [200, 0, 0], [0, 200, 0], [0, 0, 200]]
    torch.save(content, tmp_path / "net.pth")
    run(tmp_path / "net.pth", toy_voc / "JPEGImages/toy_2.jpg", "--save-dir", tmp_path / "out", "--overlays")
    mask = Image.open(tmp_path / "out/toy_2.png")
    assert mask.getpalette()[:12] == [9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200]
    image, overlay = (
        cv2.imread(str(toy_voc / "JPEGImages/toy_2.jpg"))[:, :, ::-1],
        np.array(Image.open(tmp_path / "out/toy_2_overlay.png")),
    )
    colors = np.array(mask.convert("RGB")).astype(float)
    mixed = np.abs(overlay - (0.45 * image + 0.55 * colors)).max(axis=2) <= 1
    assert (mixed | (overlay == colors).all(axis=2)).all()


@pytest.mark.parametrize("crf", [False, True])
def test_probabilities_are_the_softmax_of_the_net(crf, toy_voc, snapshot, tmp_path):
    options = ["--crf", "--crf-workers", 1] if crf else []
    run(snapshot, toy_voc / "JPEGImages/toy_1.jpg", "--save-dir", tmp_path, "--probabilities", *options)
    saved = np.load(tmp_path / "toy_1.npz")
    logits = naive_logits(snapshot, toy_voc, 1)
    expected = np.exp(logits - logits.max(0)) / np.exp(logits - logits.max(0)).sum(0)
    assert saved["probabilities"].dtype == np.float16
    np.testing.assert_allclose(saved["probabilities"], expected, atol=2e-3)
    assert saved["classes"].tolist() == ["ground", "red", "green", "blue"]


def test_skip_existing_continues_an_interrupted_run(toy_voc, snapshot, tmp_path, capsys):
    """Files with all their outputs are skipped; the others are predicted again."""
    options = [toy_voc / "JPEGImages", "--save-dir", tmp_path / "out", "--panels", "--batch-size", 4]
    run(snapshot, *options)
    whole = contents(tmp_path / "out")
    other = whole["toy_4.png"]  # another output of ours, different from a new prediction
    (tmp_path / "out/toy_1.png").write_bytes(other)
    (tmp_path / "out/toy_2_panel.png").unlink()
    (tmp_path / "out/toy_3.png").unlink()
    capsys.readouterr()
    run(snapshot, *options, "--skip-existing")
    assert contents(tmp_path / "out") == {**whole, "toy_1.png": other}
    assert "masks of 2 files in" in (out := capsys.readouterr().out)
    assert "4 existed already" in out


def test_processes_share_the_images(toy_voc, snapshot, tmp_path, monkeypatch):
    """As under torchrun, but one after another: each image is predicted once, whatever outputs exist already."""
    run(snapshot, toy_voc / "JPEGImages", "--save-dir", tmp_path / "one")
    monkeypatch.setattr(distributed, "start", lambda first: first())  # the other processes do not exist
    for rank in range(4):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", str(rank))
        before = contents(tmp_path / "four")
        run(snapshot, toy_voc / "JPEGImages", "--save-dir", tmp_path / "four", "--skip-existing")
        assert len(contents(tmp_path / "four")) == len(before) + (2 if rank < 2 else 1)
    assert contents(tmp_path / "four") == contents(tmp_path / "one")


def test_images_of_every_kind(toy_voc, snapshot, tmp_path):
    """Images in grey, with alpha, with a palette and in CMYK equal the same image in RGB."""
    rgb = Image.open(toy_voc / "JPEGImages/toy_0.jpg").convert("L").convert("RGB")
    rgb.save(tmp_path / "rgb.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    rgb.quantize(256).save(tmp_path / "palette.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    run(
        snapshot,
        *(tmp_path / name for name in ("rgb.png", "grey.png", "alpha.png", "palette.png", "cmyk.jpg")),
        "--save-dir",
        tmp_path / "o",
    )
    masks = {path.stem: np.array(Image.open(path)) for path in (tmp_path / "o").iterdir()}
    assert (masks["grey"] == masks["rgb"]).all()
    assert (masks["alpha"] == masks["rgb"]).all()
    assert (masks["palette"] == masks["rgb"]).mean() > 0.95
    assert (masks["cmyk"] == masks["rgb"]).mean() > 0.9


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_does_not_stop_the_others(workers, toy_voc, snapshot, tmp_path, capsys):
    (toy_voc / "JPEGImages/toy_1.jpg").write_bytes(b"broken")
    options = [toy_voc / "JPEGImages", "--save-dir", tmp_path, "--restore-from", snapshot, "--device", "cpu"]
    assert predict.main([*map(str, options), "--num-workers", workers]) == 1
    assert sorted(contents(tmp_path)).count("toy_1.png") == 0
    assert "toy_5.png" in contents(tmp_path)
    out, err = capsys.readouterr()
    assert "masks of 5 files in" in out
    assert "1 of 6 files were left out:\n" in err
    assert "toy_1.jpg" in err


def test_names_are_written_into_panels_and_overlays(toy_voc, snapshot, tmp_path):
    """Without panels, overlays and videos the option has no effect and is refused."""
    content = torch.load(snapshot, weights_only=True)
    content["meta"]["classes"] = list("abcd")
    torch.save(content, tmp_path / "net.pth")
    image = Image.new("RGB", (160, 120), (90, 120, 200))
    image.save(tmp_path / "x.png")
    run(tmp_path / "net.pth", tmp_path / "x.png", "--save-dir", tmp_path / "out", "--overlays", "--panels", "--names")
    mask = np.array(Image.open(tmp_path / "out/x.png"))
    classes = Classes(list("abcd"))
    overlay = np.array(Image.open(tmp_path / "out/x_overlay.png"))
    assert (overlay == blend(np.array(image), mask, classes, names=True)).all()
    assert (overlay != blend(np.array(image), mask, classes)).any()
    assert (np.array(Image.open(tmp_path / "out/x_panel.png")) == panel(np.array(image), None, mask, classes, True)).all()
    with pytest.raises(UserError, match="--names writes into panels, overlays and videos; add --overlays or --panels"):
        run(snapshot, tmp_path / "x.png", "--save-dir", tmp_path / "out", "--names")


def write_video(path: Path, frames: list[np.ndarray], codec: str = "mp4v") -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10.0, (frames[0].shape[1], frames[0].shape[0]))
    for frame in frames:
        writer.write(frame)
    writer.release()


@pytest.mark.parametrize("options", [(), ("--batch-size", 2), ("--crf", "--crf-workers", 1)])
def test_a_video_gives_masks_and_a_video(options, snapshot, tmp_path):
    rng = np.random.default_rng(0)
    frames = [np.full((48, 64, 3), 40 * i, np.uint8) + rng.integers(0, 30, (48, 64, 3), dtype=np.uint8) for i in range(3)]
    write_video(tmp_path / "film.mp4", frames)
    run(snapshot, tmp_path / "film.mp4", "--save-dir", tmp_path / "out", *options)
    assert sorted(contents(tmp_path / "out")) == ["film.mp4", *(f"film/{i:06d}.png" for i in range(3))]
    video, decoded = cv2.VideoCapture(str(tmp_path / "out/film.mp4")), cv2.VideoCapture(str(tmp_path / "film.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    for i in range(3):
        (_, shown), (_, image) = video.read(), decoded.read()
        mask = np.array(Image.open(tmp_path / f"out/film/{i:06d}.png"))
        assert np.abs(shown.astype(int) - blend(image[:, :, ::-1].copy(), mask)[:, :, ::-1]).mean() < 25  # lossy
    assert not video.read()[0]
    run(snapshot, tmp_path / "film.mp4", "--save-dir", tmp_path / "out", "--skip-existing")


def test_wrong_videos_are_refused(snapshot, tmp_path, capsys):
    (tmp_path / "film.mp4").write_bytes(b"no video")
    options = [tmp_path / "film.mp4", "--save-dir", tmp_path / "out", "--restore-from", snapshot, "--device", "cpu"]
    assert predict.main([*map(str, options)]) == 1
    assert "film.mp4 cannot be decoded" in capsys.readouterr().err
    write_video(tmp_path / "film.mp4", [np.zeros((48, 64, 3), np.uint8)])
    with pytest.raises(UserError, match=r"--probabilities of a video .* would fill the disk"):
        run(snapshot, tmp_path / "film.mp4", "--save-dir", tmp_path / "out", "--probabilities")
    with pytest.raises(UserError, match=r"the video of .*film\.mp4 would be written to .*film\.mp4, over"):
        run(snapshot, tmp_path / "film.mp4", "--save-dir", tmp_path)


def test_odd_frames_are_padded_to_even_sides(tmp_path):
    with VideoFile(tmp_path / "a.mp4", 5.0) as film:
        film.write(np.full((33, 47, 3), 200, np.uint8))
    video = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert video.read()[1].shape == (34, 48, 3)
    film = VideoFile(tmp_path / "b.mp4", 5.0)
    film.write(np.zeros((32, 48, 3), np.uint8))
    film.__exit__(KeyboardInterrupt, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def shown_at(path: Path) -> list[int]:
    """For each frame of a video, its number in :func:`grey_frames`."""
    video, shown = cv2.VideoCapture(str(path)), []
    while (read := video.read())[0]:
        shown.append(round(float(read[1].mean()) / 20))
    return shown


def grey_frames(count: int) -> list[np.ndarray]:
    return [np.full((32, 48, 3), 20 * i, np.uint8) for i in range(count)]


@pytest.mark.parametrize(
    ("rate", "times"),
    [
        (10.0, [0, 0.1, 0.2, 0.3, 0.4]),
        (10.0, [0, 0.13, 0.17, 0.32, 0.39]),  # within a frame
        (29.97003, [i / 29.97003 for i in range(5)]),
        (119.8805, [i / 119.8805 for i in range(5)]),  # MPEG-4 has no such rate
        (10.0, [0, 0.5, 0.6, 1.8, 1.9]),  # gaps
        (10.0, [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.7]),  # a burst, and a gap
        (10.0, [None, None, None]),
    ],
)
def test_frames_keep_their_times_within_one_frame(rate, times, tmp_path):
    with VideoFile(tmp_path / "a.mp4", rate) as film:
        for frame, time in zip(grey_frames(len(times)), times, strict=True):
            film.write(frame, time)
    shown = shown_at(tmp_path / "a.mp4")
    assert len(shown) == film.count
    constant = all(time is None or abs(time * rate - i) <= 1 for i, time in enumerate(times))
    if constant:
        assert shown == list(range(len(times)))
        assert film.note() == ""
        return
    for i, time in enumerate(times):
        slots = [slot for slot, frame in enumerate(shown) if frame == i]
        assert not slots or abs(slots[0] - time * rate) <= 1
    assert f"{film.repeated} frames are repeated and {film.left_out} left out" in film.note()
    assert (film.repeated, film.left_out) == (len(shown) - len(set(shown)), len(times) - len(set(shown)))


def test_a_jump_of_more_than_an_hour_is_refused(tmp_path):
    with VideoFile(tmp_path / "a.mp4", 1.0) as film:
        film.write(grey_frames(1)[0], 0.0)
        with pytest.raises(BrokenVideo, match="jump by 9999 seconds"):
            film.write(grey_frames(1)[0], 1e4)


def test_a_header_with_the_clock_in_place_of_the_frame_rate(snapshot, tmp_path, capsys):
    """Some programs write the unit of their clock, 90000 per second: the output has 25, a line says so, the next is written."""
    write_video(tmp_path / "a.mov", grey_frames(4))
    data = bytearray((tmp_path / "a.mov").read_bytes())
    for box in (
        b"mvhd",
        b"mdhd",
    ):  # version and flags, two dates, then the parts of a second (ISO/IEC 14496-12, 8.2.2 and 8.4.2)
        at = data.index(box) + 16
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") * 9000).to_bytes(4, "big")
    (tmp_path / "a.mov").write_bytes(data)
    write_video(tmp_path / "b.mp4", grey_frames(3))
    assert open_video(tmp_path / "a.mov")[1] == pytest.approx(90000)
    run(snapshot, tmp_path / "a.mov", tmp_path / "b.mp4", "--save-dir", tmp_path / "out")
    assert cv2.VideoCapture(str(tmp_path / "out/a.mp4")).get(cv2.CAP_PROP_FPS) == 25
    assert len(shown_at(tmp_path / "out/a.mp4")) == 4
    assert (tmp_path / "out/b.mp4").exists()
    assert "a.mov: its header says 90000 frames per second" in capsys.readouterr().out


NOISE = [np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8) for i in range(20)]


def count_frames(path: Path) -> int:
    """The number of frames that are predicted from a video."""
    video, _ = open_video(path)
    count = sum(1 for _ in read_frames(video))
    check_frames(path, video, count)
    return count


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "mp4v"), ("mov", "mp4v"), ("mkv", "MJPG"), ("webm", "VP80"), ("avi", "MJPG")]
)
def test_a_truncated_video_is_refused(tmp_path, suffix, codec):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    write_video(whole, NOISE, codec)
    data = whole.read_bytes()
    assert count_frames(whole) == 20
    with pytest.raises(BrokenVideo, match="0 of "):
        check_frames(whole, open_video(whole)[0], 0)
    for left in (0.2, 0.5, 0.9):
        cut.write_bytes(data[: int(left * len(data))])
        with pytest.raises(BrokenVideo, match=rf"cut\.{suffix} is (cut off: it has \d+ of its \d+|damaged: \d+ of 20 frames)"):
            count_frames(cut)
    for behind in (b"\0" * 5000, NOISE[0].tobytes()):  # trailing bytes are no damage
        cut.write_bytes(data + behind)
        assert count_frames(cut) == 20


def test_ffmpeg_prints_nothing_about_a_damaged_video(tmp_path, capfd):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(12) + b"\0\0\0\x10mdat" + bytes(8))
    with pytest.raises(BrokenVideo, match=r"a\.mp4 cannot be decoded by OpenCV"):
        open_video(tmp_path / "a.mp4")
    assert capfd.readouterr() == ("", "")


def test_missing_frames_in_the_middle_are_reported(tmp_path):
    write_video(tmp_path / "a.avi", NOISE, "MJPG")
    data = bytearray((tmp_path / "a.avi").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 6000] = bytes(6000)
    (tmp_path / "a.avi").write_bytes(data)
    with pytest.raises(BrokenVideo, match=r"a\.avi is damaged: 1[0-9] of 20 frames .* convert it: ffmpeg -i a\.avi new\.mp4"):
        count_frames(tmp_path / "a.avi")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x1a\x45\xdf\xa3\x84abcd\x18\x53\x80\x67\x40\x64xyz", (115, False)),  # 15 bytes, and a segment of 100
        (b"\x1a\x45\xdf\xa3\x40\x04abcd\x18\x53\x80\x67\x01" + b"\xff" * 7 + b"xyz", (22, False)),  # of unknown size
        (b"\x1a\x45\xdf\xa3", (8, False)),
        (b"\0\0\0\x0cftypisom\0\0\0\x09moovx\0\0\0\x64mdatxyz", (121, True)),
        (b"\0\0\0\x0cftypisom\0\0\0\1mdat\0\0\0\1\0\0\0\0xyz", (2**32 + 12, True)),  # a size of 64 bits
        (b"\0\0\0\x0cftypisom\0\0\0\1mdat" + b"\xff" * 8, (2**64 + 11, True)),
        (b"\0\0\0\x0cftypisom\0\0\0\x09moovx\0\0\0\0mdatxyz", (21, True)),  # up to the end of the file
        (b"\0\0\0\x0cftypisom\0\0\0\x09moovx\0\0\0\x08moof", (29, False)),  # fragmented
        (b"\0\0\0\x0cftypisom\0\0\0\x09moovxsome more", (21, True)),
        (b"RIFF\0\0\0\0AVI LIST", (0, True)),
        (b"RIFF\0\0\0\0WAVE", (0, False)),
        (b"\0\0\1\xba", (0, False)),
        (b"", (0, False)),
    ],
)
def test_headers_of_containers_written_by_hand(tmp_path, data, expected):
    (tmp_path / "a").write_bytes(data)
    assert describe(tmp_path / "a") == expected


def test_a_damaged_video_leaves_no_output_video(snapshot, tmp_path, capsys):
    """A good video beside it is predicted; after repair, so is the damaged one."""
    write_video(tmp_path / "film.avi", NOISE[:6], "MJPG")
    write_video(tmp_path / "good.mp4", NOISE[:2])
    whole = (tmp_path / "film.avi").read_bytes()
    (tmp_path / "film.avi").write_bytes(whole[: len(whole) // 2])
    films, out = [tmp_path / "film.avi", tmp_path / "good.mp4"], tmp_path / "out"
    options = [*films, "--save-dir", out, "--restore-from", snapshot, "--device", "cpu", "--skip-existing"]
    (tmp_path / "none.mp4").touch()
    assert predict.main([*map(str, [tmp_path / "none.mp4", *options])]) == 1
    out_text, err = capsys.readouterr()
    assert "masks of 1 files in" in out_text
    assert not (out / "none").exists()
    assert "film.avi is damaged: 2 of 6 frames can be decoded" in err  # half a frame does not count
    assert [path.name for path in out.iterdir() if path.is_file()] == ["good.mp4"]
    (tmp_path / "film.avi").write_bytes(whole)
    assert predict.main([*map(str, options)]) == 0
    assert {path.name for path in out.iterdir() if path.is_file()} == {"good.mp4", "film.mp4"}


def test_frames_that_change_their_size_are_refused(tmp_path):
    film = VideoFile(tmp_path / "a.mp4", 5.0)
    film.write(np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(BrokenVideo, match=r"a\.mp4 change their size from 64x48 to 64x50"):
        film.write(np.zeros((49, 64, 3), np.uint8))
    film.__exit__(BrokenVideo, None, None)
    assert not list(tmp_path.iterdir())
