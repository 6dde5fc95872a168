"""Run a command of the project under another start method: ``python tests/helpers_start_method.py spawn train.py --help``."""

import multiprocessing
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    method, script, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    multiprocessing.set_start_method(method)
    runpy.run_path(script, run_name="__main__")
