"""Compile loops with numba, and run them in threads.

numba's own parallel loops (`parallel=True`) are not used: their first call starts an OpenMP pool that changes the
thread count of torch in the same process, and on small inputs they cost far more than the loop.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numba
import numpy as np
from jaxtyping import Int

_MIN_ITEMS = 10_000  # fewer are not worth a thread
_SLICES_PER_THREAD = 4  # so that a slow slice does not keep the others waiting


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call; it releases the interpreter lock while it runs.

    The machine code is kept on disk for later processes: beside the source, in `NUMBA_CACHE_DIR`, or in the user's
    cache folder. Where none of them can be written, each process compiles it again.
    """
    try:
        dispatcher = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba has no folder to write to
        return numba.njit(nogil=True)(function)
    _bear_full_disk(dispatcher)
    return dispatcher


def _bear_full_disk(dispatcher: Any) -> None:
    """Use machine code that cannot be kept, as the disk is full, instead of raising."""
    save = dispatcher._cache.save_overload

    def save_if_possible(signature: Any, data: Any) -> None:
        with suppress(OSError):
            save(signature, data)

    dispatcher._cache.save_overload = save_if_possible


def run_in_threads(task: Callable[[int, int], None], offsets: Int[np.ndarray, " m_plus_1"]) -> None:
    """Call a task for consecutive slices of ragged rows, in as many threads as numba is set to (`NUMBA_NUM_THREADS`).

    Args:
        task: called with the first row of a slice and the one after its last; must release the interpreter lock, and
            must not depend on how the rows are sliced.
        offsets: (m + 1,) where the items of each row begin; slices have about equally many items.

    Example:
        >>> run_in_threads(lambda first, last: print(first, last), np.array([0, 3, 3, 8]))
        0 3
    """
    num_rows, num_items = len(offsets) - 1, int(offsets[-1] - offsets[0])
    num_threads: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    num_threads = min(num_threads, num_items // _MIN_ITEMS)
    if num_threads <= 1:
        task(0, num_rows)
        return
    bounds = np.linspace(offsets[0], offsets[-1], num_threads * _SLICES_PER_THREAD + 1)[1:-1]
    cuts = np.unique([0, *np.searchsorted(offsets, bounds).tolist(), num_rows]).tolist()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(task, cuts[:-1], cuts[1:]))  # raises what a task raised
