#!/usr/bin/env bash
# Tests this project on a GPU: the tests that need one, speed and memory in float32, bf16, fp16 and compiled, and 200 training
# steps on synthetic images. At most eight minutes; prints one table to paste. Without a GPU it runs only the checks for a CPU.
#
#     bash scripts/gpu_check.sh                    the active environment, or a new .venv
#     PYTHON=python3 bash scripts/gpu_check.sh     an interpreter that already has torch; installs nothing
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    . scripts/environment.sh
    environment requirements.txt requirements-dev.txt
fi
exec "${PYTHON:-python}" -m scripts.bench.gpu_check
