"""A few of the kills of tests/faults.py, and the faults that it must report as losses."""

import re
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT

faults = pytest.importorskip("tests.faults") if sys.platform != "win32" else pytest.skip("forks", allow_module_level=True)


def test_a_few_kills_lose_nothing():
    words = [sys.executable, "tests/faults.py", "--quick", "--kills", "2", "--seed", "3"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"nothing was lost in \d+ kills", result.stdout)
    assert int(re.search(r"training, 1 process: (\d+) kills", result.stdout)[1]) > 0


@pytest.mark.parametrize("fault", ["weights", "log", "file", "torn", "none"])
def test_losses_are_reported(fault, tmp_path):
    """Hand-made differences from the undisturbed run, and files left over."""
    for name in ("expected", "found"):
        folder = tmp_path / name
        folder.mkdir()
        lost = name == "found" and fault
        state = {
            "model": {"w": torch.full((3,), 1.0 + (lost == "weights") * 1e-6)},
            "meta": {"step": 2, "args": {"resume": lost}},
        }
        torch.save(state, folder / "VOC12_scenes_2.pth")
        torch.save(state | {"optimizer": [{"lr": 1.0}]}, folder / "last.ckpt")
        (folder / "log.jsonl").write_text(f'{{"step": {3 if lost == "log" else 2}, "seconds": {len(name)}}}\n')
        if lost in ("file", "torn"):
            (folder / {"file": "VOC12_scenes_1.pth", "torn": ".last.ckpt.77.tmp"}[lost]).write_bytes(b"")
    if fault == "none":
        faults.check_end(tmp_path / "found", tmp_path / "expected")
    else:
        with pytest.raises(faults.Lost, match=r"\.pth|log\.jsonl|holds"):
            faults.check_end(tmp_path / "found", tmp_path / "expected")
