"""What one call to ``embed`` has found in the store, has computed and still lacks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sktransfer.images._images import BadImage, Images
from sktransfer.networks._backbone import Backbone
from sktransfer.store._store import FileStat

# Images whose store rows are looked up at once; their files are read again for decoding
# soon after they were digested, so that the second reading finds them in memory.
_CHUNK = 1024
_DIGESTED_TOGETHER = 32
# How long others leave a claimed batch to this process, unless they see that it has ended.
_CLAIM_SECONDS = 300.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class BadRow:
    """An image that gave no embedding.

    Attributes
    ----------
    row : int
        Its row in ``X``, from 0.
    where : str
        The row and, where there is one, the column and the path.
    reason : str
        What is wrong with it.
    """

    row: int
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BatchLimit(Protocol):
    """The largest batch that memory has allowed so far, and the way to run one."""

    size: int

    def next_size(self, n_left: int) -> int: ...

    def forward(
        self, network: Any, batch: torch.Tensor, device: torch.device | None = None
    ) -> list[torch.Tensor]: ...


class EmbeddingRun:
    """What one call to `embed` has found, computed and still lacks."""

    def __init__(
        self,
        images: Images,
        backbone: Backbone,
        rows: np.ndarray,
        store: Any,
        precision: str,
        groups: list[int],
        fill: float,
        progress: Callable[[int], Any] | None,
    ) -> None:
        self.images, self.backbone, self.rows, self.store = images, backbone, rows, store
        self.precision, self.groups, self._fill = precision, groups, fill
        self._progress = progress or (lambda n: None)
        self._n_bad_told = 0
        self.fingerprints = [f"{f}-{precision}" for f in backbone.group_fingerprints]
        # A claim is on the first of these: one and the same whichever of the groups, which are all
        # computed together, is asked for.
        self._claim_group = min(range(len(self.fingerprints)), key=self.fingerprints.__getitem__)
        asked = [self.fingerprints[g] for g in groups if g != self._claim_group]
        self._claim_fingerprints = [self.fingerprints[self._claim_group], *asked]
        self._bad: dict[int, str] = {}  # row -> what is wrong with its image
        self._digests: dict[int, bytes] = {}  # of the rows to compute
        self._stamps: dict[int, int] = {}  # of the rows to compute: a digest of their file's stat
        self._changed: set[int] = set()  # rows whose file is no longer the one that was digested
        self._first: dict[bytes, int] = {}  # digest -> the row that is computed for it
        self._twins: list[tuple[int, int]] = []  # (row, the row computed for the same image)
        self._claimed: set[int] = set()  # rows that other processes now leave to this one

    def batches(self, pool: ThreadPoolExecutor, limit: BatchLimit) -> Iterator[list[int]]:
        """Fill in what the store holds and yield what is left to compute, in batches.

        Another process or thread that shares the store may be at the same images: each
        batch is claimed first, what others have claimed is left to them and fetched at
        the end, and computed here after all if they failed to. An empty batch asks to have
        all kept that is under way.
        """
        left_to_others: list[int] = []
        for batch in _batched(self._missing(pool), limit, len(self.images)):
            mine = self._claim(batch)
            left_to_others += [i for i in batch if i not in self._claimed]
            if mine:
                yield mine
        yield from self._found_or_computed(left_to_others, limit)
        if self._twins:
            yield []  # only then is it known whose picture could not serve its twins
            self.give_claims_back()
            yield from self._found_or_computed(self._twins_left_alone(), limit)

    def _found_or_computed(
        self, left_to_others: list[int], limit: BatchLimit
    ) -> Iterator[list[int]]:
        """Wait until others have computed these rows, or claim and yield them."""
        while left_to_others:
            digests = [self._digests[i] for i in left_to_others]
            found = self._look_up(left_to_others, digests)
            self._tell(int(found.sum()))
            left_to_others = [i for i, f in zip(left_to_others, found, strict=True) if not f]
            batch = left_to_others[: limit.size]
            if mine := self._claim(batch):
                left_to_others = [i for i in left_to_others if i not in self._claimed]
                yield mine
            elif left_to_others:
                # Others may wait in turn for what is under way here: that is kept now. What
                # is still claimed after it are pictures that turned out to be bad.
                yield []
                self.give_claims_back()
                time.sleep(_POLL_SECONDS)

    def _missing(self, pool: ThreadPoolExecutor) -> Iterator[int]:
        for start in range(0, len(self.images), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(self.images)))
            taken_at = time.time_ns()
            stats = [self.images.stat(i) for i in chunk]
            digests = self._digest(chunk, stats, taken_at, pool)
            found = self._look_up(list(digests), list(digests.values()))
            n_known = int(found.sum())
            for (i, digest), is_found in zip(digests.items(), found, strict=True):
                if is_found:
                    continue
                if (stat := stats[i - start]) is not None:
                    self._stamps[i] = hash(stat)
                if (first := self._first.setdefault(digest, i)) != i:
                    self._twins.append((i, first))
                else:
                    self._digests[i] = digest
                    yield i
            self._tell(n_known)

    def _digest(
        self, chunk: range, stats: list[FileStat | None], taken_at: int, pool: ThreadPoolExecutor
    ) -> dict[int, bytes]:
        """Return the digest of each image, from the store's list of files where it knows."""
        digests = self.store.get_file_digests(stats)
        unknown = [k for k, digest in enumerate(digests) if digest is None]
        # Several at once: handing one small array to a thread costs more than its digest.
        step = max(1, min(_DIGESTED_TOGETHER, len(unknown) // 8))
        parts = [unknown[start : start + step] for start in range(0, len(unknown), step)]
        indices = ([chunk[k] for k in part] for part in parts)
        for part, found in zip(parts, pool.map(self._digest_some, indices), strict=True):
            for k, digest in zip(part, found, strict=True):
                digests[k] = digest
        fresh = [k for k in unknown if digests[k] is not None and stats[k] is not None]
        self.store.put_file_digests(
            [stats[k] for k in fresh], [digests[k] for k in fresh], taken_at
        )
        return {i: d for i, d in zip(chunk, digests, strict=True) if d is not None}

    def _digest_some(self, indices: list[int]) -> list[bytes | None]:
        digests: list[bytes | None] = []
        for i in indices:
            try:
                digests.append(self.images.digest(i))
            except BadImage as error:
                self.fail(i, error)
                digests.append(None)
        return digests

    def _look_up(self, indices: list[int], digests: list[bytes]) -> np.ndarray:
        """Fill in the rows that the store holds; return which those are."""
        found = np.ones(len(indices), dtype=bool)
        if not indices:
            return found
        # Ascending numbers: neighbours, as nearly always, are filled in where they stand.
        are_neighbours = indices[-1] - indices[0] == len(indices) - 1
        if are_neighbours:
            rows = self.rows[indices[0] : indices[-1] + 1]
        else:
            rows = np.empty((len(indices), self.rows.shape[1]), dtype=np.float32)
        start = 0
        for g in self.groups:
            stop = start + self.backbone.feature_groups[g][1]
            found &= self.store.get_into(self.fingerprints[g], digests, rows[:, start:stop])
            start = stop
        if not are_neighbours:
            self.rows[np.asarray(indices, dtype=np.intp)[found]] = rows[found]
        return found

    def _claim(self, batch: list[int]) -> list[int]:
        digests = [self._digests[i] for i in batch]
        is_mine = self.store.claim(self._claim_fingerprints, digests, _CLAIM_SECONDS)
        mine = [i for i, m in zip(batch, is_mine, strict=True) if m]
        self._claimed.update(mine)
        return mine

    def give_claims_back(self) -> None:
        """Let others compute what this call claimed and did not finish."""
        digests = [self._digests[i] for i in self._claimed]
        if digests:
            self.store.release(self._claim_fingerprints, digests)
            self._claimed.clear()

    def decode(self, indices: Sequence[int], pinned: bool = False) -> tuple[list[int], Any]:
        """Decode and resize images into one batch; bad ones are noted and left out."""
        preprocessing = self.backbone.preprocessing
        good: list[int] = []
        batch = None
        for i in indices:
            try:
                picture = self.images.picture(i, min_size=preprocessing.min_size)
            except BadImage as error:
                self.fail(i, error)
                continue
            try:
                array = preprocessing.resize_crop(picture)
            except Exception as error:
                add_note(error, f"This happened in the preprocessing of {self.images.where(i)}.")
                raise
            if batch is None:
                dtype = torch.uint8 if array.dtype == np.uint8 else torch.float32
                batch = torch.empty((len(indices), *array.shape), dtype=dtype, pin_memory=pinned)
                into = batch.numpy()
            elif array.shape != into.shape[1:]:
                raise ValueError(
                    f"The preprocessing gave an array of shape {array.shape} for "
                    f"{self.images.where(i)}, where {self.images.where(good[0])} has "
                    f"{into.shape[1:]}: all images must come out in one shape."
                )
            into[len(good)] = array
            good.append(i)
            stamp = self._stamps.pop(i, None)
            if stamp is not None and stamp != hash(self.images.stat(i)):
                self._changed.add(i)
        if batch is None:
            return [], None
        batch = batch[: len(good)]
        # H×W×3 pixels seen as 3×H×W are channels-last already: nothing is copied.
        return good, batch.permute(0, 3, 1, 2) if batch.dtype == torch.uint8 else batch

    def forward(
        self,
        limit: BatchLimit,
        network: Any,
        good: list[int],
        batch: torch.Tensor,
        device: torch.device | None = None,
    ) -> list[torch.Tensor]:
        """Run the network; what it raises says where that was."""
        try:
            return limit.forward(network, batch, device)
        except Exception as error:
            add_note(
                error,
                f"This happened in the network {self.backbone.name}, precision "
                f"{self.precision!r}, with a {batch.dtype} batch of shape {tuple(batch.shape)} "
                f"that begins with {self.images.where(good[0])}. What was embedded before is kept.",
            )
            raise

    def keep(self, indices: list[int], tensors: list[torch.Tensor]) -> None:
        """Put a batch's rows into the output and the store."""
        if not indices:
            return
        parts = [tensor.numpy() for tensor in tensors]
        self.rows[indices] = np.concatenate([parts[g] for g in self.groups], axis=1)
        # What is of another content than the digest says is for this call alone.
        known = [k for k, i in enumerate(indices) if i not in self._changed]
        digests = [self._digests[indices[k]] for k in known]
        # The claim is given back when the rows that it is on are put: last.
        for g in sorted(range(len(parts)), key=lambda g: g == self._claim_group):
            rows = parts[g] if len(known) == len(indices) else parts[g][known]
            self.store.put_many(self.fingerprints[g], digests, rows)
        self._claimed.difference_update(indices[k] for k in known)
        self._tell(len(indices))

    def fail(self, i: int, error: BadImage) -> None:
        self.rows[i] = self._fill
        self._bad[i] = str(error)

    def bad_rows(self) -> list[BadRow]:
        """List the images that gave no embedding, in their order."""
        images = self.images
        return [BadRow(images.row(i), images.where(i), self._bad[i]) for i in sorted(self._bad)]

    def _tell(self, n_done: int) -> None:
        """Tell of rows done, and of bad ones that the workers have found: in one thread."""
        n_bad = len(self._bad)
        self._progress(n_done + n_bad - self._n_bad_told)
        self._n_bad_told = n_bad

    def _twins_left_alone(self) -> list[int]:
        """Rows that are computed after all: the file of their twin changed or went meanwhile."""
        lost = self._changed | self._bad.keys()
        alone = [(i, first) for i, first in self._twins if first in lost]
        self._twins = [pair for pair in self._twins if pair[1] not in lost]
        self._digests.update({i: self._digests[first] for i, first in alone})
        return [i for i, _ in alone]

    def copy_to_twins(self) -> None:
        """Give equal images their row."""
        self._tell(len(self._twins))
        for i, first in self._twins:
            self.rows[i] = self.rows[first]


def _batched(indices: Iterable[int], limit: BatchLimit, n: int) -> Iterator[list[int]]:
    """Batches of ascending indices, all below `n`."""
    indices, n_left = iter(indices), n
    while batch := list(itertools.islice(indices, limit.next_size(n_left))):
        n_left = n - 1 - batch[-1]
        yield batch


def add_note(error: Exception, note: str) -> None:
    """Say more about an error, where Python lets it."""
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(note)
