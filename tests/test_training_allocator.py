"""Memory that a step frees is there for the next one, without the kernel."""

import platform
import sys

import pytest
from _runs import done

# Faults of ten tensors of 64 MB, each freed before the next one: 16,384 each, of pages of 4 KiB.
CODE = """
import resource
import torch
from training.engine.allocator import ALL, KEPT_BYTES, keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for kept_bytes in (0, KEPT_BYTES, ALL):
    assert not kept_bytes or keep_freed_memory(kept_bytes)
    for step in range(30):
        if step == 20:  # by then the heap has its size
            before = faults()
        torch.ones(1 << 24)
    print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_what_is_freed_is_not_touched_for_the_first_time_again():
    ended = done([sys.executable, "-c", CODE])
    given_back, kept, all_kept = map(int, ended.stdout.split())
    assert given_back > 1000 and kept < 1000 and all_kept < 1000
