"""Split X, in any container, into columns of cells."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from datetime import date
from numbers import Integral, Number
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sktransfer._progress import shown
from sktransfer._rows import check_size, is_missing
from sktransfer.images._pixels import Samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    # A column is anything with a length that gives cells by their number.
    Columns = tuple[list, list[str] | None, tuple[int, ...] | None]
    Shape = tuple[int, ...] | None

_CHANNELS = (1, 2, 3, 4)
_PLAIN_ITEMS = (list.__getitem__, tuple.__getitem__)
MASKED = "pixels cannot be masked: give .filled(value), with the value for the masked ones"


class Container:
    """A container of a user's class, which only one thread may read at a time.

    Its ``__getitem__`` may fill the same buffer for each row, or read from one open file.
    """

    def __init__(self, cells) -> None:
        self._cells = cells

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, row: int) -> object:
        return self._cells[row]


def as_columns(X, image_shape: Shape = None) -> Columns:
    """Return the columns of X, their names, and the shape of a flat cell.

    Only the container and its first cells are inspected; no cell is read or copied.
    """
    columns, names, shape = _as_columns(X, image_shape)
    if len(columns) > 1:
        _refuse_labels(columns, names)
    return columns, names, shape


def _as_columns(X, image_shape: Shape) -> Columns:
    _refuse_data_set(X)
    _refuse_single(X)
    if hasattr(X, "__dask_graph__"):
        X = X.compute()
    is_pandas = hasattr(X, "iloc") and hasattr(X, "columns")
    if is_pandas or hasattr(X, "get_columns") or hasattr(X, "column_names"):  # polars, pyarrow
        return _from_frame(X, image_shape)
    if is_tensor(X):  # one copy from the device instead of two of each image
        return _from_numbers(X.detach().cpu(), image_shape)
    if hasattr(X, "to_pylist"):
        X = _cells_of_arrow(X)
    elif hasattr(X, "to_numpy") and hasattr(X, "dtype"):  # pandas and polars Series
        name = getattr(X, "name", None)
        cells, _ = _cells_of_series(X)
        from_cells = _from_array if isinstance(cells, np.ndarray) else _from_sequence
        columns, _, shape = from_cells(cells, image_shape)
        return columns, [name] if isinstance(name, str) and name else None, shape
    is_sequence = hasattr(X, "__getitem__") and hasattr(X, "__len__")
    kind = getattr(getattr(X, "dtype", None), "kind", "")
    if not isinstance(X, np.ndarray) and is_sequence and kind and kind in "biuf" and X.ndim > 1:
        columns, _, shape = _from_numbers(X, image_shape)  # read piece by piece: h5py, zarr …
        return [Container(X)], None, shape
    if isinstance(X, np.ndarray) and np.ma.is_masked(X):
        raise ValueError(f"X is a masked array; {MASKED}")
    if hasattr(X, "__array__"):
        return _from_array(np.asarray(X), image_shape)
    # A subclass with its own __getitem__ is read as a container of a user's class.
    if isinstance(X, (list, tuple)) and type(X).__getitem__ in _PLAIN_ITEMS:
        return _from_sequence(X, image_shape)
    if is_sequence:
        check_size((len(X),))
        return [Container(X)], None, image_shape
    raise TypeError(
        f"X is of type {type(X).__name__}, which has no rows to index; give a list, array, "
        "Series or DataFrame of images (for a generator or a set: list(X))"
    )


def read_image_shape(image_shape) -> tuple[int, ...] | None:
    """Check image_shape and return it as a tuple of int, -1 kept."""
    if image_shape is None:
        return None
    accepted = "(H, W) or (H, W, C), C in 1…4, of positive integers, one of which may be -1"
    try:
        shape = tuple(image_shape)
    except TypeError:
        raise TypeError(f"image_shape must be {accepted}; got {image_shape!r}") from None
    if (
        len(shape) not in (2, 3)
        or not all(isinstance(n, Integral) and (int(n) > 0 or n == -1) for n in shape)
        or shape.count(-1) > 1
        or (len(shape) == 3 and shape[2] not in (-1, *_CHANNELS))
    ):
        raise ValueError(f"image_shape must be {accepted}; got {image_shape!r}")
    return tuple(int(n) for n in shape)


def read_value_range(value_range) -> tuple[float, float] | None:
    """Check value_range and return it as two floats."""
    if value_range is None:
        return None
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError):
        low = high = np.nan
    if not (low < high and np.isfinite([low, high]).all()):
        raise ValueError(
            "value_range must be None or two finite numbers (low, high), low < high, those that "
            f"are black and white in the images; got {value_range!r}"
        )
    return low, high


def is_tensor(x) -> bool:
    """Whether `x` is a torch tensor, without importing torch for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, getattr(torch, "Tensor", ()))


