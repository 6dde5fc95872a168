"""prepare_voc.py on miniature VOC and SBD sets, from the raw files to an optimiser step."""

import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import DatasetError, VOCSegmentation, read_ids
from dataset.classes import VOC_CLASSES
from scripts import prepare_voc
from scripts.data.parallel import parallel_map
from tests.helpers import hear_ctrl_c
from tests.helpers_data import SIZES, TRAINVAL_AUG, jpeg_bytes, mat_bytes, png_bytes, sbd_mask, voc_mask, write
from tests.helpers_pngs import PALETTE, png
from utils.command import UserError

SCRIPT = Path(prepare_voc.__file__)
VOC = {"train": ["2007_000032", "2008_000002"], "val": ["2007_000033", "2008_000007"]}
SBD = {"train": ["2008_000002", "2008_000015", "2008_000007"], "val": ["2009_000001", "2007_000033"]}
TRAIN_AUG = ["2007_000032", "2008_000002", "2008_000015", "2009_000001"]  # by hand: all except VOC's val


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    for image_id in TRAINVAL_AUG:
        write(root / f"JPEGImages/{image_id}.jpg", jpeg_bytes(image_id))
    for name, ids in VOC.items():
        write(root / f"ImageSets/Segmentation/{name}.txt", "\n".join(ids) + "\n")
        for image_id in ids:
            write(root / f"SegmentationClass/{image_id}.png", png_bytes(voc_mask(image_id)))
    return root


@pytest.fixture
def sbd(tmp_path):
    root = tmp_path / "SBD/benchmark_RELEASE"
    for name, ids in SBD.items():
        write(root / f"dataset/{name}.txt", "\n".join(ids) + "\n")
        for image_id in ids:
            write(root / f"dataset/cls/{image_id}.mat", mat_bytes(sbd_mask(image_id)))
            write(root / f"dataset/img/{image_id}.jpg", jpeg_bytes(image_id))
            write(root / f"dataset/inst/{image_id}.mat", mat_bytes(sbd_mask(image_id), name="GTinst"))
    return root


def archive_of(sbd, path):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(sbd, arcname=sbd.name)
    return path


def run(voc, *options):
    return prepare_voc.main(["--data-dir", str(voc), "--workers", "0", *map(str, options)])


def command(voc, *options, cwd=None):
    line = [sys.executable, str(SCRIPT), "--data-dir", str(voc), "--workers", "2", *map(str, options)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, timeout=60)


def check_result(voc, kept=()):
    """Lists as worked by hand; VOC's mask for its four ids, SBD's for the other two; palettes, except for ``kept`` ids."""
    lists = {path.stem: path.read_text().split() for path in (voc / "ImageSets/SegmentationAug").iterdir()}
    assert lists == {"train_aug": TRAIN_AUG, "trainval_aug": TRAINVAL_AUG, "val": ["2007_000033", "2008_000007"]}
    assert sorted(path.name for path in (voc / "SegmentationClassAug").iterdir()) == [f"{i}.png" for i in TRAINVAL_AUG]
    for image_id in TRAINVAL_AUG:
        with Image.open(voc / f"SegmentationClassAug/{image_id}.png") as image:
            palette = np.array(image.getpalette() or []).reshape(-1, 3)
            mask = np.array(image)
        expected = sbd_mask(image_id) if image_id in ("2008_000015", "2009_000001") else voc_mask(image_id)
        assert np.array_equal(mask, expected)
        for row in VOC_CLASSES if image_id not in kept else ():
            assert tuple(palette[row.id]) == row.color


def test_lists_by_hand():
    lists = prepare_voc.augmented_lists({"a", "b"}, {"v", "w"}, {"b", "c", "w", "d"})
    assert lists == {"train_aug": {"a", "b", "c", "d"}, "trainval_aug": {"a", "b", "c", "d", "v", "w"}, "val": {"v", "w"}}


