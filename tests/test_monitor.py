"""The share of the time that the device waits for data."""

import time
from types import SimpleNamespace

import pytest
import torch

from tests.helpers_runs import SCRATCH, log_lines, train
from utils.training import monitor as meter
from utils.training.monitor import DataWait
from utils.training.stop import Ending

CPU = torch.device("cpu")


class Clock:
    """Stands in for the host's clock and for the device's events: seconds that a test sets."""

    def __init__(self, monkeypatch) -> None:
        self.host = self.device = 0.0
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                clock.device = max(clock.device, clock.host)  # the stream reaches it after all earlier work
                self.time = clock.device

            def elapsed_time(self, other: "Event") -> float:
                return (other.time - self.time) * 1000

        monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: self.host))
        monkeypatch.setattr(torch.cuda, "Event", Event)


def steps(wait: DataWait, clock: Clock, reading: float, launching: float, computing: float, count: int = 10) -> float:
    """The share after ``count`` steps with these seconds each, followed by a host sync."""
    for _ in range(count):
        with wait.reading():
            clock.host += reading
        clock.device = max(clock.device, clock.host) + computing
        clock.host += launching
    clock.host = max(clock.host, clock.device)
    return wait.share()


def test_on_cuda_only_an_idle_device_waits(monkeypatch):
    """The host loads data for half of its time: ahead of a device that is always busy, and of one that is not."""
    clock = Clock(monkeypatch)
    wait = DataWait(torch.device("cuda", 0), 4)
    steps(wait, clock, 0.01, 0.01, 0.1)
    assert steps(wait, clock, 0.01, 0.01, 0.1) == pytest.approx(0.01 / 1.01, rel=1e-6)  # the first of ten, after the log line
    assert steps(wait, clock, 0.3, 0.01, 0.1) == pytest.approx((0.3 + 9 * 0.21) / (9 * 0.31 + 0.4))


def test_other_devices_wait_when_the_host_does(monkeypatch):
    clock = Clock(monkeypatch)
    wait = DataWait(CPU, 0)
    assert steps(wait, clock, 1.0, 3.0, 0.0) == pytest.approx(0.25)
    assert steps(wait, clock, 0.0, 3.0, 0.0) == 0


def test_the_warning_comes_once_and_names_what_to_raise(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(meter, "usable_cores", lambda: 8)
    wait, said = DataWait(CPU, 2), []
    for reading in (1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        steps(wait, clock, reading, 3.0, 0.0)
        said.append(wait.warning())
    assert [bool(text) for text in said] == [False] * 5 + [True] + [False] * 3  # three in a row, once
    assert "raise --num-workers, which is 2; this process may use 8 cores" in said[5]
    wait = DataWait(CPU, 8)
    for _ in range(3):
        steps(wait, clock, 1.0, 3.0, 0.0)
    assert "more than 8 cores" in wait.warning()


def test_a_run_reports_slow_data_loading(toy_voc, tmp_path, monkeypatch, capsys):
    """In every line of the log, and once by a warning."""
    read = Ending.read

    def slow(*args):
        time.sleep(0.3)
        return read(*args)

    monkeypatch.setattr(Ending, "read", slow)
    assert train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "5") == 0
    assert all(0.1 < line["data_wait"] <= 1 for line in log_lines(tmp_path))
    assert capsys.readouterr().out.count("warning: the device waits for images") == 1