def is_stream(x) -> bool:
    """Whether `x` is an open file."""
    return hasattr(x, "read") and hasattr(x, "seek")


def describe(cell) -> str:
    """Describe a cell for messages."""
    if isinstance(cell, dict):
        held = [cell[key] for key in ("path", "bytes") if cell.get(key) is not None]
        return describe(held[0]) if held else f"dict with the keys {shown(list(cell)[:5])}"
    if isinstance(cell, Samples):
        cell = cell.array
    if isinstance(cell, (list, tuple)) and cell and not isinstance(cell[0], (Number, list)):
        return f"{type(cell).__name__} that begins with {describe(cell[0])}"
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return f"{len(cell)} bytes"
    if isinstance(cell, Image.Image):
        return f"PIL image, mode {cell.mode}, {cell.width} × {cell.height}"
    if isinstance(cell, np.ndarray) or is_tensor(cell):
        kind = "tensor" if is_tensor(cell) else "array"
        return f"{kind} of shape {tuple(cell.shape)}, {cell.dtype}"
    return shown(cell)


def _refuse_data_set(X) -> None:
    images, kind = _images_of(X, "X"), type(X).__name__
    if images:
        raise TypeError(f"X is of type {kind}, whose rows are not images alone: give {images}")
    if isinstance(X, Mapping) and not {"bytes", "path"} & set(X):
        raise TypeError(
            f"X is of type {kind} with the keys {shown(list(X))}; X holds one image per row: give "
            "one of its values, X[KEY]"
        )


def _images_of(X, name: str) -> str:
    """Return code that gives the images of a data set `name`; "" for a class of the user's."""
    package = type(X).__module__.partition(".")[0]
    if package == "datasets" and hasattr(X, "column_names") and not isinstance(X, Mapping):
        return f'{name}["image"]'
    kinds = {c.__name__ for c in type(X).__mro__ if c.__module__.startswith("torch")}
    if "DataLoader" in kinds:
        return _images_of(X.dataset, f"{name}.dataset") or f"{name}.dataset"
    code = str(getattr(getattr(X, "__getitem__", None), "__module__", "")).partition(".")[0]
    parts = X.datasets if "ConcatDataset" in kinds else [X.dataset] if "Subset" in kinds else []
    if code not in ("torch", "torchvision") or not all(_images_of(part, "") for part in parts):
        return ""
    if "TensorDataset" in kinds:
        return f"{name}.tensors[0]"
    if hasattr(X, "samples"):
        return f"[path for path, _ in {name}.samples]"
    return f"{name}.data" if hasattr(X, "data") else f"[image for image, _ in {name}]"


def _refuse_single(X) -> None:
    if isinstance(X, np.ndarray) and X.ndim == 0:
        X = X.item()
    single = (str, os.PathLike, bytes, bytearray, memoryview, dict, Image.Image)
    if isinstance(X, single) or is_stream(X) or hasattr(X, "read_bytes"):
        hint = "wrap it in a list, [X]"
        if isinstance(X, (str, os.PathLike)) and (set("*?[") & set(str(X)) or os.path.isdir(X)):
            hint = "the files of a folder are sorted(glob.glob('FOLDER/**/*.jpg', recursive=True))"
        raise TypeError(f"X is a single cell ({describe(X)}); X holds one image per row: {hint}")
    if X is None or isinstance(X, Number):
        raise TypeError(f"X is {X!r}; X holds one image per row: a list, array or DataFrame")
    if hasattr(X, "toarray") and hasattr(X, "nnz"):
        raise TypeError(
            f"X is a sparse {type(X).__name__}; images are dense: give X.toarray(), "
            "with image_shape=(H, W)"
        )
    if type(X).__name__ == "LazyFrame":
        raise TypeError("X is a LazyFrame, which has no rows yet; give X.collect()")


