"""The process's allocator, for work that frees and asks for the same megabytes at every step."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep up to a gigabyte of what is freed, instead of returning it to the system.

    Else every batch comes in pages that the system clears anew, which costs more than what is
    copied into them. Other C libraries have their own ways and are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(threshold, KEPT_BYTES)
