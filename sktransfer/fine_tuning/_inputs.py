"""Batches of the network's inputs in training: pixels, or stored outputs of frozen stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sktransfer._rows import BadCell, BadRow, Rows
from sktransfer.embedding._batches import STREAMING, n_decoding_threads
from sktransfer.embedding._embed import embed, embed_images
from sktransfer.fine_tuning._module import TunedModule
from sktransfer.networks._backbone import Backbone
from sktransfer.networks._inference import tensor_float_32
from sktransfer.networks._preprocessing import AnyPreprocessing
from sktransfer.networks._tokens import Tokens
from sktransfer.store._store import MAX_ACTIVATION_BYTES, activations, as_store

# Of the pixels of a training set, or its outputs of frozen stages, that are kept in memory; larger
# ones are computed again in each epoch.
MAX_KEPT_BYTES = 2 * 2**30
_MAX_BYTES_ON_DEVICE = 2**30  # of outputs of frozen stages that are kept on an accelerator

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class EmbeddingSettings:
    """How images are read and embedded; the names are the estimators' parameters."""

    memory: object
    device: str
    precision: str
    n_jobs: int | None
    on_error: str
    verbose: int


def embed_rows(
    images: Rows, backbone: Backbone, settings: EmbeddingSettings
) -> tuple[np.ndarray, list[BadRow]]:
    """Return the embeddings of each row's images, joined, and the unreadable images."""
    out = np.empty((len(images), backbone.n_features), dtype=np.float32)
    bad = embed_images(
        images,
        backbone,
        out=out,
        memory=settings.memory,
        device=settings.device,
        precision=settings.precision,
        n_jobs=settings.n_jobs,
        verbose=settings.verbose,
    )
    return out.reshape(images.n_rows, -1), bad


