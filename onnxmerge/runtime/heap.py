"""What a process keeps of the memory that it has freed."""

import contextlib
import ctypes


def return_memory() -> None:
    """Give the system back what was freed (glibc only), since malloc keeps the pages of all but the largest arrays."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