def test_md5_of_the_sorted_lines():
    ids = {"2010_000001", "2007_000032", "2008_000002"}  # printf '2007_000032\n2008_000002\n2010_000001\n' | md5sum
    assert prepare_voc.ids_md5(ids) == "d85def2238e6a11a507147e2f853cee3"


def test_published_counts_are_consistent():
    counts = {name: count for name, (count, _) in prepare_voc.PUBLISHED.items()}
    assert counts["train_aug"] + counts["val"] == counts["trainval_aug"] == 12031
    assert counts["train_aug"] - counts["train"] == 9118


def test_sbd_folder_through_the_command_line(voc, sbd, capsys):
    done = command(voc, "--sbd", sbd)
    assert done.returncode == 0, done.stderr
    check_result(voc)
    assert "train_aug: 4 ids, 10578 fewer than the published 10582" in done.stderr
    assert "this is not the published set" in done.stderr
    assert run(voc, "--sbd", sbd / "dataset", "--strict") == 1
    assert "6 already there, 0 written from VOC, 0 from" in capsys.readouterr().out


def test_sbd_archive_is_read_without_unpacking(voc, sbd, tmp_path):
    archive = archive_of(sbd, tmp_path / "benchmark.tgz")
    image = voc / "JPEGImages/2009_000001.jpg"
    image.unlink()
    before = {path for path in tmp_path.rglob("*") if "VOC2012" not in path.parts}
    assert run(voc, "--sbd", archive) == 0
    check_result(voc)
    assert image.read_bytes() == jpeg_bytes("2009_000001")
    assert {path for path in tmp_path.rglob("*") if "VOC2012" not in path.parts} == before


@pytest.mark.parametrize("form", ["folder", "parent", "zip", "in place"])
def test_ready_masks(voc, tmp_path, form, capsys):
    masks = {i: png_bytes(sbd_mask(i)) for i in TRAINVAL_AUG}
    folder = (voc if form == "in place" else tmp_path / "ready") / "SegmentationClassAug"
    for image_id, data in masks.items():
        write(folder / f"{image_id}.png", data)
    source = folder.parent if form == "parent" else folder
    if form == "zip":
        source = tmp_path / "SegmentationClassAug.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for image_id, data in masks.items():
                archive.writestr(f"SegmentationClassAug/{image_id}.png", data)
                archive.writestr(f"__MACOSX/SegmentationClassAug/._{image_id}.png", b"\0\5\26\7")
    assert run(voc, "--aug", source) == 0
    kept = ("2008_000015", "2009_000001") if form == "in place" else ()
    check_result(voc, kept)
    out, err = capsys.readouterr()
    assert ("4 existing masks differ from those of VOC" in out) == (form == "in place")
    assert f"warning: 4 of the 4 masks in {source} that VOC also has differ from VOC's: 2007_000032" in err
    assert run(voc, "--aug", source) == 0
    assert "6 already there" in capsys.readouterr().out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_changes_nothing_and_repairs_what_is_broken(voc, sbd):
    assert run(voc, "--sbd", sbd) == 0
    folder, lists = voc / "SegmentationClassAug", voc / "ImageSets/SegmentationAug"
    with Image.open(folder / "2009_000001.png") as image:
        grey = Image.fromarray(np.array(image))
    grey.save(folder / "2009_000001.png")  # the right indices without a palette, as published
    pairs = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\r\n" for i in reversed(TRAIN_AUG)]
    (lists / "train_aug.txt").write_text("".join(pairs))  # the right ids and masks, in the official format and another order
    before = contents(voc)
    assert run(voc, "--sbd", sbd) == 0
    assert contents(voc) == before

    whole = (folder / "2008_000015.png").read_bytes()
    (folder / "2008_000015.png").write_bytes(whole[:-20])
    (folder / "2007_000033.png").write_bytes(png_bytes(sbd_mask("2007_000033")))  # complete, but not VOC's mask
    (folder / ".2007_000032.png.77.tmp").write_bytes(b"half")  # left by a killed run
    (lists / "val.txt").write_text("2007_000033\n")
    (lists / "train_aug.txt").write_text("".join(pairs).replace("ClassAug/2009_000001", "Class/2009_000001"))
    wrong = [folder / "2008_000015.png", folder / "2007_000033.png", lists / "val.txt", lists / "train_aug.txt"]
    others = {path.name: path.read_bytes() for path in wrong}
    assert run(voc, "--sbd", sbd) == 0
    check_result(voc, kept=["2009_000001"])
    aside = {path.name: path.read_bytes() for path in (voc / "SegmentationClassAug_replaced").iterdir()}
    assert aside == others
    assert (folder / "2008_000015.png").read_bytes() == whole
    assert run(voc, "--sbd", sbd, "--overwrite") == 0
    check_result(voc)


