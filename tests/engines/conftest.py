"""Tests of an engine are collected only where it is installed: vLLM by `make test-engines`, llama.cpp by
`make setup-llama-cpp`."""

from __future__ import annotations

import os
from importlib.util import find_spec

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the test's process: seconds a start, not half a minute
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
collect_ignore_glob = [] if find_spec("llama_cpp") else ["test_llama_cpp.py"]
if find_spec("vllm") is None:
    collect_ignore_glob += ["test_vllm_*.py"]
else:
    os.environ.update(ENVIRONMENT)
