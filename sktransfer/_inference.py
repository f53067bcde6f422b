"""``embed``: the only inference loop.

Per image: ask the store; what it does not hold is decoded, resized, batched, sent
through the network and kept. On a CPU each worker thread carries whole batches from
file to row with a share of the cores, so that decoding and network never wait for each
other and no core spins at a barrier. On an accelerator the workers decode into pinned
memory and the calling thread alone speaks to the device.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sktransfer._backbones import Backbone
from sktransfer._images import BadImage, Images

# Images whose store rows are looked up at once; their files are read again for decoding
# soon after they were digested, so that the second reading finds them in memory.
_CHUNK = 1024
# How long others leave a claimed batch to this process, unless they see that it has ended.
_CLAIM_SECONDS = 300.0
_POLL_SECONDS = 0.02
_CPU_BATCH, _ACCELERATOR_BATCH = 32, 256


@dataclass(frozen=True)
class BadRow:
    """An image that gave no embedding.

    Attributes
    ----------
    row : int
        Its row in ``X``, from 0.
    label : str
        The row and, where there is one, the column and the path.
    reason : str
        What is wrong with it.
    """

    row: int
    label: str
    reason: str

    def __str__(self) -> str:
        return f"{self.label}: {self.reason}"


def embed(
    images: Images,
    backbone: Backbone,
    *,
    out: np.ndarray,
    store: Any,
    batch_size: int | str = "auto",
    device: str = "auto",
    precision: str = "float32",
    n_jobs: int | None = None,
    groups: Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[BadRow]:
    """Embed images into ``out``.

    Parameters
    ----------
    images : Images
        Of length n_images = n_rows × n_columns.
    backbone : Backbone
    out : ndarray of shape (n_images, n_features), float32
        Receives the rows; those of bad images become NaN.
    store : MemoryStore or DiskStore
        Where rows are looked up and kept.
    batch_size : int or "auto"
    device : str
        ``"auto"`` or a torch device.
    precision : {"float32", "bfloat16", "float16"}
    n_jobs : int or None
        Threads; ``None`` and -1: as many as torch would use in this process.
    groups : sequence of int or None
        Which of ``backbone.feature_groups`` are returned, in order; the others are
        computed in the same pass and go to the store alone. ``None``: all.
    progress : callable or None
        Called with the number of rows just finished.

    Returns
    -------
    bad_rows : list of BadRow
    """
    groups = range(len(backbone.feature_groups)) if groups is None else groups
    run = _Run(images, backbone, out, store, precision, list(groups), progress)
    torch_device = resolve_device(device)
    n_threads = _n_threads(n_jobs)
    try:
        if torch_device.type == "cpu":
            _run_on_cpu(run, batch_size, n_threads)
        else:
            _run_on_accelerator(run, batch_size, n_threads, torch_device)
    finally:
        run.give_claims_back()
    run.copy_to_twins()
    return run.bad_rows()


def resolve_device(device: str) -> torch.device:
    """Return the torch device that ``device`` names; ``"auto"``: cuda, mps, then cpu."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        if torch.cuda._is_in_bad_fork():
            warnings.warn(
                "This process was forked from one that had already used CUDA, which CUDA "
                "does not allow, so the CPU is used. Start workers with 'spawn' or joblib's "
                "'loky' to use the GPU in them.",
                UserWarning,
                stacklevel=2,
            )
            return torch.device("cpu")
        count = torch.cuda.device_count()
        in_worker = multiprocessing.parent_process() is not None
        # Workers of one pool have neighbouring process ids: deal the devices out by them.
        return torch.device("cuda", os.getpid() % count if in_worker and count > 1 else 0)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _n_threads(n_jobs: int | None) -> int:
    # torch's own number already respects the limits that joblib sets inside its workers.
    available = torch.get_num_threads()
    if n_jobs is None:
        return available
    return max(1, available + 1 + n_jobs) if n_jobs < 0 else n_jobs


