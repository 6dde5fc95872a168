"""How a command of this project ends: errors that are the user's to mend, exit statuses, and what a terminal is shown."""

import atexit
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TextIO

from utils.processes import STOP_SIGNALS, is_heard

FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, of its share
# torch on the CPU, torch on CUDA, OpenCV
_NO_MEMORY = re.compile(
    r"Storage size calculation overflowed|tried to allocate \d+ bytes|CUDA out of memory|Failed to allocate \d+ bytes"
)
# gloo, NCCL
_OTHER_GONE = re.compile(r"gloo[/\\]transport|Connection (closed|reset) by peer|ncclRemoteError|remote process exit")


class UserError(Exception):
    """A mistake in how a command was called: one sentence that says what was found, what was expected, what to do."""

    exit_status = 2


def run_command(main: Callable[[], int | None]) -> None:
    """Run ``main`` and end the process as every command of this project does.

    An exception that carries an ``exit_status`` (``UserError``, ``DatasetError``, ``WeightsError``) is the user's to mend:
    its sentence goes to standard error, without a traceback. So does one where memory ran out, with status 1. Ctrl-C ends with
    status 130, a request to stop that ``main`` does not handle itself with 128 + its number, after whatever stands in a
    ``finally``. Anything else is a bug and keeps its traceback, with status 1.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGINT and is_heard(number):
            signal.signal(number, _exit_by_signal)
    sys.stdout, sys.stderr = Shown(sys.stdout, "\n\t"), Shown(sys.stderr, "\n\t\r")
    status: int | None
    try:
        status = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        put(sys.stderr, "interrupted")
        status = 130
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        status = end.code
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        _drop(sys.stdout)
        status = 141
    except Exception as error:
        told, text = sentence_of(error)
        if told is None and not _one_of_several():
            raise
        if told is None:
            traceback.print_exc()
        else:
            put(sys.stderr, shown(f"{os.path.basename(sys.argv[0])}: error: {text}"))
        status = told or 1
    _end(status)


def sentence_of(error: Exception) -> tuple[int | None, str]:
    """The exit status and the sentence of an error that is not ours to mend; None and "" for a bug."""
    status, text = getattr(error, "exit_status", None), str(error)
    if status is not None:
        return status, text
    if "does not have a deterministic implementation" in text:  # torch's own words
        return 2, f"--deterministic: {text.split(',')[0]}; leave the option out"
    if (found := _NO_MEMORY.search(text)) or isinstance(error, MemoryError):
        what = f" ({found[0]})" if found else ""
        return 1, f"memory ran out{what}: take smaller pictures, crops (--input-size) or batches (--batch-size)"
    if _one_of_several() and isinstance(error, RuntimeError) and _OTHER_GONE.search(text):
        return 1, "another process has ended before its work was done; where it could, it said why"
    if isinstance(error, OSError) and (refused := _refused(error)):
        return 2, refused
    return None, ""


def _refused(error: OSError) -> str:
    """What the system refused, and where, in a sentence; "" where it may be a mistake of ours, such as a file that is gone."""
    if error.filename is None:
        full = error.errno in FULL
        return f"what is printed cannot be written ({error.strerror}); free space, or print elsewhere" if full else ""
    if isinstance(error, FileNotFoundError | FileExistsError):
        return ""
    place = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    place = place if len(place) <= 300 else f"{place[:100]}... ({len(place)} characters)"
    advice = "change its rights, or choose another place" if isinstance(error, PermissionError) else "choose another place"
    return f"{place} cannot be used ({error.strerror}); {advice}"


def shown(text: str, keep: str = "\n\t") -> str:
    """``text`` with control characters other than ``keep`` as their codes, ``\\x1b``, so that no name steers a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class Shown:
    """A text stream to which :func:`shown` text is written; what cannot be encoded comes as its code, too.

    Attributes:
        stream: the one that is written to.
    """

    def __init__(self, stream: TextIO, keep: str) -> None:
        self.stream, self.keep = stream, keep
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        return self.stream.write(shown(text, self.keep))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def put(stream: "TextIO | Shown", *lines: str) -> None:
    """Print lines for a user who may have gone: without a reader or a terminal, what is printed from then on is dropped.

    What a full disk does not take is lost as well, but the next lines are tried again.
    """
    try:
        for line in lines:
            print(line, file=stream, flush=True)
    except OSError as error:
        if error.errno not in FULL:
            _drop(stream)


def _drop(stream: "TextIO | Shown") -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end(status: int) -> NoReturn:
    """End the process; where it is one of several, without taking Python down.

    A moment after each collective a thread of gloo lets go of its tensors, which takes Python's lock. Where it asks too late,
    Python (up to 3.13) ends the thread, and with it the process, by SIGABRT instead of ``status``
    (https://github.com/pytorch/pytorch/pull/179291). The threads cannot be joined before: torch 2.4 does so with the lock held.
    """
    if _one_of_several():
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # its reader has gone, or its disk is full: what it holds goes nowhere
            _drop(stream)
    if not _one_of_several():
        sys.exit(status)
    os._exit(status)


def _one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _exit_by_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
