"""A process-wide setting that several threads want changed at the same time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from sktransfer._process_lock import ProcessLock


class SharedContext:
    """Opened by the first thread that enters, closed by the last that leaves.

    Were each to open one of its own, that which overlaps another's would put back what the other
    had set. Meant for globals. In the child of a fork, where the other threads are not, it is
    closed.

    Parameters
    ----------
    make : callable
        Returns the context manager that changes the setting.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]):
        self._make, self._lock = make, ProcessLock()
        self._n_within, self._open = 0, contextlib.ExitStack()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._end)

    def _end(self) -> None:
        self._n_within = 0
        self._open.close()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._n_within == 0:
                self._open.enter_context(self._make())
            self._n_within += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_within -= 1
                if self._n_within <= 0:
                    self._end()
