"""The embedding store: an image is embedded once.

`as_store` turns the ``memory`` parameter of the estimators into a store. A store keeps rows by
(fingerprint of the network and its settings, digest of the image), and file identities, so that a
file known already is not even read.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

from sktransfer._threads import ProcessLock
from sktransfer.store._disk import DEFAULT_DISK_BYTES, DiskStore
from sktransfer.store._info import FileStat, StoreInfo
from sktransfer.store._memory import DEFAULT_MEMORY_BYTES, MemoryStore

__all__ = [
    "DEFAULT_DISK_BYTES",
    "DEFAULT_MEMORY_BYTES",
    "DiskStore",
    "FileStat",
    "MemoryStore",
    "Store",
    "StoreInfo",
    "as_store",
    "embedding_store",
]

Store = MemoryStore | DiskStore

# What frozen stages made of pictures, for the fits to come. A fit that needs more keeps its own.
MAX_ACTIVATION_BYTES = 2**30
activations = MemoryStore(MAX_ACTIVATION_BYTES)


class _ProcessStore(MemoryStore):
    def clear(self) -> None:
        """Forget everything, and what frozen stages made of pictures."""
        super().clear()
        activations.clear()


# What all extractors of this process share when they are given no memory.
_process_store = _ProcessStore(DEFAULT_MEMORY_BYTES)
_no_store = MemoryStore(0)

# Folders in use stay open between calls: closing one writes its log back.
_N_OPEN = 8
_open_stores: OrderedDict[str, DiskStore] = OrderedDict()
_lock = ProcessLock()


def as_store(memory: Any) -> Store:
    """The store that a ``memory`` parameter stands for.

    Parameters
    ----------
    memory : None, False, str, os.PathLike, joblib.Memory, MemoryStore or DiskStore
        None: the one store of this process, of at most 512 MiB. False: nothing is kept. A folder,
        or a `joblib.Memory` with one: a file in that folder, of at most 10 GiB. A
        `joblib.Memory` without a location keeps nothing. A store is itself.

    Returns
    -------
    store : MemoryStore or DiskStore
        The same one for the same folder.

    Raises
    ------
    TypeError
        For anything else.
    ValueError
        For a path that cannot be a local folder.
    """
    if memory is None:
        return _process_store
    if memory is False:
        return _no_store
    if isinstance(memory, MemoryStore | DiskStore):
        return memory
    folder = memory
    if hasattr(memory, "location") and callable(getattr(memory, "cache", None)):  # joblib.Memory
        folder = memory.location
        if folder is None:
            return _no_store
        if getattr(memory, "backend", "local") != "local":
            raise ValueError(
                f"memory={memory!r} keeps its data in the joblib backend {memory.backend!r}; "
                "embeddings need a local folder. Give one as memory='path/to/folder'."
            )
    if not isinstance(folder, str | os.PathLike) or isinstance(os.fspath(folder), bytes):
        raise TypeError(
            "memory must be None (keep embeddings in this process), False (keep none), a folder "
            f"(str or pathlib.Path), or a joblib.Memory; got {memory!r} of type "
            f"{type(memory).__name__}."
        )
    return _open(os.fspath(folder))


def embedding_store(memory: Any = None, *, max_bytes: int | str | None = "default") -> Store:
    """The store behind a ``memory`` parameter: to look into, to empty, or with a bound of its own.

    Parameters
    ----------
    memory : None, False, str, Path, joblib.Memory or store, default=None
        As the estimators take it. ``None``: what all estimators of this process share.
    max_bytes : int, str or None, default="default"
        The bound, beyond which the least recently used rows go first: bytes, or a text such as
        ``"50G"``. ``None`` is no bound. With it the store is a new one, in memory or on the same
        file, to be given to estimators as their ``memory``; who is given the folder alone makes
        the file fit into 10 GiB. Without it: 512 MiB in memory, 10 GiB on disk.

    Returns
    -------
    store : MemoryStore or DiskStore
        ``store.info()`` tells what is kept (`n_rows`, `n_bytes`, `max_bytes`, `n_files`,
        `rows_by_fingerprint`); ``store.reduce_size(bytes_limit=None,
        items_limit=None, age_limit=None)`` and ``store.clear()`` drop rows, as those of
        `joblib.Memory` do; for ``None``, ``clear`` also frees what the fits of fine-tuning
        estimators left for each other. Clones of an estimator share it; sent to another
        process, one in memory arrives empty, and one on disk is opened there.

    Raises
    ------
    TypeError
        For a `memory` that is none of these.
    ValueError
        For a path that cannot be a local folder, a bound that is no size, or one for
        ``memory=False``.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import PretrainedFeatureExtractor, embedding_store
    >>> store = embedding_store(max_bytes="100M")
    >>> X, _ = load_digits(return_X_y=True)
    >>> extractor = PretrainedFeatureExtractor(image_shape=(8, 8), memory=store)
    >>> rows = extractor.fit_transform(X[:20] / 16)
    >>> store.info().n_rows
    20
    >>> store.reduce_size(items_limit=5)
    >>> store.info().n_rows
    5
    """
    store = as_store(memory)
    if max_bytes == "default":
        return store
    if store is _no_store:
        raise ValueError(f"memory={memory!r} keeps nothing: it takes no max_bytes.")
    if isinstance(store, DiskStore):
        return DiskStore(store.folder, max_bytes)
    return MemoryStore(max_bytes)


def _open(folder: str) -> DiskStore:
    if not folder or "://" in folder or "\0" in folder:
        raise ValueError(
            f"memory must be a local folder; got {folder!r}. Give a path such as 'cache' or "
            "'/data/cache', which is made when missing."
        )
    path = os.path.abspath(os.path.expanduser(folder))
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(
            f"memory must be a folder, and {folder!r} is a file. Give the path of a folder, which "
            "is made when missing."
        )
    with _lock:
        store = _open_stores.pop(path, None) or DiskStore(path)
        _open_stores[path] = store
        if len(_open_stores) > _N_OPEN:
            _open_stores.popitem(last=False)  # closes itself when its last user lets go
        return store
