"""One process or many: the set-up that torchrun's environment asks for, and the few things processes tell one another.

Everything works unchanged in a single process. ``torchrun`` sets RANK, WORLD_SIZE and LOCAL_RANK; see
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
_hosts: Any = None  # the group of the processes' CPUs: what goes through it waits for no GPU
PATIENCE = timedelta(days=7)  # one process's share of the pictures may take hours longer than another's


def rank() -> int:
    """This process's number, 0 in a single process."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that prints, logs and writes."""
    return rank() == 0


def start(first: Callable[[], Value | None] = lambda: None) -> Value | None:
    """Join the other processes, if there are any: NCCL for tensors on GPUs, gloo for those on CPUs.

    Args:
        first: called before, such as to fork processes from this still small one; where it raises in one process, all raise.

    Returns:
        What ``first()`` does.

    Raises:
        UserError: RANK and WORLD_SIZE are set, but the others cannot be found.
    """
    global _hosts
    made, failed = _attempt(first)
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, rank_, size = next(dist.rendezvous("env://"))
            # After a restart the store may still hold the addresses of the processes before it.
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
    """Leave the group of processes after a run that all of them ended well: NCCL may wait for ever for one that failed.

    The hosts' group stays referred to: torch 2.4 would join its threads with Python's lock held, which they may be waiting for.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` whose gradients are averaged over the processes; itself in a single process.

    Its buffers are not sent around: running statistics are those of process 0, which is the one that saves.
    """
    if world_size() == 1:
        return module
    device_ids = [device.index] if device.type == "cuda" else None
    names = inspect.signature(DistributedDataParallel).parameters  # the option's name has changed in torch 2.14
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {"device_ids": device_ids, "gradient_as_bucket_view": True, sync_buffers: False}
    return DistributedDataParallel(module, **options)


def agree(*numbers: int) -> list[int]:
    """For each number the largest that any process gave; the processes wait for one another, but not for a GPU."""
    if _hosts is None:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_hosts)
    return tensor.tolist()


def gather(value: Value) -> list[Value]:
    """The values of all processes, by their numbers, for small things that can be pickled."""
    if _hosts is None:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_hosts)
    return values


def from_main(make: Callable[[], Value]) -> Value:
    """What ``make()`` returns on process 0, on every process; what it raises there is raised everywhere."""
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
    """What ``make()`` returns in this process; where it raises in one of them, all raise, so that none waits for ever.

    ``make()`` talks to no other process: they may not all come so far.
    """
    made, failed = _attempt(make)
    raise_any(failed)
    return made  # type: ignore[return-value]  # make() did return


def raise_any(error: Exception | None) -> None:
    """Raise ``error``, else the sentence and the exit status of one that another process gives; all call this together."""
    problems = gather(_problem(error) if error else None)
    if error:
        raise error
    for problem in filter(None, problems):
        raise OtherProcessFailed(*problem)


def _attempt(make: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    """What ``make()`` returns, or raises."""
    try:
        return make(), None
    except Exception as error:  # the others must hear of it
        return None, error


def _problem(error: Exception) -> tuple[str, int]:
    """What the other processes are told of an error, which may be of a kind that cannot be pickled: its sentence and status."""
    status, text = sentence_of(error)
    if status is None:  # a bug, whose traceback comes from this process
        status, text = 1, f"process {rank()}: {traceback.format_exception_only(error)[-1].strip()}"
    return text, status


def check_same(found: Mapping[str, Any]) -> None:
    """Make sure that all processes have found the same, before anything is shared out by number.

    Args:
        found: what it is called in messages -> lists, strings and numbers, told apart by their ``repr()``.

    Raises:
        UserError: on all processes, with the first thing that differs and where it does.
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
    """Something went wrong in another process, which tells what."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give all processes the tensors of process 0, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0, group=_group_of(tensor))


def sum_(tensor: Tensor) -> Tensor:
    """Add ``tensor`` up over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=_group_of(tensor))
    return tensor


def min_(tensor: Tensor) -> Tensor:
    """Take the smallest of each element over the processes, in place and on the device."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=_group_of(tensor))
    return tensor


def _group_of(tensor: Tensor) -> Any:
    """The hosts' group for what is on the CPU, so that the threads of the other one never hold a tensor of Python's."""
    return _hosts if tensor.device.type == "cpu" else None
