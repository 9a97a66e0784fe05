"""Memory that a step frees is there for the next one, without the kernel."""

import platform
import subprocess
import sys

import pytest

from training.engine.allocator import ALL, KEPT_BYTES

# Faults of ten tensors of 64 MB, each freed before the next one: 16,384 each, of pages of 4 KiB.
CODE = """
import resource, sys
import torch
from training.engine.allocator import keep_freed_memory
if sys.argv[1:]:
    assert keep_freed_memory(int(sys.argv[1]))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(30):
    if step == 20:  # by then the heap has its size
        before = faults()
    torch.ones(1 << 24)
print(faults() - before)
"""


def faults(*kept_bytes: int) -> int:
    command = [sys.executable, "-c", CODE, *map(str, kept_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_what_is_freed_is_not_touched_for_the_first_time_again():
    given_back = faults()
    assert given_back > 1000
    assert faults(KEPT_BYTES) < 1000 and faults(ALL) < 1000