class _Run:
    """What one call to `embed` has found, computed and still lacks."""

    def __init__(self, images, backbone, rows, store, precision, groups, progress) -> None:
        self.images, self.backbone, self.rows, self.store = images, backbone, rows, store
        self.precision, self.groups = precision, groups
        self.progress = progress or (lambda n: None)
        self.fingerprints = [f"{f}-{precision}" for f in backbone.group_fingerprints]
        self._asked_fingerprints = [self.fingerprints[g] for g in groups]
        self._bad: dict[int, str] = {}  # row -> what is wrong with its image
        self._digests: dict[int, bytes] = {}  # of the rows to compute
        self._first: dict[bytes, int] = {}  # digest -> the row that is computed for it
        self._twins: list[tuple[int, int]] = []  # (row, the row computed for the same image)
        self._claimed: set[int] = set()  # rows that other processes now leave to this one

    def batches(self, pool: ThreadPoolExecutor, limit: _BatchLimit) -> Iterator[list[int]]:
        """Fill in what the store holds and yield what is left to compute, in batches.

        Another process or thread that shares the store may be at the same images: each
        batch is claimed first, what others have claimed is left to them and fetched at
        the end, and computed here after all if they failed to.
        """
        left_to_others: list[int] = []
        for batch in _batched(self._missing(pool), limit):
            mine = self._claim(batch)
            left_to_others += [i for i in batch if i not in self._claimed]
            if mine:
                yield mine
        while left_to_others:
            digests = [self._digests[i] for i in left_to_others]
            found = self._look_up(left_to_others, digests)
            self.progress(int(found.sum()))
            left_to_others = [i for i, f in zip(left_to_others, found, strict=True) if not f]
            batch = left_to_others[: limit.size]
            if mine := self._claim(batch):
                left_to_others = [i for i in left_to_others if i not in self._claimed]
                yield mine
            elif left_to_others:
                time.sleep(_POLL_SECONDS)

    def _missing(self, pool: ThreadPoolExecutor) -> Iterator[int]:
        for start in range(0, len(self.images), _CHUNK):
            digests = self._digest(range(start, min(start + _CHUNK, len(self.images))), pool)
            found = self._look_up(list(digests), list(digests.values()))
            n_known = int(found.sum())
            for (i, digest), is_found in zip(digests.items(), found, strict=True):
                if is_found:
                    continue
                if (first := self._first.setdefault(digest, i)) != i:
                    self._twins.append((i, first))
                    n_known += 1
                else:
                    self._digests[i] = digest
                    yield i
            self.progress(n_known)

    def _digest(self, chunk: range, pool: ThreadPoolExecutor) -> dict[int, bytes]:
        """Return the digest of each image, from the store's list of files where it knows."""
        taken_at = time.time_ns()
        stats = [self.images.stat(i) for i in chunk]
        digests = self.store.get_file_digests(stats)
        unknown = [k for k, digest in enumerate(digests) if digest is None]
        fresh = []
        for k, digest in zip(
            unknown, pool.map(self._digest_one, map(chunk.__getitem__, unknown)), strict=True
        ):
            digests[k] = digest
            if digest is not None and stats[k] is not None:
                fresh.append(k)
        self.store.put_file_digests(
            [stats[k] for k in fresh], [digests[k] for k in fresh], taken_at
        )
        return {i: d for i, d in zip(chunk, digests, strict=True) if d is not None}

    def _digest_one(self, i: int) -> bytes | None:
        try:
            return self.images.digest(i)
        except BadImage as error:
            self.fail(i, error)
            return None

    def _look_up(self, indices: list[int], digests: list[bytes]) -> np.ndarray:
        """Fill in the rows that the store holds; return which those are."""
        rows = np.empty((len(indices), self.rows.shape[1]), dtype=np.float32)
        found = np.ones(len(indices), dtype=bool)
        start = 0
        for g in self.groups:
            stop = start + self.backbone.feature_groups[g][1]
            found &= self.store.get_into(self.fingerprints[g], digests, rows[:, start:stop])
            start = stop
        self.rows[np.asarray(indices, dtype=np.intp)[found]] = rows[found]
        return found

    def _claim(self, batch: list[int]) -> list[int]:
        digests = [self._digests[i] for i in batch]
        is_mine = self.store.claim(self._asked_fingerprints, digests, _CLAIM_SECONDS)
        mine = [i for i, m in zip(batch, is_mine, strict=True) if m]
        self._claimed.update(mine)
        return mine

    def give_claims_back(self) -> None:
        """Let others compute what this call claimed and did not finish."""
        digests = [self._digests[i] for i in self._claimed]
        if digests:
            self.store.release(self._asked_fingerprints, digests)

    def decode(self, indices: Sequence[int], pinned: bool = False) -> tuple[list[int], Any]:
        """Decode and resize images into one batch; bad ones are noted and left out."""
        preprocessing = self.backbone.preprocessing
        good: list[int] = []
        batch = None
        for i in indices:
            try:
                pixels = self.images.decode(i, min_size=preprocessing.min_size)
            except BadImage as error:
                self.fail(i, error)
                continue
            array = preprocessing.resize_crop(pixels)
            if batch is None:
                dtype = torch.uint8 if array.dtype == np.uint8 else torch.float32
                batch = torch.empty((len(indices), *array.shape), dtype=dtype, pin_memory=pinned)
                into = batch.numpy()
            into[len(good)] = array
            good.append(i)
        if batch is None:
            return [], None
        batch = batch[: len(good)]
        # H×W×3 pixels seen as 3×H×W are channels-last already: nothing is copied.
        return good, batch.permute(0, 3, 1, 2) if batch.dtype == torch.uint8 else batch

    def keep(self, indices: list[int], tensors: list[torch.Tensor]) -> None:
        """Put a batch's rows into the output and the store."""
        if not indices:
            return
        parts = [tensor.numpy() for tensor in tensors]
        self.rows[indices] = np.concatenate([parts[g] for g in self.groups], axis=1)
        digests = [self._digests[i] for i in indices]
        for fingerprint, part in zip(self.fingerprints, parts, strict=True):
            self.store.put_many(fingerprint, digests, part)  # and gives the claims back
        self._claimed.difference_update(indices)
        self.progress(len(indices))

    def fail(self, i: int, error: BadImage) -> None:
        self.rows[i] = np.nan
        self._bad[i] = str(error)
        self.progress(1)

    def bad_rows(self) -> list[BadRow]:
        """List the images that gave no embedding, in their order."""
        images = self.images
        return [BadRow(images.row(i), images.label(i), self._bad[i]) for i in sorted(self._bad)]

    def copy_to_twins(self) -> None:
        """Give equal images their row, or their error."""
        for i, first in self._twins:
            self.rows[i] = self.rows[first]
            if first in self._bad:
                self._bad[i] = self._bad[first]


