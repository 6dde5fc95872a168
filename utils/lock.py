"""One run a snapshot folder: a lock that ends with its process, however that ends, and a note of who holds it."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from utils.command import UserError
from utils.files import save_json

LOCK, HOLDER = ".run.lock", ".run.json"
PATIENCE = 3.0  # seconds; forked helpers of a killed run may hold its lock until they see that it is gone


@contextmanager
def one_run(folder: Path) -> Iterator[str]:
    """Hold ``folder``, which is made where it is missing, for the run of this process.

    Yields:
        A line for the user: a run that was killed held it, or it cannot be locked; else "".

    Raises:
        UserError: another run holds it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    before, line = _holder(folder), ""
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE if before else 0)
        save_json(folder / HOLDER, {"host": socket.gethostname(), "pid": os.getpid()})
        if before:
            line = f"{folder} was in use by {_named(before)} when that was killed: its lock is taken over"
            line += "" if before.get("host") == socket.gethostname() else "; if it still runs there, stop this run"
    except Timeout:
        holder = _named(_holder(folder))
        raise UserError(f"--snapshot-dir {folder} is in use by {holder}; let it end, or choose another folder") from None
    except (OSError, NotImplementedError, UserError) as error:  # read-only, or a network disk without locks
        reason = getattr(error, "strerror", None) or error
        line = f"note: {folder} cannot be locked ({reason}): see to it that no other run writes there"
    try:
        yield line
    finally:
        for name in (HOLDER, LOCK) if lock.is_locked else ():
            with suppress(OSError):  # Windows lets nobody delete what is open
                (folder / name).unlink(missing_ok=True)
        lock.release()
        for place in made:  # what a run that never began has made is empty
            with suppress(OSError):
                place.rmdir()


def _holder(folder: Path) -> dict:
    """``{"host": ..., "pid": ...}`` of the run that holds, or held, ``folder``; {} where there is none."""
    try:
        return dict(json.loads((folder / HOLDER).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _named(holder: dict) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder.keys() >= {"host", "pid"} else "another run"