# -- data frames and Series ------------------------------------------------------------------
def _from_frame(X, image_shape: Shape) -> Columns:
    check_size(X.shape)
    if image_shape is not None and all(map(is_number_dtype, getattr(X, "dtypes", [None]))):
        rows = X.to_numpy()  # there may be thousands of columns of pixels
        if rows.dtype != object:
            return _from_array(rows, image_shape)
    names = list(X.column_names if hasattr(X, "column_names") else X.columns)
    columns, numeric = [], []
    for j, name in enumerate(names):
        column = X.iloc[:, j] if hasattr(X, "iloc") else X[name]
        if hasattr(column, "to_pylist"):
            is_number = is_number_dtype(column.type)
            column = column.to_pandas() if is_number else _cells_of_arrow(column)
        if hasattr(column, "to_numpy"):
            column, is_number = _cells_of_series(column)
        columns.append(column)
        numeric += [name] if is_number else []
    if numeric and len(numeric) < len(names):
        raise ValueError(
            f"the columns {shown(numeric)} of X hold numbers and the others images; give the image "
            "columns alone, with a ColumnTransformer or X[[…]]"
        )
    are_objects = image_shape is not None and len(columns) > 1
    if numeric or (are_objects and _has_number([column[0] for column in columns])):
        dtype = None if numeric else object
        return _from_array(np.column_stack([np.asarray(c, dtype) for c in columns]), image_shape)
    return columns, names if all(isinstance(name, str) for name in names) else None, image_shape


def is_number_dtype(dtype) -> bool:
    """Whether a dtype of NumPy, pandas, polars or pyarrow is of numbers or booleans."""
    if hasattr(dtype, "is_numeric"):  # polars
        return dtype.is_numeric() or str(dtype) == "Boolean"
    if hasattr(dtype, "num_fields"):  # pyarrow
        return re.match("u?int|float|double|half|bool", str(dtype)) is not None
    return getattr(dtype, "kind", "O") in "biufc"


def _cells_of_series(series) -> tuple[Sequence, bool]:
    """Return the cells of a Series, not copied, and whether it is numeric."""
    dtype = series.dtype
    if hasattr(dtype, "is_numeric"):  # polars
        if is_number_dtype(dtype) and series.null_count() < len(series):
            return series.to_numpy(), True
        return series, False
    if is_number_dtype(dtype):
        numbers = series.to_numpy()
        if numbers.dtype == object:  # nullable integers with a missing one
            numbers = series.to_numpy(dtype="float64", na_value=np.nan)
        is_empty_column = numbers.dtype.kind == "f" and np.isnan(numbers).all()
        return numbers, not is_empty_column
    if isinstance(dtype, np.dtype):
        return series.to_numpy(), False
    if "list<" in str(dtype):  # of pyarrow in pandas
        return _cells_of_arrow(series.array.__arrow_array__()), False
    return getattr(series, "array", series), False  # converts a cell when it is read


def _cells_of_arrow(column):
    """Return the cells of a column of pyarrow; numbers keep their dtype."""
    leaf = column.type
    if hasattr(leaf, "shape"):  # fixed-shape tensors
        is_chunked = hasattr(column, "combine_chunks")
        return (column.combine_chunks() if is_chunked else column).to_numpy_ndarray()
    while hasattr(leaf, "value_type"):
        leaf = leaf.value_type
    return np.asarray(column) if is_number_dtype(leaf) else column.to_pylist()


