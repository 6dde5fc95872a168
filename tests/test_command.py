"""How commands end: forbidden paths, names that are too long, odd arguments, a full disk, control characters."""

import errno
import os
import re
import shutil
import signal
import sys
from importlib import import_module

import pytest
import torch

from utils.argtypes import OTHER_NAMES, Parser
from utils.command import Shown, run_command, shown

TRAIN = ["--backbone", "resnet18", "--num-classes", "4", "--restore-from", "none", "--num-steps", "1", "--device", "cpu"]
NET = ["--restore-from", "net.pth", "--device", "cpu"]
# PATH stands for a path that cannot be used.
PATHS = [
    ("train", ["--data-dir=PATH", *TRAIN]),
    ("train", ["--data-dir=toy", "--data-list=PATH", *TRAIN]),
    ("train", ["--data-dir=toy", *TRAIN, "--restore-from=PATH"]),
    ("train", ["--data-dir=toy", *TRAIN, "--snapshot-dir=PATH"]),
    ("train", ["--data-dir=toy", *TRAIN, "--resume=PATH"]),
    ("evaluate", ["--data-dir=PATH", *NET]),
    ("evaluate", ["--data-dir=toy", "--restore-from=PATH", "--device=cpu"]),
    *(("evaluate", ["--data-dir=toy", *NET, f"--{name}=PATH"]) for name in ("data-list", "save-dir", "save-json", "report")),
    ("evaluate", ["--data-dir=toy", *NET, "--report=new", "--compare=PATH"]),
    ("scripts.predict", ["PATH", *NET]),
    ("scripts.predict", ["toy/JPEGImages/toy_0.jpg", *NET, "--save-dir=PATH"]),
    *(("scripts.check_dataset", ["--data-dir=toy", f"--{name}=PATH"]) for name in ("data-dir", "data-list", "json")),
    ("scripts.plot_log", ["PATH"]),
    ("scripts.plot_log", ["log.jsonl", "-o", "PATH.png"]),
    ("scripts.masks_to_indices", ["PATH", "new"]),
    ("scripts.masks_to_indices", ["toy/SegmentationClassAug", "PATH", "--workers=0"]),
    ("scripts.export_onnx", ["PATH", "net.pt2"]),
    ("scripts.export_onnx", ["net.pth", "PATH.pt2"]),
    ("scripts.convert_weights", ["PATH", "new.pth"]),
    ("scripts.convert_weights", ["net.pth", "PATH.pth"]),
    ("scripts.prepare_voc", ["--data-dir=PATH"]),
    ("scripts.make_shapes", ["--out=PATH", "--train=1", "--val=0"]),
    ("scripts.download", ["resnet18-v1", "--weights-dir=PATH"]),
    ("scripts.benchmark", ["memory", "--json=PATH"]),
]

LAZY = (
    "multiprocessing.synchronize",
    "utils.evaluation.submission",
    "utils.evaluation.video",
    "scripts.bench.training",
    "torch.utils.tensorboard",
)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Restore what run_command changes in the process."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def ordinary_user(toy_voc, snapshot, tmp_path, monkeypatch):
    """A user in a folder of their own, which contains a folder without permissions; root changes to another user."""
    for name in (*dict(PATHS), *LAZY):  # the other user may have no access to Python's own folder
        import_module(name)
    shutil.copy(snapshot, tmp_path / "net.pth")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "locked/in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    is_root = os.geteuid() == 0
    if is_root:
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 65534, 65534)
    (tmp_path / "locked").chmod(0)
    if is_root:
        os.seteuid(65534)
    yield tmp_path
    if is_root:
        os.seteuid(0)
    (tmp_path / "locked").chmod(0o700)


