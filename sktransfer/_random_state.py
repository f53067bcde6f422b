"""Random numbers of our own from torch's one state for all, which stays the caller's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

from sktransfer._shared_context import SharedContext


class _CallersState:
    """Puts torch's random state back when the last of several users at once has ended.

    The state is one for all threads: if each put back what it had found, one that began while
    another was at work would leave the other's seed behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_within = 0
        self._states: dict[torch.device, torch.Tensor] = {}

    def enter(self, device: torch.device) -> None:
        with self._lock:
            self._n_within += 1
            if "cpu" not in {place.type for place in self._states}:
                self._states[torch.device("cpu")] = torch.get_rng_state()
            if device.type == "cuda" and device not in self._states:
                self._states[device] = torch.cuda.get_rng_state(device)

    def leave(self) -> None:
        with self._lock:
            self._n_within -= 1
            if self._n_within:
                return
            for place, state in self._states.items():
                if place.type == "cuda":
                    torch.cuda.set_rng_state(state, place)
                else:
                    torch.set_rng_state(state)
            self._states = {}


_callers_state = _CallersState()
if hasattr(os, "register_at_fork"):  # the other threads' work does not go on in the child
    os.register_at_fork(after_in_child=_callers_state.__init__)  # type: ignore[misc]


@contextlib.contextmanager
def own_random_state(seed: int | None = None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw from `seed` (None: from the state as it is) and leave the caller's state alone.

    Parameters
    ----------
    seed : int or None
    device : torch.device or str
        Where numbers are drawn, beside the CPU.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    _callers_state.enter(device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if seed is not None:
                # torch.manual_seed would seed every other device, too.
                torch.default_generator.manual_seed(seed)
                if device.type == "cuda":
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
                elif device.type == "mps":
                    torch.mps.manual_seed(seed)
            yield
    finally:
        _callers_state.leave()


@contextlib.contextmanager
def _same_algorithms() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


_repeatable = SharedContext(_same_algorithms)


def repeatable_kernels(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Let cuDNN take the same algorithms each time; what else is set for it stays as it is."""
    return _repeatable() if device.type == "cuda" else contextlib.nullcontext()
