"""Memory that was freed, given back to the system."""

import ctypes
import gc
import sys

HEAVY = 64 << 20
"""Bytes of weights from which on it is worth time to hold them fewer times."""


def give_back() -> None:
    """Give freed memory back where the C library would keep it, as glibc does; elsewhere nothing.

    glibc keeps pieces of less than 32 MiB: of each weight that was rounded, a hole between what
    came of it.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def give_back_graphs() -> None:
    """Give back what graphs held that are no longer used: they refer to themselves."""
    gc.collect()
    give_back()
