"""Deal the images of one call out to the workers of a joblib cluster backend.

Under ``joblib.parallel_config(backend="dask")``, or ray's or spark's backend, one
``transform`` becomes tasks of some hundred images. A worker loads the network once and keeps
it; the engine runs the tasks of a worker that died again on another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import joblib
import numpy as np
import torch
from joblib.parallel import get_active_backend

from sktransfer.embedding._batches import BadRow, embed, resolve_device
from sktransfer.images._images import Images
from sktransfer.store._store import as_store

# joblib's own backends: their workers are cores of this machine, which embed() uses as threads.
_LOCAL_BACKENDS = {
    "LokyBackend",
    "MultiprocessingBackend",
    "SequentialBackend",
    "ThreadingBackend",
}
_IMAGES_PER_TASK = 512


def check_place(memory: Any, device: str) -> torch.device:
    """Return the device, or tell before a network is loaded that it or `memory` cannot be used."""
    as_store(memory)
    return resolve_device(device)


def embed_anywhere(
    images: Images,
    backbone: Any,
    *,
    out: np.ndarray,
    memory: Any,
    n_jobs: int | None,
    progress: Callable[[int], Any],
    **settings: Any,
) -> list[BadRow]:
    """Embed in this process or, under a cluster's joblib backend, on its workers.

    The parameters are those of `embed`, with `memory` for the store it stands for: a folder
    is opened by each worker, so it should be one that all of them see.
    """
    backend, configured = get_active_backend()
    if not _is_of_cluster(backend):
        store = as_store(memory)
        return embed(
            images, backbone, out=out, store=store, n_jobs=n_jobs, progress=progress, **settings
        )
    # Who chooses a cluster wants all of it, though joblib's own default is one job.
    n_jobs = next((n for n in (n_jobs, configured) if n is not None), -1)
    n_tasks = max(_n_workers(backend, n_jobs), -(-len(images) // _IMAGES_PER_TASK))
    parts = [part for part in np.array_split(np.arange(len(images)), n_tasks) if len(part)]
    tasks = (
        joblib.delayed(_embed_part)(images[part], backbone, memory, out.shape[1], settings)
        for part in parts
    )
    returned = "generator" if backend.supports_return_generator else "list"
    bad: list[BadRow] = []
    done = joblib.Parallel(n_jobs=n_jobs, return_as=returned)(tasks)
    for part, (rows, bad_in_part, notes) in zip(parts, done, strict=True):
        out[part] = rows
        bad += bad_in_part
        images.merge_notes(notes)
        progress(len(part))
    return bad


def _is_of_cluster(backend: Any) -> bool:
    if type(backend).__name__ in _LOCAL_BACKENDS:
        return False
    # Not within a task of a search that is itself spread over the workers.
    return not getattr(backend, "nesting_level", None) and not _is_in_dask_task()


def _n_workers(backend: Any, n_jobs: int) -> int:
    try:
        return max(1, backend.effective_n_jobs(n_jobs))
    except Exception:  # a backend that cannot tell before it is configured
        return 1


def _is_in_dask_task() -> bool:
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return False
    try:
        distributed.get_worker()
    except ValueError:
        return False
    return True


def _embed_part(
    images: Images, backbone: Any, memory: Any, width: int, settings: dict[str, Any]
) -> tuple[np.ndarray, list[BadRow], Any]:
    rows = np.empty((len(images), width), dtype=np.float32)
    bad = embed(images, backbone, out=rows, store=as_store(memory), n_jobs=None, **settings)
    return rows, bad, images.take_notes()
