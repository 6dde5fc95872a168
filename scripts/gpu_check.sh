#!/usr/bin/env bash
# Tries this project on a GPU: the tests that need one, speed and memory in float32, bf16, fp16 and compiled, and 200 real steps
# on made-up images. At most eight minutes; it ends in one table to paste. Without a GPU it says so and does the CPU's share.
#
#     bash scripts/gpu_check.sh                    an active environment, else .venv, which is made
#     PYTHON=python3 bash scripts/gpu_check.sh     an interpreter that has torch already; nothing is fetched
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    . scripts/environment.sh
    environment requirements.txt requirements-dev.txt
fi
exec "${PYTHON:-python}" -m scripts.bench.gpu_check
