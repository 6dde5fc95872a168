"""The fixtures of the tests, on toy data (tests/helpers.py)."""

import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from deeplab import BACKBONES, deeplabv2
from deeplab.crf import CRFUnavailable
from tests.helpers import ROOT, TOY_CLASSES, hear_ctrl_c, make_toy_voc
from tests.helpers_devices import fake_cuda, on_meta  # noqa: F401  (fixtures)
from tests.helpers_nets import THIN, WHOLE, randomise_batch_norm
from utils.checkpoint import make_meta, save_snapshot

sys.path.insert(0, str(ROOT))
if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, and so would the tests' own processes
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip a test that needs pydensecrf where it is not installed: no version of it builds for Python 3.13."""
    try:
        return (yield)
    except CRFUnavailable as error:
        if importlib.util.find_spec("pydensecrf"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def in_a_group():
    """Start processes, each in its own process group; the groups are killed after the test, however it ends."""
    started = []

    def start(words: list, **options) -> subprocess.Popen:
        options = {
            "cwd": ROOT,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        } | options
        started.append(subprocess.Popen([*map(str, words)], start_new_session=True, preexec_fn=hear_ctrl_c, **options))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def toy_voc(tmp_path: Path) -> Path:
    """See :func:`make_toy_voc`."""
    return make_toy_voc(tmp_path / "toy")


@pytest.fixture(scope="module")
def thin_nets():
    """``resnet18`` is a thin net in a whole test module: for runs in this process that do not depend on the size of the net."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet18", THIN["resnet18"])
        yield


@pytest.fixture
def whole_nets(monkeypatch):
    """``resnet18`` is the published net again."""
    monkeypatch.setitem(BACKBONES, "resnet18", WHOLE["resnet18"])


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    net = randomise_batch_norm(deeplabv2("resnet18", TOY_CLASSES))
    path = tmp_path_factory.mktemp("snapshot") / "VOC12_scenes_7.pth"
    save_snapshot(path, net, make_meta(net, ["ground", "red", "green", "blue"], 7, {}, seen_voc_val=""))
    return path