# -- arrays, tensors, lists ------------------------------------------------------------------
def _from_array(X: np.ndarray, image_shape: Shape) -> Columns:
    kind = X.dtype.kind
    if kind == "c":
        raise ValueError(f"Complex data not supported\nX is an array of dtype {X.dtype}")
    if kind in "biuf":
        if X.ndim == 1 and kind == "f" and len(X) and np.isnan(X).all():
            return [X], None, image_shape  # a column of paths that are all missing
        return _from_numbers(X, image_shape)
    if kind not in "OUST":
        raise TypeError(f"X is an array of dtype {X.dtype}, which holds no images")
    check_size(X.shape)
    if X.ndim == 1:
        return _from_sequence(X, image_shape)
    has_images = any(isinstance(cell, (str, bytes, os.PathLike, Image.Image)) for cell in X[0])
    if X.ndim == 2 and (has_images or kind != "O" or not _has_number(X[0])):
        return [X[:, j] for j in range(X.shape[1])], None, image_shape
    # scikit-learn, too, accepts numbers in an array of objects.
    numbers = _numbers_of(X.tolist())
    columns, names, shape = _from_array(numbers, image_shape)
    if isinstance(X.flat[0], int):  # without a dtype
        columns = [[typed_integers(image) for image in numbers]]
    return columns, names, shape


def typed_integers(image: np.ndarray) -> np.ndarray:
    """Restore uint16 from Python's integers, which ``np.array(images, object)`` makes of it."""
    is_uint16 = image.dtype.kind == "i" and image.min() >= 0 and 255 < image.max() < 2**16
    return image.astype(np.uint16) if is_uint16 else image


def _from_sequence(X, image_shape: Shape) -> Columns:
    """Split a 1-D sequence of cells, or of rows of cells or numbers."""
    check_size((len(X),))
    first = _first_cell(X)
    if isinstance(first, Number) and all(isinstance(x, Number) or is_missing(x) for x in X):
        return _from_numbers(np.asarray(X), image_shape)
    if isinstance(first, (list, tuple)) and isinstance(X, (list, tuple, np.ndarray)):
        leaf = _first_cell(first)
        if isinstance(X, (list, tuple)) and isinstance(leaf, (Number, list, tuple)):
            return _from_array(_numbers_of(X), image_shape)
        if not isinstance(leaf, (Number, list, tuple)):
            lengths = {len(row) if isinstance(row, (list, tuple)) else None for row in X}
            if len(lengths) > 1 or not first:
                raise ValueError(
                    "the rows of X are lists of different lengths; each row has one image, "
                    "or the same number of images"
                )
            return [list(column) for column in zip(*X, strict=True)], None, image_shape
    is_array = isinstance(first, np.ndarray) or is_tensor(first)
    if image_shape is None and is_array and first.ndim == 1 and first.dtype != object:
        raise ValueError(_flat_message(f"a list of arrays of shape {tuple(first.shape)}"))
    return [X], None, image_shape


def _first_cell(cells):
    """Return the first cell that is not missing, or None."""
    return next((cell for cell in cells if not is_missing(cell)), None)


def _numbers_of(X) -> np.ndarray:
    try:
        numbers = np.array(X)
    except ValueError as error:
        raise ValueError(
            f"X is a nested list that does not form an array ({error}); for images of different "
            "sizes give a list of arrays"
        ) from error
    if numbers.dtype.kind not in "biufc":
        numbers = np.array(X, dtype=np.float64)
    return numbers


def _from_numbers(X, image_shape: Shape) -> Columns:
    """Split a numeric array or tensor: flat rows, or a stack of images."""
    shape, channels_first = tuple(X.shape), is_tensor(X)
    what = f"{'a tensor' if channels_first else 'an array'} of numbers of shape {shape}"
    if len(shape) < 2:
        raise ValueError(
            f"Expected 2D array of flat images, or a 3-D or 4-D one, got {len(shape)}D array "
            f"instead: X is {what}. Reshape your data either using array.reshape(-1, 1) if your "
            "data has a single feature or array.reshape(1, -1) if it contains a single sample."
        )
    check_size(shape)
    if channels_first and X.is_complex():
        raise ValueError(f"Complex data not supported\nX is {what}, {X.dtype}")
    if len(shape) == 2:
        if image_shape is None:
            raise ValueError(_flat_message(what))
        return [X], None, _fit_shape(image_shape, shape[1])
    if len(shape) > 4:
        raise ValueError(f"X is {what}; a stack of images has 3 or 4 dimensions")
    _check_stack(shape, channels_first, what)
    return [X], None, None


