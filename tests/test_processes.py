"""Helper processes ignore stop signals and end with the main process, under every start method."""

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from tests.helpers import ROOT
from utils.processes import STOP_SIGNALS, kill_helpers, start_helper

MAIN = """
import multiprocessing, os, sys, time
sys.path.insert(0, {root!r})
from concurrent.futures import ProcessPoolExecutor
from utils.processes import start_helper

if __name__ == "__main__":
    pools = []
    for method in multiprocessing.get_all_start_methods():
        pools.append(ProcessPoolExecutor(2, multiprocessing.get_context(method), start_helper))
        first, second = [pools[-1].submit(os.getpid) for _ in range(2)]
        pools[-1].submit(time.sleep, 60)  # busy, not waiting for work
        print(method, first.result(), second.result(), flush=True)
    print("ready", flush=True)
    time.sleep(60)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_helpers_ignore_stop_signals_and_end_with_a_killed_main_process(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(MAIN.format(root=str(ROOT)))
    main = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    helpers = {}
    try:
        while (line := main.stdout.readline().split()) and line != ["ready"]:
            helpers[line[0]] = {int(pid) for pid in line[1:]}
        assert set(helpers) == set(multiprocessing.get_all_start_methods())
        for pid in set().union(*helpers.values()):
            for number in STOP_SIGNALS:
                os.kill(pid, number)
        assert all(map(alive, set().union(*helpers.values())))
    finally:
        main.kill()
    # Every helper holds the other end of this pipe, so it closes when the last helper ends.
    assert main.communicate(timeout=20)[0] == ""
    assert main.returncode == -signal.SIGKILL


def test_a_broken_pool_of_helpers_that_ignore_signals_ends():
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with ProcessPoolExecutor(2, context, start_helper) as pool:
        waiting = pool.submit(signal.pause) if hasattr(signal, "pause") else pool.submit(int)
        with pytest.raises(BrokenProcessPool):
            pool.submit(os._exit, 9).result(timeout=20)
        kill_helpers(pool)
        with pytest.raises(BrokenProcessPool):
            waiting.result(timeout=20)
