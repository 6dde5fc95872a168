"""The device of a command and its precision: selection, mixed precision, compilation."""

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from utils.command import UserError, put
from utils.distributed import is_main, rank, world_size


def select_device(name: str, gpu: int, tf32: bool = True, deterministic: bool = False) -> torch.device:
    """Select the device to run on, and set its precision. Call it before anything is computed.

    Args:
        name: ``"auto"`` (CUDA if available, else the CPU) or a torch device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``,
            ``"xpu"``.
        gpu: index of the CUDA device if ``name`` has none. Of several processes each uses the device of its local rank, and
            ``gpu`` is ignored.
        tf32: whether CUDA may round the factors of float32 convolutions to 10 bits; torch's default is overridden.
        deterministic: whether to use only deterministic algorithms
            (https://docs.pytorch.org/docs/stable/notes/randomness.html).

    Raises:
        UserError: the device does not exist here, or several processes would share one.
    """
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    if name == "auto":
        if not torch.cuda.is_available():
            if is_main():
                put(sys.stdout, f"no CUDA device found: running on the CPU with {torch.get_num_threads()} threads")
            return torch.device("cpu")
        name = "cuda"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a torch device; expected auto, cpu, cuda, cuda:N, mps or xpu") from None
    if device.type == "cuda":
        return _select_cuda(device, gpu)
    available = {"cpu": True, "mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    if device.type not in available:
        raise UserError(f"--device {name} is not supported; expected auto, cpu, cuda, cuda:N, mps or xpu")
    if not available[device.type]:
        raise UserError(
            f"--device {name}: this machine, or this build of torch, has no {device.type} device; try --device auto"
        )
    if device.type in ("mps", "xpu") and world_size() > 1:
        raise UserError(f"--device {device.type} works in a single process only; start it without torchrun")
    return device


def _select_cuda(device: torch.device, gpu: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if world_size() > 1:
        if device.index is not None:
            raise UserError(
                f"--device {device} would put {world_size()} processes on one GPU; use --device cuda, and choose the GPUs with "
                "CUDA_VISIBLE_DEVICES"
            )
        index = _local_rank(count)
    else:
        index = gpu if device.index is None else device.index
    if not 0 <= index < count:
        raise UserError(
            f"CUDA device {index} was requested, but this machine has {count}; choose another with --gpu or --device"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _local_rank(count: int) -> int:
    """The rank of this process on its machine: from torchrun, from Slurm, else its rank modulo ``count`` GPUs."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return rank() % max(count, 1)


def check_compiler(device: torch.device) -> None:
    """Compile a tiny function, so that a missing compiler is reported before any work is done.

    Raises:
        UserError: torch.compile does not work here.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # the kind depends on what is missing
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        advice = "install a C++ compiler (g++, or MSVC on Windows), or leave --compile out"
        raise UserError(f"--compile: torch.compile does not work on this machine ({text.strip()[:200]}); {advice}") from None


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of ``--amp``: ``"off"`` (float32), ``"bf16"`` or ``"fp16"``."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the host. The returned function waits for this copy, but not for later work, and returns it."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy, done = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait
