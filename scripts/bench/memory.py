"""The memory of a training step, computed without running it.

The net, its loss and its backward pass run on fake tensors, which have shapes but no values. Every storage is counted while it
is alive: weights, gradients, momentum, activations saved for the backward pass or recomputed there, and intermediate results.
The workspace inside a kernel and the memory of the driver are not counted.
"""

import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deeplab import make_net, multi_scale_loss, single_scale_loss

CARDS = (8, 12, 16, 24, 40)  # GiB
RESERVE = 1.5 * 2**30  # per card, for the CUDA context, cuDNN's workspace and fragmentation: assumed, not measured
ROWS: dict[str, dict[str, Any]] = {
    "train.py": {},
    "train.py --amp bf16": {"amp": True},
    "train.py --grad-checkpoint": {"grad_checkpoint": True},
    "train.py --amp bf16 --grad-checkpoint": {"amp": True, "grad_checkpoint": True},
    "train.py --batch-norm full": {"batch_norm": "full"},
    "train.py --batch-norm full --amp bf16": {"batch_norm": "full", "amp": True},
    "train_msc.py": {"scales": 3},
    "train_msc.py --amp bf16": {"scales": 3, "amp": True},
    "train_msc.py --one-scale-at-a-time": {"scales": 3, "one_scale_at_a_time": True},
    "train_msc.py --one-scale-at-a-time --amp bf16": {"scales": 3, "one_scale_at_a_time": True, "amp": True},
    "train_msc.py --grad-checkpoint": {"scales": 3, "grad_checkpoint": True},
    "train_msc.py --batch-norm full": {"scales": 3, "batch_norm": "full"},
}


@dataclass(frozen=True)
class StepMemory:
    """Bytes: ``weights`` with buffers, ``momentum`` (gradients need as much), ``saved`` for the backward pass, ``peak``."""

    weights: int
    momentum: int
    saved: int
    peak: int

    @property
    def card(self) -> int | None:
        """The smallest of ``CARDS`` that has enough memory for the step, in GiB."""
        return next((card for card in CARDS if self.peak + RESERVE <= card * 2**30), None)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators allocate, each once and while something refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def end(_: weakref.ref) -> None:
            self.now -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, end)
        self.now += size
        self.peak = max(self.peak, self.now)


def step_memory(
    backbone: str,
    num_classes: int,
    crop: tuple[int, int],
    batch_size: int,
    *,
    net_name: str = "deeplabv2",
    scales: int = 1,
    batch_norm: str = "frozen",
    amp: bool = False,
    grad_checkpoint: bool = False,
    one_scale_at_a_time: bool = False,
) -> StepMemory:
    """The memory of the second training step, when gradients and momentum exist.

    Args:
        scales: 1 as in train.py, or 3 as in train_msc.py.
        amp: bfloat16; float16 needs as much memory.
    """
    three: Callable[..., dict[str, Tensor]] = partial(multi_scale_loss, one_scale_at_a_time=one_scale_at_a_time)
    loss_function = three if scales == 3 else single_scale_loss
    size = "output" if net_name == "deeplabv2" else "input"
    with FakeTensorMode(), LiveBytes() as live:
        net = make_net({"net": net_name, "backbone": backbone, "num_classes": num_classes}, batch_norm).train()
        net.grad_checkpoint = grad_checkpoint
        weights = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
        momentum = [torch.zeros_like(parameter) for parameter in net.parameters() if parameter.requires_grad]
        images, labels = torch.zeros(batch_size, 3, *crop), torch.zeros(batch_size, *crop, dtype=torch.int64)
        before = live.now
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = loss_function(net, images, labels, size=size)["loss"]
            saved = live.now - before
            loss.backward()
            del loss
            net.zero_grad()
    return StepMemory(weights, sum(buffer.nbytes for buffer in momentum), saved, live.peak)


def memory_rows(args: Namespace) -> dict[str, StepMemory]:
    """{row: memory} for the net, the crop and the batch size in the benchmark's options."""
    compute = partial(step_memory, args.backbone, args.num_classes, args.input_size, args.batch_size, net_name=args.net)
    return {name: compute(**options) for name, options in ROWS.items()}


def print_memory(args: Namespace, rows: dict[str, StepMemory]) -> None:
    """Print the table and explain its columns."""
    height, width = args.input_size
    print(
        f"\nmemory of a training step, computed: batch {args.batch_size} of {height}x{width}, {args.net}, {args.backbone}, MB"
    )
    first = max(map(len, rows))
    print(f"{'':{first}}  {'weights':>8}  {'momentum':>8}  {'saved':>8}  {'peak':>8}  {'card':>6}")
    for name, row in rows.items():
        cells = "  ".join(f"{value / 1e6:8.0f}" for value in (row.weights, row.momentum, row.saved, row.peak))
        print(f"{name:{first}}  {cells}  {f'{row.card} GB' if row.card else '-':>6}")
    print("  saved: activations kept for the backward pass; peak: everything, with gradients and recomputed activations")
    print(f"  card: the smallest of {', '.join(map(str, CARDS))} GB with {RESERVE / 2**30:g} GB left over; computed, not tried")
