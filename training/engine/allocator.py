"""The process's allocator, for work that frees and asks for the same megabytes at every step."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>
KEPT_BYTES = 1 << 30
ALL = -1  # as mallopt(3) puts it


def keep_freed_memory(kept_bytes: int = KEPT_BYTES) -> bool:
    """Let glibc keep up to so many bytes of what is freed, instead of returning them to the system;
    say whether it will.

    Else every batch comes in pages that the system clears again, which costs more than what is
    copied into them. ALL is for steps on the CPU, which need as much again each time: of those of
    ZeRO, with their flat buffers, clearing was a fifth. Other C libraries have their own ways and
    are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # the heap alone, since pieces with a mapping of their own go back at once; 0 is a refusal
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, kept_bytes))
