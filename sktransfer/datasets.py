"""Read labelled images from a folder."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import numpy as np

__all__ = ["load_folder"]

# Suffixes of the image files that the estimators read.
_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".jp2", ".avif", ".ppm", ".pgm", ".pbm", ".heic", ".heif"),
)
_LAYOUTS = (
    "It takes a folder with one folder of images for each class (FOLDER/CLASS/image.jpg), a "
    "folder of images with one CSV file, or the path of a CSV file."
)


def load_folder(path: str | Path, *, label: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """List the images of a folder and their labels.

    No image is opened. Hidden files, files whose suffix is not one of an image, and folders within
    that of a class are skipped. Images are in the order of their names, or of the rows of the CSV
    file.

    Parameters
    ----------
    path : str or Path
        One of three: a folder with one folder of images for each class; a folder of images with
        one CSV file; a CSV file. A CSV file has a header, and the first column that names files
        gives the images, relative to the folder of the CSV file. ``~`` is expanded.
    label : str or None, default=None
        The column of the CSV file that gives the labels. ``None``: the only one beside the images.

    Returns
    -------
    paths : ndarray of shape (n_samples,), dtype object
        The paths as ``str``, to be given as `X`.
    y : ndarray of shape (n_samples,)
        The names of the classes, or the labels of the CSV file: integers or floats if all are.

    Raises
    ------
    FileNotFoundError
        If `path` does not exist.
    ValueError
        If the layout is ambiguous or none of these, or if a row names no file or has no label.

    See Also
    --------
    sktransfer.PretrainedFeatureExtractor : Compute feature columns for the images.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from sktransfer.datasets import load_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("ant", "bee"):
    ...         (Path(folder) / name).mkdir()
    ...         Image.new("RGB", (8, 8)).save(Path(folder) / name / "1.png")
    ...     paths, y = load_folder(folder)
    >>> [Path(path).name for path in paths], y.tolist()
    (['1.png', '1.png'], ['ant', 'bee'])
    """
    path = Path(os.path.expanduser(path))
    if path.is_file():
        return _read_csv(path, label)
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is neither a folder nor a file. {_LAYOUTS}")
    entries = _visible(path)
    folders = [entry for entry in entries if entry.is_dir()]
    images = [entry for entry in entries if _is_image(entry)]
    tables = [entry for entry in entries if entry.suffix.lower() == ".csv"]
    if len(tables) == 1 and (images or label is not None or not folders):
        return _read_csv(tables[0], label)
    if images or not folders:
        found = f"{len(images)} images, {len(folders)} folders and {len(tables)} CSV files"
        raise ValueError(f"{str(path)!r} holds {found}, which gives no labels. {_LAYOUTS}")
    if label is not None:
        raise ValueError(f"label={label!r} names a column, but {str(path)!r} has no CSV file.")
    of_class = {
        folder: [file for file in _visible(folder) if _is_image(file)] for folder in folders
    }
    for folder, files in of_class.items():
        if not files:
            inner = next((entry for entry in _visible(folder) if entry.is_dir()), None)
            hint = f" Did you mean load_folder({str(folder)!r})?" if inner else ""
            raise ValueError(
                f"{str(folder)!r}, a folder of a class, holds no image.{hint} {_LAYOUTS}"
            )
    pairs = [(str(file), folder.name) for folder, files in of_class.items() for file in files]
    return np.array([file for file, _ in pairs], dtype=object), np.array(
        [name for _, name in pairs]
    )


def _read_csv(table: Path, label: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Read paths and labels from the rows of a CSV file."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(table)!r} is not in UTF-8 ({error}): save it in UTF-8.") from error
    if not rows:
        raise ValueError(f"{str(table)!r} has no rows below its header.")
    columns = [name for name in rows[0] if name is not None]
    first = rows[0]
    image = next((c for c in columns if first[c] and os.path.isfile(table.parent / first[c])), None)
    if image is None:
        raise ValueError(
            f"No column of {str(table)!r} names a file: its first row is {first}. Columns are "
            f"separated by commas, and paths are relative to {str(table.parent)!r}."
        )
    others = [column for column in columns if column != image]
    if label is None and len(others) != 1:
        raise ValueError(
            f"Which column of {str(table)!r} has the labels? Set label to one of {others}."
        )
    label = others[0] if label is None else label
    if label not in others:
        raise ValueError(f"{str(table)!r} has no column {label!r} for the labels, but {others}.")
    paths, labels = [], []
    for number, row in enumerate(rows):
        path = table.parent / (row[image] or "")
        if not path.is_file() or not row[label]:
            what = f"no file {str(path)!r}" if not path.is_file() else f"no {label!r}"
            raise ValueError(f"Row {number} (from 0) of {str(table)!r} has {what}.")
        paths.append(str(path))
        labels.append(row[label])
    return np.array(paths, dtype=object), _as_numbers(labels)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(_SUFFIXES) and path.is_file()


def _as_numbers(labels: list[str]) -> np.ndarray:
    """Convert labels to integers or floats, unless that would lose part of one ("007", "1_0")."""
    if any(re.search("^[-+]?0[0-9]|_", label) for label in labels):
        return np.array(labels)
    if all(re.fullmatch("-?[0-9]+", label) for label in labels):
        integers = list(map(int, labels))
        return np.array(integers if max(map(abs, integers)) < 2**63 else labels)
    try:
        return np.array(labels, dtype=np.float64)
    except ValueError:
        return np.array(labels)
