"""From a text to the numbers of its tokens, and from several to a network's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

PADDING = -1


class Vocabulary(Protocol):
    """A source of text networks, which maps tokens to numbers."""

    def encoder(self, max_length: int) -> Callable[[str], Sequence[int]]:
        """Return what encodes a text as at most `max_length` tokens."""


class Tokens:
    """The preprocessing of texts.

    Texts are encoded one by one and padded together, to the longest of them.
    """

    joins = True
    min_size: tuple[int, int] | None = None

    def __init__(self, vocabulary: Vocabulary, max_length: int) -> None:
        self._vocabulary, self.max_length = vocabulary, max_length
        self._encode: Callable[[str], Sequence[int]] | None = None

    @property
    def input_size(self) -> tuple[int, ...]:
        return (self.max_length,)

    @property
    def identity(self) -> str:
        """Its part of fingerprints."""
        return f"tokens:{self.max_length}"

    def prepare(self, text: str) -> np.ndarray:
        """Return the numbers of a text's tokens, int64."""
        if self._encode is None:
            self._encode = self._vocabulary.encoder(self.max_length)
        return np.asarray(self._encode(text), dtype=np.int64)

    def join(
        self, texts: Sequence[torch.Tensor], device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Pad texts on the right, with -1: int64 (n, longest)."""
        longest = max(1, *map(len, texts))
        joined = torch.full((len(texts), longest), PADDING, dtype=torch.int64)
        for row, text in zip(joined, texts, strict=True):
            row[: len(text)] = text
        return joined.to(device)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_encode": None}
