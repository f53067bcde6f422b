"""A process-wide setting that several threads want changed at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from sktransfer._process_lock import ProcessLock


class SharedContext:
    """Opened by the first thread that enters, closed by the last that leaves.

    Were each to open one of its own, that which overlaps another's would put back what the other
    had set.

    Parameters
    ----------
    make : callable
        Returns the context manager that changes the setting.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]):
        self._make, self._lock = make, ProcessLock()
        self._n_within = 0
        self._open: AbstractContextManager[Any] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._n_within == 0:
                self._open = self._make()
                self._open.__enter__()
            self._n_within += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_within -= 1
                if self._n_within == 0 and self._open is not None:
                    self._open.__exit__(None, None, None)
