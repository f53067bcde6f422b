"""Batches: how large they are, and how a CPU and an accelerator run them."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Self, TypeVar

import torch

from sktransfer._progress import warn
from sktransfer._threads import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor, nn

_ACCELERATOR_BATCH = 256
# On a CPU a batch is small enough for the allocator to reuse memory between layers: larger tensors
# are allocated and zeroed by the system at every layer. 8 images of 224 × 224 are 1.0 to 1.3 times
# as fast as 32 (docs/benchmarks/batch_size.py).
_CPU_VALUES, _SMALLEST_CPU_BATCH, _LARGEST_CPU_BATCH = 8 * 3 * 224 * 224, 4, 32
# Towards the end batches shrink to this, so that all workers finish at about the same time.
_LAST_BATCH = 8
_MOST_WORKERS = 8  # on a CPU: a few wide ones rather than many narrow ones

_COUNTS: dict[str, Callable[[], int]] = {
    "cuda": torch.cuda.device_count,
    "mps": torch.mps.device_count,
    "meta": int,  # computes nothing
}

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

    def work(batch: list) -> tuple[list, list, list[Tensor]]:
        good, pixels = run.decode(batch)
        return batch, good, run.forward(limit, network(), good, pixels) if good else []

    with Workers(n_workers, max(1, n_threads // n_workers)) as workers:
        for result in workers.run(work, run.batches(workers, limit)):
            if result is not None:
                run.keep(*result)


def run_on_accelerator(run, device: torch.device, batch_size: int | str, n_threads: int) -> None:
    """Decode in threads, into pinned memory for CUDA; this thread alone uses the device."""
    limit = BatchLimit(_ACCELERATOR_BATCH if batch_size == "auto" else int(batch_size))
    network = functools.cache(lambda: run.network(device))
    # A batch's rows are waited for when the next is queued, so that the device always has work.
    queued: deque[tuple[tuple[list, list, list[Tensor]], Callable[[], None]]] = deque()

    def work(batch: list) -> tuple[list, list, Tensor]:
        return batch, *run.decode(batch, device.type == "cuda")

    def keep_all_but(n: int) -> None:
        while len(queued) > n:
            result, wait_for_copy = queued.popleft()
            wait_for_copy()
            run.keep(*result)

    with Workers(n_threads) as workers:
        for decoded in workers.run(work, run.batches(workers, limit)):
            if decoded is not None:
                batch, good, pixels = decoded
                parts = run.forward(limit, network(), good, pixels, device) if good else []
                queued.append(((batch, good, parts), _queued_work(device)))
            keep_all_but(0 if decoded is None else 1)
        keep_all_but(0)


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
        return named
    if not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if multiprocessing.parent_process() is None:
        return torch.device("cuda", 0)
    try:
        torch.cuda.init()
    except RuntimeError as error:
        warn(f"CUDA cannot be used in this worker process, so the CPU is used: {error}")
        return torch.device("cpu")
    # Workers of one pool have neighbouring process ids, so that each gets another device.
    return torch.device("cuda", os.getpid() % torch.cuda.device_count())


def n_decoding_threads(n_jobs: int | None) -> int:
    """Return the number of threads that ``n_jobs`` means in this process."""
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
        self, work: Callable[[_Item], _Result], items: Iterable[_Item | None]
    ) -> Iterator[_Result | None]:
        """Yield ``work(item)`` in order, some being under way.

        An item None waits for all of them and comes back as None.
        """
        under_way: deque[Future[_Result]] = deque()
        for item in items:
            if item is not None:
                under_way.append(self._pool.submit(work, item))
            while under_way and (item is None or len(under_way) >= self.depth):
                yield under_way.popleft().result()
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
        self.n_sharing = 0  # workers that share the batches out among them

    def next_size(self, n_left: int) -> int:
        """Return the size of the next batch if at most so many images are left."""
        if not self.n_sharing:
            return self.size
        share = -(-n_left // (2 * self.n_sharing))
        return min(self.size, max(_LAST_BATCH, share))

    def forward(
        self, network: nn.Module, batch: Tensor, device: torch.device | None = None
    ) -> list[Tensor]:
        """Run ``batch``; when memory runs out, in halves, and keep to that size."""
        try:
            if device is None:
                return network(batch)
            # Elsewhere than on CUDA nothing keeps or awaits what is still being copied.
            in_background = device.type == "cuda"
            parts = network(batch.to(device, non_blocking=in_background))
            return [part.to("cpu", non_blocking=in_background) for part in parts]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
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
            warn(
                f"Out of memory with {len(batch)} images at once: continuing with batches of "
                f"{half}. Set batch_size={half} to begin there."
            )
        halves = [self.forward(network, part, device) for part in batch.split(half)]
        if device is not None:
            _queued_work(device)()
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]


def _queued_work(device: torch.device) -> Callable[[], None]:
    """Return what waits for all that is queued on the device by now."""
    if device.type == "cuda":
        return torch.cuda.current_stream(device).record_event().synchronize
    return torch.mps.synchronize if device.type == "mps" else lambda: None
