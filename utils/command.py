"""Run a command of this project: the user's errors, exit statuses, and safe output to a terminal."""

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

FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk, a full quota
# torch on the CPU, torch on CUDA, OpenCV
_NO_MEMORY = re.compile(
    r"Storage size calculation overflowed|tried to allocate \d+ bytes|CUDA out of memory|Failed to allocate \d+ bytes"
)
# gloo, NCCL
_OTHER_GONE = re.compile(r"gloo[/\\]transport|Connection (closed|reset) by peer|ncclRemoteError|remote process exit")


class UserError(Exception):
    """A mistake in how a command was called: one sentence with what was found, what was expected and what to do."""

    exit_status = 2


def run_command(main: Callable[[], int | None]) -> None:
    """Run ``main`` and end the process as every command of this project does.

    An exception with an ``exit_status`` (``UserError``, ``DatasetError``, ``WeightsError``) is a mistake of the user: its
    sentence goes to standard error, without a traceback. If memory runs out, a sentence is printed as well, with status 1. The
    status is 130 after Ctrl-C, and 128 + its number after a stop signal that ``main`` does not handle; ``finally`` blocks run
    first. Anything else is a bug and keeps its traceback, with status 1.
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
    except BrokenPipeError:  # the reader of our output is gone, as in `... | head`
        _drop(sys.stdout)
        status = 141
    except Exception as error:
        status, text = sentence_of(error)
        if status is None and not _one_of_several():
            raise
        if status is None:
            traceback.print_exc()
        else:
            put(sys.stderr, shown(f"{os.path.basename(sys.argv[0])}: error: {text}"))
        status = status or 1
    _end(status)


def sentence_of(error: Exception) -> tuple[int | None, str]:
    """The exit status and the sentence of an error that is not a bug; None and "" for a bug."""
    status, text = getattr(error, "exit_status", None), str(error)
    if status is not None:
        return status, text
    if "does not have a deterministic implementation" in text:  # torch's own words
        return 2, f"--deterministic: {text.split(',')[0]}; leave the option out"
    if (found := _NO_MEMORY.search(text)) or isinstance(error, MemoryError):
        what = f" ({found[0]})" if found else ""
        return 1, f"memory ran out{what}: use smaller images, crops (--input-size) or batches (--batch-size)"
    if _one_of_several() and isinstance(error, RuntimeError) and _OTHER_GONE.search(text):
        return 1, "another process has ended before its work was done; see its message, if it printed one"
    if isinstance(error, OSError) and (refused := _refused(error)):
        return 2, refused
    return None, ""


def _refused(error: OSError) -> str:
    """The sentence for an operation that the system refused; "" if it may be our bug, such as a file that is gone."""
    if error.filename is None:
        full = error.errno in FULL
        return f"the output cannot be written ({error.strerror}); free space, or print elsewhere" if full else ""
    if isinstance(error, FileNotFoundError | FileExistsError):
        return ""
    place = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    place = place if len(place) <= 300 else f"{place[:100]}... ({len(place)} characters)"
    advice = "change its permissions, or choose another path" if isinstance(error, PermissionError) else "choose another path"
    return f"{place} cannot be used ({error.strerror}); {advice}"


def shown(text: str, keep: str = "\n\t") -> str:
    """``text`` with the codes of control characters, ``\\x1b``, except ``keep``, so that no name controls the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class Shown:
    """A text stream that passes everything through :func:`shown`; characters that cannot be encoded become codes, too.

    Attributes:
        stream: the underlying stream.
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
    """Print lines for a user who may be gone: once there is no reader or terminal, further output is dropped.

    On a full disk lines are lost as well, but the next ones are tried again.
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
    """End the process; if it is one of several, without shutting down Python.

    Shortly after each collective a thread of gloo releases its tensors, which needs Python's lock. If Python is shutting down
    by then, it (up to 3.13) ends the thread, and the process dies of SIGABRT instead of returning ``status``
    (https://github.com/pytorch/pytorch/pull/179291). The threads cannot be joined first: torch 2.4 does so with the lock held.
    """
    if _one_of_several():
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # its reader is gone, or its disk is full: drop what is buffered
            _drop(stream)
    if not _one_of_several():
        sys.exit(status)
    os._exit(status)


def _one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _exit_by_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
