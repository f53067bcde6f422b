"""``list_backbones``: the networks that have a name, and what they cost."""

from __future__ import annotations

import functools
import html
from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatch
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Knowing a network's columns takes building it, a tenth of a second to a second: done where a
# pattern leaves at most this many.
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
    """A list of :class:`BackboneInfo` that prints as a table, in a notebook too.

    ``table["resnet50"]`` is the row of that name, a slice is a table.
    """

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, str):
            return next(row for row in self if row.name == index)
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
        (millions), ``multiply_adds`` (billions) and ``weights``. It prints as a table, shows
        as one in a notebook and has ``to_pandas()``. No weights are loaded. The networks are
        built to fill in ``n_features``, and ``parameters`` of timm's, where `pattern` leaves
        at most 24 of them; otherwise these are None.

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
    if any(sign in pattern for sign in "*?["):
        return fnmatch(name, pattern)
    return pattern.lower() in name.lower()


@functools.cache
def _info(name: str, is_built: bool) -> BackboneInfo:
    if name == "builtin":
        return _of_builtin()
    n_features, parameters = _measure(name) if is_built else (None, None)
    if name.startswith("timm:"):
        size, weights = _of_timm(name.removeprefix("timm:"))
        return BackboneInfo(name, size, n_features, parameters, None, weights)
    from torchvision.models import get_model_weights

    members = get_model_weights(name)
    default = members["DEFAULT"]
    return BackboneInfo(
        name,
        default.transforms().crop_size[0],
        n_features,
        default.meta["num_params"] / 1e6,
        default.meta["_ops"],
        (default.name, *(member.name for member in members if member is not default)),
    )


def _of_builtin() -> BackboneInfo:
    from sktransfer.networks.builtin import DEFAULT, VERSIONS

    version = VERSIONS[DEFAULT]
    weights = (DEFAULT, *(name for name in VERSIONS if name != DEFAULT))
    cost = version.parameters, version.multiply_adds
    return BackboneInfo("builtin", version.size[0], version.n_features, *cost, weights)


def _of_timm(name: str) -> tuple[int | None, tuple[str, ...]]:
    from sktransfer.networks._published import import_timm

    config = import_timm().get_pretrained_cfg(name)
    if config is None:
        return None, ()
    return max(config.input_size[1:]), ("DEFAULT",) if config.has_weights else ()


def _measure(name: str) -> tuple[int | None, float]:
    """Return the number of columns, if it can be an image network, and millions of parameters."""
    from sktransfer.networks._backbone import load_backbone
    from sktransfer.networks._own import resolve_source

    source = resolve_source(name, None)
    parameters = sum(p.numel() for p in source.build().parameters())
    try:
        return load_backbone(source).n_features, parameters / 1e6
    except ValueError:  # a few of timm's networks do not take images
        return None, parameters / 1e6
