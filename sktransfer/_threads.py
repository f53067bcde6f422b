"""Process-wide settings that threads share: fits that change them take turns."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def process_lock() -> threading.RLock:  # type: ignore[valid-type]
    """Make a re-entrant lock for globals, which is open in the child of a fork.

    Another thread of the parent may hold it at the fork; in the child nobody would release it.
    """
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):  # as the standard library does for its own locks
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock


# Held while torch's global random state, its kernels' settings or the warnings' filters differ
# from the caller's: two threads that each put back what they found would leave the other's behind.
one_at_a_time = process_lock()


@contextlib.contextmanager
def own_random_state(seed: int | None = None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Use torch's global random state without changing the caller's.

    Parameters
    ----------
    seed : int or None
        ``None``: continue from the caller's state.
    device : torch.device or str
        Where numbers are drawn, beside the CPU.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    devices = [device] if device.type == "cuda" else []
    with one_at_a_time, torch.random.fork_rng(devices=devices):
        if seed is not None:
            # torch.manual_seed would seed every other device, too.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            elif device.type == "mps":
                torch.mps.manual_seed(seed)
        yield


@contextlib.contextmanager
def repeatable_kernels(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose the same algorithms in every run."""
    if device.type != "cuda":
        yield
        return
    import torch

    cudnn = torch.backends.cudnn
    with one_at_a_time:
        before = cudnn.benchmark, cudnn.deterministic
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before
