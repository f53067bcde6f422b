"""Tables of results: a data frame where pandas is installed, text and HTML everywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import get_scorer

if TYPE_CHECKING:
    import pandas as pd


class Table(dict):
    """Columns by their names, which print as a table: the result without pandas."""

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def as_frame(columns: Mapping[str, Sequence | np.ndarray]) -> pd.DataFrame | Table:
    """Return a DataFrame of the columns; a `Table` of arrays if pandas is not installed."""
    try:
        import pandas as pd
    except ImportError:
        return Table({name: np.asarray(column) for name, column in columns.items()})
    return pd.DataFrame(columns)


def as_text(columns: Mapping[str, Sequence]) -> str:
    """Align columns: the text ones at the left, the others at the right."""
    cells = {name: [shown(value) for value in column] for name, column in columns.items()}
    parts = []
    for name, column in cells.items():
        width = max(map(len, [name, *column]))
        align = str.ljust if all(isinstance(v, str) for v in columns[name]) else str.rjust
        parts.append([align(cell, width) for cell in [name, *column]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*parts, strict=True))


def as_html(columns: Mapping[str, Sequence]) -> str:
    """Return an HTML table of the same cells."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = (
        "".join(f"<td>{html.escape(shown(value))}</td>" for value in row)
        for row in zip(*columns.values(), strict=True)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def name_of_score(scoring: object, is_regression: bool) -> str:
    """Return what the parameter `scoring` measures, for headings; raise if it is no scorer."""
    if scoring is None:
        return "R²" if is_regression else "accuracy"
    if not callable(scoring):
        if not isinstance(scoring, str):
            raise TypeError(f"scoring={scoring!r}: the name of one scorer, or a callable.")
        get_scorer(scoring)
    return scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score")


def shown(value: object) -> str:
    """Format a cell: three decimals, a dash for what is not known."""
    if isinstance(value, (float, np.floating)):
        return "–" if math.isnan(value) else f"{value:.3f}"
    return str(value)


def plus_minus(value: float, error: float, sign: bool = False) -> str:
    """Format an estimate with its standard error."""
    if math.isnan(value):
        return "–"
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return text if math.isnan(error) else f"{text} ± {error:.3f}"