def _run_on_cpu(run: _Run, batch_size: int | str, n_threads: int) -> None:
    # A few wide workers rather than many narrow ones where there are many cores.
    n_workers = min(n_threads, 8)
    limit = _BatchLimit(_CPU_BATCH if batch_size == "auto" else int(batch_size))
    # A handful of images is shared out rather than given to one worker.
    limit.size = max(1, min(limit.size, -(-len(run.images) // n_workers)))
    n_workers = min(n_workers, -(-len(run.images) // limit.size))
    n_inner = max(1, n_threads // n_workers)
    network = run.backbone.inference_module(torch.device("cpu"), run.precision)

    def work(indices: list[int]) -> tuple[list[int], list[torch.Tensor]]:
        good, batch = run.decode(indices)
        return good, [] if batch is None else limit.forward(network, batch)

    outer = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(n_inner,))
    try:
        for good, parts in _in_flight(pool, work, run.batches(pool, limit), 2 * n_workers):
            run.keep(good, parts)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # The number is each thread's own, but new threads start from the one set last.
        torch.set_num_threads(outer)


def _run_on_accelerator(
    run: _Run, batch_size: int | str, n_threads: int, device: torch.device
) -> None:
    limit = _BatchLimit(_ACCELERATOR_BATCH if batch_size == "auto" else int(batch_size))
    network = run.backbone.inference_module(device, run.precision)
    pinned = device.type == "cuda"

    def work(indices: list[int]) -> tuple[list[int], Any]:
        return run.decode(indices, pinned)

    with ThreadPoolExecutor(n_threads) as pool:
        try:
            # A batch's rows are waited for when the next is queued, so that the device always
            # has work. The copy back runs in the stream's order: one event tells it is there.
            queued: deque[tuple[list[int], list[torch.Tensor], Callable[[], None]]] = deque()

            def keep_oldest() -> None:
                good, parts, wait = queued.popleft()
                wait()
                run.keep(good, parts)

            for good, batch in _in_flight(pool, work, run.batches(pool, limit), n_threads + 2):
                if batch is not None:
                    parts = limit.forward(network, batch, device)
                    queued.append((good, parts, _queued_work(device)))
                if len(queued) > 1:
                    keep_oldest()
            while queued:
                keep_oldest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _queued_work(device: torch.device) -> Callable[[], None]:
    """Return what waits for all that is queued on the device by now."""
    if device.type == "cuda":
        return torch.cuda.current_stream(device).record_event().synchronize
    return torch.mps.synchronize if device.type == "mps" else lambda: None


class _BatchLimit:
    """The largest batch that memory has allowed so far, and the way to run one."""

    def __init__(self, size: int) -> None:
        self.size = size

    def forward(
        self, network: Any, batch: torch.Tensor, device: torch.device | None = None
    ) -> list[torch.Tensor]:
        """Run ``batch``; where memory runs out, in halves, and stay at that size."""
        try:
            if device is None:
                return network(batch)
            parts = network(batch.to(device, non_blocking=True))
            return [part.to("cpu", non_blocking=True) for part in parts]
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(
                    f"Memory does not suffice for one image of shape {tuple(batch.shape[1:])}: "
                    "use a smaller network or input size, precision='bfloat16' or another device."
                ) from error
        # Outside the handler, so that the failed pass's tensors are no longer referred to.
        if device is not None and device.type == "cuda":
            torch.cuda.empty_cache()
        half = -(-len(batch) // 2)
        if half < self.size:
            self.size = half
            warnings.warn(
                f"Out of memory with {len(batch)} images at once: going on with batches of "
                f"{half}. Set batch_size={half} to begin there.",
                UserWarning,
                stacklevel=2,
            )
        halves = [self.forward(network, part, device) for part in batch.split(half)]
        if device is not None:
            _queued_work(device)()
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)  # the CPU's and mps's allocators raise plain RuntimeErrors
    return "can't allocate memory" in text or "out of memory" in text


def _batched(indices: Iterable[int], limit: _BatchLimit) -> Iterator[list[int]]:
    indices = iter(indices)
    while batch := list(itertools.islice(indices, limit.size)):
        yield batch


def _in_flight(
    pool: ThreadPoolExecutor, work: Callable, batches: Iterable[list[int]], depth: int
) -> Iterator[Any]:
    """Yield ``work(batch)`` in order with at most ``depth`` under way."""
    under_way: deque[Future] = deque()
    for batch in batches:
        under_way.append(pool.submit(work, batch))
        if len(under_way) >= depth:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
