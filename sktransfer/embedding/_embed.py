"""``embed``: rows for images, from the store or through the network."""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from joblib.parallel import get_active_backend

from sktransfer._progress import progress_bar
from sktransfer._rows import BadCell, BadRow, Rows
from sktransfer._threads import own_settings
from sktransfer.embedding._batches import (
    Batch,
    BatchLimit,
    Workers,
    n_decoding_threads,
    resolve_device,
    run_on_accelerator,
    run_on_cpu,
    uploaded,
)
from sktransfer.embedding._cluster import deal_out, is_outside_of_workers
from sktransfer.networks._preprocessing import CallablePreprocessing
from sktransfer.networks._tokens import Tokens
from sktransfer.store._store import Lock, Store, as_store, block_of, resolve_memory

if TYPE_CHECKING:
    from sktransfer._rows import Cell
    from sktransfer.networks._backbone import Backbone

_CHUNK = 1024  # images whose files are looked up in the store at once
_FIRST_PART = 32  # images read before an accelerator's threads decode the first
_READ_TOGETHER = 8  # images read by one task
_PART_BYTES = 128 << 20  # of content that is read before it is computed
_POLL_SECONDS = 0.02
_CPU = torch.device("cpu")
# joblib's own backends: their workers are cores of this machine, which embed() uses as threads.
_LOCAL_BACKENDS = {
    "LokyBackend",
    "MultiprocessingBackend",
    "SequentialBackend",
    "ThreadingBackend",
}


def check_place(memory: object, device: str) -> torch.device:
    """Return the device; raise before a network is loaded if it or `memory` cannot be used."""
    as_store(memory)
    return resolve_device(device)


def embed_images(
    images: Rows,
    backbone: Backbone,
    *,
    out: np.ndarray,
    memory: object,
    start: str = "",
    n_jobs: int | None,
    verbose: int,
    **settings,
) -> list[BadRow]:
    """Embed in this process or, under a cluster's joblib backend, on its workers.

    The parameters are those of `embed`, with `memory` in place of the store (a folder is opened
    by each worker, so it should be one that all of them see; a relative one is in `start`) and
    `verbose` for a progress bar.
    """
    backend, _ = get_active_backend()
    is_local = type(backend).__name__ in _LOCAL_BACKENDS or not is_outside_of_workers(backend)
    with progress_bar(len(images), images.kind[:-1]) if verbose else nullcontext() as progress:
        if is_local:
            store = as_store(memory, start)
            settings |= {"n_jobs": n_jobs, "progress": progress}
            return embed(images, backbone, out=out, store=store, **settings)
        bad: list[BadRow] = []
        memory = resolve_memory(memory, start)
        embed_part = functools.partial(_embed_part, backbone, memory, out.shape[1], settings)
        for part, (rows, bad_in_part, notes) in deal_out(images, n_jobs, embed_part):
            out[part] = rows
            bad += bad_in_part
            images.merge_notes(notes)
            if progress is not None:
                progress(len(part))
        return bad


def _embed_part(
    backbone: Backbone, memory: object, width: int, settings: dict, images: Rows
) -> tuple[np.ndarray, list[BadRow], dict]:
    rows = np.empty((len(images), width), dtype=np.float32)
    bad = embed(images, backbone, out=rows, store=as_store(memory), **settings)
    return rows, bad, images.take_notes()


@own_settings()
def embed(
    images: Rows,
    backbone: Backbone,
    *,
    out: np.ndarray,
    store: Store,
    batch_size: int | str = "auto",
    device: str = "auto",
    precision: str = "float32",
    n_jobs: int | None = None,
    groups: Sequence[int] | None = None,
    fill: float = np.nan,
    progress: Callable[[int], object] | None = None,
) -> list[BadRow]:
    """Embed images into ``out``, float32 (n_images, n_features); return the bad ones.

    Each image is looked up in the store; what the store does not have is decoded, resized,
    batched, sent through the network and put there. `groups` are those of the backbone's feature
    groups that are returned, None for all; the others are computed in the same pass and go to the
    store alone. `fill` is what the rows of bad images hold, and `progress` is called with each
    number of rows just finished. The other parameters are those of `PretrainedFeatureExtractor`.
    """
    groups = range(len(backbone.feature_groups)) if groups is None else groups
    order = images.order()
    if order is not None:
        images, asked, out = images[order], out, np.empty_like(out)
    run = EmbeddingRun(images, backbone, out, store, precision, groups, fill, progress)
    torch_device, n_threads = resolve_device(device), n_decoding_threads(n_jobs)
    try:
        if torch_device.type == "cpu":
            run_on_cpu(run, len(images), batch_size, n_threads)
        else:
            run_on_accelerator(run, torch_device, batch_size, n_threads)
    finally:
        run.release_all()
    bad = run.finish()
    if order is not None:
        asked[order] = out
        bad.sort(key=lambda b: b.row)
    return bad


