"""One run a snapshot folder: a lock that ends with its process, however that ends, and a note of who holds it."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from utils.command import UserError
from utils.files import DiskError, save_json

LOCK, HOLDER = ".run.lock", ".run.json"
NOTHING = (-1, -1)  # no file's numbers
PATIENCE = 3.0  # seconds; forked helpers of a killed run may hold its lock until they see that it is gone


class FolderLock:
    """A context that holds ``folder``, which is made where it is missing, for the run of this process.

    Entering it gives a line for the user: a run that was killed held the folder, or it cannot be locked; else "".

    Raises:
        UserError: another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, FileLock(folder / LOCK)
        self._me = {"host": socket.gethostname(), "pid": os.getpid()}
        self._file: tuple[int, int] | None = None  # the lock file that is held; a deleted one's number is not given again
        self._made: list[Path] = []

    def __enter__(self) -> str:
        self._made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        before = _holder(self.folder)
        try:
            self._acquire(PATIENCE if before else 0)
        except Timeout:
            holder = _named(_holder(self.folder))
            raise UserError(
                f"--snapshot-dir {self.folder} is in use by {holder}; let it end, or choose another folder"
            ) from None
        except (OSError, NotImplementedError, UserError) as error:  # read-only, or a network disk without locks
            reason = getattr(error, "strerror", None) or error
            return f"note: {self.folder} cannot be locked ({reason}): see to it that no other run writes there"
        if not before:
            return ""
        line = f"{self.folder} was in use by {_named(before)} when that was killed: its lock is taken over"
        return line + ("" if before.get("host") == self._me["host"] else "; if it still runs there, stop this run")

    def _acquire(self, patience: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(timeout=patience)
        self._file = _number(self.folder / LOCK)
        save_json(self.folder / HOLDER, self._me)

    def lost(self) -> bool:
        """Whether the lock file that is held is not the one in the folder: somebody has deleted it, or the folder."""
        return self._file is not None and self._file != _number(self.folder / LOCK)

    def check(self) -> None:
        """Make sure, before anything is saved, that the folder is still this run's: a lock that was deleted is taken again.

        Raises:
            UserError: another run has come in the meantime, whether it is still there or not.
        """
        if not self.lost():
            return
        self._lock.release()
        self._file = NOTHING
        try:
            there = any((self.folder / name).exists() for name in ("last.ckpt", "args.json"))
            if there and _holder(self.folder) != self._me:  # another run's, even if it has ended
                raise Timeout(str(self.folder))
            with suppress(OSError, NotImplementedError, DiskError):  # the save itself says what cannot be written
                self._acquire(0)
        except Timeout:
            raise UserError(
                f"--snapshot-dir {self.folder} was deleted, or its {LOCK}, and {_named(_holder(self.folder))} has it now; "
                "nothing more of this run is written there"
            ) from None

    def __exit__(self, *error: object) -> None:
        for name in (HOLDER, LOCK) if self._file and not self.lost() else ():
            with suppress(OSError):  # Windows lets nobody delete what is open
                (self.folder / name).unlink(missing_ok=True)
        self._lock.release()
        for place in self._made:  # what a run that never began has made is empty
            with suppress(OSError):
                place.rmdir()


def _number(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that is made under its name later; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _holder(folder: Path) -> dict:
    """``{"host": ..., "pid": ...}`` of the run that holds, or held, ``folder``; {} where there is none."""
    try:
        return dict(json.loads((folder / HOLDER).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _named(holder: dict) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder.keys() >= {"host", "pid"} else "another run"
