"""Deal the images of one call out to the workers of a joblib cluster backend.

Under ``joblib.parallel_config(backend="dask")``, or ray's or spark's backend, one
``transform`` becomes tasks of some hundred images. A worker loads the network once and keeps
it; the engine runs the tasks of a worker that died again on another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import joblib
import numpy as np
from joblib.parallel import get_active_backend

from sktransfer.embedding._batches import resolve_device
from sktransfer.embedding._embed import BadRow, embed
from sktransfer.images._images import Images
from sktransfer.store._store import as_store

if TYPE_CHECKING:
    import torch
    from joblib.parallel import ParallelBackendBase

    from sktransfer.networks._backbone import Backbone

# joblib's own backends: their workers are cores of this machine, which embed() uses as threads.
_LOCAL = {"LokyBackend", "MultiprocessingBackend", "SequentialBackend", "ThreadingBackend"}
_IMAGES_PER_TASK = 512


def check_place(memory: object, device: str) -> torch.device:
    """Return the device; raise before a network is loaded if it or `memory` cannot be used."""
    as_store(memory)
    return resolve_device(device)


def embed_anywhere(
    images: Images,
    backbone: Backbone,
    *,
    out: np.ndarray,
    memory: object,
    n_jobs: int | None,
    progress: Callable[[int], object] | None = None,
    **settings,
) -> list[BadRow]:
    """Embed in this process or, under a cluster's joblib backend, on its workers.

    The parameters are those of `embed`, with `memory` in place of the store: a folder is opened
    by each worker, so it should be one that all of them see.
    """
    backend, configured = get_active_backend()
    if not _is_cluster(backend):
        store = as_store(memory)
        return embed(
            images, backbone, out=out, store=store, n_jobs=n_jobs, progress=progress, **settings
        )
    # Who chooses a cluster wants all of it, though joblib's own default is one job.
    n_jobs = next((n for n in (n_jobs, configured) if n is not None), -1)
    n_tasks = max(1, backend.effective_n_jobs(n_jobs), -(-len(images) // _IMAGES_PER_TASK))
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
        if progress is not None:
            progress(len(part))
    return bad


def _is_cluster(backend: ParallelBackendBase) -> bool:
    # Not within a task of a search that is itself spread over the workers.
    if type(backend).__name__ in _LOCAL or getattr(backend, "nesting_level", None):
        return False
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return True
    try:
        distributed.get_worker()
    except ValueError:  # this is not a worker of dask
        return True
    return False


def _embed_part(
    images: Images, backbone: Backbone, memory: object, width: int, settings: dict
) -> tuple[np.ndarray, list[BadRow], dict]:
    rows = np.empty((len(images), width), dtype=np.float32)
    bad = embed(images, backbone, out=rows, store=as_store(memory), n_jobs=None, **settings)
    return rows, bad, images.take_notes()
