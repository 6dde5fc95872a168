"""One run per snapshot folder: a lock that is released when its process ends, in whatever way, and a note of its holder."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from utils.command import UserError
from utils.files import DiskError, save_json

LOCK, HOLDER = ".run.lock", ".run.json"
NOTHING = (-1, -1)  # device and inode of no file
PATIENCE = 3.0  # seconds; forked workers of a killed run may hold its lock until they notice that it is gone


class FolderLock:
    """A context manager that locks ``folder`` for this process's run. A missing folder is created.

    Entering it returns a line for the user if a killed run held the folder or the folder cannot be locked, else "".

    Raises:
        UserError: another run holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, FileLock(folder / LOCK)
        self._me = {"host": socket.gethostname(), "pid": os.getpid()}
        self._file: tuple[int, int] | None = None  # of the lock file that is held; kept open, so no new file gets its inode
        self._made: list[Path] = []

    def __enter__(self) -> str:
        self._made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        before = _holder(self.folder)
        try:
            self._acquire(PATIENCE if before else 0)
        except Timeout:
            holder = _named(_holder(self.folder))
            raise UserError(
                f"--snapshot-dir {self.folder} is in use by {holder}; wait until it ends, or choose another folder"
            ) from None
        except (OSError, NotImplementedError, UserError) as error:  # read-only, or a network disk without locks
            reason = getattr(error, "strerror", None) or error
            return f"note: {self.folder} cannot be locked ({reason}); make sure that no other run writes there"
        if not before:
            return ""
        line = f"{self.folder} was left locked by {_named(before)}; this run takes over the lock"
        return line + ("" if before.get("host") == self._me["host"] else "; if that process still runs there, stop this run")

    def _acquire(self, patience: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(timeout=patience)
        self._file = _number(self.folder / LOCK)
        save_json(self.folder / HOLDER, self._me)

    def lost(self) -> bool:
        """Whether the lock file that is held is no longer the one in the folder: somebody deleted it, or the folder."""
        return self._file is not None and self._file != _number(self.folder / LOCK)

    def check(self) -> None:
        """Check, before anything is saved, that this run still holds the folder; a deleted lock is acquired again.

        Raises:
            UserError: another run has used the folder in the meantime, even if it has ended.
        """
        if not self.lost():
            return
        self._lock.release()
        self._file = NOTHING
        try:
            there = any((self.folder / name).exists() for name in ("last.ckpt", "args.json"))
            if there and _holder(self.folder) != self._me:  # another run's, even if it has ended
                raise Timeout(str(self.folder))
            with suppress(OSError, NotImplementedError, DiskError):  # the save itself reports what cannot be written
                self._acquire(0)
        except Timeout:
            raise UserError(
                f"--snapshot-dir {self.folder} or its {LOCK} was deleted, and {_named(_holder(self.folder))} has the folder "
                "now; this run writes nothing more there"
            ) from None

    def __exit__(self, *error: object) -> None:
        for name in (HOLDER, LOCK) if self._file and not self.lost() else ():
            with suppress(OSError):  # Windows does not delete open files
                (self.folder / name).unlink(missing_ok=True)
        self._lock.release()
        for place in self._made:  # still empty if the run never began
            with suppress(OSError):
                place.rmdir()


def _number(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, which a later file of the same name does not share; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _holder(folder: Path) -> dict:
    """``{"host": ..., "pid": ...}`` of the run that holds or held ``folder``; {} if there is none."""
    try:
        return dict(json.loads((folder / HOLDER).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _named(holder: dict) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder.keys() >= {"host", "pid"} else "another run"