class Pixels:
    """Decoded, resized and cropped images, kept in memory if they are not too large.

    Rows with unreadable images are marked in `is_bad`, and the images are listed in `bad`. With
    ``on_error="skip"`` :meth:`take` returns zeros for them.
    """

    def __init__(
        self,
        images: Rows,
        n_columns: int,
        preprocessing: AnyPreprocessing,
        settings: EmbeddingSettings,
    ):
        self._images, self._n_columns, self._preprocessing = images, n_columns, preprocessing
        self._settings, self.bad = settings, list[BadRow]()
        self.is_bad = np.zeros(len(self), dtype=bool)
        self.is_kept = True
        self._pixels: dict[int, np.ndarray] = {}
        self._blank: np.ndarray | None = None  # zeros of an image's shape

    def __len__(self) -> int:
        return len(self._images) // self._n_columns

    def read_all(self) -> list[BadRow]:
        """Decode every image once, and return those that cannot be read."""
        for start in range(0, len(self), 256):
            self._read(np.arange(start, min(start + 256, len(self))))
        return list(self.bad)

    def take(self, index: np.ndarray) -> torch.Tensor:
        """Return the images of some rows: (n, n_columns, channels, height, width)."""
        found = self._read(index)
        if self._blank is None or (self._settings.on_error == "raise" and self.is_bad[index].any()):
            raise _no_longer_readable(self.bad[-1])
        arrays = [self._blank if pixels is None else pixels for pixels in found]
        if isinstance(self._preprocessing, Tokens):
            tensor = self._preprocessing.join([torch.from_numpy(tokens) for tokens in arrays])
        else:
            tensor = torch.from_numpy(np.stack(arrays))
        if tensor.dtype == torch.uint8:
            tensor = tensor.permute(0, 3, 1, 2)  # channels-last in memory
        return tensor.unflatten(0, (-1, self._n_columns))

    def _read(self, index: np.ndarray) -> list[np.ndarray | None]:
        n_columns = self._n_columns
        wanted = (np.asarray(index)[:, None] * n_columns + np.arange(n_columns)).ravel().tolist()
        found: dict[int, np.ndarray] = {}
        if missing := [i for i in wanted if i not in self._pixels]:
            with ThreadPoolExecutor(n_decoding_threads(self._settings.n_jobs)) as pool:
                decoded = zip(missing, pool.map(self._decode, missing), strict=True)
                found = {i: pixels for i, pixels in decoded if pixels is not None}
            self.is_bad[[i // n_columns for i in missing if i not in found]] = True
            if found and self._blank is None:
                self._blank = np.zeros_like(next(iter(found.values())))
                self.is_kept = self._blank.nbytes * len(self._images) <= MAX_KEPT_BYTES
            if self.is_kept:
                self._pixels |= found
        return [found.get(i, self._pixels.get(i)) for i in wanted]

    def _decode(self, i: int) -> np.ndarray | None:
        if self.is_bad[i // self._n_columns]:
            return None
        try:
            how = self._preprocessing
            with self._images.read(i).decoded(how.min_size) as cell:
                return how.prepare(cell) if isinstance(how, Tokens) else how.resize_crop(cell)
        except BadCell as error:
            self.bad.append(BadRow(self._images.row(i), self._images.where(i), str(error)))
            return None


class Precomputed:
    """Inputs (n_rows, n_columns, …) that were computed before, except for bad rows."""

    is_kept = True

    def __init__(self, rows: np.ndarray, bad: list[BadRow] | None = None, is_bad=False):
        self._rows, self.bad = rows, bad or []
        self.is_bad = np.broadcast_to(is_bad, len(rows))
        self._on_device: torch.Tensor | None = None

    def keep_on(self, device: torch.device) -> None:
        """Keep the rows on an accelerator, if they are not too large."""
        if device.type == "cpu" or self._rows.nbytes > _MAX_BYTES_ON_DEVICE:
            return
        if self._on_device is None:
            self._on_device = torch.as_tensor(self._rows, device=device)

    def take(self, index: np.ndarray) -> torch.Tensor:
        if self._on_device is None:
            return torch.from_numpy(self._rows[index])
        return self._on_device[torch.from_numpy(index)]


class FrozenStages(Backbone):
    """The stages of a module before `stop`, frozen, as a backbone for `embed`.

    The row of an image is that of :meth:`TunedModule.run_frozen`; `sample` is one image, or a text
    padded to the length of all rows.
    """

    def __init__(self, backbone: Backbone, module: TunedModule, stop: int, sample: torch.Tensor):
        vars(self).update(vars(backbone))
        self._module, self._stop = module.eval(), stop
        with torch.no_grad():
            self.n_features = module.run_frozen(sample.to(module.device), stop).shape[1]
        self._length = module.frozen_shape[0] if backbone.is_text else None
        self.feature_groups = [("frozen stages", self.n_features)]
        self.group_fingerprints = [f"{backbone.fingerprint}-until{stop}-{self.n_features}"]

    def inference_module(self, device="cpu", precision="float32"):
        self._module.to(device)
        return self._run

    @torch.inference_mode()
    def _run(self, x: torch.Tensor) -> list[torch.Tensor]:
        with tensor_float_32(x.device, False):
            return [self._module.run_frozen(x, self._stop, self._length)]


def frozen_outputs(
    images: Rows, n_columns: int, frozen: FrozenStages, settings: EmbeddingSettings
) -> Precomputed | None:
    """Compute the outputs of frozen stages, or return those of an earlier fit.

    Unless `memory` keeps nothing, they are kept in this process. None if they are too large.
    """
    n_bytes = 4 * frozen.n_features * len(images)
    if n_bytes > MAX_KEPT_BYTES:
        return None
    # If they exceeded the store's bound, rows would be evicted before they are used again.
    is_shared = as_store(settings.memory).max_bytes != 0 and n_bytes <= MAX_ACTIVATION_BYTES
    out = np.empty((len(images), frozen.n_features), dtype=np.float32)
    bad = embed(
        images,
        frozen,
        out=out,
        store=activations if is_shared else as_store(False),
        device=settings.device,
        precision=settings.precision,
        n_jobs=settings.n_jobs,
        fill=0.0,
    )
    if bad and settings.on_error == "raise":
        raise _no_longer_readable(bad[-1])
    rows_in_X = np.array([images.row(i) for i in range(0, len(images), n_columns)])
    is_bad = np.isin(rows_in_X, [b.row for b in bad])
    return Precomputed(out.reshape(-1, n_columns, frozen.n_features), bad, is_bad)


def _no_longer_readable(bad: BadRow) -> ValueError:
    return ValueError(
        f"{bad}. It could be read at the start of this fit: fit again when the images do not "
        'change meanwhile, or set on_error="skip" to leave such rows out.'
    )


class TrainingSet(Dataset):
    """Inputs, targets and weights of the rows `index` of a source; skorch's data set.

    Weights are scaled to a mean of 1.
    """

    def __init__(
        self,
        source: Pixels | Precomputed,
        index: np.ndarray,
        target: np.ndarray,
        weight: np.ndarray,
    ):
        self.source, self.index = source, index
        self.target = torch.from_numpy(np.ascontiguousarray(target))
        self.weight = torch.from_numpy(weight / weight.mean()).float()

    def __getstate__(self) -> dict[str, object]:
        return {}  # a net that is pickled during training contains no data

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        x, target, weight = self.take(np.array([i]))
        return {"x": x[0], "weight": weight[0]}, target[0]

    def take(self, rows: np.ndarray) -> Batch:
        """Return inputs, targets and weights of some rows."""
        where, index = torch.from_numpy(rows), self.index[rows]
        x = self.source.take(index)
        # An image that has become unreadable has no weight.
        is_read = torch.from_numpy(~self.source.is_bad[index])
        return x, self.target[where], self.weight[where] * is_read


class Batches:
    """skorch's iterator over a :class:`TrainingSet`, shuffled if there is a `generator`.

    Rows are divided evenly into batches of at most `batch_size`, so that no single row remains.
    The data sets that a user gives to the net are not shuffled.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        augment: Callable[..., Batch] | None = None,
    ):
        self.dataset, self.batch_size, self.device = dataset, batch_size, torch.device(device)
        self.generator, self.augment = generator, augment

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        if not isinstance(self.dataset, TrainingSet):
            yield from DataLoader(self.dataset, self.batch_size)
            return
        order = np.arange(len(self.dataset))
        if self.generator is not None:
            order = torch.randperm(len(order), generator=self.generator).numpy()
        in_background = self.device.type in STREAMING
        if isinstance(self.dataset.source, Precomputed):
            self.dataset.source.keep_on(self.device)
        for batch in self._fetched(np.array_split(order, len(self))):
            if self.augment is not None:
                batch = self.augment(*batch)
            x, target, weight = (p.to(self.device, non_blocking=in_background) for p in batch)
            yield {"x": x, "weight": weight}, target

    def _fetched(self, batches: list[np.ndarray]) -> Iterator[Batch]:
        if self.dataset.source.is_kept and self.device.type == "cpu":  # type: ignore[attr-defined]
            yield from map(self._fetch, batches)
            return
        with ThreadPoolExecutor(1) as pool:
            # The next batch is fetched while the network trains on this one.
            waiting = pool.submit(self._fetch, batches[0])
            for batch in batches[1:]:
                current, waiting = waiting, pool.submit(self._fetch, batch)
                yield current.result()
            yield waiting.result()

    def _fetch(self, batch: np.ndarray) -> Batch:
        parts = self.dataset.take(batch)  # type: ignore[attr-defined]
        if self.device.type not in STREAMING:
            return parts
        return tuple(p.pin_memory() if p.device.type == "cpu" else p for p in parts)
