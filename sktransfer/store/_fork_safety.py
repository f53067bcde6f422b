"""Locks and connections that come whole through ``os.fork``.

The child of a fork has one thread. A lock held by another thread of the parent would stay locked in
it for ever, and SQLite's own table of open files would claim locks that the child does not hold
(https://sqlite.org/howtocorrupt.html, 2.6). So a fork waits until nobody is inside a store, and
a store lets go of what must not be inherited.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class HeldAcrossFork(Protocol):
    """What can be registered: a re-entrant lock, and something to do just before a fork."""

    fork_lock: threading.RLock  # type: ignore[valid-type]

    def before_fork(self) -> None: ...


_registered: weakref.WeakSet = weakref.WeakSet()
_held: list = []
# Two threads that fork at once take turns, and nothing is registered meanwhile.
_forking = threading.RLock()


def hold_across_fork(thing: HeldAcrossFork) -> None:
    """Hold the thing's ``fork_lock`` while this process forks."""
    with _forking:
        _registered.add(thing)


def _before() -> None:
    _forking.acquire()
    for thing in sorted(_registered, key=id):
        thing.fork_lock.acquire()
        _held.append(thing)
        thing.before_fork()


def _after() -> None:
    while _held:
        _held.pop().fork_lock.release()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
