"""What the broker asks of the allocator."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from common.process import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(77)
for turn in range(6):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for array in [np.ones(1 << 18, np.float32) for _ in range(32)]:  # 32 MB
        del array
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("not glibc")
    return int(done.stdout)


def test_freed_memory_is_used_again():
    pages = 32 * (1 << 20) // 4096
    assert faults("kept") < pages / 10 < faults("given back")
