#!/usr/bin/env bash
# The one test command: installs what is needed, then ruff, mypy, and pytest on all cores. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment requirements.txt requirements-dev.txt
ruff check .
ruff format --check .
mypy deeplab dataset utils scripts train.py train_msc.py evaluate.py
cores=$(python -c 'from utils.processes import usable_cores; print(usable_cores())')
export OMP_NUM_THREADS=1  # the processes share the cores already
python -m pytest -n "$cores" --dist worksteal "$@"  # neighbours stay together, and share what takes long to make
