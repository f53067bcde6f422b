"""``list_backbones``: what can be named, and what it costs."""

from __future__ import annotations

import functools
import html
from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatch
from typing import Any

# Columns that a torchvision builder gives -> its names. Looked up here because building all
# eighty takes seconds; a builder that is not here is measured.
_WIDTHS = {
    400: "regnet_x_400mf",
    440: "regnet_y_400mf",
    512: "maxvit_t resnet18 resnet34 squeezenet1_0 squeezenet1_1",
    672: "regnet_x_800mf",
    768: "convnext_small convnext_tiny swin_s swin_t swin_v2_s swin_v2_t vit_b_16 vit_b_32",
    784: "regnet_y_800mf",
    888: "regnet_y_1_6gf",
    912: "regnet_x_1_6gf",
    1008: "regnet_x_3_2gf",
    1024: "convnext_base densenet121 googlenet mobilenet_v3_small shufflenet_v2_x0_5 "
    "shufflenet_v2_x1_0 shufflenet_v2_x1_5 swin_b swin_v2_b vit_l_16 vit_l_32",
    1280: "efficientnet_b0 efficientnet_b1 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s "
    "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large vit_h_14",
    1408: "efficientnet_b2",
    1512: "regnet_y_3_2gf",
    1536: "convnext_large efficientnet_b3",
    1664: "densenet169",
    1792: "efficientnet_b4",
    1920: "densenet201 regnet_x_8gf",
    2016: "regnet_y_8gf",
    2048: "efficientnet_b5 inception_v3 regnet_x_16gf resnet101 resnet152 resnet50 "
    "resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x2_0 wide_resnet101_2 "
    "wide_resnet50_2",
    2208: "densenet161",
    2304: "efficientnet_b6",
    2520: "regnet_x_32gf",
    2560: "efficientnet_b7",
    3024: "regnet_y_16gf",
    3712: "regnet_y_32gf",
    4096: "alexnet vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn",
    7392: "regnet_y_128gf",
}
_WIDTH_OF = {name: width for width, names in _WIDTHS.items() for name in names.split()}
# A timm network takes a tenth of a second to measure; beyond this many only names are listed.
_MAX_MEASURED = 24


