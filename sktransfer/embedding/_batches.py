"""Batches: how large they are, and how a CPU and an accelerator run them."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout

from sktransfer._progress import warn
from sktransfer._threads import is_out_of_memory
from sktransfer.networks._inference import with_index

if TYPE_CHECKING:
    from torch import Tensor, nn

# Kinds of devices to and from which memory is copied beside their computing.
STREAMING = {"cuda"}
_ACCELERATOR_BATCH = 256
# On a CPU a batch is small enough for the allocator to reuse memory between layers: larger tensors
# are allocated and zeroed by the system at every layer. 8 images of 224 × 224 are 1.0 to 1.3 times
# as fast as 32 (docs/benchmarks/batch_size.py).
_CPU_VALUES, _SMALLEST_CPU_BATCH, _LARGEST_CPU_BATCH = 8 * 3 * 224 * 224, 4, 32
# Towards the end batches shrink to this, so that all workers finish at about the same time.
_LAST_BATCH = 8
# An accelerator's first and last ones: it starts soon after the first image is decoded, and ends
# soon after the last (docs/benchmarks/gpu_scheduling.py).
_SMALLEST_ACCELERATOR_BATCH = 32
_MOST_WORKERS = 8  # on a CPU: a few wide ones rather than many narrow ones
_MOST_QUEUED = 3  # batches on an accelerator whose rows are not waited for yet

_COUNTS: dict[str, Callable[[], int]] = {
    "cuda": torch.cuda.device_count,
    "mps": torch.mps.device_count,
    "meta": int,  # computes nothing
}

_DTYPES = {np.uint8: torch.uint8, np.int64: torch.int64}

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_on_cpu(run, n_images: int, batch_size: int | str, n_threads: int) -> None:
    """Run the batches of an `EmbeddingRun` on threads that each carry whole batches.

    From file to row, with a share of the cores: decoding and network never wait for each other.
    """
    n_workers = min(n_threads, _MOST_WORKERS)
    size = cpu_batch_size(run.input_size) if batch_size == "auto" else int(batch_size)
    # A handful of images is shared out rather than given to one worker.
    limit = BatchLimit(max(1, min(size, -(-n_images // n_workers))))
    if batch_size == "auto" and n_workers > 1:
        limit.n_sharing = n_workers
    n_workers = min(n_workers, -(-n_images // limit.size))
    # Asked for when it is needed: rows that are all known need no network.
    network = functools.cache(lambda: run.network(torch.device("cpu")))

    def work(batch: Batch) -> tuple[list, list, list[Tensor]]:
        run.decode(batch, range(len(batch.rows)))
        good, pixels = run.pixels(batch)
        return batch.rows, good, run.forward(limit, network(), good, pixels) if good else []

    with Workers(n_workers, max(1, n_threads // n_workers)) as workers:
        batches = run.batches(workers, limit)
        for result in workers.run(work, (task and task[0] for task in batches)):
            if result is not None:
                run.keep(*result)


def run_on_accelerator(run, device: torch.device, batch_size: int | str, n_threads: int) -> None:
    """Read and decode in threads, a batch in all of them; this thread alone uses the device."""
    limit = BatchLimit(_ACCELERATOR_BATCH if batch_size == "auto" else int(batch_size))
    if batch_size == "auto":
        limit.n_sharing, limit.smallest, limit.is_growing = 3, _SMALLEST_ACCELERATOR_BATCH, True
    network = functools.cache(lambda: run.network(device))
    # Rows are waited for when the next batches are queued, so that the device always has work.
    queued: deque[tuple[list, list, Callable[[], list[Tensor]]]] = deque()

    def work(task: tuple[Batch, range, bool]) -> tuple[Batch, bool]:
        batch, numbers, is_last = task
        run.decode(batch, numbers)
        return batch, is_last

    def keep_all_but(n: int) -> None:
        while len(queued) > n:
            rows, good, copied = queued.popleft()
            run.keep(rows, good, copied())

    # Readers of their own: images to read do not wait behind those to decode.
    with Workers(n_threads) as readers, Workers(n_threads) as decoders:
        tasks = run.batches(readers, limit, n_threads, device.type in STREAMING)
        for done in decoders.run(work, tasks, is_eager=True):
            if done is None:
                keep_all_but(0)
            elif done[1]:
                batch = done[0]
                good, pixels = run.pixels(batch, device)
                parts = run.forward(limit, network(), good, pixels, device) if good else []
                queued.append((batch.rows, good, _copied_back(parts, device)))
                keep_all_but(_MOST_QUEUED)
        keep_all_but(0)


class Batch:
    """Rows to compute together, `size` at most, and their images, which several threads decode.

    `images` has the pixels of each row by its place in `rows`, without those of bad images. Unless
    they have many shapes they are parts of one tensor, `joined`, which is made for the `first`.
    """

    def __init__(self, size: int, is_pinned: bool, is_joined: bool) -> None:
        self.size, self._is_pinned, self._is_joined = size, is_pinned, is_joined
        self.rows: list = []
        self.images: dict[int, Tensor] = {}
        self.joined: Tensor | None = None
        self.first = 0
        self._lock = threading.Lock()

    def room_for(self, k: int, image: np.ndarray) -> Tensor:
        """Return where the image of row `k` goes."""
        shape, dtype = image.shape, _DTYPES.get(image.dtype.type, torch.float32)
        if not self._is_joined:
            return torch.empty(shape, dtype=dtype, pin_memory=self._is_pinned)
        with self._lock:
            if self.joined is None:
                shape, self.first = (self.size, *shape), k
                self.joined = torch.empty(shape, dtype=dtype, pin_memory=self._is_pinned)
        return self.joined[k]


def resolve_device(device: str) -> torch.device:
    """Return the torch device that ``device`` names; ``"auto"``: cuda, mps, then cpu."""
    if device != "auto":
        try:
            named = torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"device={device!r} is not a torch device: 'auto', 'cpu', 'cuda', 'cuda:1' or "
                "'mps' are accepted."
            ) from error
        # Counting initialises CUDA, which a user of the CPU does not need.
        if named.type in _COUNTS and (n_found := _COUNTS[named.type]()) <= (named.index or 0):
            raise ValueError(
                f"device={device!r}, but torch finds {n_found} devices of that kind here: "
                "device='auto' uses a GPU if there is one and else the CPU."
            )
        return with_index(named)
    if not torch.cuda.is_available():
        kind = "mps" if torch.backends.mps.is_available() else "cpu"
        return with_index(torch.device(kind))
    if multiprocessing.parent_process() is None:
        return torch.device("cuda", 0)
    try:
        torch.cuda.init()
    except RuntimeError as error:
        warn(f"CUDA cannot be used in this worker process, so the CPU is used: {error}")
        return torch.device("cpu")
    return _dealt_device()


_slots: list[FileLock] = []  # the system frees them when this process ends


@functools.cache
def _dealt_device() -> torch.device:
    """Return the CUDA device that the fewest worker processes of this machine have been dealt.

    Each holds a lock on a slot of the real device, as workers may see them in different orders.
    """
    user = getattr(os, "getuid", int)()  # a folder for all users may hold files of others
    for slot in itertools.count():
        for i in range(torch.cuda.device_count()):
            name = f"sktransfer-{user}-{torch.cuda.get_device_properties(i).uuid}-{slot}.lock"
            lock = FileLock(Path(tempfile.gettempdir()) / name, thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _slots.append(lock)
            return torch.device("cuda", i)
    raise AssertionError("there is a free slot")


def n_decoding_threads(n_jobs: int | None) -> int:
    # torch's own number already respects the limits that joblib sets inside its workers.
    available = torch.get_num_threads()
    if n_jobs is None:
        return available
    return max(1, available + 1 + n_jobs) if n_jobs < 0 else n_jobs


def cpu_batch_size(input_size: Sequence[int]) -> int:
    """Return how many images or maps of this size (C, H, W) a CPU should take at once."""
    n_values = max(3, input_size[0]) * math.prod(input_size[1:])
    return max(_SMALLEST_CPU_BATCH, min(_CPU_VALUES // n_values, _LARGEST_CPU_BATCH))


# Held while the number of torch threads that new threads get differs from the caller's.
_start_lock = threading.Lock()


class Workers:
    """Threads that start together when they are first needed.

    Each uses `n_torch_threads` torch threads; None: as many as any new thread.
    """

    def __init__(self, n_workers: int, n_torch_threads: int | None = None) -> None:
        self.depth = 2 * n_workers  # tasks under way at once
        self._n_workers, self._n_torch_threads = n_workers, n_torch_threads

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        pool, n_torch_threads = ThreadPoolExecutor(self._n_workers), self._n_torch_threads
        if n_torch_threads is None:
            return pool
        all_started = threading.Barrier(self._n_workers)

        def set_number() -> None:
            torch.get_num_threads()  # before a thread's first use torch sets it to the default
            torch.set_num_threads(n_torch_threads)
            all_started.wait()

        def start() -> None:
            # torch.set_num_threads is for the calling thread and for all that start after it.
            for_new_threads = torch.get_num_threads()
            wait([pool.submit(set_number) for _ in range(self._n_workers)])
            torch.set_num_threads(for_new_threads)

        with _start_lock:
            starter = threading.Thread(target=start)
            starter.start()
            starter.join()
        return pool

    def run(
        self,
        work: Callable[[_Item], _Result],
        items: Iterable[_Item | None],
        *,
        is_eager: bool = False,
    ) -> Iterator[_Result | None]:
        """Yield ``work(item)`` in order, while up to `depth` items are under way.

        An item None waits for all of them and comes back as None. With `is_eager` all finished
        results come before the next item is asked for; otherwise at most one, so that the number
        of items under way does not fall.
        """
        under_way: deque[Future[_Result]] = deque()
        for item in items:
            if item is not None:
                under_way.append(self._pool.submit(work, item))
            while under_way and (
                item is None or len(under_way) >= self.depth or under_way[0].done()
            ):
                yield under_way.popleft().result()
                if item is not None and not is_eager:
                    break
            if item is None:
                yield None
        while under_way:
            yield under_way.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if "_pool" in vars(self):
            self._pool.shutdown(wait=True, cancel_futures=True)


class BatchLimit:
    """The largest batch that memory has allowed so far, and the way to run one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.n_sharing = 0  # workers that share the batches out among them …
        self.smallest = _LAST_BATCH  # … in ever smaller ones towards the end
        self.is_growing = False  # whether the first are small, too
        self._n_dealt = 0

    def next_size(self, n_left: int) -> int:
        """Return the size of the next batch if at most so many images are left."""
        if not self.n_sharing:
            return self.size
        share = -(-n_left // (2 * self.n_sharing))
        share = min(share, self._n_dealt) if self.is_growing else share
        size = min(self.size, max(self.smallest, share))
        self._n_dealt += size
        return size

    def forward(
        self, network: nn.Module, batch: Tensor, device: torch.device | None = None
    ) -> list[Tensor]:
        """Run ``batch``; when memory runs out, in halves, and keep to that size."""
        try:
            if device is not None and batch.device != device:
                on_host, in_background = batch, device.type in STREAMING
                batch = uploaded(lambda: on_host.to(device, non_blocking=in_background), device)
            return network(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(
                    f"Memory does not suffice for one input of shape {tuple(batch.shape[1:])}: "
                    "use a smaller network or input size, precision='bfloat16' or another device."
                ) from error
        # Outside the handler, so that the failed pass's tensors are no longer referred to.
        if device is not None and device.type in STREAMING:
            torch.get_device_module(device).empty_cache()
        half = -(-len(batch) // 2)
        if half < self.size:
            self.size = half
            warn(
                f"Out of memory with a batch of {len(batch)}: continuing with batches of "
                f"{half}. Set batch_size={half} to begin there."
            )
        halves = [self.forward(network, part, device) for part in batch.split(half)]
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]


@functools.cache
def _upload_stream(device: torch.device) -> torch.Stream:
    return torch.get_device_module(device).Stream(device)


def uploaded(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Return a tensor that `make` copies to the device, beside what is computed there."""
    if device.type not in STREAMING:
        return make()
    module, uploads = torch.get_device_module(device), _upload_stream(device)
    with module.stream(uploads):
        made = make()
    computing = module.current_stream(device)
    computing.wait_stream(uploads)
    made.record_stream(computing)  # its memory is not reused before it was read
    return made


def _copied_back(parts: list[Tensor], device: torch.device) -> Callable[[], list[Tensor]]:
    """Start copying rows from the device; return what waits for them."""
    if device.type not in STREAMING:
        return lambda: [part.cpu() for part in parts]  # which waits for the device
    copies = [part.to("cpu", non_blocking=True) for part in parts]
    are_copied = torch.get_device_module(device).current_stream(device).record_event()

    def wait_for_copies() -> list[Tensor]:
        are_copied.synchronize()
        return copies

    return wait_for_copies
