"""Rows of X: the cells of one or several columns, or a selection of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Number
from typing import Protocol, Self

import numpy as np

_N_REPORTED = 10


class BadCell(ValueError):
    """A cell cannot be read; the message is the reason and names no row."""


class Cell(Protocol):
    """The content of a cell of X, which was read once."""

    @property
    def n_bytes(self) -> int: ...

    @property
    def digest(self) -> bytes: ...

    def decoded(self, min_size: tuple[int, int] | None = None) -> AbstractContextManager: ...


@dataclass(frozen=True)
class BadRow:
    """A cell that gave no embedding.

    Attributes
    ----------
    row : int
        Its row in ``X``, from 0.
    where : str
        The row and, where there is one, the column and the path.
    reason : str
        Why it could not be read.
    """

    row: int
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def unreadable(first: str, bad: list[BadRow], last: str, where: str = "") -> ValueError:
    """Make the error that lists the first ten bad rows; `where` names the list of all."""
    lines = [first, *(f"  {row}" for row in bad[:_N_REPORTED])]
    if len(bad) > _N_REPORTED:
        lines.append(f"  … and {len(bad) - _N_REPORTED} more{where}")
    error = ValueError("\n".join([*lines, last]))
    error.bad_images = error.bad_rows = bad  # type: ignore[attr-defined]
    return error


def check_size(shape: tuple[int, ...]) -> None:
    """Raise ValueError if an X of this shape has no rows, or no columns."""
    # scikit-learn's estimator checks expect this wording.
    for n, what in zip(shape[:2], ("sample", "feature"), strict=False):
        if n == 0 and (what == "sample" or len(shape) == 2):
            raise ValueError(
                f"Found array with 0 {what}(s) (shape={shape}) while a minimum of 1 is required."
            )


def is_missing(cell: object) -> bool:
    """Whether a cell is None, NaN, pandas.NA or NaT."""
    if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
        return True
    # NaN and NaT, also of NumPy, differ from themselves.
    return isinstance(cell, (Number, np.datetime64, np.timedelta64)) and bool(cell != cell)


class Rows(ABC):
    """A sequence of cells: the rows of X times its columns, row by row.

    With two columns the cells of row 0 are numbers 0 and 1, so that the embeddings of all cells
    reshape to ``(n_rows, n_columns * d)``. A slice or an array of numbers selects a view whose
    cells keep the row they came from.

    Attributes
    ----------
    n_rows, n_columns : int
        Of X; of a view its length and 1.
    feature_names : list of str or None
        The columns of a DataFrame, the name of a Series; None for a view.
    """

    kind = "cells"  # what messages call them
    is_ordered = False  # whether a batch should hold cells that follow one another
    # Changes what an encoded cell means, but is not part of its digest.
    value_range: tuple[float, float] | None = None

    def __init__(self, columns: list, names: list[str] | None = None) -> None:
        self._columns, self._names = columns, names
        self._n_x_columns = len(columns)
        n_cells = len(columns[0]) * len(columns)
        self._positions: np.ndarray | range = range(n_cells)  # in the columns, row by row …
        self._numbers: np.ndarray | range = self._positions  # … and in X
        self._is_view = False

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def n_columns(self) -> int:
        return 1 if self._is_view else len(self._columns)

    @property
    def n_rows(self) -> int:
        return len(self) // self.n_columns

    @property
    def feature_names(self) -> list[str] | None:
        return None if self._is_view else self._names

    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> Self:
        view = type(self).__new__(type(self))
        view.__dict__.update(self.__dict__, _is_view=True)
        if isinstance(index, slice):
            view._positions, view._numbers = self._positions[index], self._numbers[index]
            return view
        index = np.asarray(index)
        if index.ndim != 1:
            raise TypeError(
                f"{type(self).__name__} are indexed by slices and 1-D arrays, got {index!r}; "
                "read(i) gives a single cell"
            )
        index = index if index.dtype == bool else index.astype(np.intp)
        view._positions = np.asarray(self._positions)[index]
        view._numbers = np.asarray(self._numbers)[index]
        return view

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.n_rows} rows × {self.n_columns} columns>"

    def order(self) -> np.ndarray | None:
        """Return the fastest order of computation; None: any order."""
        return None

    @abstractmethod
    def read(self, i: int) -> Cell:
        """Read cell `i`; raise BadCell with the reason."""

    @abstractmethod
    def where(self, i: int) -> str:
        """Describe the place of cell `i` in X and its content, for messages."""

    def stat(self, i: int) -> tuple[str, int, int, int] | None:
        """Return what changes with the file if cell `i` is a local one, else None."""
        return None

    def take_warnings(self) -> str | None:
        """Return the assumptions since the last call as the text of one warning, or None."""
        return None

    def take_notes(self) -> dict:
        """Return and clear a worker's assumptions, to be merged in the main process."""
        return {}

    def merge_notes(self, notes: dict) -> None:  # noqa: B027
        """Add a worker's assumptions about cells of the same X."""

    def row(self, i: int) -> int:
        """Return the row of X that cell `i` came from."""
        return int(self._numbers[i]) // self._n_x_columns

    def _container(self, i: int) -> tuple[Sequence, int]:
        """Return the column of cell `i`, and its position there."""
        row, column = divmod(int(self._positions[i]), len(self._columns))
        return self._columns[column], row

    def _place(self, number: int) -> str:
        """Name the row, and the column, of a cell's number in X."""
        row, column = divmod(number, self._n_x_columns)
        if self._n_x_columns == 1:
            return f"row {row}"
        name = self._names[column] if self._names else column
        return f"row {row}, column {name!r}"
