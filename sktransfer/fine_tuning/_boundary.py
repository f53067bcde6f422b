"""What the frozen stages make of pictures: computed once, and shared by the fits of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sktransfer.fine_tuning._rows import Kept, Pixels, allocate
from sktransfer.store._store import MAX_ACTIVATION_BYTES, MemoryStore, activations, as_store


def boundary_rows(
    pixels: Pixels,
    positions: np.ndarray,
    keys: Sequence[bytes],
    module: Any,
    stop: int,
    device: torch.device,
    fingerprint: str | None,
    batch_size: int = 64,
) -> Kept | None:
    """What the stages before `stop` make of some rows of pictures.

    Parameters
    ----------
    pixels : Pixels
    positions : ndarray of int
        The rows that are wanted.
    keys : sequence of bytes
        Of these rows: what their pictures are known by.
    module : TunedModule
    stop : int
    device : torch.device
    fingerprint : str or None
        What tells these frozen stages from all others; None: rows are neither looked for nor
        left to other fits.
    batch_size : int, default=64

    Returns
    -------
    kept : Kept or None
        None where the rows fit neither in memory nor on disk.

    Raises
    ------
    ValueError
        For a picture that can no longer be read, where `pixels` are to raise it.
    """
    rows: list[np.ndarray | None] = [None] * len(keys)
    if fingerprint is not None:
        rows = activations.get_many(fingerprint, keys)
    missing = np.array([i for i, row in enumerate(rows) if row is None], dtype=int)
    own: np.ndarray | None = None
    module.eval()
    for start in range(0, len(missing), batch_size):
        index = missing[start : start + batch_size]
        batch = pixels.take(positions[index])
        values = module.run_frozen(batch.to(device), stop).cpu().numpy()
        if start == 0 and (
            fingerprint is None or len(keys) * values[0].nbytes > MAX_ACTIVATION_BYTES
        ):
            own = allocate((len(keys), *values.shape[1:]), values.dtype)
            if own is None:
                return None
            for i, row in enumerate(rows):
                if row is not None:
                    own[i] = row
        if own is not None:
            own[index] = values
            continue
        assert fingerprint is not None
        new_keys = [keys[i] for i in index]
        is_read = ~pixels.is_bad[positions[index]]  # what is not of the picture is not shared
        read_keys = [key for key, was_read in zip(new_keys, is_read, strict=True) if was_read]
        activations.put_many(fingerprint, read_keys, values[is_read])
        # The store's own copies, so that a row is in memory once. Another fit, in another thread,
        # may have driven them out already.
        found = activations.get_many(fingerprint, new_keys)
        for i, row, value in zip(index, found, values, strict=True):
            rows[i] = np.array(value) if row is None else row
    return Kept(rows if own is None else own)


def keeps_anything(memory: Any) -> bool:
    """Whether the parameter ``memory`` lets anything be kept after a fit."""
    store = as_store(memory)
    return not (isinstance(store, MemoryStore) and store.max_bytes == 0)
