"""A parallel map with a bounded queue, for work on many small files."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from utils.argtypes import helpers
from utils.command import UserError
from utils.processes import default_processes, kill_helpers, start_helper

Result = TypeVar("Result")


def parallel_map(function: Callable[..., Result], tasks: Iterable[tuple], workers: int) -> Iterator[Result]:
    """Yield ``function(*task)`` for every task, in no particular order.

    ``tasks`` is read only a few tasks ahead, so that an iterator over a large archive never fills the memory. With ``workers``
    0 everything runs in this process, in order. On Ctrl-C the running tasks (each is small) are finished and no other is
    started. The workers end with this process, however it ends.

    Args:
        function: importable by name; its arguments and result must be picklable.
        tasks: tuples of arguments; messages show the first one.
        workers: number of processes; Windows cannot wait for more than 61.

    Raises:
        UserError: a worker process died: a file crashes its decoder, or memory ran out.
    """
    if workers == 0:
        for task in tasks:
            yield function(*task)
        return
    workers = min(workers, 61) if sys.platform == "win32" else workers
    tasks = iter(tasks)
    try:
        executor = ProcessPoolExecutor(workers, initializer=start_helper)
    except (OSError, NotImplementedError) as error:  # /dev/shm is full or missing, or too many files are open
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"no worker processes can be started ({reason}); add --workers 0") from None
    with executor as pool:
        pending: dict[Future[Result], str] = {}
        try:
            while True:
                for task in islice(tasks, 4 * workers - len(pending)):
                    pending[pool.submit(function, *task)] = str(task[0])
                if not pending:
                    return
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    del pending[future]
                    yield result
        except BrokenProcessPool:
            kill_helpers(pool)
            names = ", ".join(sorted(pending.values()))
            raise UserError(
                f"a worker process was killed while it worked on one of {names}: a file crashes its decoder, or memory ran "
                "out; find out which with --workers 1"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--workers``, the number of processes for :func:`parallel_map`."""
    text = "number of worker processes; 0: work in the main process (default: %(default)s)"
    parser.add_argument("--workers", type=helpers, default=default_processes(64), help=text)
