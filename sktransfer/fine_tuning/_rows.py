"""The rows a network is trained on: each picture once, decoded once, frozen parts computed once."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from sktransfer.embedding._embed import BadRow
from sktransfer.images._images import BadImage, Images

# What is kept of a training set (pixels, or what the frozen stages make of them): in memory up
# to the first bound, on disk up to the second or half of what is free there, else made again in
# each epoch.
MAX_MEMORY_BYTES = 2 * 2**30
MAX_DISK_BYTES = 64 * 2**30


def digest_rows(
    images: Images, store: Any, n_threads: int
) -> tuple[list[bytes | None], list[BadRow]]:
    """One key per row, made of its pictures' digests; None where one cannot be read."""
    taken_at = time.time_ns()
    stats = [images.stat(i) for i in range(len(images))]
    digests = store.get_file_digests(stats)
    unknown = [i for i, digest in enumerate(digests) if digest is None]
    bad: list[BadRow] = []

    def read(i: int) -> bytes | BadRow:
        try:
            return images.digest(i)
        except BadImage as error:
            return BadRow(images.row(i), images.where(i), str(error))

    with ThreadPoolExecutor(n_threads) as pool:
        for i, found in zip(unknown, pool.map(read, unknown), strict=True):
            if isinstance(found, BadRow):
                bad.append(found)
            else:
                digests[i] = found
    fresh = [i for i in unknown if digests[i] is not None and stats[i] is not None]
    store.put_file_digests([stats[i] for i in fresh], [digests[i] for i in fresh], taken_at)
    c = images.n_columns
    keys = []
    for row in range(images.n_rows):
        parts = digests[row * c : (row + 1) * c]
        keys.append(None if None in parts else b"".join(parts))
    return keys, bad