def end_of(name: str, words: list, monkeypatch, capsys) -> tuple[int, str]:
    """The exit status of a command and its standard error."""
    monkeypatch.setattr(sys, "argv", [f"{name.rpartition('.')[2]}.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_command(import_module(name).main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("path", ["locked/in/a", "x" * 300], ids=["locked", "long"])
def test_forbidden_paths_and_names_that_are_too_long_are_one_sentence(path, ordinary_user, monkeypatch, capsys):
    for name, words in PATHS:
        status, text = end_of(name, [word.replace("PATH", path) for word in words], monkeypatch, capsys)
        said = [line for line in text.splitlines() if "error: " in line]
        assert (status, len(said)) == (2, 1), (name, words, text)
        assert path[:9] in said[0], (name, words)


def test_errors_of_the_system_are_one_sentence_and_bugs_keep_their_traceback(capsys):
    for number, message in (
        (errno.EACCES, "change its permissions"),
        (errno.EIO, "Input/output error"),
        (errno.ELOOP, "links"),
    ):

        def refused(number=number):
            raise OSError(number, os.strerror(number), "some/where")

        with pytest.raises(SystemExit) as end:
            run_command(refused)
        assert end.value.code == 2
        assert (said := capsys.readouterr().err).count("\n") == 1
        assert "some/where cannot be used" in said
        assert message in said
    for bug in (FileNotFoundError(errno.ENOENT, "No such file", "some/where"), OSError("?"), ValueError("?")):

        def wrong(bug=bug):
            raise bug

        with pytest.raises(type(bug)):
            run_command(wrong)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
@pytest.mark.parametrize("name", ["evaluate", "scripts.check_dataset"])
def test_results_that_cannot_be_printed_are_one_sentence(name, toy_voc, snapshot, monkeypatch, capsys):
    words = {"evaluate": ["--data-dir", toy_voc, "--restore-from", snapshot, "--device", "cpu", "--num-workers", "0"]}
    words = words.get(name, ["--data-dir", toy_voc, "--num-classes", "4", "--workers", "0"])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, text = end_of(name, words, monkeypatch, capsys)
        assert status == 2
        assert "the output cannot be written (No space left on device)" in text
        assert text.count("\n") == 1


def test_a_reader_that_is_gone_before_the_last_line(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as end:
            run_command(lambda: print("a line that waits in the buffer"))
        assert end.value.code == 141


COMMANDS = {
    "train": ("--data-dir", "--batch-size"), "train_msc": ("--snapshot-dir",), "evaluate": ("--save-json", "--scales"),
    "scripts.predict": ("--save-dir",), "scripts.check_dataset": ("--data-list", "--image-dir"),
    "scripts.plot_log": ("--output",),
    "scripts.masks_to_indices": ("--classes",), "scripts.export_onnx": (), "scripts.convert_weights": ("--to",),
    "scripts.prepare_voc": ("--sbd",), "scripts.download": ("--from",), "scripts.make_shapes": ("--out",),
    "scripts.benchmark": ("--json",),
}  # fmt: skip


def test_two_dashes_are_not_a_value(monkeypatch, capsys):
    for name, options in COMMANDS.items():
        for option in options:
            status, text = end_of(name, [f"{option}=--"], monkeypatch, capsys)
            assert (status, f"{option}=--: '--' is no value" in text) == (2, True), (name, option)
    parser = Parser()
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "-a"]).words == ["-a"]  # as in argparse


@pytest.mark.parametrize(
    ("name", "word", "meant"),
    [
        ("train", "--lr", "--learning-rate"),
        ("train", "--epochs", "--num-steps, which counts optimiser steps"),
        ("train_msc", "--batch_size=4", "--batch-size"),
        ("train", "--learing-rate", "--learning-rate"),
        ("train", "--crop-size", "--input-size"),
        ("train", "-j", "--num-workers"),
        ("evaluate", "--ckpt", "--restore-from"),
        ("evaluate", "--flip", "--mirror"),
        ("scripts.predict", "--output-dir", "--save-dir"),
        ("scripts.check_dataset", "--workerz", "--workers"),
        ("evaluate", "--epochs", ""),
        ("train", "--zzz", ""),
        ("train", "photo.jpg", ""),
    ],
)
def test_a_mistyped_option_is_answered_in_one_sentence_with_the_nearest(name, word, meant, monkeypatch, capsys):
    status, text = end_of(name, [*(["a.jpg"] if name == "scripts.predict" else []), word, "3"], monkeypatch, capsys)
    assert status == 2
    assert len(text.splitlines()) == 1
    assert word.partition("=")[0] in text
    assert text.endswith(f"; did you mean {meant}?\n" if meant else "; --help lists the options\n")


def test_names_of_other_programs_lead_to_options_that_exist(monkeypatch, capsys):
    known = set()
    for name in COMMANDS:
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            import_module(name).main()
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    for names in OTHER_NAMES.values():
        assert set(names) <= known, names


def test_an_empty_output_path_is_refused(monkeypatch, capsys):
    for name, words in (
        ("train", ["--snapshot-dir", ""]), ("evaluate", ["--save-dir="]), ("evaluate", ["--save-json="]),
        ("evaluate", ["--report", ""]), ("scripts.predict", ["a.jpg", "--save-dir", ""]), ("scripts.plot_log", ["a", "-o", ""]),
        ("scripts.check_dataset", ["--json="]), ("scripts.benchmark", ["--json="]), ("scripts.make_shapes", ["--out="]),
        ("scripts.masks_to_indices", ["a", ""]), ("scripts.download", ["resnet18", "--weights-dir="]),
    ):  # fmt: skip
        status, text = end_of(name, words, monkeypatch, capsys)
        assert (status, "it is empty; name a file or folder" in text) == (2, True), (name, words, text)


def test_folders_and_devices_in_place_of_a_file(toy_voc, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, words, message in (
        *(("train", ["--data-dir", toy_voc, "--restore-from", path], "it is a folder") for path in (".", "/", "..")),
        ("scripts.convert_weights", [".", "new.pth"], "it is a folder"),
        ("scripts.convert_weights", ["/dev/zero", "new.pth"], "it is a device or a pipe"),
        ("scripts.check_dataset", ["--data-dir", toy_voc, "--data-list", "/dev/zero"], "/dev/zero is a device"),
        ("scripts.check_dataset", ["--data-dir", toy_voc, "--num-classes", "4", "--json", "."], "which is a folder"),
        ("scripts.masks_to_indices", ["/", "new"], "new is inside the source folder /"),
        ("evaluate", ["--data-dir", toy_voc, "--restore-from", ""], "it is a folder"),
    ):
        status, text = end_of(name, words, monkeypatch, capsys)
        assert (status, message in text) == (2, True), (name, words, text)


def test_no_name_controls_the_terminal(toy_voc, snapshot, tmp_path, monkeypatch, capsys):
    evil = "a\x1b]0;owned\x07\x9b2J\x7f"
    content = torch.load(snapshot, weights_only=True)
    content["meta"]["classes"] = ["ground", evil, "green\x1b[8m", "blue"]
    torch.save(content, tmp_path / "net.pth")
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        shutil.copy(toy_voc / f"{folder}/toy_0.{suffix}", toy_voc / f"{folder}/{evil}.{suffix}")
    (toy_voc / "ImageSets/Segmentation/val.txt").write_text(f"{evil}\n{evil}\ntoy_1\n")
    (toy_voc / "JPEGImages/broken\x1b[2J.jpg").write_bytes(b"broken")
    net = ["--restore-from", tmp_path / "net.pth", "--device", "cpu", "--num-workers", "0"]
    lists = ["--data-dir", toy_voc, "--data-list", "ImageSets/Segmentation/val.txt", "--workers", "0"]
    terminal = sys.stdout
    for colours, name, words, status in (
        (False, "evaluate", ["--data-dir", toy_voc, *net], 0),
        (True, "evaluate", ["--data-dir", toy_voc, *net], 0),
        (True, "scripts.predict", [toy_voc / "JPEGImages", *net, "--save-dir", tmp_path / "out"], 1),
        (True, "scripts.check_dataset", lists, 1),
        (True, "evaluate", ["--data-dir", tmp_path / evil, *net], 2),
        (True, "scripts.plot_log", [evil], 2),
    ):
        monkeypatch.setattr(type(terminal), "isatty", lambda stream, colours=colours: colours)
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_command(import_module(name).main)
        assert end.value.code == status, (name, words)
        said = "".join(capsys.readouterr())
        if colours:  # those before each class are ours
            said = re.sub(r"\x1b\[48;2;\d+;\d+;\d+m  \x1b\[0m", "", said)
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", said), (name, said)
        assert r"\x1b" in said


def test_shown():
    assert shown("a\x1b[31m\r\x9b\x7f\n\tü") == "a\\x1b[31m\\r\\x9b\\x7f\n\tü"
    written = []

    class Stream:
        def write(self, text):
            written.append(text)
            return len(text)

        def isatty(self):
            return True

    stream = Shown(Stream(), "\n\r")
    print("a\r\x1b\tb", file=stream)
    assert "".join(written) == "a\r\\x1b\\tb\n"
    assert stream.isatty()


def test_numbers_of_24_digits_are_too_large(monkeypatch, capsys):
    for name, option in (
        ("train", "--batch-size"), ("train", "--num-steps"), ("train", "--num-workers"), ("train", "--atrous-rates"),
        ("evaluate", "--input-size"), ("evaluate", "--window"), ("evaluate", "--num-workers"), ("evaluate", "--crf-workers"),
        ("evaluate", "--scales"), ("scripts.predict", "--gpu"), ("scripts.check_dataset", "--workers"),
        ("scripts.masks_to_indices", "--workers"), ("scripts.prepare_voc", "--workers"), ("scripts.benchmark", "--repeats"),
    ):  # fmt: skip
        value = ",".join(["1" * 24] * (1 + (option in ("--input-size", "--window"))))
        status, text = end_of(name, [f"{option}={value}"], monkeypatch, capsys)
        assert (status, re.search("too large|or above", text) is not None) == (2, True), (name, option, text)
