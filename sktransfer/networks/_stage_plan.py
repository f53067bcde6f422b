"""Where a traced network is cut into stages, and what the stages are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import fx, nn

from sktransfer.networks._tracing import Traced, token_use

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, nn.Bilinear)
DROPOUTS = (nn.modules.dropout._DropoutNd,)
_PLAN_SIZE = 192  # pixels: six halvings leave three
# A sub-module that calls itself a stage is one, whether or not it shrinks the map.
_STAGE_NAME = re.compile(r"(?:^|[._])(?:stage|layer|denseblock)s?_?\d+$", re.IGNORECASE)


@dataclass
class _Unit:
    """A piece of the graph between two cuts that belongs to one sub-module."""

    key: str
    lo: int
    hi: int
    source: fx.Node
    out: fx.Node
    n_layers: int = 0
    is_pool: bool = False
    is_dropout: bool = False
    is_container: bool = False
    is_isotropic: bool = False
    shrinks: bool = False
    is_map: bool = True
    keys: list[str] = field(default_factory=list)

    @property
    def is_block(self) -> bool:
        return self.n_layers > 1 or self.is_container


class StagePlan:
    """Where a traced network is cut, and what the pieces are called.

    Attributes
    ----------
    embedding : fx.Node
        What enters the classification head, or what the network returns if it has none.
    outputs : dict of str to fx.Node
        Stage name -> the value the stage ends with.
    """

    def __init__(self, traced: Traced, input_size: tuple[int, int, int], name: str):
        self.traced, self.network_name, self._size = traced, name, input_size
        if traced.output is traced.input:
            raise ValueError(
                f"{name} returns the picture as it gets it: a network with at least one operation "
                "is needed. nn.Flatten() gives the pixels themselves."
            )
        self.shapes = self._shapes_to_plan_by(input_size)
        self._cuts = traced.cuts()
        self._expanded = {""}
        self._isotropic: set[str] = set()
        self._tokens: dict[str, tuple[int | None, int]] = {}
        self.has_head, head = self._find_head()
        body = self._body_units(head)
        groups = self._group(body)
        self._pieces: list[tuple[str, int, int, fx.Node, fx.Node]] = []
        names = self._names(groups)
        for name, group in zip(names, groups, strict=True):
            self._pieces.append((name, group[0].lo, group[-1].hi, group[0].source, group[-1].out))
        self.embedding = self._pieces[-1][4] if self._pieces else traced.input
        if self.has_head:
            last = len(traced.nodes) - 1
            self._pieces.append(("head", head, last, self.embedding, traced.output))
        self.outputs = {piece[0]: piece[4] for piece in self._pieces}

    @property
    def names(self) -> list[str]:
        return list(self.outputs)

    @property
    def stage_keys(self) -> list[str]:
        """What each stage ends with."""
        return [_key_of(node) for node in self.outputs.values()]

    def pieces(self) -> list[tuple[str, nn.Module]]:
        """The stages as modules, made of the traced module's own layers."""
        return [
            (name, self.traced.segment(lo, hi, source, out))
            for name, lo, hi, source, out in self._pieces
        ]

    def unheard_in_training(self, stages: Sequence[str]) -> list[str]:
        """Dotted names of modules that do in training, within these stages, what no stage can."""
        pieces = [(lo, hi, source) for _, lo, hi, source, _ in self._pieces]
        places = [(lo, hi) for name, lo, hi, _, _ in self._pieces if name in stages]
        asking = {
            read.path
            for read in self.traced.unheard_reads(pieces)
            if any(lo <= read.position <= hi for lo, hi in places)
        }
        changes = self.traced.changes_in_training
        return sorted(path for path in asking if changes(path, self.embedding))

    def head_layers(self) -> set[str]:
        """Dotted names of the head's layers and parameters."""
        if not self.has_head:
            return set()
        nodes = self.traced.nodes[self._pieces[-1][1] :]
        return {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}

    # -- layers by name ---------------------------------------------------------------------
    @property
    def embedding_key(self) -> str:
        """Name of what enters the head."""
        return _key_of(self.embedding)

    @property
    def last_map_key(self) -> str:
        """Name of the last value before the head that still has places to pool over."""
        end = self.traced.order[self.embedding]
        for i in range(end, 0, -1):
            if i in self._cuts and self._is_map(node := self._cuts[i]):
                return _key_of(node)
        return self.embedding_key

    def resolve(self, layer: str) -> str:
        """The operation that a stage's, sub-module's or operation's name stands for."""
        node = self.outputs.get(layer) or self.traced.names.get(layer)
        if node is None:
            raise unknown_layer(layer, self.network_name, self.names, list(self.traced.names))
        return _key_of(node)

    def shape(self, key: str, input_size: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of a layer's value for two pictures of `input_size`."""
        shape = self._shapes(input_size).get(self._node(key), ())
        return checked_shape(shape, key, self.network_name)

    def is_channels_last(self, key: str, input_size: tuple[int, int, int]) -> bool:
        """Whether a 4-D value is N×H×W×C."""
        shape = self.shape(key, input_size)
        if len(shape) != 4:
            return False
        if (shape[1] == shape[2]) != (shape[2] == shape[3]):
            return channels_last(shape)
        # All axes equal, or the picture not square: see which ones follow the picture's size.
        channels, height, width = input_size
        for factor in (2, 3):
            try:
                other = self.shape(key, (channels, factor * height, factor * width))
            except ValueError:
                continue
            return other[1] != shape[1] and other[3] == shape[3]
        return False

    def tokens(self, key: str) -> tuple[int | None, int]:
        """The class token's place behind a layer, if there is one, and how many are no place."""
        if key not in self._tokens:  # asked for in every fit
            self._tokens[key] = token_use(self.traced, self._node(key), self.embedding)
        return self._tokens[key]

    def extractor(self, keys: list[str], poolings: list[nn.Module]) -> fx.GraphModule:
        """The network up to the deepest of the layers, returning their pooled values."""
        return self.traced.extractor([self._node(key) for key in keys], poolings)

    def _shapes_to_plan_by(self, size: tuple[int, int, int]) -> dict[fx.Node, tuple[int, ...]]:
        """Shapes for pictures so large that no map shrinks to one place before the pooling."""
        factor = -(-_PLAN_SIZE // min(size[1:]))
        if factor > 1:
            try:
                return self._shapes((size[0], factor * size[1], factor * size[2]))
            except ValueError:
                pass  # built for one size
        return self._shapes(size)

    def _node(self, key: str) -> fx.Node:
        return self.traced.input if key == "input" else self.traced.by_key[key]

    def _shapes(self, input_size: tuple[int, int, int]) -> dict[fx.Node, tuple[int, ...]]:
        try:
            return self.traced.shapes(input_size)
        except Exception as error:
            raise not_accepted(self.network_name, input_size, error) from error

    # -- the head ---------------------------------------------------------------------------
    def _find_head(self) -> tuple[bool, int]:
        """Position where the head begins: the last linear layer, if nothing learnt follows.

        SqueezeNet's and a few others' is a 1x1 convolution. Dropout just before it belongs to
        it, so that what is kept at the boundary never depends on chance.
        """
        nodes = self.traced.nodes
        for i in range(len(nodes) - 1, 0, -1):
            layer = self.traced.layer(nodes[i])
            if layer is None:
                continue
            is_head = isinstance(layer, nn.Linear) or (
                isinstance(layer, nn.Conv2d)
                and layer.kernel_size == (1, 1)
                and layer.bias is not None
            )
            if is_head and i - 1 in self._cuts:
                while i - 2 in self._cuts and self._is_dropout(nodes[i - 1]):
                    i -= 1
                return i > 1, i
            if next(layer.parameters(), None) is not None:
                break
        return False, len(nodes)

    def _is_dropout(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.traced.layer(node), (*DROPOUTS, nn.Identity))
        return node.target in (nn.functional.dropout, torch.dropout)

    # -- units ------------------------------------------------------------------------------
    def _body_units(self, end: int) -> list[_Unit]:
        """The operations before `end`, by the sub-modules worth telling apart."""
        n_parameters = self._n_parameters(self._units(1, end))
        while True:
            units = self._units(1, end)
            opened = {unit.key for unit in units if self._opens(unit, max(1, n_parameters))}
            if not opened - self._expanded:
                return units
            self._expanded |= opened

    def _opens(self, unit: _Unit, n_body: int) -> bool:
        """Whether a sub-module holds several stages rather than being (part of) one."""
        if unit.key in self._expanded or not self._children(unit.key):
            return False
        self._expanded.add(unit.key)
        inner = self._units(unit.lo, unit.hi + 1)
        self._expanded.discard(unit.key)
        if len(inner) < 2:
            return False
        n_shrinking = sum(part.shrinks and part.n_layers > 0 for part in inner[1:])
        n_shrinking += sum(part.shrinks and part.is_pool and part.is_map for part in inner)
        if n_shrinking >= 2 or not unit.is_map:
            return True
        if self._n_parameters([unit]) < 0.9 * n_body:
            return False
        if n_shrinking == 0 and sum(part.is_block for part in inner) > 1:
            self._isotropic.add(unit.key)
        return True

    def _children(self, key: str) -> bool:
        module = self.traced.modules.get(key)
        return module is not None and next(module.children(), None) is not None

    def _key(self, path: str) -> str | None:
        """The sub-module that a layer counts to; None: an operation between sub-modules."""
        key = ""
        for part in path.split(".") if path else []:
            key = f"{key}.{part}" if key else part
            if key not in self._expanded:
                return key
        return None

    def _units(self, start: int, end: int) -> list[_Unit]:
        units: list[_Unit] = []
        source = self._cuts.get(start - 1, self.traced.input)
        lo, keys = start, [self._key(self.traced.nodes[start].meta.get("path", ""))]
        nodes = self.traced.nodes
        for i in range(start, end):
            key = self._key(nodes[i].meta.get("path", ""))
            # Nothing is cut inside a run of plain operations, but what turns a map into a
            # vector is told apart from the block before it.
            if i > lo and i - 1 in self._cuts and (key != keys[-1] if key else self._pools(i)):
                out = self._cuts[i - 1]
                units.append(self._unit(lo, i - 1, source, out, keys))
                source, lo, keys = out, i, []
            keys.append(key)
        out = self._cuts.get(end - 1, self.traced.output)
        units.append(self._unit(lo, end - 1, source, out, keys))
        return units

    def _pools(self, i: int) -> bool:
        """Whether the plain operation at `i` begins to turn the map into a vector."""
        node = self.traced.nodes[i]
        return (
            node.op != "call_module"
            and self._is_map(self._cuts[i - 1])
            and not self._is_map(self._cuts.get(i, node))
        )

    def _unit(
        self, lo: int, hi: int, source: fx.Node, out: fx.Node, keys: list[str | None]
    ) -> _Unit:
        known = list(dict.fromkeys(key for key in keys if key))
        unit = _Unit(known[-1] if known else "", lo, hi, source, out, keys=known)
        nodes = self.traced.nodes[lo : hi + 1]
        layers = [layer for node in nodes if (layer := self.traced.layer(node)) is not None]
        unit.n_layers = sum(isinstance(layer, _WEIGHTED) for layer in layers)
        # Weights of two or more dimensions that an operation reads are a layer's, too.
        unit.n_layers += sum(
            node.target in (nn.functional.linear, nn.functional.conv2d) for node in nodes
        )
        module = self.traced.modules.get(unit.key)
        is_leaf = module is not None and next(module.children(), None) is None
        unit.is_dropout = is_leaf and isinstance(module, DROPOUTS)
        unit.is_map = self._is_map(out)
        before, after = self._area(source), self._area(out)
        unit.shrinks = bool(before and after and before >= 2 * after)
        unit.is_pool = unit.n_layers == 0 and unit.shrinks and len(layers) <= 1
        unit.is_isotropic = unit.key.rpartition(".")[0] in self._isotropic and unit.n_layers > 1
        unit.is_container = (
            isinstance(module, nn.Sequential) and unit.n_layers > 1 and len(known) == 1
        ) or (bool(_STAGE_NAME.search(unit.key)) and unit.n_layers > 0)
        return unit

    def _is_map(self, node: fx.Node) -> bool:
        """Whether a value still has places (a map or a sequence of tokens), not one vector."""
        shape = self.shapes.get(node, ())
        return len(shape) == 3 or (len(shape) == 4 and shape[2:] != (1, 1))

    def _area(self, node: fx.Node) -> int:
        """Number of places of a map; 0 where there are none to count."""
        shape = self.shapes.get(node, ())
        if len(shape) != 4:
            return 0
        return shape[1] * shape[2] if channels_last(shape) else shape[2] * shape[3]

    def _n_parameters(self, units: list[_Unit]) -> int:
        parameters: dict[int, int] = {}
        for unit in units:
            for node in self.traced.nodes[unit.lo : unit.hi + 1]:
                if (layer := self.traced.layer(node)) is not None:
                    parameters.update({id(p): p.numel() for p in layer.parameters()})
        return sum(parameters.values())

    # -- stages -----------------------------------------------------------------------------
    def _group(self, units: list[_Unit]) -> list[list[_Unit]]:
        """Put units together into stages."""
        has_blocks = any(unit.is_block for unit in units)
        pooling = self._pool_start(units)
        groups: list[list[_Unit]] = []
        for i, unit in enumerate(units):
            group = groups[-1] if groups else []
            if i == pooling or i == 0:
                begins = True
            elif pooling is not None and i > pooling:
                # Hidden layers of the classifier, each with the dropout before it.
                begins = unit.is_dropout or (
                    unit.n_layers > 0 and not all(u.is_dropout for u in group)
                )
            else:
                begins = self._begins(unit, group, is_stem=len(groups) == 1 and has_blocks)
            if begins:
                groups.append([])
            groups[-1].append(unit)
        merged = groups[:1]
        for group in groups[1:]:
            # Several steps without layers, one after another, are one pooling.
            if any(unit.n_layers for unit in (*merged[-1], *group)) or len(merged) == 1:
                merged.append(group)
            else:
                merged[-1].extend(group)
        return merged

    @staticmethod
    def _begins(unit: _Unit, group: list[_Unit], is_stem: bool) -> bool:
        """Whether `unit` begins a stage rather than going on with `group`."""
        has_layers = any(u.n_layers for u in group)
        is_simple = not any(u.is_block for u in group)
        if group[-1].is_pool and has_layers:
            return True
        if not unit.n_layers:
            return False
        if is_simple:
            # A stem lasts until the first block; a layer that shrinks the map between two
            # stages opens the second of them.
            if is_stem:
                return unit.is_block
            return unit.shrinks and has_layers
        return unit.shrinks or unit.is_container or unit.is_isotropic

    @staticmethod
    def _pool_start(units: list[_Unit]) -> int | None:
        """Where the map turns into a vector, with the normalisation just before it."""
        first = next((i for i, unit in enumerate(units) if not unit.is_map), None)
        if first is None or first == 0:
            return None
        if units[first].n_layers:
            return first
        start = first
        while start > 0 and not units[start - 1].n_layers and not units[start - 1].is_pool:
            start -= 1
        # Norm and activation behind a plain layer are that layer's own.
        if start < first and start > 0 and not units[start - 1].is_block:
            start = first
        return start or first

    def _names(self, groups: list[list[_Unit]]) -> list[str]:
        names: list[str] = []
        by_node = {node: name for name, node in reversed(self.traced.names.items())}
        for k, group in enumerate(groups):
            last = group[-1]
            has_layers = any(unit.n_layers for unit in group)
            if k == 0 and len(groups) > 1:
                name = "stem"
            elif not has_layers and not last.is_map:
                name = "pool"
            elif self.traced.names.get(last.key) is last.out:
                name = last.key
            else:
                name = by_node.get(last.out, last.key)
            short = name.rpartition(".")[2]
            if not short[:1].isdigit() and len(short) > 3:
                name = short if short not in names else name
            is_taken = name in names or (name == "pool" and has_layers)
            names.append(f"{name}#{k}" if is_taken else name)
        return names


def channels_last(shape: tuple[int, ...]) -> bool:
    """Whether a 4-D value is N×H×W×C rather than N×C×H×W, for square pictures."""
    return shape[1] == shape[2] != shape[3]


def _key_of(node: fx.Node) -> str:
    return "input" if node.op == "placeholder" else node.meta["name"]


def unknown_layer(layer: str, network: str, stages: list[str], names: list[str]) -> ValueError:
    """The error for a layer that a network does not have."""
    known = list(dict.fromkeys([*stages, *names]))
    close = get_close_matches(layer, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    examples = ", ".join(map(repr, [name for name in names if name not in stages][:3]))
    return ValueError(
        f"layer={layer!r} is not in {network}.{hint} Its stages are {stages}; the dotted name of "
        f"any sub-module or operation is accepted too ({examples}, …: {len(names)} in all)."
    )


def checked_shape(shape: tuple[int, ...], key: str, network: str) -> tuple[int, ...]:
    """The shape of a layer's value for two pictures, if its first axis is the pictures'."""
    if shape and shape[0] != 2:
        raise ValueError(
            f"{key.removeprefix('>')!r} of {network} gives values of shape {shape} for two "
            "pictures: the first axis has to be that of the pictures, one row for each. Give "
            "another layer, or a network that keeps the batch."
        )
    return shape


def not_accepted(network: str, input_size: tuple[int, int, int], error: Exception) -> ValueError:
    """The error for an input size that a network cannot take."""
    reason: Any = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    text = str(reason).strip().split("\n")[0]
    channels, height, width = input_size
    return ValueError(
        f"{network} does not accept pictures of {channels}×{height}×{width} (channels × height × "
        f"width): {text}. preprocessing={{'size': …, 'crop': …}} sets another size."
    )