def merge_rows(
    keys: Sequence[bytes | None], target: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merge equal rows and bring the rest into an order of their own.

    Rows of the same pictures and the same target become one row of their joint weight, so that a
    weight of two is the row twice, and no row lies on both sides of a validation split. Rows
    without weight go. The order follows from the digests: the given one does not matter.

    Returns
    -------
    index : ndarray of int
        The first of each set of equal rows.
    weight : ndarray of float
    """
    first: dict[bytes, int] = {}
    total: dict[bytes, float] = {}
    target = np.ascontiguousarray(target)
    for i, key in enumerate(keys):
        if key is None or weight[i] == 0:
            continue
        full = key + target[i].tobytes()
        first.setdefault(full, i)
        total[full] = total.get(full, 0.0) + float(weight[i])
    order = sorted(first)
    index = np.array([first[full] for full in order], dtype=int)
    return index, np.array([total[full] for full in order], dtype=float)


def rows_of(images: Images, index: np.ndarray) -> Images:
    """A view of the pictures of some rows; its pictures are numbered row by row."""
    c = images.n_columns
    return images[(index[:, None] * c + np.arange(c)).reshape(-1)]


class Pixels:
    """Decoded, resized and cropped pictures, kept within the bounds above.

    Parameters
    ----------
    images : Images
        Of length n_rows · n_columns.
    n_columns : int
    preprocessing : Preprocessing or CallablePreprocessing
    n_threads : int
        For decoding.
    on_error : {"raise", "skip"}
        What :meth:`take` does with a picture that cannot be read: an error, or zeros in its place.

    Attributes
    ----------
    bad : list of BadRow
        Those that could not be read so far.
    is_bad : ndarray of bool of shape (n_rows,)
        Their rows.
    """

    def __init__(
        self,
        images: Images,
        n_columns: int,
        preprocessing: Any,
        n_threads: int,
        on_error: str = "raise",
    ):
        self._images, self.n_columns, self._preprocessing = images, n_columns, preprocessing
        self._n_threads, self._on_error = n_threads, on_error
        self.bad: list[BadRow] = []
        self.is_bad = np.zeros(len(self), dtype=bool)
        self._blank: np.ndarray | None = None  # of the others' shape, once there is one
        self._kept: np.ndarray | None = None
        self._fits = True
        self._is_ready = np.zeros(len(images), dtype=bool)

    def __len__(self) -> int:
        return len(self._images) // self.n_columns

    @property
    def is_kept_in_memory(self) -> bool:
        return self._kept is not None and not isinstance(self._kept, np.memmap)

    def read_all(self) -> None:
        """Decode every picture once; afterwards `bad` tells which cannot be."""
        for start in range(0, len(self), 256):
            self._read(np.arange(start, min(start + 256, len(self))))

    def forget(self) -> None:
        """Let go of what is kept."""
        self._kept = None
        self._is_ready[:] = False

    def take(self, index: np.ndarray) -> torch.Tensor:
        """The pictures of some rows: (n, n_columns, channels, height, width)."""
        pictures = self._read(index)
        if self._blank is None:
            raise ValueError(
                f"None of the {len(self)} rows' pictures that were asked for first can be read any "
                f"more, though they could at the start of this fit. {self.bad[-1]}."
            )
        if self._on_error == "raise" and self.is_bad[index].any():
            raise ValueError(
                f"{self.bad[-1]}. It could be read at the start of this fit: fit again when nobody "
                'changes the pictures, or set on_error="skip" to leave such rows out.'
            )
        return pictures

    def _read(self, index: np.ndarray) -> torch.Tensor:
        c = self.n_columns
        wanted = (np.asarray(index)[:, None] * c + np.arange(c)).reshape(-1)
        missing = [int(i) for i in wanted if not self._is_ready[i]]
        if missing:
            with ThreadPoolExecutor(self._n_threads) as pool:
                found = dict(zip(missing, pool.map(self._decode, missing), strict=True))
            self.is_bad[[i // c for i, pixels in found.items() if pixels is None]] = True
            sample = next((p for p in found.values() if p is not None), None)
            if sample is not None:
                self._blank = np.zeros_like(sample)
                if self._kept is None and self._fits:
                    self._kept = allocate((len(self._images), *sample.shape), sample.dtype)
                    self._fits = self._kept is not None
            blank = np.zeros((1, 1, 3), np.uint8) if self._blank is None else self._blank
            decoded = {i: blank if p is None else p for i, p in found.items()}
            if self._kept is not None:
                for i, pixels in decoded.items():
                    self._kept[i] = pixels
                    self._is_ready[i] = True
        if self._kept is not None:
            stacked = np.asarray(self._kept[wanted])
        else:
            stacked = np.stack([decoded[int(i)] for i in wanted])
        tensor = torch.from_numpy(stacked)
        if tensor.dtype == torch.uint8:
            tensor = tensor.permute(0, 3, 1, 2)  # channels-last in memory, as convolutions like it
        return tensor.unflatten(0, (-1, c))

    def _decode(self, i: int) -> np.ndarray | None:
        try:
            picture = self._images.picture(i, self._preprocessing.min_size)
        except BadImage as error:
            row = self._images.row(i)
            if all(bad.row != row for bad in self.bad):
                self.bad.append(BadRow(row, self._images.where(i), str(error)))
            return None
        return np.asarray(self._preprocessing.resize_crop(picture))


class Kept:
    """Rows of numbers that are there already: embeddings, or what frozen stages gave.

    Parameters
    ----------
    rows : ndarray, or list of ndarrays of one shape
    """

    def __init__(self, rows: Any):
        self.rows = rows
        self.is_bad = np.zeros(len(rows), dtype=bool)
        self.is_kept_in_memory = not isinstance(rows, np.memmap)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> torch.Tensor:
        if isinstance(self.rows, list):
            return torch.from_numpy(np.stack([self.rows[i] for i in index]))
        return torch.from_numpy(np.asarray(self.rows[index]))


def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """An array in memory, in a temporary file that ends with it, or None: it fits in neither.

    The file's place is taken at once: to write where a disk has become full ends the process.
    """
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if n_bytes <= MAX_MEMORY_BYTES:
        return np.empty(shape, dtype=dtype)
    try:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if n_bytes > min(MAX_DISK_BYTES, free // 2):
            return None
        with tempfile.TemporaryFile(prefix="sktransfer-") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            return np.memmap(file, dtype=dtype, mode="r+", shape=shape)  # type: ignore[call-overload]
    except OSError:  # no folder for it, or no place in it
        return None


class TrainingSet(torch.utils.data.Dataset):
    """Inputs, targets and weights of rows; skorch's data set.

    Parameters
    ----------
    source : Pixels or Kept
    index : ndarray of int
        Which of its rows.
    target : ndarray
        Of these rows.
    weight : ndarray of float
        Brought to a mean of 1.
    """

    def __init__(self, source: Any, index: np.ndarray, target: np.ndarray, weight: np.ndarray):
        self.source, self.index = source, index
        self._later: tuple[Any, np.ndarray] | None = None
        self.target = torch.from_numpy(np.ascontiguousarray(target))
        mean = weight.mean() if len(weight) else 1.0
        self.weight = torch.from_numpy(weight / mean).float()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a net that is pickled while it is trained takes none of its rows along

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        x, target, weight = self.take(np.array([i]))
        return {"x": x[0], "weight": weight[0]}, target[0]

    def give_first(self, source: Any, index: np.ndarray) -> None:
        """Give rows of another source until :meth:`go_on` is called."""
        self._later = self.source, self.index
        self.source, self.index = source, index

    @property
    def is_embedded(self) -> bool:
        """Whether it gives other rows for now."""
        return self._later is not None

    def go_on(self) -> None:
        """Give rows of the own source from now on."""
        if self._later is not None:
            (self.source, self.index), self._later = self._later, None

    def take(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets and weights of some rows."""
        where = torch.from_numpy(rows)
        x = self.source.take(self.index[rows])
        # A picture that could not be read again weighs nothing.
        is_read = torch.from_numpy(~self.source.is_bad[self.index[rows]])
        return x, self.target[where], self.weight[where] * is_read


class Batches:
    """skorch's iterator over a :class:`TrainingSet`.

    Parameters
    ----------
    dataset : TrainingSet
        Or any other, should somebody call the net itself: its rows come in order.
    batch_size : int
        At most; the rows are dealt out evenly, so that no batch is a rest of one row.
    device : torch.device
    generator : torch.Generator or None
        Shuffles; None: the rows come in order.
    change : callable or None
        What augmentation, mixup and cutmix make of a batch, on the device.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        change: Any = None,
    ):
        self.dataset, self.batch_size, self.device = dataset, batch_size, torch.device(device)
        self.generator, self.change = generator, change

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        if not isinstance(self.dataset, TrainingSet):
            yield from torch.utils.data.DataLoader(self.dataset, self.batch_size)
            return
        n = len(self.dataset)
        order = np.arange(n)
        if self.generator is not None:
            order = torch.randperm(n, generator=self.generator).numpy()
        batches = np.array_split(order, len(self))
        source = self.dataset.source
        with ThreadPoolExecutor(1) as pool:
            # The next batch is fetched while this one is trained on.
            is_at_hand = getattr(source, "is_kept_in_memory", True)
            ahead = 0 if is_at_hand and self.device.type == "cpu" else 1
            waiting = [pool.submit(self._fetch, batch) for batch in batches[:ahead]]
            for i, batch in enumerate(batches):
                if waiting:
                    if i + 1 < len(batches):
                        waiting.append(pool.submit(self._fetch, batches[i + 1]))
                    x, target, weight = waiting.pop(0).result()
                else:
                    x, target, weight = self._fetch(batch)
                x = x.to(self.device, non_blocking=self.device.type == "cuda")
                target, weight = target.to(self.device), weight.to(self.device)
                if self.change is not None:
                    x, target, weight = self.change(x, target, weight)
                yield {"x": x, "weight": weight}, target

    def _fetch(self, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, target, weight = self.dataset.take(batch)
        return (x.pin_memory() if self.device.type == "cuda" else x), target, weight
