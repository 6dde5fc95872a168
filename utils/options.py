"""The command line: the options that train.py and train_msc.py share, value types, and how a command ends."""

import argparse
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in how a command was called: one sentence that says what was found, what was expected, what to do."""

    exit_status = 2


def run_command(main: Callable[[], int | None]) -> None:
    """Run ``main`` and end the process as every command of this project does.

    An exception that carries an ``exit_status`` (``UserError``, ``DatasetError``, ``WeightsError``) is the user's to mend:
    its sentence goes to standard error, without a traceback. Ctrl-C ends with status 130. Anything else is a bug and keeps
    its traceback.
    """
    try:
        status = main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if status is None:
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
    sys.exit(status)


def size(text: str) -> tuple[int, int]:
    """An argparse type: ``"321,321"`` -> (321, 321), height and width in pixels."""
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write HEIGHT,WIDTH, as in 321,321") from None
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; both sides must be at least 1")
    return height, width
