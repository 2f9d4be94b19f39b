"""The CPU as a run uses it: so many threads, and memory that stays with the process."""

from __future__ import annotations

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_KEPT = 2**30  # bytes
_LEAST_KEPT = 2**25  # the most that glibc before 2.35 takes for the second


def use_processor(threads: int) -> None:
    """Run PyTorch on so many threads of this process, from now on.

    With glibc up to 1 GiB of freed memory also stays with the process. By default it goes back to the system and each
    step faults its activations in again, page by page, which takes a tenth of a laptop run's time.
    """
    torch.set_num_threads(threads)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    if mallopt(_MMAP_THRESHOLD, _KEPT) or mallopt(_MMAP_THRESHOLD, _LEAST_KEPT):
        mallopt(_TRIM_THRESHOLD, _KEPT)  # alone it would stop the first from adapting itself