@dataclass(frozen=True)
class BackboneInfo:
    """One network that can be named.

    Attributes
    ----------
    name : str
        What ``backbone=`` takes.
    input_size : int or None
        Height and width of the pictures it gets, in pixels.
    n_features : int or None
        Columns of its embedding.
    parameters : float or None
        Millions of parameters, head included.
    multiply_adds : float or None
        Billions of multiply-adds for one picture.
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


class BackboneTable(list[BackboneInfo]):
    """A list of :class:`BackboneInfo` that prints as a table, in a notebook too."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return next(row for row in self if row.name == index)
        got = super().__getitem__(index)
        return BackboneTable(got) if isinstance(index, slice) else got

    def _cells(self) -> list[list[str]]:
        return [
            [
                row.name,
                "" if row.input_size is None else str(row.input_size),
                "" if row.n_features is None else str(row.n_features),
                "" if row.parameters is None else f"{row.parameters:.1f}",
                "" if row.multiply_adds is None else f"{row.multiply_adds:.2f}",
                ", ".join(row.weights),
            ]
            for row in self
        ]

    def __repr__(self) -> str:
        lines = [_HEADINGS, *self._cells()]
        widths = [max(len(line[k]) for line in lines) for k in range(len(_HEADINGS))]
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
        head = row(_HEADINGS, "th")
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"

    def to_pandas(self) -> Any:
        """Return the table as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame([astuple(row) for row in self], columns=_COLUMNS)


def list_backbones(pattern: str | None = None, *, timm: bool = False) -> BackboneTable:
    """List the networks that can be named.

    Parameters
    ----------
    pattern : str, default=None
        With ``*`` and ``?`` as in file names (``"resnet*"``, ``"timm:vit_*"``), or a part of
        the name (``"mobile"``).
    timm : bool, default=False
        Whether timm's networks are listed as well; needs the extra ``timm``. A pattern that
        begins with ``"timm:"`` asks for them, too.

    Returns
    -------
    table : BackboneTable
        A list of rows with ``name``, ``input_size`` (pixels), ``n_features``, ``parameters``
        (millions), ``multiply_adds`` (billions) and ``weights``. It prints as a table, shows
        as one in a notebook and has ``to_pandas()``. No weights are loaded. Of timm's networks
        size and cost are measured where the pattern leaves at most 24 of them.

    See Also
    --------
    load_backbone : The network behind a name.

    Examples
    --------
    >>> from sktransfer import list_backbones
    >>> list_backbones("resnet?0")
    name      input (px)  columns  parameters (M)  multiply-adds (G)  weights
    resnet50         224     2048            25.6               4.09  IMAGENET1K_V2, IMAGENET1K_V1
    """
    if pattern is not None and not isinstance(pattern, str):
        raise TypeError(f"pattern={pattern!r} is not a string such as 'resnet*'.")
    rows = [_of_torchvision(name) for name in _matching(_own_names(), pattern)]
    if timm or (pattern or "").startswith("timm:"):
        rows += _of_timm(pattern)
    return BackboneTable(rows)


def _matching(names: list[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return names
    if any(sign in pattern for sign in "*?["):
        return [name for name in names if fnmatch(name, pattern)]
    return [name for name in names if pattern.lower() in name.lower()]


def _own_names() -> list[str]:
    from sktransfer.networks._published import torchvision_names

    return ["builtin", *torchvision_names()]


@functools.cache
def _of_torchvision(name: str) -> BackboneInfo:
    if name == "builtin":
        from sktransfer.networks.builtin import DEFAULT, VERSIONS

        size, width, parameters, multiply_adds = _measure(name)
        published = (DEFAULT, *(version for version in VERSIONS if version != DEFAULT))
        return BackboneInfo(name, size, width, parameters, multiply_adds, published)
    from torchvision.models import get_model_weights

    members: Any = get_model_weights(name)
    default = members.DEFAULT
    width = _WIDTH_OF.get(name) or _measure(name)[1]
    others = (member.name for member in members if member is not default)
    return BackboneInfo(
        name,
        default.transforms().crop_size[0],
        width,
        default.meta["num_params"] / 1e6,
        default.meta["_ops"],
        (default.name, *others),
    )


def _of_timm(pattern: str | None) -> list[BackboneInfo]:
    from sktransfer.networks._timm_source import import_timm

    timm = import_timm()
    names = _matching([f"timm:{name}" for name in timm.list_models()], pattern)
    published = {f"timm:{name}" for name in timm.list_models(pretrained=True)}
    published |= {name.partition(".")[0] for name in published}
    rows = []
    for name in names:
        config = timm.get_pretrained_cfg(name.removeprefix("timm:"))
        size = None if config is None else max(config.input_size[1:])
        weights = ("DEFAULT",) if name in published else ()
        measured = (size, None, None, None)
        if len(names) <= _MAX_MEASURED:
            measured = _measure(name)
        rows.append(BackboneInfo(name, *measured, weights))
    return rows


@functools.cache
def _measure(name: str) -> tuple[Any, Any, Any, Any]:
    """Input size, width, parameters and multiply-adds, on torch's meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sktransfer.networks._sources import resolve_source
    from sktransfer.networks._stages import plan_stages
    from sktransfer.networks._tracing import meta_copy

    source = resolve_source(name, None)
    module = source.build()
    size = source.preprocessing.input_size
    plan = plan_stages(module, size, name)
    shape = plan.shape(plan.embedding_key, size)
    width = shape[-1] if plan.is_channels_last(plan.embedding_key, size) else shape[1]
    n_parameters = sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_copy(module)(torch.empty((1, *size), device="meta"))
    # The counter takes a multiplication and an addition for two.
    return max(size[1:]), width, n_parameters / 1e6, counter.get_total_flops() / 2e9
