#!/usr/bin/env bash
# The one test command: installs what is needed, then ruff and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment requirements.txt requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"