@dataclass
class _Row:
    """A row to compute."""

    i: int
    cell: Cell | None  # None: to be read again
    digest: bytes
    block: int = -1  # whose lock is held for it


class EmbeddingRun:
    """What one call to `embed` has found, computed and still lacks."""

    def __init__(
        self,
        images: Rows,
        backbone: Backbone,
        out: np.ndarray,
        store: Store,
        precision: str,
        groups: Sequence[int],
        fill: float,
        progress: Callable[[int], object] | None,
    ) -> None:
        self._images, self._backbone, self._out, self._store = images, backbone, out, store
        self._precision, self._groups, self._fill = precision, groups, fill
        self._progress = progress or (lambda n: None)
        self.input_size = backbone.input_size
        how = backbone.preprocessing
        # What resizes the images of a batch together, on the device.
        self._together = how if not isinstance(how, CallablePreprocessing) and how.joins else None
        # An encoded image has the same digest under any range of its values.
        settings = f"{precision}-{images.value_range}" if images.value_range else precision
        self._fingerprints = [f"{f}-{settings}" for f in backbone.group_fingerprints]
        self._keeps = store.max_bytes != 0
        self._n_left = self._n_unreported = len(images)  # to compute at most; not reported yet
        self._started_at = time.time_ns()
        self._stats: dict[int, tuple] = {}  # of files whose digest is not known yet
        self._first: dict[bytes, int] = {}  # digest -> the row that is computed for it
        self._duplicates: list[tuple[int, int]] = []  # (row, the row computed for an equal image)
        self._locks: dict[int, Lock] = {}  # held, of blocks of digests
        self._n_locked: Counter[int] = Counter()  # rows of a block to compute, or under way
        self._later: list[_Row] = []  # rows of blocks that other threads or processes hold
        self._bad: dict[int, str] = {}  # row -> what is wrong with its image

    # -- rows to compute -----------------------------------------------------------------
    def batches(
        self, readers: Workers, limit: BatchLimit, n_tasks: int = 1, is_pinned: bool = False
    ) -> Iterator[tuple[Batch, range, bool] | None]:
        """Fill in the rows that the store has, and yield what is left to compute.

        A batch comes as `n_tasks` tasks of decoding, which may begin before all its images are
        read: the batch, the places of the rows to decode, and whether these are its last.

        Other processes or threads may embed the same images at the same time. Rows are
        computed under the lock of the block that their digest falls into, and looked up once
        more when the lock is acquired. No call waits for a lock while it holds one: it yields
        None first, so that all rows being computed are kept and their locks released.
        """
        # While one process computes a few blocks, the others can take the rest of the part.
        most = min(_CHUNK, 4 * readers.depth * limit.size)
        first = most if n_tasks == 1 else min(most, _FIRST_PART)
        in_tasks = functools.partial(self._batched, limit, n_tasks, is_pinned)
        yield from in_tasks(self._missing(readers, first, most))
        while self._later:
            rows, self._later = sorted(self._later, key=lambda row: row.i), []
            n_waiting = len(rows)
            yield from in_tasks(self._locked(self._not_stored(rows)))
            if len(self._later) == n_waiting:  # no lock was free
                yield None
                time.sleep(_POLL_SECONDS)

    def _batched(
        self, limit: BatchLimit, n_tasks: int, is_pinned: bool, rows: Iterator[_Row]
    ) -> Iterator[tuple[Batch, range, bool]]:
        is_last = False  # of all rows
        while not is_last:
            size = max(1, min(limit.next_size(self._n_left), self._n_left))
            batch = Batch(size, is_pinned, self._together is None)
            n_together = -(-batch.size // n_tasks)
            n = 0
            while not is_last and n < batch.size:
                wanted = min(n_together, batch.size - n)
                batch.rows += itertools.islice(rows, wanted)
                start, n = n, len(batch.rows)
                self._n_left -= n - start
                is_last = n - start < wanted
                if n:
                    yield batch, range(start, n), is_last or n == batch.size

    def _missing(self, readers: Workers, n_first: int, most: int) -> Iterator[_Row]:
        """Read the images that the store does not know by their file, in ever larger parts."""
        part: list[_Row] = []
        n_bytes, wanted = 0, n_first
        for rows in filter(None, readers.run(self._read, self._to_read())):
            part += rows
            n_bytes += sum(row.cell.n_bytes for row in rows if row.cell)
            if len(part) >= wanted or n_bytes > _PART_BYTES:
                yield from self._locked(self._new(part))
                part, n_bytes, wanted = [], 0, min(2 * wanted, most)
        yield from self._locked(self._new(part))

    def _to_read(self) -> Iterator[list[int]]:
        """Yield the images that have to be read, a few at a time."""
        n = len(self._images)
        n_together = max(1, min(_READ_TOGETHER, n // 16))
        for start in range(0, n, _CHUNK):
            chunk = range(start, min(start + _CHUNK, n))
            unknown = self._not_known(chunk) if self._keeps else list(chunk)
            for k in range(0, len(unknown), n_together):
                yield unknown[k : k + n_together]

    def _not_known(self, chunk: range) -> list[int]:
        """Fill in the rows of files that have not changed since they were read; return the rest."""
        stats = [self._images.stat(i) for i in chunk]
        digests = self._store.get_file_digests(stats)
        triples = zip(chunk, stats, digests, strict=True)
        self._stats.update((i, stat) for i, stat, digest in triples if stat and digest is None)
        known = [i for i, digest in zip(chunk, digests, strict=True) if digest is not None]
        found = self._look_up(known, [digest for digest in digests if digest is not None])
        done = {i for i, is_found in zip(known, found, strict=True) if is_found}
        return [i for i in chunk if i not in done]

    def _read(self, together: list[int]) -> list[_Row]:
        """Read and digest images; what cannot be read is noted and left out."""
        rows = []
        for i in together:
            try:
                cell = self._images.read(i)
                rows.append(_Row(i, cell, cell.digest))
            except BadCell as error:
                self._fail(i, error)
        return rows

    def _new(self, part: list[_Row]) -> list[_Row]:
        """Return the rows that neither the store has nor an equal image of this call gives."""
        read = [row for row in part if row.i in self._stats]
        if read:
            stats, digests = [self._stats.pop(row.i) for row in read], [row.digest for row in read]
            self._store.put_file_digests(stats, digests, self._started_at)
        new = []
        for row in self._not_stored(part):
            if (first := self._first.setdefault(row.digest, row.i)) == row.i:
                new.append(row)
            else:
                self._duplicates.append((row.i, first))
        return new

    def _locked(self, rows: list[_Row]) -> Iterator[_Row]:
        """Yield rows whose block's lock this call holds; defer the others."""
        if not self._keeps:
            yield from rows
            return
        blocks: dict[int, list[_Row]] = {}
        for row in rows:
            row.block = block_of(row.digest)
            blocks.setdefault(row.block, []).append(row)
        in_order: list[_Row] = []
        # In the same order in every run, so that the same batches give the same bits.
        for block in sorted(blocks):
            if block not in self._locks:
                lock = self._store.lock(min(self._fingerprints), block)
                if not lock.acquire(blocking=False):
                    for row in blocks[block]:
                        row.cell = None
                    self._later += blocks[block]
                    continue
                self._locks[block] = lock
            missing = self._not_stored(blocks[block])
            self._count(block, len(missing))
            if self._images.is_ordered:
                in_order += missing
            else:  # the next locks are asked for when these rows are computed
                yield from missing
        yield from sorted(in_order, key=lambda row: row.i)

    def _not_stored(self, rows: list[_Row]) -> list[_Row]:
        found = self._look_up([row.i for row in rows], [row.digest for row in rows])
        return [row for row, is_found in zip(rows, found, strict=True) if not is_found]

    def _look_up(self, indices: list[int], digests: list[bytes]) -> np.ndarray:
        """Fill in the rows that the store holds; return which those are."""
        if not self._keeps or not indices:
            return np.zeros(len(indices), dtype=bool)
        found = np.ones(len(indices), dtype=bool)
        # Ascending numbers: neighbours, as nearly always, are filled in where they are.
        are_neighbours = indices[-1] - indices[0] == len(indices) - 1
        rows = self._out[indices[0] : indices[-1] + 1]
        if not are_neighbours:
            rows = np.empty((len(indices), self._out.shape[1]), dtype=np.float32)
        start = 0
        for g in self._groups:
            stop = start + self._backbone.feature_groups[g][1]
            found &= self._store.get_into(self._fingerprints[g], digests, rows[:, start:stop])
            start = stop
        if not are_neighbours:
            self._out[np.asarray(indices, dtype=np.intp)[found]] = rows[found]
        n_found = int(found.sum())
        self._n_left -= n_found
        self._report(n_found)
        return found

    def _count(self, block: int, n_rows: int) -> None:
        """Add to the number of a block's rows in work; at 0 release its lock."""
        self._n_locked[block] += n_rows
        if self._n_locked[block] == 0:
            self._locks.pop(block).release()

    def release_all(self) -> None:
        """Release the locks of a call that ends early."""
        while self._locks:
            self._locks.popitem()[1].release()

    # -- computing them ------------------------------------------------------------------
    def network(self, device: torch.device) -> torch.nn.Module:
        """Return the network, on the device."""
        return self._backbone.inference_module(device, self._precision)

    def decode(self, batch: Batch, places: range) -> None:
        """Decode and resize images of a batch; bad ones are noted and left out."""
        for k in places:
            row = batch.rows[k]
            try:
                array = self._decode(row)
            except BadCell as error:
                self._fail(row.i, error)
                continue
            into = batch.room_for(k, array)
            if array.shape != into.shape:
                raise ValueError(
                    f"The preprocessing gave an array of shape {array.shape} for "
                    f"{self._images.where(row.i)}, and of shape {tuple(into.shape)} for "
                    f"{self._images.where(batch.rows[batch.first].i)}: all images must have one "
                    "shape then."
                )
            into.numpy()[:] = array
            batch.images[k] = into

    def pixels(self, batch: Batch, device: torch.device = _CPU) -> tuple[list[_Row], torch.Tensor]:
        """Return the rows of a batch that have an image, and these as the network takes them."""
        places = sorted(batch.images)
        good, images = [batch.rows[k] for k in places], [batch.images[k] for k in places]
        if not good:
            return [], torch.empty(0)
        if self._together is not None:
            join = self._together.join
            return good, uploaded(lambda: join(images, device), device)
        assert batch.joined is not None
        pixels = batch.joined[: len(good)]
        if places[-1] >= len(good):  # bad ones lie between them
            pixels = torch.stack(images)
        # H×W×3 pixels seen as 3×H×W are channels-last already: nothing is copied.
        return good, pixels.permute(0, 3, 1, 2) if pixels.dtype == torch.uint8 else pixels

    def _decode(self, row: _Row) -> np.ndarray:
        cell, row.cell = row.cell, None  # frees its bytes after decoding
        if cell is None:
            cell = self._images.read(row.i)
            if cell.digest != row.digest:
                raise BadCell("it changed during this call")
        preprocessing = self._backbone.preprocessing
        with cell.decoded(preprocessing.min_size) as image:
            try:
                if self._together is not None:
                    return np.asarray(self._together.prepare(image))
                assert not isinstance(preprocessing, Tokens)
                return preprocessing.resize_crop(image)
            except Exception as error:
                where = self._images.where(row.i)
                error.add_note(f"This happened in the preprocessing of {where}.")
                raise

    def forward(
        self,
        limit: BatchLimit,
        network: torch.nn.Module,
        good: list[_Row],
        pixels: torch.Tensor,
        device: torch.device | None = None,
    ) -> list[torch.Tensor]:
        """Run the network; what it raises says where that was."""
        try:
            return limit.forward(network, pixels, device)
        except Exception as error:
            error.add_note(
                f"This happened in the network {self._backbone.name}, precision "
                f"{self._precision!r}, with a {pixels.dtype} batch of shape "
                f"{tuple(pixels.shape)} that begins with {self._images.where(good[0].i)}. "
                "What was embedded before is kept."
            )
            raise

    def keep(self, batch: list[_Row], good: list[_Row], parts: list[torch.Tensor]) -> None:
        """Put a batch's rows into the output and the store."""
        if good:
            arrays = [part.numpy() for part in parts]
            rows = np.concatenate([arrays[g] for g in self._groups], axis=1)
            self._out[[row.i for row in good]] = rows
            if self._keeps:
                digests = [row.digest for row in good]
                for fingerprint, array in zip(self._fingerprints, arrays, strict=True):
                    self._store.put_many(fingerprint, digests, array)
        for row in batch:
            if row.block >= 0:
                self._count(row.block, -1)
        self._report(len(batch))

    # -- the end -------------------------------------------------------------------------
    def finish(self) -> list[BadRow]:
        """Give equal images their row, and list the images that gave none, in their order."""
        for i, first in self._duplicates:
            self._out[i] = self._out[first]
            if first in self._bad:
                self._bad[i] = self._bad[first]
        self._report(self._n_unreported)
        images = self._images
        return [BadRow(images.row(i), images.where(i), self._bad[i]) for i in sorted(self._bad)]

    def _fail(self, i: int, error: BadCell) -> None:
        self._out[i] = self._fill
        self._bad[i] = str(error)

    def _report(self, n_done: int) -> None:
        self._n_unreported -= n_done
        self._progress(n_done)
