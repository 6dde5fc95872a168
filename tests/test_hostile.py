"""A few hundred damaged files of every kind (tests/hostile.py runs many more by hand), and the faults found so far."""

import gzip
import os
import signal
import struct
import time

import pytest

from tests import hostile
from tests.helpers_specimens import Specimen, specimens

EVERY = specimens()


def test_damaged_files_give_one_sentence_and_never_other_content():
    counts, faults = hostile.run(EVERY, range(8 * len(EVERY)), seed=0)
    assert not faults, "\n".join(faults)
    assert counts.total() == 8 * len(EVERY)
    assert {name for name, outcome in counts if outcome == "refused"} == EVERY.keys()


def test_the_harness_finds_every_kind_of_fault(monkeypatch):
    def reader(fault):
        def read(path):
            return fault() if path.parent.name.isdigit() else "whole"  # the undamaged file is in the other folder

        return read

    def allocate():
        try:
            bytearray(1 << 45)
        except MemoryError:
            raise hostile.UserError("it is damaged") from None

    bad = {
        "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda: time.sleep(60),
        "allocation": allocate,
        "foreign error": lambda: {}["x"],
        "other content": lambda: "other",
    }
    monkeypatch.setattr(hostile, "SECONDS", 1)
    counts, faults = hostile.run({name: Specimen("a", b"abc", reader(fault), True) for name, fault in bad.items()}, range(5), 0)
    found = dict(counts.keys())  # pairs
    assert found.pop("crash").startswith("CRASH")
    assert found == {"hang": "HANG", "allocation": "MEMORY", "foreign error": "OTHER ERROR", "other content": "WRONG CONTENT"}
    assert len(faults) == 5


# Faults that the harness has found: (specimen, damage to its bytes, expected message)


def directory_entry(data, name):
    """The offset of a member's entry in a zip directory; the name follows at byte 46 (PKWARE APPNOTE 4.3.12)."""
    return data.rindex(name) - 46


def changed(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def flip(data, at):
    return changed(data, at, bytes([data[at] ^ 1]))


def orientation(data):
    return flip(data, data.index(b"eXIf") + 10)


def gzips_sum(data):
    return flip(data, len(data) - 6)


def third_header(data):
    return flip(data, 2 * 1024 + 20)


def long_comment(data):
    return changed(data, directory_entry(data, b"res4a_branch2a/weights.npy") + 32, b"\xff\xff")


def marked_as_folder(data):
    return changed(data, directory_entry(data, b"archive/data/13") + 38, b"\x10")


def emptied(data):
    return changed(data, directory_entry(data, b"benchmark_RELEASE/dataset/cls/2.mat") + 16, bytes(12))


def renamed(data):
    return changed(data, directory_entry(data, b"SegmentationClassAug/1.png") + 46 + 23, b"gnp")


def wrong_offset(data):
    return data[:160] + data[161:]


def no_image_data(data):
    at = data.index(b"IDAT") - 4
    return data[:at] + data[at + 12 + struct.unpack(">I", data[at : at + 4])[0] :]


def bytearray_of_any_size(data):
    return data[:128] + b"\x80\x05\x96" + (1 << 50).to_bytes(8, "little") + b"."


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("image, PNG", orientation, "its part eXIf does not match its checksum"),
        ("image, PNG", no_image_data, "is damaged: its pixels end after 0 of"),
        ("label, palette", no_image_data, "is damaged: its pixels end after 0 of"),
        ("tgz archive", gzips_sum, "is damaged or unsafe .CRC check failed"),
        ("tgz archive, new sums", third_header, "its list of members ends early, at byte 2048"),
        ("tgz archive", lambda data: data[:300], "damaged or unsafe"),
        ("SBD's archive", gzips_sum, "is damaged or truncated .CRC check failed"),
        ("SBD's archive, new sums", third_header, "its list of members ends early, at byte 2048"),
        ("npz", long_comment, r"its directory has \d+ of \d+ entries"),
        ("last.ckpt", marked_as_folder, "/data/13 in it does not match its checksum"),
        ("zip archive, compressed", emptied, r"cls/2\.mat has two checksums"),
        ("zip of masks", renamed, "File name in directory"),
        ("zip of masks", wrong_offset, "neither a folder nor a readable zip"),
        ("npy of objects", bytearray_of_any_size, "damaged .KeyError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_that_was_once_accepted(tmp_path, name, damage, message):
    specimen = EVERY[name]
    path = tmp_path / specimen.filename
    path.write_bytes(specimen.wrap(damage(specimen.data)))
    with pytest.raises(hostile.OWN, match=message) as caught:
        specimen.read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_archives_with_trailing_zeros_are_accepted(tmp_path):
    specimen = EVERY["tgz archive, new sums"]
    path = tmp_path / specimen.filename
    path.write_bytes(gzip.compress(specimen.data + bytes(10240)))
    assert len(specimen.read(path)) == 5
