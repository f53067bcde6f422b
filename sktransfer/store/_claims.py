"""Who computes an embedding: names of threads, whether they still live, and whom to send away."""

from __future__ import annotations

import os
import socket
import threading


def this_worker() -> str:
    """Machine, process and thread."""
    return f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}"


def is_gone(worker: str) -> bool:
    """Whether the worker is known to have ended; False for one on another machine."""
    host, _, rest = worker.rpartition(":")[0].rpartition(":")
    if host != socket.gethostname() or os.name == "nt":  # on Windows os.kill would end it
        return False
    try:
        os.kill(int(rest), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return True
    except OSError:
        return False
    return False


class Refusals:
    """Claims refused because the row is there by now.

    A worker claims what it has just looked for in vain. When it claims a second time, it has
    looked again and could not use the row (one of several fingerprints is missing, or there is
    damage): then it may compute it, rather than wait for ever.
    """

    _MOST = 100_000

    def __init__(self) -> None:
        self._refused: set[tuple[int, str, bytes]] = set()

    def refuse(self, fingerprint: str, digest: bytes) -> bool:
        """Whether to refuse this row to this thread: once."""
        key = (threading.get_ident(), fingerprint, digest)
        if key in self._refused:
            self._refused.discard(key)
            return False
        if len(self._refused) >= self._MOST:
            self._refused.clear()
        self._refused.add(key)
        return True
