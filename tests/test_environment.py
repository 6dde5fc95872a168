"""``scripts/environment.sh`` with a fake ``python`` that logs the calls of pip."""

import os
import shutil
import subprocess

import pytest

from tests.helpers import ROOT

BASH = shutil.which("bash")
PYTHON = """#!{bash}
if [ -n "{failing}" ] && [[ "$*" = *"{failing}"* ]]; then
    echo "a reason" >&2
    exit 1
fi
case "$*" in
    *sys.prefix*) echo "{prefix}" ;;
    *"-m pip"*) echo "$*" >> "{prefix}/log" ;;
esac
"""
pytestmark = pytest.mark.skipif(not BASH, reason="a script for bash")


@pytest.fixture
def environment(tmp_path):
    """Calls ``environment FILE...`` in a new folder; commands that contain ``failing`` fail."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/environment.sh", tmp_path / "scripts")
    (tmp_path / "a.txt").write_text("torch\n")
    (tmp_path / "b.txt").write_text("pytest\n")

    def call(*files, failing="", active=True):
        for name in ("python", "python3"):
            program = tmp_path / "bin" / name
            program.write_text(PYTHON.format(bash=BASH, prefix=tmp_path, failing=failing))
            program.chmod(0o755)
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | ({"VIRTUAL_ENV": str(tmp_path)} if active else {})
        script = f"set -euo pipefail; . scripts/environment.sh; environment {' '.join(files)}; echo ready"
        done = subprocess.run([BASH, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
        log = tmp_path / "log"
        asked = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return done, [line.split("--disable-pip-version-check ")[1] for line in asked]

    return call


def test_each_file_is_installed_once(environment, tmp_path):
    done, asked = environment("a.txt")
    assert asked == ["-r a.txt"]
    assert f"installing a.txt into {tmp_path}" in done.stdout
    assert environment("a.txt")[1] == []
    assert environment("a.txt", "b.txt")[1] == ["-r b.txt"]
    assert environment("a.txt")[1] == []
    (tmp_path / "a.txt").write_text("torch>=3\n")
    done, asked = environment("a.txt", "b.txt")
    assert asked == ["-r a.txt"]
    assert done.stdout.endswith("ready\n")


@pytest.mark.parametrize(
    ("failing", "active", "sentence"),
    [
        ("-m pip", True, "pip could not install a.txt"),
        ("import pip", True, "has no pip"),
        ("version_info", True, "Python 3.10 or newer is needed"),
        ("version_info", False, "Python 3.10 or newer is needed"),
        ("ensurepip", False, "apt install python3-venv"),
        ("-m venv", False, "could not be created"),
    ],
)
def test_a_failure_is_one_sentence(environment, failing, active, sentence):
    done, _ = environment("a.txt", failing=failing, active=active)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "ready" not in done.stdout
    if failing == "-m pip":
        assert environment("a.txt")[1] == ["-r a.txt"]  # a failed file is not marked as installed


def test_a_new_torch_is_announced(environment):
    assert "3 GB" in environment("a.txt", failing="find_spec")[0].stdout
    assert "3 GB" not in environment("b.txt")[0].stdout
