"""Images that several networks embed, each read and decoded once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
from PIL import Image

from sktransfer.images._cells import Cell, Size
from sktransfer.images._images import BadImage, Images
from sktransfer.networks._backbone import Backbone
from sktransfer.networks._inference import Network

_MAX_DECODED_BYTES = 512 << 20


class SharedImages(Images):
    """A part of X whose cells are kept after they were read."""

    def __init__(self, images: Images, part: slice | np.ndarray) -> None:
        self._view = images[part]
        vars(self).update(vars(self._view))
        self._kept: dict[int, SharedCell | BadImage] = {}
        self.n_bytes_left = _MAX_DECODED_BYTES

    def __getitem__(self, index) -> Images:  # type: ignore[override]
        return self._view[index]  # other processes read for themselves

    def read(self, i: int) -> Cell:
        if i not in self._kept:
            try:
                self._kept[i] = SharedCell(super().read(i), self)
            except BadImage as error:
                self._kept[i] = error
        kept = self._kept[i]
        if isinstance(kept, BadImage):
            raise kept
        return kept


class SharedCell(Cell):
    """A cell that keeps its digest and its decoded image.

    A JPEG file is decoded at a reduced size for small networks; it is decoded again where two
    networks ask for different sizes, so that all rows are those of the extractor.
    """

    def __init__(self, cell: Cell, owner: SharedImages) -> None:
        vars(self).update(vars(cell))
        self._owner = owner
        self._images: dict[tuple[int, int], Image.Image | np.ndarray] = {}

    @cached_property
    def digest(self) -> bytes:  # type: ignore[override]
        return super().digest

    @contextmanager
    def decoded(self, min_size: Size = None) -> Iterator[Image.Image | np.ndarray]:
        if isinstance(self.content, np.ndarray):
            yield self.content
            return
        key = self._reductions(min_size)
        if key in self._images:
            yield self._images[key]
            return
        with super().decoded(min_size) as image:
            width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
            self._owner.n_bytes_left -= 3 * width * height
            if self._owner.n_bytes_left >= 0:
                self._images[key] = image
            yield image

    @cached_property
    def _jpeg_size(self) -> tuple[int, int] | None:
        """Width and height of a JPEG file."""
        assert isinstance(self.content, bytes)
        try:
            with Image.open(io.BytesIO(self.content), formats=["JPEG"]) as image:
                return image.size
        except Exception:  # another format, or decode() says what is wrong
            return None

    def _reductions(self, min_size: tuple[int, int] | None) -> tuple[int, int]:
        """Return by what the file may be reduced if it is upright and if it lies on its side."""
        if min_size is None or self._jpeg_size is None:
            return 1, 1
        (width, height), (min_height, min_width) = self._jpeg_size, min_size
        factors = (
            min(width // min_width, height // min_height),
            min(width // min_height, height // min_width),
        )
        first, second = (next((s for s in (8, 4, 2) if factor >= s), 1) for factor in factors)
        return first, second


class HeldBackbone(Backbone):
    """A backbone that holds its network: a process keeps only the last few that it used."""

    def __init__(self, backbone: Backbone) -> None:
        vars(self).update(vars(backbone))
        self._held = backbone.network

    @property
    def network(self) -> Network:
        return vars(self).get("_held") or super().network

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_held"}
