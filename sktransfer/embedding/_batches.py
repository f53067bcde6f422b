"""``embed``: the only inference loop.

Per image: ask the store; what it does not hold is decoded, resized, batched, sent
through the network and kept. On a CPU each worker thread carries whole batches from
file to row with a share of the cores, so that decoding and network never wait for each
other and no core spins at a barrier. On an accelerator the workers decode into pinned
memory and the calling thread alone speaks to the device.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from sktransfer.embedding._embed import BadRow, EmbeddingRun
from sktransfer.images._images import Images
from sktransfer.networks._backbone import Backbone

_ACCELERATOR_BATCH = 256
# On a CPU a batch is as large as lets the widest layers' values stay in memory that the process
# has: what is larger is asked of the system anew, and zeroed by it, at every layer. With 8 pictures
# of 224 × 224 that is 1.0 to 1.3 times as fast as with 32 (docs/benchmarks/batch_size.py).
_CPU_VALUES, _SMALLEST_CPU_BATCH, _LARGEST_CPU_BATCH = 8 * 3 * 224 * 224, 4, 32
# As many images, if not known yet, are worth a copy of the network packed for them.
_MANY_IMAGES = 128
# Towards the end batches shrink to this, so that all workers end at about the same time.
_LAST_BATCH = 8


def embed(
    images: Images,
    backbone: Backbone,
    *,
    out: np.ndarray,
    store: Any,
    batch_size: int | str = "auto",
    device: str = "auto",
    precision: str = "float32",
    is_compiled: bool = False,
    n_jobs: int | None = None,
    groups: Sequence[int] | None = None,
    fill: float = np.nan,
    progress: Callable[[int], Any] | None = None,
) -> list[BadRow]:
    """Embed images into ``out``.

    Parameters
    ----------
    images : Images
        Of length n_images = n_rows × n_columns.
    backbone : Backbone
    out : ndarray of shape (n_images, n_features), float32
        Receives the rows.
    store : MemoryStore or DiskStore
        Where rows are looked up and kept.
    batch_size : int or "auto"
    device : str
        ``"auto"`` or a torch device.
    precision : {"float32", "bfloat16", "float16"}
    is_compiled : bool
        Whether the network is compiled first.
    n_jobs : int or None
        Threads; ``None`` and -1: as many as torch would use in this process.
    groups : sequence of int or None
        Which of ``backbone.feature_groups`` are returned, in order; the others are
        computed in the same pass and go to the store alone. ``None``: all.
    fill : float
        What the rows of bad images hold.
    progress : callable or None
        Called with the number of rows just finished.

    Returns
    -------
    bad_rows : list of BadRow
    """
    groups = range(len(backbone.feature_groups)) if groups is None else groups
    run = EmbeddingRun(images, backbone, out, store, precision, list(groups), fill, progress)
    torch_device = resolve_device(device)
    n_threads = n_decoding_threads(n_jobs)
    try:
        if torch_device.type == "cpu":
            _run_on_cpu(run, batch_size, n_threads, is_compiled)
        else:
            _run_on_accelerator(run, batch_size, n_threads, torch_device, is_compiled)
    finally:
        run.give_claims_back()
    run.copy_to_twins()
    return run.bad_rows()


# How many devices of a kind there are; who asks for the CPU need not wake the others.
_COUNTS = {
    "cuda": lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "mps": lambda: int(torch.backends.mps.is_available()),
    "meta": lambda: 0,  # computes nothing
}


def resolve_device(device: str) -> torch.device:
    """Return the torch device that ``device`` names; ``"auto"``: cuda, mps, then cpu."""
    if device != "auto":
        try:
            named = torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"device={device!r} is no torch device: 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps' "
                "are accepted."
            ) from error
        if named.type in _COUNTS and (n_found := _COUNTS[named.type]()) <= (named.index or 0):
            raise ValueError(
                f"device={device!r}, but torch finds {n_found} devices of that kind here: "
                "device='auto' takes one where there is one and else the CPU."
            )
        return named
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


def n_decoding_threads(n_jobs: int | None) -> int:
    # torch's own number already respects the limits that joblib sets inside its workers.
    available = torch.get_num_threads()
    if n_jobs is None:
        return available
    return max(1, available + 1 + n_jobs) if n_jobs < 0 else n_jobs


def cpu_batch_size(input_size: Sequence[int]) -> int:
    """Images, or maps within a network, to take at once on a CPU, by their size (C, H, W)."""
    n_values = max(3, input_size[0]) * math.prod(input_size[1:])
    return max(_SMALLEST_CPU_BATCH, min(_CPU_VALUES // n_values, _LARGEST_CPU_BATCH))


def _run_on_cpu(
    run: EmbeddingRun, batch_size: int | str, n_threads: int, is_compiled: bool
) -> None:
    # A few wide workers rather than many narrow ones where there are many cores.
    n_workers = min(n_threads, 8)
    size = run.backbone.input_size
    if batch_size == "auto":
        limit = _BatchLimit(_LARGEST_CPU_BATCH if is_compiled else cpu_batch_size(size))
    else:
        limit = _BatchLimit(int(batch_size))
    # A handful of images is shared out rather than given to one worker.
    limit.size = max(1, min(limit.size, -(-len(run.images) // n_workers)))
    if batch_size == "auto" and not is_compiled and n_workers > 1:
        limit.n_sharing = n_workers
    if not is_compiled:  # what is compiled is compiled for a number of threads
        n_workers = min(n_workers, -(-len(run.images) // limit.size))
    n_inner = max(1, n_threads // n_workers)
    packed_for = (*size[-2:], n_inner) if len(run.images) >= _MANY_IMAGES else None
    # Asked for when it is needed: rows that are all known need no network.
    network = functools.cache(
        lambda: _network_of(run, torch.device("cpu"), is_compiled, packed_for)
    )

    def work(indices: list[int]) -> tuple[list[int], list[torch.Tensor]]:
        good, batch = run.decode(indices)
        return good, [] if batch is None else run.forward(limit, network(), good, batch)

    with _new_threads_unchanged as changes:
        pool = ThreadPoolExecutor(n_workers, initializer=changes.set_number, initargs=(n_inner,))
        try:
            for good, parts in _in_flight(pool, work, run.batches(pool, limit), 2 * n_workers):
                run.keep(good, parts)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _network_of(
    run: EmbeddingRun, device: torch.device, is_compiled: bool, packed_for: tuple | None = None
) -> Any:
    return run.backbone.inference_module(device, run.precision)


class _NewThreadsUnchanged:
    """Give threads that start later the number of torch threads that they would have had.

    `torch.set_num_threads` is for the calling thread and for all that start after it. The
    number is put back when the last of several calls at once has ended, if any of them set it:
    a call whose rows are all in the store starts no thread at all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_within = self._number = 0
        self._is_changed = False

    def set_number(self, number: int) -> None:
        """Set the number of torch threads of this thread."""
        self._is_changed = True
        torch.set_num_threads(number)

    def __enter__(self) -> _NewThreadsUnchanged:
        with self._lock:
            if self._n_within == 0:
                self._number, self._is_changed = torch.get_num_threads(), False
            self._n_within += 1
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._n_within -= 1
            if self._n_within == 0 and self._is_changed:
                # In a thread of its own: the caller's own number was never touched.
                last = threading.Thread(target=torch.set_num_threads, args=(self._number,))
                last.start()
                last.join()


