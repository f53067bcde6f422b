"""as_texts(X): a sequence of texts from any container of strings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from numbers import Number

import numpy as np

from sktransfer._progress import shown
from sktransfer._rows import BadCell, BadRow, Rows, check_size, is_missing


def as_texts(X) -> Texts:
    """View X as a sequence of texts.

    Parameters
    ----------
    X : list, array, Series, DataFrame or another sequence
        One text per row, ``str`` or UTF-8 bytes, of pandas, polars, pyarrow or NumPy or in any
        object with ``__len__`` and ``__getitem__``; or rows with several of them: a DataFrame, a
        2-D array, a list of lists. Missing cells are found when they are read.

    An X that cannot be a collection of texts raises a TypeError or a ValueError; a single cell
    that is not a text raises BadCell when it is read.
    """
    columns, names = _as_columns(X)
    for j, column in enumerate(columns):
        first = next((cell for cell in column if not is_missing(cell)), None)
        if first is not None and not any(isinstance(cell, (str, bytes)) for cell in column):
            where = f"the column {shown(names[j])} of X" if names and len(names) > 1 else "X"
            raise ValueError(
                f"{where} holds {shown(first)} ({type(first).__name__}) and the like, which are "
                "not texts: give the columns of strings alone, with a ColumnTransformer or X[[…]]."
            )
    return Texts(columns, names)


class Texts(Rows):
    """The texts of X."""

    kind = "texts"
    is_ordered = True

    def read(self, i: int) -> TextCell:
        """Read text `i`; raise BadCell with the reason."""
        column, row = self._container(i)
        try:
            cell = column[row]
        except Exception as error:
            raise BadCell(f"X[{row}] raises {type(error).__name__}: {error!s:.300}") from error
        if is_missing(cell):
            raise BadCell(f"the cell is missing: it holds {cell!r}")
        if isinstance(cell, bytes):
            try:
                cell = cell.decode()
            except UnicodeDecodeError as error:
                raise BadCell(f"its bytes are not UTF-8 ({error})") from error
        if not isinstance(cell, str):
            raise BadCell(f"it is {shown(cell)} ({type(cell).__name__}), not a string")
        return TextCell(str(cell))

    def where(self, i: int) -> str:
        """Return the row, and the column, of text `i` in X and its beginning, for messages."""
        column, row = self._container(i)
        with contextlib.suppress(Exception):
            return f"{self._place(int(self._numbers[i]))} ({shown(column[row])})"
        return self._place(int(self._numbers[i]))

    def order(self) -> np.ndarray:
        """Return the texts' numbers, the longest first: a batch is as long as its longest."""
        lengths = np.zeros(len(self), dtype=np.int64)
        for i in range(len(self)):
            with contextlib.suppress(BadCell):
                lengths[i] = self.read(i).n_bytes
        return np.argsort(-lengths, kind="stable")

    def read_all(self) -> tuple[dict[int, str], list[BadRow]]:
        """Return the texts by their number, and the cells that hold none."""
        texts, bad = {}, []
        for i in range(len(self)):
            try:
                texts[i] = self.read(i).text
            except BadCell as error:
                bad.append(BadRow(self.row(i), self.where(i), str(error)))
        return texts, bad

    def __getstate__(self) -> dict:
        if not self._is_view:
            return self.__dict__
        cells = [column[row] for column, row in map(self._container, range(len(self)))]
        return self.__dict__ | {"_columns": [cells], "_positions": range(len(self))}


class TextCell:
    """One text."""

    def __init__(self, text: str) -> None:
        # Half of a surrogate pair, as a cut of JSON leaves it, is in no encoding.
        self._encoded = text.encode("utf-8", "replace")
        self.text = text if text.isascii() else self._encoded.decode()
        self.n_bytes = len(self._encoded)

    @property
    def digest(self) -> bytes:
        """16 bytes of the SHA-256 of the text."""
        return sha256(b"text\0" + self._encoded).digest()[:16]

    @contextlib.contextmanager
    def decoded(self, min_size: tuple[int, int] | None = None) -> Iterator[str]:
        """Yield the text."""
        yield self.text


def _as_columns(X) -> tuple[list, list[str] | None]:
    """Take X apart into columns of cells, and their names."""
    if isinstance(X, (str, bytes)):
        raise TypeError(f"X is a single text ({shown(X)}); X holds one per row: wrap it, [X].")
    if X is None or isinstance(X, (Number, Mapping)) or type(X).__name__ == "LazyFrame":
        raise TypeError(f"X is {shown(X)}; X holds one text per row: a list, array or DataFrame.")
    if hasattr(X, "toarray"):
        raise TypeError(f"X is a sparse {type(X).__name__}, which holds no texts.")
    if hasattr(X, "__dask_graph__"):
        X = X.compute()
    is_pandas = hasattr(X, "iloc") and hasattr(X, "columns")
    if is_pandas or hasattr(X, "get_columns") or hasattr(X, "column_names"):  # polars, pyarrow …
        check_size(X.shape)
        names = list(X.column_names if hasattr(X, "column_names") else X.columns)
        columns = [_cells(X.iloc[:, j] if is_pandas else X[name]) for j, name in enumerate(names)]
        return columns, names if all(isinstance(name, str) for name in names) else None
    if hasattr(X, "to_pylist") or (hasattr(X, "to_numpy") and hasattr(X, "dtype")):
        name = getattr(X, "name", None)
        check_size((len(X),))
        return [_cells(X)], [name] if isinstance(name, str) and name else None
    if isinstance(X, np.ma.MaskedArray):
        X = np.array(X.tolist(), dtype=object)  # None where it is masked
    if not isinstance(X, (list, tuple)) and hasattr(X, "__array__"):
        X = np.asarray(X)
    if isinstance(X, np.ndarray):
        return _of_array(X), None
    if not (hasattr(X, "__len__") and hasattr(X, "__getitem__")):
        raise TypeError(
            f"X is of type {type(X).__name__}, which has no rows to index; give a list, array, "
            "Series or DataFrame of texts (for a generator or a set: list(X))."
        )
    check_size((len(X),))
    if isinstance(X[0], (list, tuple, np.ndarray)):
        lengths = {len(row) if isinstance(row, (list, tuple, np.ndarray)) else None for row in X}
        if len(lengths) > 1 or lengths == {0}:
            raise ValueError(
                "the rows of X are lists of different lengths; each row has one text, or the same "
                "number of texts. Texts that are split into words: give ' '.join(words)."
            )
        return [list(column) for column in zip(*X, strict=True)], None
    return [X], None


def _of_array(X: np.ndarray) -> list:
    if X.ndim == 0:
        raise TypeError(f"X is a single cell ({shown(X.item())}); wrap it in a list, [X].")
    if X.ndim > 2:
        raise ValueError(f"Found array with dim {X.ndim}, while dim <= 2 is required: X is {X!r}.")
    if X.dtype.kind == "c":
        raise ValueError(f"Complex data not supported\nX is an array of dtype {X.dtype}")
    check_size(X.shape)
    return [X] if X.ndim == 1 else [X[:, j] for j in range(X.shape[1])]


def _cells(column) -> Sequence:
    """Return a list of the cells of a column."""
    return column.to_pylist() if hasattr(column, "to_pylist") else list(column)  # of pyarrow
