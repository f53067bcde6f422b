"""A lock that the child of a fork finds open."""

import multiprocessing
import os
import threading

import pytest

from sktransfer._threads import ProcessLock


def test_it_excludes_other_threads():
    lock, count = ProcessLock(), [0]

    def add():
        for _ in range(200):
            with lock:
                seen = count[0]
                threading.Event().wait(1e-6)  # lets the others run
                count[0] = seen + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == [800]


def test_an_error_opens_it():
    lock = ProcessLock()
    with pytest.raises(ValueError, match="within"), lock:
        raise ValueError("within")
    with lock:
        pass


def test_its_holder_may_take_it_again():
    lock = ProcessLock()
    with lock, lock:
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_does_not_wait_for_the_parents_thread():
    lock = ProcessLock()
    is_held, may_end = threading.Event(), threading.Event()

    def hold():
        with lock:
            is_held.set()
            may_end.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait()

    def take():
        with lock:
            pass

    child = multiprocessing.get_context("fork").Process(target=take)
    try:
        child.start()
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
        may_end.set()
        holder.join()
