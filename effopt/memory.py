"""Memory that was freed, given back to the system."""

import ctypes
import sys


def give_back() -> None:
    """Give freed memory back where the C library would keep it, as glibc does; elsewhere nothing.

    glibc keeps pieces of less than 32 MiB: of each weight that was rounded, a hole between what
    came of it.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
