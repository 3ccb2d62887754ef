"""What a process does with memory that it frees: a step's tensors are those of the next step too.

glibc gives the free end of its heap back to the system, so the next step takes a page fault for
each 4 KiB of it. Whether a step frees the end depends on what else is in the heap: of equal
training steps on a processor, some took a fifth longer (docs/log.md).
"""

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_NEVER, _LARGEST = -1, 32 * 2**20  # the largest that mallopt takes
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Keep freed memory in this process and those it forks, unless the user chose otherwise.

    It then holds the most that it ever held at once. Blocks of more than 32 MiB are given back all
    the same. Without glibc nothing changes.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CHOICES):
        return
    with contextlib.suppress(AttributeError):  # of a C library that has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _NEVER)
