"""Distribute the images of one call over the workers of a joblib cluster backend.

Under ``joblib.parallel_config(backend="dask")``, or ray's or spark's backend, one
``transform`` becomes tasks of some hundred images. A worker loads the network once. The engine
runs the tasks of a worker that died on another one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import joblib
import numpy as np
from joblib.parallel import get_active_backend

from sktransfer._rows import Rows

if TYPE_CHECKING:
    from joblib.parallel import ParallelBackendBase

_IMAGES_PER_TASK = 512

_Result = TypeVar("_Result")


def is_outside_of_workers(backend: ParallelBackendBase) -> bool:
    """Whether this is not a task of a search that is itself spread over the cluster."""
    if getattr(backend, "nesting_level", None):
        return False
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return True
    try:
        distributed.get_worker()
    except ValueError:  # this is not a worker of dask
        return True
    return False


def deal_out(
    images: Rows, n_jobs: int | None, embed_part: Callable[[Rows], _Result]
) -> Iterator[tuple[np.ndarray, _Result]]:
    """Yield the numbers of some images and what ``embed_part`` returned for them on a worker."""
    backend, configured = get_active_backend()
    # joblib's default is one job; that of a cluster is all its workers.
    n_jobs = next((n for n in (n_jobs, configured) if n is not None), -1)
    n_tasks = max(1, backend.effective_n_jobs(n_jobs), -(-len(images) // _IMAGES_PER_TASK))
    parts = [part for part in np.array_split(np.arange(len(images)), n_tasks) if len(part)]
    tasks = (joblib.delayed(embed_part)(images[part]) for part in parts)
    returned = "generator" if backend.supports_return_generator else "list"
    done = joblib.Parallel(n_jobs=n_jobs, return_as=returned)(tasks)
    yield from zip(parts, done, strict=True)
