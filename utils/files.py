"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from utils.command import UserError


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call ``write(file)`` on a temporary file beside ``path`` and rename it: ``path`` is the old file or the whole new one.

    Missing folders are made.

    Raises:
        UserError: the file cannot be written (no space, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps a full disk in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path} cannot be written ({cause.strerror or cause}); free space or choose another folder") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def save_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
