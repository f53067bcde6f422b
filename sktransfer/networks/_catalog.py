"""``list_backbones``: the networks that have a name, with their sizes and costs."""

from __future__ import annotations

import functools
import html
from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatch
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# The number of columns is known from building a network, in a tenth of a second to a second: only
# if a pattern leaves at most this many.
_MAX_BUILT = 24


@dataclass(frozen=True)
class BackboneInfo:
    """One network that has a name.

    Attributes
    ----------
    name : str
        The value of the parameter `backbone`.
    input_size : int or None
        Height and width of its input, in pixels.
    n_features : int or None
        Columns of its embedding.
    parameters : float or None
        Millions of parameters, head included.
    multiply_adds : float or None
        Billions of multiply-adds for one image.
    weights : tuple of str
        Published weights, the default first.
    """

    name: str
    input_size: int | None
    n_features: int | None
    parameters: float | None
    multiply_adds: float | None
    weights: tuple[str, ...]


_COLUMNS = [field.name for field in fields(BackboneInfo)]
_HEADINGS = ["name", "input (px)", "columns", "parameters (M)", "multiply-adds (G)", "weights"]
_FORMATS = ["{}", "{}", "{}", "{:.1f}", "{:.2f}", "{}"]


class BackboneTable(list[BackboneInfo]):
    """A list of :class:`BackboneInfo` that prints as a table, also in a notebook.

    ``table["resnet50"]`` is the row of that name, and a slice is a table.
    """

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, str):
            return {row.name: row for row in self}[index]
        got = super().__getitem__(index)
        return BackboneTable(got) if isinstance(index, slice) else got

    def _cells(self) -> list[list[str]]:
        rows = [[*astuple(row)[:-1], ", ".join(row.weights)] for row in self]
        return [
            ["" if v is None else f.format(v) for f, v in zip(_FORMATS, row, strict=True)]
            for row in rows
        ]

    def __repr__(self) -> str:
        lines = [_HEADINGS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if 0 < k < 5 else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        def row(cells: list[str], tag: str) -> str:
            inner = "".join(
                f'<{tag} style="text-align:{"right" if 0 < k < 5 else "left"}">'
                f"{html.escape(cell)}</{tag}>"
                for k, cell in enumerate(cells)
            )
            return f"<tr>{inner}</tr>"

        body = "".join(row(cells, "td") for cells in self._cells())
        return f"<table><thead>{row(_HEADINGS, 'th')}</thead><tbody>{body}</tbody></table>"

    def to_pandas(self) -> pd.DataFrame:
        """Return the table as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame([astuple(row) for row in self], columns=_COLUMNS)


def list_backbones(pattern: str | None = None, *, timm: bool = False) -> BackboneTable:
    """List the networks that have a name.

    Parameters
    ----------
    pattern : str, default=None
        With ``*`` and ``?`` as in file names (``"resnet*"``, ``"timm:vit_*"``), or a part of
        the name (``"mobile"``).
    timm : bool, default=False
        Whether to list timm's networks as well; needs the extra ``timm``. A pattern that
        begins with ``"timm:"`` asks for them, too.

    Returns
    -------
    table : BackboneTable
        A list of rows with ``name``, ``input_size`` (pixels), ``n_features``, ``parameters``
        (millions), ``multiply_adds`` (billions) and ``weights``. It prints as a table, also in a
        notebook, and has ``to_pandas()``. No weights are loaded. ``n_features``, and
        ``parameters`` of timm's networks, are None unless `pattern` leaves at most 24 networks.

    Raises
    ------
    TypeError
        If `pattern` is not a string.
    ImportError
        If timm's networks are asked for and timm is not installed.

    See Also
    --------
    load_backbone : Load a network by its name.

    Examples
    --------
    >>> from sktransfer import list_backbones
    >>> list_backbones("resnet?0")
    name      input (px)  columns  parameters (M)  multiply-adds (G)  weights
    resnet50         224     2048            25.6               4.09  IMAGENET1K_V2, IMAGENET1K_V1
    """
    if pattern is not None and not isinstance(pattern, str):
        raise TypeError(f"pattern={pattern!r} is not a string such as 'resnet*'.")
    from sktransfer.networks._published import import_timm, torchvision_names

    names = ["builtin", *torchvision_names()]
    if timm or (pattern or "").startswith("timm:"):
        names += [f"timm:{name}" for name in import_timm().list_models()]
    names = [name for name in names if pattern is None or _matches(name, pattern)]
    return BackboneTable(_info(name, len(names) <= _MAX_BUILT) for name in names)


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.lower()
    if any(sign in pattern for sign in "*?["):
        return fnmatch(name, pattern)
    return pattern in name


@functools.cache
def _info(name: str, is_built: bool) -> BackboneInfo:
    from torchvision.models import get_model_weights

    from sktransfer.networks._published import import_timm
    from sktransfer.networks.builtin import DEFAULT, VERSIONS

    if name == "builtin":
        version, names = VERSIONS[DEFAULT], sorted(VERSIONS, key=lambda other: other != DEFAULT)
        cost = version.parameters, version.multiply_adds
        return BackboneInfo(
            name, version.preprocessing.crop_size[0], version.n_features, *cost, tuple(names)
        )
    n_features, parameters = _measure(name) if is_built else (None, None)
    if name.startswith("timm:"):
        config = import_timm().get_pretrained_cfg(name.removeprefix("timm:"))
        size = max(config.input_size[1:]) if config else None
        weights = ("DEFAULT",) if config and config.has_weights else ()
        return BackboneInfo(name, size, n_features, parameters, None, weights)
    members = get_model_weights(name)
    default = members["DEFAULT"]
    weights = (default.name, *(w.name for w in members if w is not default))
    cost = default.meta["num_params"] / 1e6, default.meta["_ops"]
    return BackboneInfo(name, default.transforms().crop_size[0], n_features, *cost, weights)


def _measure(name: str) -> tuple[int | None, float]:
    """Return the number of columns, None if it takes no images, and millions of parameters."""
    from sktransfer.networks._backbone import load_backbone, resolve_source

    source = resolve_source(name, None)
    parameters = sum(p.numel() for p in source.build().parameters()) / 1e6
    try:
        return load_backbone(source).n_features, parameters
    except ValueError:
        return None, parameters