def test_masks_of_another_source_are_noticed_and_replaced(voc, sbd, tmp_path, capsys, monkeypatch):
    bad = tmp_path / "bad"
    for image_id in TRAINVAL_AUG:
        write(bad / f"{image_id}.png", png_bytes(np.full(SIZES[image_id], 7, dtype=np.uint8)))
    ids = {"train": VOC["train"], "val": VOC["val"], "train_aug": TRAIN_AUG, "trainval_aug": TRAINVAL_AUG}
    for name, listed in ids.items():
        monkeypatch.setitem(prepare_voc.PUBLISHED, name, (len(listed), prepare_voc.ids_md5(set(listed))))
    monkeypatch.setattr(prepare_voc, "SBD_COUNT", 5)
    assert run(voc, "--aug", bad, "--strict") == 1
    out, err = capsys.readouterr()
    assert f"4 of the 4 masks in {bad} that VOC also has differ from VOC's" in err
    assert "warning: this is not the published set" in err
    assert run(voc, "--sbd", sbd, "--strict") == 0
    check_result(voc)
    out, err = capsys.readouterr()
    assert "masks: 4 already there, 0 written from VOC, 2 from" in out
    assert "2 existing masks differ from those of VOC or" in out
    assert "warning" not in err
    aside = voc / "SegmentationClassAug_replaced"
    assert sorted(path.name for path in aside.iterdir()) == ["2008_000015.png", "2009_000001.png"]
    assert run(voc, "--aug", bad) == 0  # and back: no mask that was set aside is overwritten
    assert sorted(path.name for path in (voc / "SegmentationClassAug_replaced2").iterdir()) == [
        path.name for path in sorted(aside.iterdir())
    ]


