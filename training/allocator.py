"""The process's allocator, for work that frees and asks for the same megabytes at every step."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
KEPT_BYTES = 1 << 30
DOCUMENTED_BYTES = 32 << 20  # the most that mallopt(3) promises to take


def keep_freed_memory() -> None:
    """Let glibc keep up to a gigabyte of what is freed, instead of returning it to the system.

    Else every batch comes in pages that the system clears anew, which costs more than what is
    copied into them. Other C libraries have their own ways and are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # of larger pieces first: to set one ends glibc's own adjustment of both. 0 is its refusal
    sizes = (KEPT_BYTES, DOCUMENTED_BYTES)
    if any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in sizes):
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
