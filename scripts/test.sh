#!/usr/bin/env bash
# Installs the requirements, then runs ruff, mypy, and pytest on all cores. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment requirements.txt requirements-dev.txt
ruff check .
ruff format --check .
mypy deeplab dataset utils scripts train.py train_msc.py evaluate.py
cores=$(python -c 'from utils.processes import usable_cores; print(usable_cores())')
export OMP_NUM_THREADS=1  # one process per core is enough
python -m pytest -n "$cores" --dist worksteal "$@"  # keeps neighbouring tests in one process, which share slow fixtures
