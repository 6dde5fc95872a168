"""The modules of ``scripts/benchmark.py`` and ``scripts/gpu_check.sh``: reference, parts, timing and computed memory."""
