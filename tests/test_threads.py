"""Locks that a fork leaves open, and torch's random state in threads."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sktransfer._threads import own_random_state, process_lock


def test_it_excludes_other_threads():
    lock, count = process_lock(), [0]

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
    lock = process_lock()
    with pytest.raises(ValueError, match="within"), lock:
        raise ValueError("within")
    with lock:
        pass


def test_its_holder_may_take_it_again():
    lock = process_lock()
    with lock, lock:
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_does_not_wait_for_the_parents_thread():
    lock = process_lock()
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


def test_the_callers_random_state_stays():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with own_random_state(0):
        drawn = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)


def test_without_a_seed_the_callers_state_is_continued():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with own_random_state():
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.rand(3), expected)


def test_fits_in_threads_take_turns():
    def draw(seed):
        with own_random_state(seed):
            return torch.cat([torch.rand(1) for _ in range(200)])

    expected = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for drawn, wanted in zip(pool.map(draw, range(4)), expected, strict=True):
            assert torch.equal(drawn, wanted)
