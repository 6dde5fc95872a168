"""One process or many: the set-up that torchrun's environment asks for, and the few things processes tell one another.

Everything works unchanged in a single process. ``torchrun`` sets RANK, WORLD_SIZE and LOCAL_RANK; see
https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.command import UserError


def rank() -> int:
    """This process's number, 0 in a single process."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that prints, logs and writes."""
    return rank() == 0


def select_device(name: str, gpu: int) -> torch.device:
    """The device to run on.

    Args:
        name: ``"auto"`` (CUDA where there is any, else the CPU) or a torch device such as ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        gpu: index of the CUDA device where ``name`` does not give one; under torchrun each process takes its LOCAL_RANK.

    Raises:
        UserError: the device does not exist here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            if is_main():
                print(f"no CUDA device found: running on the CPU with {torch.get_num_threads()} threads")
            return torch.device("cpu")
        name = "cuda"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is no torch device; write auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(os.environ["LOCAL_RANK"]) if world_size() > 1 else gpu if device.index is None else device.index
    if not 0 <= index < count:
        raise UserError(
            f"CUDA device {index} was asked for, but this machine has {count}; choose another with --gpu or --device"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of ``--amp``: ``"off"`` (float32), ``"bf16"`` or ``"fp16"``."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def start(device: torch.device) -> None:
    """Join the other processes, if there are any: NCCL for tensors on GPUs, gloo for those on CPUs."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` whose gradients are averaged over the processes; itself in a single process."""
    if world_size() == 1:
        return module
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)


def no_sync(module: nn.Module, skip: bool):
    """A context in which a backward pass keeps its gradients to this process, where ``skip`` is set."""
    return module.no_sync() if skip and isinstance(module, DistributedDataParallel) else nullcontext()


def sum_(tensor: Tensor) -> Tensor:
    """Add ``tensor`` up over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