_new_threads_unchanged = _NewThreadsUnchanged()
if hasattr(os, "register_at_fork"):  # the other threads' calls do not go on in the child
    os.register_at_fork(after_in_child=_new_threads_unchanged.__init__)  # type: ignore[misc]


def _run_on_accelerator(
    run: EmbeddingRun,
    batch_size: int | str,
    n_threads: int,
    device: torch.device,
    is_compiled: bool,
) -> None:
    limit = _BatchLimit(_ACCELERATOR_BATCH if batch_size == "auto" else int(batch_size))
    network = _network_of(run, device, is_compiled)
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
                    parts = run.forward(limit, network, good, batch, device)
                    queued.append((good, parts, _queued_work(device)))
                while len(queued) > (1 if batch is not None else 0):
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
        self.n_sharing = 0  # workers that share the batches out among them

    def next_size(self, n_left: int) -> int:
        """Size of the next batch where at most so many images are left."""
        if not self.n_sharing:
            return self.size
        share = -(-n_left // (2 * self.n_sharing))
        return min(self.size, max(_LAST_BATCH, share))

    def forward(
        self, network: Any, batch: torch.Tensor, device: torch.device | None = None
    ) -> list[torch.Tensor]:
        """Run ``batch``; where memory runs out, in halves, and stay at that size."""
        try:
            if device is None:
                return network(batch)
            # Elsewhere than on CUDA nothing keeps or awaits what is still being copied.
            in_background = device.type == "cuda"
            parts = network(batch.to(device, non_blocking=in_background))
            return [part.to("cpu", non_blocking=in_background) for part in parts]
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


def _in_flight(
    pool: ThreadPoolExecutor, work: Callable, batches: Iterable[list[int]], depth: int
) -> Iterator[Any]:
    """Yield ``work(batch)`` in order with at most ``depth`` under way.

    An empty batch waits for all of them and comes back as ``([], None)``.
    """
    under_way: deque[Future] = deque()
    for batch in batches:
        if batch:
            under_way.append(pool.submit(work, batch))
        while under_way and (not batch or len(under_way) >= depth):
            yield under_way.popleft().result()
        if not batch:
            yield [], None
    while under_way:
        yield under_way.popleft().result()
