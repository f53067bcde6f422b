"""Who computes an embedding: a name for this thread, and whether another's bearer still lives."""

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
