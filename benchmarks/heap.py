"""Measure what a step computes, and not the pages that the system hands out for it: `kept_heap`.

With transformers' own loss a step takes and frees several blocks of the size of all logits (400 MB for 2048 tokens of
SmolLM2). glibc asks the system for each and gives it back, so every page of them is cleared at its first touch, in each
step, the floor's as the others'. On a virtual machine that is up to a quarter of the step and differs from one step to
the next by more than what is looked for. Within `kept_heap` freed memory stays with the process, for all alike.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""malloc.h: free bytes at the heap's end that go back; sizes that get a mapping of their own; how many may have one."""


@contextlib.contextmanager
def kept_heap() -> Iterator[bool]:
    """Keep freed memory in the process within the block; yields whether this C library lets itself be told so."""
    libc: Any = ctypes.CDLL(None)
    told = hasattr(libc, "mallopt") and bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))
    try:
        yield told
    finally:
        if told:  # what glibc comes to by itself after a few large blocks
            libc.mallopt(M_MMAP_MAX, 2**16)
            libc.mallopt(M_MMAP_THRESHOLD, 2**25)
            libc.mallopt(M_TRIM_THRESHOLD, 2**26)
            libc.malloc_trim(0)
