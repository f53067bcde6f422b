"""A network that ``torch.compile`` makes machine code of, and that goes on plainly without it."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import nn


class CompiledNetwork:
    """An embedding network, compiled at its first batch.

    Called like the network it holds, from several threads. Where it cannot be compiled (no C++
    compiler, an operation that torch cannot compile) a warning says so and the network runs as
    it is: the batch that it happened at, too, is not lost.

    Parameters
    ----------
    network : nn.Module
        Takes a batch, returns a list of tensors with one row per image.
    """

    def __init__(self, network: nn.Module):
        self._plain = network
        self._compiled: Any = torch.compile(network)
        self._is_ready = False
        self._lock = threading.Lock()

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        if not self._is_ready:
            with self._lock:  # compiled by one thread, while the others wait for it
                rows = self._run(x)
                self._is_ready = True
            return rows
        return self._run(x)

    def _run(self, x: torch.Tensor) -> list[torch.Tensor]:
        compiled = self._compiled
        if compiled is None:
            return self._plain(x)
        # One machine code for all batch sizes: the last batch is smaller, and batches are halved
        # where memory runs out. torch compiles a size of one apart, so a single image goes twice;
        # filling every batch up would cost a full one for each of a few images.
        batch = x if len(x) > 1 else torch.cat([x, x])
        torch._dynamo.maybe_mark_dynamic(batch, 0)
        try:
            return [rows[: len(x)] for rows in compiled(batch)]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            rows = self._plain(x)  # what it raises is not about compiling
            if self._compiled is not None:
                self._compiled = None
                warnings.warn(
                    f"compile=True, but torch.compile failed here ({_reason(error)}): going on "
                    "without. It needs a C++ compiler on a CPU and triton on a GPU; set "
                    "compile=False to be without this warning.",
                    UserWarning,
                    stacklevel=2,
                )
            return rows


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
