"""The workshop of ``scripts/benchmark.py`` and ``scripts/gpu_check.sh``: reference, measured parts, clock, computed memory."""
