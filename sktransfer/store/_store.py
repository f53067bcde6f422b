"""The embedding store, from which an image that was embedded before gets its row.

`as_store` turns the ``memory`` parameter of the estimators into a store. A store keeps rows by
(fingerprint of the network and its settings, digest of the image). It also keeps the identities of
files, so that a known file is not read again.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar

from sktransfer._progress import shown
from sktransfer.store._disk import DiskStore
from sktransfer.store._memory import Lock as Lock
from sktransfer.store._memory import MemoryStore

Store = MemoryStore | DiskStore

# Rows are computed under one lock for each fingerprint and block of digests.
N_BLOCKS = 32

# Outputs of frozen stages, for later fits of this process, except of a fit whose outputs are
# larger than this.
MAX_ACTIVATION_BYTES = 2**30
activations = MemoryStore(MAX_ACTIVATION_BYTES)


class _ProcessStore(MemoryStore):
    def clear(self) -> None:
        """Delete all rows, file identities and outputs of frozen stages."""
        super().clear()
        activations.clear()


# Shared by all estimators of this process with memory=None, and with memory=False.
_process_store = _ProcessStore()
NO_STORE = MemoryStore(0)

# One object for each folder. A few stay open between calls, as closing writes SQLite's log back.
_disk_store = functools.lru_cache(maxsize=8)(DiskStore)


def block_of(digest: bytes) -> int:
    """Return the block, from 0 to N_BLOCKS - 1, of a digest."""
    return digest[0] % N_BLOCKS


_keeps_nothing = ContextVar("_keeps_nothing", default=False)


@contextlib.contextmanager
def keep_nothing() -> Iterator[None]:
    """Disable all stores, for artificial images that only probe a model."""
    token = _keeps_nothing.set(True)
    try:
        yield
    finally:
        _keeps_nothing.reset(token)


def as_store(memory: object, start: str = "") -> Store:
    """Return the store of a ``memory`` parameter; a relative folder is in `start`.

    None: the store of this process. False, or a `joblib.Memory` without a location: a store that
    keeps nothing. A folder, or a `joblib.Memory` with one: a file there. A store: itself.
    """
    if memory is False or _keeps_nothing.get():
        return NO_STORE
    if memory is None:
        return _process_store
    if isinstance(memory, MemoryStore | DiskStore):
        return memory
    is_joblib_memory = hasattr(memory, "location") and hasattr(memory, "cache")
    folder = memory.location if is_joblib_memory else memory  # type: ignore[attr-defined]
    if folder is None:
        return NO_STORE
    if not isinstance(folder, str | os.PathLike) or isinstance(os.fspath(folder), bytes):
        raise TypeError(
            "memory must be None (keep embeddings in this process), False (keep none), a folder "
            f"(str or pathlib.Path), or a joblib.Memory; got {shown(memory)} of type "
            f"{type(memory).__name__}."
        )
    folder = os.fspath(folder)
    if not folder or "://" in folder or "\0" in folder:
        raise ValueError(
            f"memory must be a local folder; got {shown(folder)}. Give a path such as 'cache' or "
            "'/data/cache', which is made when missing."
        )
    path = os.path.abspath(os.path.join(start, os.path.expanduser(folder)))
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(
            f"memory must be a folder, and {path!r} is a file. Give the path of a folder, which is "
            "made when missing."
        )
    return _disk_store(path)


def resolve_memory(memory: object, start: str) -> object:
    """Return `memory`; a relative folder becomes an absolute one in `start`."""
    store = memory if memory is None else as_store(memory, start)
    return store.folder if isinstance(store, DiskStore) and store is not memory else memory


def embedding_store(memory: object = None, *, max_bytes: int | str | None = "default") -> Store:
    """Return the store behind a ``memory`` parameter, to look into it, empty it or set a bound.

    Parameters
    ----------
    memory : None, False, str, Path, joblib.Memory or store, default=None
        As the estimators take it. ``None``: what all estimators of this process share.
    max_bytes : int, str or None, default="default"
        The bound, beyond which the oldest rows are deleted (in memory, the least recently used):
        bytes, or a text such as ``"50G"``. ``None``: unbounded. If it is given, the store is a
        new one, in memory or on the same file; give it to the estimators as their ``memory``. An
        estimator given the folder alone makes the file fit into 10 GiB. Without `max_bytes`, the
        bound is 512 MiB in memory and 10 GiB on disk.

    Returns
    -------
    store : MemoryStore or DiskStore
        ``store.info()`` says what is kept (`n_rows`, `n_bytes`, `max_bytes`, `n_files`,
        `rows_by_fingerprint`), ``len(store)`` is the number of rows, and ``store.clear()`` deletes
        them all. For ``None``, ``clear`` also frees what fits of fine-tuning estimators keep for
        later fits. Clones of an estimator share a store. In another process, a store in memory
        arrives empty, and one on disk is opened there.

    Raises
    ------
    TypeError
        For a `memory` that is none of these.
    ValueError
        For a path that cannot be a local folder, a bound that is not a size, or a bound for
        ``memory=False``.

    See Also
    --------
    PretrainedFeatureExtractor : Its parameter `memory` takes a store.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import PretrainedFeatureExtractor, embedding_store
    >>> store = embedding_store(max_bytes="100M")
    >>> X, _ = load_digits(return_X_y=True)
    >>> extractor = PretrainedFeatureExtractor(image_shape=(8, 8), memory=store)
    >>> rows = extractor.fit_transform(X[:20] / 16)
    >>> len(store)
    20
    >>> store.clear()
    >>> len(store)
    0
    """
    store = as_store(memory)
    if max_bytes == "default":
        return store
    if store is NO_STORE:
        raise ValueError(f"memory={memory!r} keeps nothing: it takes no max_bytes.")
    if isinstance(store, DiskStore):
        return DiskStore(store.folder, max_bytes)
    return MemoryStore(max_bytes)