def _check_stack(shape: tuple[int, ...], is_first: bool, what: str) -> None:
    """Raise ValueError if the shape of a stack of images is ambiguous or not accepted.

    `is_first`: the channels come first, as in tensors, rather than last, as in arrays.
    """
    if len(shape) == 3:
        height, width, c = (*shape[1:], shape[0]) if is_first else shape
        if c in _CHANNELS:
            raise ValueError(
                f"X is {what}, which may be one image of {height} × {width} with {c} channels, or "
                f"{shape[0]} grey images of {shape[1]} × {shape[2]}. Give [X] for the one, "
                f"{'X[:, None]' if is_first else 'X[..., None]'} for the others."
            )
        return
    n, a, b, c = shape
    first = f"{b} × {c} with {a} channels (channels first)"
    last = f"{a} × {b} with {c} channels (channels last)"
    order, other = ("N, C, H, W", "N, H, W, C") if is_first else ("N, H, W, C", "N, C, H, W")
    moved = "X.permute(0, 3, 1, 2)" if is_first else "X.transpose(0, 2, 3, 1)"
    channels, elsewhere = (a, c) if is_first else (c, a)
    if channels in _CHANNELS and elsewhere in (1, 3):
        former, latter = (first, last) if is_first else (last, first)
        raise ValueError(
            f"X is {what}, which may be {n} images of {former}, or of {latter}. Give list(X) for "
            f"the former, list({moved}) for the latter."
        )
    if channels not in _CHANNELS:
        hint = ""
        if elsewhere in _CHANNELS:
            hint = f" It looks like ({other}) with {elsewhere} channels: give {moved}"
            hint += "." if is_first else ", or a torch tensor."
        raise ValueError(
            f"X is {what}; {'tensors' if is_first else 'arrays'} are ({order}), channels "
            f"{'first' if is_first else 'last'}, with 1, 2, 3 or 4 channels, not {channels}.{hint}"
        )


def _fit_shape(image_shape: tuple[int, ...], n_features: int) -> tuple[int, ...]:
    known = int(np.prod([n for n in image_shape if n != -1]))
    fits = n_features % known == 0 if -1 in image_shape else n_features == known
    shape = tuple(n_features // known if n == -1 else n for n in image_shape)
    if not fits or (len(shape) == 3 and shape[2] not in _CHANNELS):
        raise ValueError(
            f"X has {n_features} features, which do not fill image_shape={image_shape}"
            + (f" ({known} values)" if -1 not in image_shape else "")
            + "; give (H, W) or (H, W, C), C in 1…4, whose product is the number of features"
        )
    return shape


def _flat_message(what: str) -> str:
    return (
        f"X is {what}. If each row is a flat image, its shape is missing: give "
        "image_shape=(H, W) or (H, W, C). If X is one image (H, W), wrap it in a list, [X]."
    )


def _refuse_labels(columns: list, names: list[str] | None) -> None:
    """Raise ValueError if one of several columns holds labels instead of images."""
    for name, column in zip(names or range(len(columns)), columns, strict=True):
        cells = [column[row] for row in range(min(len(column), 8))]
        cells = [cell for cell in cells if not is_missing(cell)]
        if cells and all(map(_is_label, cells)):
            raise ValueError(
                f"the column {shown(name)} of X holds {shown(cells[0])} and the like, which are "
                "not images; give the image columns alone, with a ColumnTransformer or X[[…]]"
            )


def _is_label(cell) -> bool:
    if not isinstance(cell, str):
        return isinstance(cell, (Number, date, np.datetime64, np.timedelta64))
    is_path = re.search(r"[/\\:]|\.\w+$", cell)  # not "St. Bernard"
    return bool(cell.strip()) and not is_path and not os.path.exists(cell)


def _has_number(row) -> bool:
    return any(isinstance(cell, Number) and not is_missing(cell) for cell in row)
