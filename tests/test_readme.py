"""The commands of the READMEs are parsed by their programs' own parsers, and their Python code is run."""

import argparse
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from deeplab import deeplabv2
from tests.helpers import ROOT, make_toy_voc
from tests.helpers_nets import randomise_batch_norm
from tests.helpers_readme import AFTER_A_CHANGE, READMES, TEXT, commands, script_and_options, scripts
from utils.checkpoint import make_meta, save_snapshot

# Programs whose commands are not run, with the reason.
NOT_RUN = {
    "bash": "the two set-up scripts install packages; bash itself reads them",
    "pip": "installs packages",
    "source": "a builtin of the shell",
    "torchrun": "its processes wait for one another; the script that it starts goes through its parser",
    "srun": "needs a cluster",
}


class Parsed(Exception):
    """The command line was parsed."""


def test_there_are_commands():
    assert len(commands()) > 15
    assert any(command.startswith("torchrun") for command in commands())


@pytest.mark.parametrize("command", [command for command in commands() if command.split()[0] in ("python", "torchrun")])
def test_a_command_is_parsed(command, monkeypatch):
    """By the parser of its script; nothing after it is run."""

    def ending(method):
        def parse(self, *args):
            method(self, *args)
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))
    script, options = script_and_options(command)
    monkeypatch.setattr(sys, "argv", [script, *options])
    main = runpy.run_path(str(ROOT / script), run_name="read")["main"]
    if any(change in command for change in AFTER_A_CHANGE):
        with pytest.raises(SystemExit):
            main()
        return
    with pytest.raises(Parsed):
        main()


@pytest.mark.parametrize("command", [command for command in commands() if command.split()[0] in NOT_RUN])
def test_files_in_commands_that_are_not_run_exist(command):
    for name in re.findall(r"[\w./-]+\.(?:sh|py|txt)", command):
        assert (ROOT / name).is_file(), name
    if command.startswith("bash "):
        assert subprocess.run(["bash", "-n", ROOT / command.split()[1]], timeout=60).returncode == 0


def test_scripts_and_options_that_are_named_exist():
    """Every ``--option`` in the text is an option of some program, and every script is a file."""
    for name in re.findall(r"`((?:scripts/)?\w+\.(?:py|sh))`", TEXT):
        assert name == "labelme2voc.py" or (ROOT / name).is_file() or [*ROOT.glob(f"*/{name}"), *ROOT.glob(f"*/*/{name}")], name
    programs = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "utils").rglob("options.py")]
    known = set(re.findall(r'"(--[a-z0-9-]+)"', "".join(path.read_text(encoding="utf-8") for path in programs)))
    foreign = re.compile(r"`[^`]*\b(?:docker|sbatch|srun)\b[^`]*`|`--(?:shm-size|ipc|signal)[^`]*`")
    text = foreign.sub("", TEXT)
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", "\n".join(re.findall(r"`[^`\n]*`", text))))
    assert named - known - {"--help", "--nproc", "--nnodes", "--rdzv", "--max-restarts", "--version"} == set()


def test_images_exist_and_are_small():
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT):
        assert Path(ROOT / name).stat().st_size < 300_000


WITH_PYTHON = [name for name, text in READMES.items() if scripts(text)]


@pytest.mark.usefixtures("thin_nets")
@pytest.mark.parametrize("readme", WITH_PYTHON)
def test_python_runs_as_it_stands(readme, tmp_path, monkeypatch, capsys):
    """One block after another, in a folder with the snapshot, the photo and the data set that the text uses."""
    monkeypatch.chdir(tmp_path)
    toy = make_toy_voc(tmp_path / "data/VOCdevkit/VOC2012")
    shutil.copy(toy / "JPEGImages/toy_0.jpg", "photo.jpg")
    shutil.copy(toy / "SegmentationClassAug/toy_0.png", "label.png")
    torch.manual_seed(0)
    net = randomise_batch_norm(deeplabv2("resnet18", 21))
    Path("snapshots").mkdir()
    save_snapshot("snapshots/VOC12_scenes_20000.pth", net, make_meta(net, None, 0, {}))
    scope: dict = {}
    for block in scripts(READMES[readme]):
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 15
        exec(block, scope)
    assert {"README.md", "deeplab/README.md"} <= {*WITH_PYTHON}
    if readme != "deeplab/README.md":
        return
    size = scope["image"].shape[:2]
    assert (scope["classes"].shape, scope["classes"].dtype) == (size, torch.uint8)
    assert scope["probabilities"].shape == (21, *size)
    assert scope["refined"].shape == size
    assert Image.open("overlay.png").size == size[::-1]
    assert 0 <= float(capsys.readouterr().out) <= 1
    before = net.state_dict()  # the training loop starts from this net
    assert any(not torch.equal(value, before[name]) for name, value in scope["net"].state_dict().items())
