"""Global state of a process: torch's settings, locks on them, and errors of memory."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Of torch's allocators, and of libraries that fail to allocate: CUDA, cuBLAS, cuDNN, MPS, XPU, and
# oneDNN, whose "could not create a primitive descriptor" means an unknown operation.
_OUT_OF_MEMORY = re.compile(
    r"out.of.(\w+.)?memory|out.of.resources|alloc(ation)?.?failed|can.?t allocate|cannot allocate|"
    r"not enough memory|failed to allocate|bad.alloc|invalid buffer size|"
    r"could not (create|execute) a (primitive|memory)(?! desc)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the CPU or a device ran out of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


def process_lock() -> threading.RLock:  # type: ignore[valid-type]
    """Make a re-entrant lock for globals, which a fork leaves open in the child.

    If another thread of the parent held it at the fork, no thread of the child could release it.
    """
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):  # as the standard library does for its own locks
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock


# Held while torch's global random state, its kernels' settings or the warnings' filters differ
# from the caller's: otherwise one thread could restore the values that another has set.
global_state_lock = process_lock()

_dtype_lock = process_lock()

_n_calls = 0  # that need float32 by default
_dtype_before: torch.dtype | None = None  # the caller's, if it is another


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Replace the caller's default dtype and device, autocast and gradient modes of torch.

    Every function that builds, trains or runs a network does so in this context. By default torch
    then computes in float32 on the CPU, and records gradients.
    """
    import torch

    with contextlib.ExitStack() as stack:
        stack.enter_context(_float32_by_default())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # get_default_device() of torch 2.6 fails after set_default_device(None).
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def _float32_by_default() -> Iterator[None]:
    """Set the default dtype of all threads; the last of several concurrent calls restores it."""
    import torch

    global _n_calls, _dtype_before
    with _dtype_lock:
        _n_calls += 1
        if torch.get_default_dtype() != torch.float32:
            _dtype_before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        with _dtype_lock:
            _n_calls -= 1
            if _n_calls == 0 and _dtype_before is not None:
                torch.set_default_dtype(_dtype_before)
                _dtype_before = None


@contextlib.contextmanager
def own_random_state(seed: int | None = None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Use torch's global random states of the CPU and of `device`, and restore them at the end.

    Without a `seed` they continue from the caller's.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    devices = [device] if device.type == "cuda" else []
    with global_state_lock, torch.random.fork_rng(devices=devices):
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
def deterministic_cudnn(device: torch.device) -> Iterator[None]:
    """Make cuDNN choose the same algorithms in every run."""
    if device.type != "cuda":
        yield
        return
    import torch

    cudnn = torch.backends.cudnn
    with global_state_lock:
        before = cudnn.benchmark, cudnn.deterministic
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before
