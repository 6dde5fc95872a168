"""One process or many: the setup from torchrun's environment, and the few collectives that the commands use.

All functions work in a single process, too. ``torchrun`` sets RANK, WORLD_SIZE and LOCAL_RANK; see
https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

import hashlib
import inspect
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.command import UserError, sentence_of

Value = TypeVar("Value")
_hosts: Any = None  # the process group of the CPUs: its collectives never wait for a GPU
PATIENCE = timedelta(days=7)  # one process may need hours longer for its share of the images than another


def rank() -> int:
    """The rank of this process, 0 in a single process."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that prints, logs and writes."""
    return rank() == 0


def start(first: Callable[[], Value | None] = lambda: None) -> Value | None:
    """Join the other processes, if there are any: NCCL for tensors on GPUs, gloo for tensors on CPUs.

    Args:
        first: called before joining, for example to fork processes while this one is small; if it raises in one process, all
            raise.

    Returns:
        The result of ``first()``.

    Raises:
        UserError: RANK and WORLD_SIZE are set, but the processes cannot find each other.
    """
    global _hosts
    made, failed = _attempt(first)
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, rank_, size = next(dist.rendezvous("env://"))
            # After a restart the store may still hold the addresses of the previous processes.
            store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=store, rank=rank_, world_size=size)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the {world_size()} processes cannot find each other ({reason}); start them with torchrun"
            ) from None
        _hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
    raise_any(failed)
    return made


def stop() -> None:
    """Leave the process group after a run that succeeded in all processes: NCCL may wait forever for one that failed.

    ``_hosts`` stays referenced: torch 2.4 would join its threads while holding Python's lock, which they may be waiting for.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap ``module`` so that its gradients are averaged over the processes; in a single process it is returned as it is.

    Buffers are not synchronised: the saved running statistics are those of process 0.
    """
    if world_size() == 1:
        return module
    device_ids = [device.index] if device.type == "cuda" else None
    names = inspect.signature(DistributedDataParallel).parameters  # torch 2.14 has renamed the option
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {"device_ids": device_ids, "gradient_as_bucket_view": True, sync_buffers: False}
    return DistributedDataParallel(module, **options)


def agree(*numbers: int) -> list[int]:
    """The maximum of each number over all processes. The processes wait for each other, but not for a GPU."""
    if _hosts is None:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_hosts)
    return tensor.tolist()


def gather(value: Value) -> list[Value]:
    """The values of all processes, by rank, for small values that can be pickled."""
    if _hosts is None:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_hosts)
    return values


def from_main(make: Callable[[], Value]) -> Value:
    """Call ``make()`` on process 0 and return its result on every process; if it raises, all processes raise."""
    if _hosts is None:
        return make()
    made, failed = _attempt(make) if is_main() else (None, None)
    sent: list[Any] = [made, failed and _problem(failed)]
    dist.broadcast_object_list(sent, group=_hosts)
    if failed:
        raise failed
    if sent[1]:
        raise OtherProcessFailed(*sent[1])
    return sent[0]


def everywhere(make: Callable[[], Value]) -> Value:
    """The result of ``make()`` in this process; if it raises in one process, all raise, so that none waits forever.

    ``make()`` must not use collectives: another process may already have failed.
    """
    made, failed = _attempt(make)
    raise_any(failed)
    return made  # type: ignore[return-value]  # make() did return


def raise_any(error: Exception | None) -> None:
    """Raise ``error`` or else, with its sentence and exit status, that of another process. All processes call this together."""
    problems = gather(_problem(error) if error else None)
    if error:
        raise error
    for problem in filter(None, problems):
        raise OtherProcessFailed(*problem)


def _attempt(make: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    """(result of ``make()``, None), or (None, the exception that it raised)."""
    try:
        return make(), None
    except Exception as error:  # to be sent to the other processes
        return None, error


def _problem(error: Exception) -> tuple[str, int]:
    """The sentence and the exit status of an error, for the other processes; the error itself may not be picklable."""
    status, text = sentence_of(error)
    if status is None:  # a bug: this process prints the traceback
        status, text = 1, f"process {rank()}: {traceback.format_exception_only(error)[-1].strip()}"
    return text, status


def check_same(found: Mapping[str, Any]) -> None:
    """Check that all processes have found the same, before work is divided by rank.

    Args:
        found: name in messages -> lists, strings and numbers, compared by their ``repr()``.

    Raises:
        UserError: on all processes, with the first difference.
    """
    mine = {name: hashlib.sha256(repr(value).encode()).digest() for name, value in found.items()}
    if all(theirs == mine for theirs in gather(mine)):
        return
    main, *others = gather(dict(found))
    number, other = next((number, other) for number, other in enumerate(others, start=1) if repr(other) != repr(main))
    name = next(name for name in {**main, **other} if repr(main.get(name)) != repr(other.get(name)))
    what, here, there = "it", main.get(name), other.get(name)
    if isinstance(here, list) and isinstance(there, list):
        pairs = enumerate(zip_longest(here, there, fillvalue="missing"), start=1)
        what, here, there = next((f"number {place}", *pair) for place, pair in pairs if repr(pair[0]) != repr(pair[1]))
    raise UserError(
        f"the processes have different {name}: {what} is {here} in process 0 and {there} in process {number}; give all of them "
        "the same options, lists and files"
    )


class OtherProcessFailed(UserError):
    """An error of another process, with its sentence and exit status."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy the tensors of process 0 to all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0, group=_group_of(tensor))


def sum_(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=_group_of(tensor))
    return tensor


def min_(tensor: Tensor) -> Tensor:
    """The minimum of each element over the processes, in place and on the device."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=_group_of(tensor))
    return tensor


def _group_of(tensor: Tensor) -> Any:
    """The host group for tensors on the CPU, so that the threads of the default group never hold a Python tensor."""
    return _hosts if tensor.device.type == "cpu" else None