def test_a_re_ordered_palette_is_refused(voc, tmp_path, capsys):
    """In a ready set and in VOC's own folder; such a mask is never written with the VOC palette."""
    black, aeroplane, sofa = (0, 0, 0), (128, 0, 0), (0, 192, 0)
    source = tmp_path / "ready"
    for image_id in TRAINVAL_AUG:
        write(source / f"{image_id}.png", png(sbd_mask(image_id) // 18, 1, PALETTE, [black, sofa]))
    write(voc / "SegmentationClass/2007_000033.png", png(voc_mask("2007_000033") % 2, 1, PALETTE, [aeroplane, black]))
    with pytest.raises(DatasetError, match="3 files cannot be used"):
        run(voc, "--aug", source)
    errors = capsys.readouterr().err
    assert "2008_000015: the mask has a palette that a tool re-ordered: index 1 has the colour of 18" in errors
    assert "2007_000033: the mask has a palette that a tool re-ordered: index 0 has the colour of 1" in errors
    assert not (voc / "SegmentationClassAug/2008_000015.png").exists()


def test_all_bad_masks_are_listed_before_it_fails(voc, sbd):
    folder = sbd / "dataset/cls"
    extra = ["2009_000002", "2009_000003", "2009_000004", "2009_000005", "2009_000006"]
    for image_id in extra:
        SIZES[image_id] = (20, 30)
        write(voc / f"JPEGImages/{image_id}.jpg", jpeg_bytes(image_id))
    good = sbd_mask("2009_000001")
    write(folder / "2008_000015.mat", mat_bytes(good)[:300])
    write(folder / "2009_000001.mat", mat_bytes(good[:-1]))
    write(folder / "2009_000002.mat", mat_bytes(np.full((20, 30), 21, dtype=np.uint8)))
    write(folder / "2009_000003.mat", mat_bytes(np.zeros((20, 30), dtype=np.uint8), name="GTinst"))
    write(folder / "2009_000004.mat", mat_bytes(np.zeros((20, 30, 3), dtype=np.uint8)))
    write(folder / "2009_000005.mat", b"")
    write(sbd / "dataset/val.txt", "\n".join(SBD["val"] + extra))  # 2009_000006 has no .mat at all
    done = command(voc, "--sbd", sbd)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in (
        "2008_000015: the mask is not a readable MATLAB file",
        "2009_000001: the mask is 38x46 pixels, its image 38x47",
        "2009_000002: the mask holds 21, expected 0..20 and 255",
        "2009_000003: the mask holds GTinst, expected GTcls.Segmentation",
        "2009_000004: the mask is an array (20, 30, 3) of uint8",
        "2009_000005: the mask is not a readable MATLAB file",
        "2009_000006:",
        "7 files cannot be used",
    ):
        assert part in done.stderr
    assert not (voc / "ImageSets/SegmentationAug").exists()
    assert {path.stem for path in (voc / "SegmentationClassAug").iterdir()} == {i for ids in VOC.values() for i in ids}


def test_missing_sources_give_one_sentence(voc, tmp_path):
    done = command(voc, cwd=tmp_path)
    assert done.returncode == 2
    assert "python scripts/download.py sbd" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(DatasetError, match=f"pass --data-dir {voc}"):
        run(voc.parent)


def test_wrong_sources(voc, sbd, tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        run(voc, "--sbd", tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"lacks the lists dataset/train\.txt"):
        run(voc, "--sbd", voc)
    with pytest.raises(DatasetError, match="holds no PNG masks"):
        run(voc, "--aug", sbd)
    text = tmp_path / "notes.zip"
    text.write_text("no zip")
    with pytest.raises(DatasetError, match="neither a folder nor a readable zip"):
        run(voc, "--aug", text)
    archive = archive_of(sbd, tmp_path / "cut.tgz")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DatasetError, match="damaged or truncated"):
        run(voc, "--sbd", archive)
    (voc / "JPEGImages/2008_000015.jpg").unlink()
    (sbd / "dataset/img/2008_000015.jpg").unlink()
    with pytest.raises(DatasetError, match="1 file cannot be used"):
        run(voc, "--sbd", sbd)


def test_ids_that_lead_out_of_the_folder_are_refused(voc, sbd):
    write(sbd / "dataset/val.txt", "2009_000001\n../../escape\n")
    write(sbd / "dataset/cls/2009_000001.mat", mat_bytes(sbd_mask("2009_000001")))
    with pytest.raises(DatasetError, match=r"cannot be file names: \.\./\.\./escape"):
        run(voc, "--sbd", sbd)
    assert not (voc / "SegmentationClassAug").exists()


def test_a_damaged_member_of_a_zip_is_named(voc, tmp_path, capsys):
    path = tmp_path / "masks.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for image_id in TRAINVAL_AUG:
            archive.writestr(f"{image_id}.png", png_bytes(sbd_mask(image_id)))
        offset = archive.getinfo("2008_000015.png").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 100] ^= 255
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="1 file cannot be used"):
        run(voc, "--aug", path)
    assert "2008_000015: the mask cannot be decoded" in capsys.readouterr().err


def test_a_published_list_in_the_folder_shows_which_ids_differ(voc, monkeypatch):
    published = {"2007_000032", "2008_000002", "2010_000001"}
    monkeypatch.setitem(prepare_voc.PUBLISHED, "train_aug", (3, "d85def2238e6a11a507147e2f853cee3"))
    assert prepare_voc.difference("train_aug", published, voc) is None
    ids = {"2007_000032", "2008_000002", "2011_000009", "cat"}
    text = prepare_voc.difference("train_aug", ids, voc)
    assert text == "train_aug: 4 ids, 1 more than the published 3; 1 not in VOC's format (2007_000032): cat"
    lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png" for i in published]
    write(voc / "ImageSets/SegmentationAug/official.txt", "\n".join(lines))
    text = prepare_voc.difference("train_aug", ids, voc)
    assert text.endswith("; 2 too many: 2011_000009, cat; 1 missing: 2010_000001")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_ctrl_c_leaves_complete_files_and_the_next_run_resumes(voc, sbd):
    pipe = voc / "SegmentationClass/2008_000007.png"  # VOC's last mask: reading it blocks
    pipe.unlink()
    os.mkfifo(pipe)
    line = [sys.executable, str(SCRIPT), "--data-dir", str(voc), "--sbd", str(sbd), "--workers", "2"]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_ctrl_c
    )
    folder = voc / "SegmentationClassAug"
    deadline = time.monotonic() + 40
    while len(list(folder.glob("[!.]*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # to all processes of the command, as a terminal does
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.strip().endswith("interrupted")
    assert "Traceback" not in errors
    assert sorted(path.stem for path in folder.iterdir()) == ["2007_000032", "2007_000033", "2008_000002"]
    assert not (voc / "ImageSets/SegmentationAug").exists()
    pipe.unlink()
    write(pipe, png_bytes(voc_mask("2008_000007")))
    assert run(voc, "--sbd", sbd) == 0
    check_result(voc)


def _square(number):
    return number * number


def _die(number):
    os._exit(9)


def test_parallel_map_reads_only_a_few_tasks_ahead():
    taken = []

    def numbers():
        for number in range(50):
            taken.append(number)
            yield (number,)

    results = parallel_map(_square, numbers(), workers=1)
    first = next(results)
    assert len(taken) <= 4
    assert sorted([first, *results]) == [number * number for number in range(50)]
    assert list(parallel_map(_square, [], workers=2)) == []


def test_the_error_of_a_dead_worker_names_its_task():
    with pytest.raises(UserError, match="one of 17"):
        list(parallel_map(_die, [(17,)], workers=2))  # the idle worker also ends


def test_from_the_archives_to_an_optimiser_step(voc, sbd):
    import torch
    from torch.utils.data import DataLoader

    from dataset.transforms import Pad, RandomCrop, RandomMirror, RandomScale, TrainTransform, to_input
    from deeplab import deeplabv2, single_scale_loss

    torch.manual_seed(0)
    assert run(voc, "--sbd", sbd) == 0
    ids = read_ids(voc / "ImageSets/SegmentationAug/train_aug.txt")
    transforms = [RandomScale(), RandomMirror(), RandomCrop((65, 65)), Pad((65, 65))]
    data = VOCSegmentation(voc, ids, transform=TrainTransform(7, transforms))
    images, labels, _ = next(iter(DataLoader(data, batch_size=4)))
    assert images.shape == (4, 65, 65, 3)
    assert set(labels.unique().tolist()) == {0, 1, 18, 255}
    net = deeplabv2("resnet18", num_classes=21).train()
    before = net.layer5.conv2d_list[0].weight.detach().clone()
    single_scale_loss(net, to_input(images), labels.long())["loss"].backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3).step()
    assert not torch.equal(net.layer5.conv2d_list[0].weight, before)
    assert all(torch.isfinite(p).all() for p in net.parameters())
