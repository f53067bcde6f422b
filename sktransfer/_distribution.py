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
from joblib.parallel import get_active_backend

from sktransfer._cache import as_store
from sktransfer._images import Images
from sktransfer._inference import BadRow, embed

# joblib's own backends: their workers are cores of this machine, which embed() uses as threads.
_LOCAL_BACKENDS = {
    "LokyBackend",
    "MultiprocessingBackend",
    "SequentialBackend",
    "ThreadingBackend",
}
_IMAGES_PER_TASK = 512


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
    n_workers = _n_cluster_workers(n_jobs)
    if n_workers is None:
        store = as_store(memory)
        return embed(
            images, backbone, out=out, store=store, n_jobs=n_jobs, progress=progress, **settings
        )
    n_tasks = max(n_workers, -(-len(images) // _IMAGES_PER_TASK))
    parts = [part for part in np.array_split(np.arange(len(images)), n_tasks) if len(part)]
    tasks = (
        joblib.delayed(_embed_part)(images[part], backbone, memory, out.shape[1], settings)
        for part in parts
    )
    bad: list[BadRow] = []
    done = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(tasks)
    for part, (rows, bad_in_part, notes) in zip(parts, done, strict=True):
        out[part] = rows
        bad += bad_in_part
        images.merge_notes(notes)
        progress(len(part))
    return bad


def _n_cluster_workers(n_jobs: int | None) -> int | None:
    """Return how many workers the active backend has; None: it is none of a cluster."""
    backend, config_n_jobs = get_active_backend()
    if type(backend).__name__ in _LOCAL_BACKENDS:
        return None
    if getattr(backend, "nesting_level", None) or _is_in_dask_task():
        return None  # within a task of a search that is itself spread over the workers
    try:
        return max(1, backend.effective_n_jobs(n_jobs or config_n_jobs or -1))
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
