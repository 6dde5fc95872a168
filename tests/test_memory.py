"""The computed memory of a training step, compared with hand-worked bytes and with a real step."""

import json
import os
import subprocess
import sys

import pytest
import torch

from deeplab import deeplabv2
from scripts.bench.memory import LiveBytes, step_memory
from tests.helpers import ROOT

CASES = {
    "resnet18 full": ("resnet18", 4, (161, 161), 6, {"batch_norm": "full"}),
    "resnet50 three scales": ("resnet50", 4, (161, 161), 4, {"scales": 3}),
    "resnet50 one at a time": ("resnet50", 4, (161, 161), 4, {"scales": 3, "one_scale_at_a_time": True}),
    "resnet50 recomputed": ("resnet50", 4, (161, 161), 4, {"grad_checkpoint": True}),
}
# A real step in a process that returns large freed blocks to the system, so that resident memory is memory in use.
REAL = """
import gc, json
import torch
from deeplab import deeplabv2, multi_scale_loss, single_scale_loss
from scripts.bench.measure import reset_peak, resident
from tests.test_memory import CASES

def step(backbone, classes, crop, batch, options):
    options = dict(options)
    loss = multi_scale_loss if options.pop("scales", 1) == 3 else single_scale_loss
    net = deeplabv2(backbone, classes, options.pop("batch_norm", "frozen")).train().to(memory_format=torch.channels_last)
    net.grad_checkpoint = options.pop("grad_checkpoint", False)
    momentum = [torch.ones_like(parameter) for parameter in net.parameters() if parameter.requires_grad]
    images, labels = torch.randn(batch, 3, *crop), torch.zeros(batch, *crop, dtype=torch.int64)
    for _ in range(2):
        reset_peak()
        loss(net, images, labels, **options)["loss"].backward()
        net.zero_grad()
    return resident("VmHWM")

found = {}
for name, case in CASES.items():
    step("resnet18", 2, (33, 33), 1, {})  # loads the libraries
    gc.collect()
    before = resident("VmRSS")
    found[name] = step(*case) - before
    gc.collect()
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident set is read from /proc")
def test_a_real_step_needs_the_computed_memory():
    """The resident set of four kinds of steps on the CPU is within 15 % of the computed one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    child = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert child.returncode == 0, child.stderr[-2000:]
    real = json.loads(child.stdout.splitlines()[-1])
    assert real.keys() == CASES.keys()
    for name, (*net, options) in CASES.items():
        assert step_memory(*net, **options).peak == pytest.approx(real[name], rel=0.15), name


def test_bytes_are_counted_while_they_are_alive():
    with LiveBytes() as live:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a.view(10, 100)[2:]  # the same bytes
        c = a * 2
        assert live.now == 8000
        del a
        assert live.now == 8000
        del b, c
        d = torch.zeros(250)
        assert (live.now, live.peak) == (1000, 8000)
        del d
    assert live.now == 0


def test_memory_of_a_step():
    """Weights and momentum follow from the parameters; recomputation and bfloat16 need less, three scales need more."""
    compute = lambda **options: step_memory("resnet50", 4, (161, 161), 4, **options)  # noqa: E731
    plain = compute()
    with torch.device("meta"):
        net = deeplabv2("resnet50", 4)
    learnable = sum(parameter.numel() for parameter in net.parameters())
    assert plain.momentum == 4 * learnable
    assert plain.weights == 4 * (learnable + sum(buffer.numel() for buffer in net.buffers()))
    assert plain.peak > plain.weights + plain.momentum + plain.saved
    recomputed, half, three = compute(grad_checkpoint=True), compute(amp=True), compute(scales=3)
    alone = compute(scales=3, one_scale_at_a_time=True)
    assert recomputed.saved < 0.8 * plain.saved
    assert recomputed.saved < recomputed.peak - recomputed.weights - recomputed.momentum  # plus one recomputed block
    assert half.saved < 0.6 * plain.saved
    assert half.peak < 0.8 * plain.peak
    assert plain.peak < alone.peak < 1.1 * plain.peak < 1.3 * plain.peak < three.peak
    assert compute(batch_norm="full").saved > 1.4 * plain.saved


def test_cards():
    assert step_memory("resnet18", 4, (33, 33), 1).card == 8
    assert step_memory("resnet101", 21, (769, 769), 10, batch_norm="full", scales=3).card is None
