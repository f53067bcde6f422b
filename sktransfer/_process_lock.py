"""A lock for what the threads of one process share."""

from __future__ import annotations

import os
import threading
from typing import Any


class ProcessLock:
    """A lock that the child of a fork finds open.

    Another thread of the parent may hold it at the fork; in the child nobody would ever let go
    of it. Meant for globals: it lives as long as the process.

    Parameters
    ----------
    is_reentrant : bool, default=False
        Whether the thread that holds it may take it again.
    """

    def __init__(self, *, is_reentrant: bool = False) -> None:
        self._make: Any = threading.RLock if is_reentrant else threading.Lock
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = self._make()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
