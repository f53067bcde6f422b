"""A network as an ordered list of stages, cut where a single tensor crosses.

The stages, run one after another, compute what the network does. The first is the ``"stem"``. The
last is the ``"head"``, the last linear layer with what follows it. The ``"pool"`` reduces the last
map to a vector. The ends of the others are listed here for torchvision's networks, come from
``group_matcher`` for timm's, and from the children of any other module. Each stage has the name of
its last module: ``"layer3"``, ``"features.6"``, ``"encoder_layer_11"``.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections import Counter

from torch import fx, nn

from sktransfer.networks._blocks import BlockPlan, EmbeddingModel
from sktransfer.networks._graph import (
    Stage,
    StageModule,
    Stages,
    Traced,
    TracingError,
    checked_shape,
    not_accepted,
    trace,
    unknown_layer,
)
from sktransfer.networks._hooks import HookedPlan

# torchvision's classes, some with their number of `features` -> the last modules of stages, as
# "name:class" if the name is not enough.
_STAGE_ENDS = {
    "AlexNet": r"features\.\d+:MaxPool2d|classifier\.[25]",
    "ConvNeXt": r"features\.[01357]",
    "DenseNet": r"features\.(pool0|denseblock\d)",
    "EfficientNet": r"features\.[0-68]",
    "EfficientNet 8": r"features\.[0-57]",
    "GoogLeNet": r"maxpool[1-4]|inception5b",
    "Inception3": r"maxpool[12]|Mixed_(5d|6e|7c)",
    "MNASNet": r"layers\.([7-9]|1[0126])",
    "MaxVit": r"stem|blocks\.\d+|classifier\.4",
    "MobileNetV2": r"features\.([0136]|1[0368])",
    "MobileNetV3": r"features\.(0|1|3|6|12|16)|classifier\.1",
    "MobileNetV3 13": r"features\.(0|1|3|8|12)|classifier\.1",
    "RegNet": r"stem|trunk_output\.block\d",
    "ResNet": r"maxpool|layer\d",
    "ShuffleNetV2": r"maxpool|stage[23]|conv5",
    "SqueezeNet": r"features\.\d+:MaxPool2d|features\.12",
    "SwinTransformer": r"features\.[01357]",
    "VGG": r"features\.\d+:MaxPool2d|classifier\.[14]",
    "VisionTransformer": r"encoder\.dropout|encoder\.layers\.encoder_layer_\d+",
}
_MAP_SIZE = 192  # pixels: six halvings leave three


def plan_stages(
    module: nn.Module,
    input_size: tuple[int, ...],
    name: str = "the network",
    *,
    is_user_code: bool = False,
) -> StagePlan | HookedPlan | BlockPlan:
    """Find a network's stages without a forward pass.

    With `is_user_code`, compare the graph with the module for two random images.
    """
    if isinstance(module, EmbeddingModel):
        return BlockPlan(module, input_size, name)
    try:
        traced = trace(module)
    except TracingError:
        return HookedPlan(module, input_size, name)
    plan = StagePlan(traced, input_size, name)
    if is_user_code and not traced.agrees_with_module(input_size):
        return HookedPlan(module, input_size, name)
    return plan


class StagePlan:
    """Where a traced network is cut, and the names of the parts.

    `names` are those of the stages, `stage_keys` of the operations with which they end.
    """

    def __init__(self, traced: Traced, input_size: tuple[int, ...], name: str):
        if traced.output is traced.input:
            raise ValueError(
                f"{name} returns the image as it gets it: a network with at least one operation "
                "is needed. nn.Flatten() gives the pixels themselves."
            )
        self.traced, self.network_name = traced, name
        self._map_shapes = self._large_shapes(input_size)
        # timm makes a network without its head for num_classes=0.
        is_headless = getattr(traced.root, "num_classes", None) == 0
        start = len(traced.nodes) if is_headless else self._head_start()
        self._has_head = start < len(traced.nodes)
        end = start - 1
        self._embedding = traced.crossing[end] if self._has_head else traced.output
        marks = self._family_ends(end) or self._group_ends(end)
        if not marks or marks[-1][1] < end:
            marks.append(("pool" if marks else "", end))
        marks = self._with_pool(marks)
        nodes = [traced.crossing.get(position, traced.output) for _, position in marks]
        if self._has_head:
            marks.append(("head", len(traced.nodes) - 1))
            nodes.append(traced.output)
        labels = [
            self._label(name, node, marks) for (name, _), node in zip(marks, nodes, strict=True)
        ]
        self.names = _unique(labels)
        self.stage_keys = [node.meta["key"] for node in nodes]
        self._ends = nodes

    def _label(self, name: str, node: fx.Node, marks: list[tuple[str, int]]) -> str:
        """Return the name of the outermost module that returns `node` and holds no other stage."""
        if name in ("pool", "head"):
            return name
        paths = [path for path, value in self.traced.module_outputs.items() if value is node]
        alone = [
            path
            for path in paths
            if not any(other.startswith(f"{path}.") for other, _ in marks if other != name)
        ]
        return min(alone, key=len, default=node.meta["key"])

    # -- where stages end -------------------------------------------------------------------
    def _head_start(self) -> int:
        """Find the last linear layer (or 1×1 convolution), if no other layer follows.

        Dropout just before it belongs to the head: what enters the head is never random.
        """
        traced = self.traced
        for i in range(len(traced.nodes) - 1, 0, -1):
            layer = traced.layer(traced.nodes[i])
            if layer is None or next(layer.parameters(), None) is None:
                continue
            is_linear = isinstance(layer, nn.Linear) or (
                isinstance(layer, nn.Conv2d)
                and layer.kernel_size == (1, 1)
                and layer.bias is not None
            )
            if not is_linear or i - 1 not in traced.crossing:
                break
            while i - 2 in traced.crossing and isinstance(
                traced.layer(traced.nodes[i - 1]), (nn.Dropout, nn.Identity)
            ):
                i -= 1
            return i if i > 1 else len(traced.nodes)
        return len(traced.nodes)

    def _family_ends(self, end: int) -> list[tuple[str, int]]:
        """Find the ends of the stages of one of torchvision's networks, by the modules' names."""
        root = self.traced.root
        kinds = [c.__name__ for c in type(root).__mro__ if c.__module__.startswith("torchvision.")]
        if not kinds or kinds[0] not in _STAGE_ENDS:
            return []
        kind = f"{kinds[0]} {len(getattr(root, 'features', ()))}"
        pattern = re.compile(_STAGE_ENDS.get(kind, _STAGE_ENDS[kinds[0]]))
        found = []
        for path, node in self.traced.module_outputs.items():
            module = f"{path}:{type(self.traced.modules[path]).__name__}"
            if pattern.fullmatch(path) or pattern.fullmatch(module):
                position = self.traced.cuts.get(node)
                if position is not None and position <= end:
                    found.append((path, position))
        return sorted(found, key=operator.itemgetter(1))

    def _group_ends(self, end: int) -> list[tuple[str, int]]:
        """Find the ends of stages by groups of parameters: one ends where the next begins."""
        reads = {
            i: self.traced.parameters(node) for i, node in enumerate(self.traced.nodes[: end + 1])
        }
        # Parameters of norms alone do not make a stage.
        weights = {n: p for own in reads.values() for n, p in own.items() if p.ndim > 1}
        group_of = self._timm_groups(weights) or self._children(weights)
        with_weights = {group_of[name] for name in weights if name in group_of}
        spans: dict[str, list[int]] = {}
        for i, own in reads.items():
            for group in with_weights.intersection(group_of.get(name, "") for name in own):
                spans.setdefault(group, [i, i])[1] = i
        found: list[tuple[str, int]] = []
        name, last = "", 0
        for group, (first, stop) in spans.items():
            cuts = [i for i in range(last, first) if i in self.traced.crossing]
            if name and cuts:
                found.append((name, self._block_end(name, last, cuts[-1])))
            name, last = group, max(last, stop)
        return [*found, (name, end)] if name else []

    def _timm_groups(self, weights: dict[str, nn.Parameter]) -> dict[str, str]:
        """Return the stage of each parameter, as timm itself groups them."""
        root = self.traced.root
        if not hasattr(root, "group_matcher") or not hasattr(root, "pretrained_cfg"):
            return {}
        from timm.models import group_parameters

        try:
            matcher = root.group_matcher(coarse=True)  # type: ignore[operator]
        except AssertionError:  # rdnet has no coarse groups
            return {}
        groups = group_parameters(root, matcher, reverse=True)
        members: dict[object, list[str]] = {}
        for name in weights:
            members.setdefault(groups[name], []).append(name)
        labels = {group: _common_module(names) for group, names in members.items()}
        return {name: labels[group] for name, group in groups.items() if group in labels}

    def _children(self, weights: dict[str, nn.Parameter]) -> dict[str, str]:
        """Find the child that each parameter belongs to, of the module that holds most of them."""
        names = [n for n, _ in self.traced.root.named_parameters(remove_duplicate=False)]
        opened = {""}

        def child(name: str) -> str:
            parts = name.split(".")[:-1]
            paths = (".".join(parts[:k]) for k in range(1, len(parts) + 1))
            return next((path for path in paths if path not in opened), "")

        while True:
            groups = {name: child(name) for name in names}
            totals: Counter[str] = Counter()
            for name, weight in weights.items():
                totals[groups[name]] += weight.numel()
            largest, size = totals.most_common(1)[0] if totals else ("", 0)
            depth = largest.count(".") + 1
            has_children = any(n.count(".") > depth for n in weights if groups[n] == largest)
            if not (largest and has_children and size >= 0.9 * totals.total()):
                return {name: group for name, group in groups.items() if group}
            opened.add(largest)

    def _with_pool(self, marks: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Add the stage "pool" where a map becomes a vector."""
        weighted = [
            i
            for i, node in enumerate(self.traced.nodes)
            if any(p.ndim > 1 for p in self.traced.parameters(node).values())
        ]
        found: list[tuple[str, int]] = []
        start = 0
        for name, stop in marks:
            maps = [i for i in range(start, stop + 1) if self._is_map(i)]
            if maps and maps[-1] < stop and any(i <= maps[-1] for i in weighted):
                inner = [i for i in weighted if start < i <= maps[-1]]
                last = self._block_end(name, inner[-1], maps[-1]) if inner else start
                following = [i for i in weighted if last < i <= stop]
                before = range(last, min([*following, stop + 1]))
                pool = max(i for i in before if i in self.traced.crossing)
                found += [(name, last)] if last > start else []
                found += [("pool", pool)] if pool > last else []
                found += [(name, stop)] if stop > pool else []
            else:
                found.append((name, stop))
            start = stop
        return found

    def _block_end(self, name: str, first: int, last: int) -> int:
        """Find where the block called `name` ends, if the network can be cut there."""
        module = self.traced.modules.get(name)
        if module is None or next(module.children(), None) is None:
            return last
        end = self.traced.cuts.get(self.traced.names.get(name, self.traced.input), last)
        return end if first <= end <= last else last

    def _is_map(self, position: int) -> bool:
        """Whether the value that crosses there is a map or a sequence of tokens."""
        node = self.traced.crossing.get(position)
        shape = self._map_shapes.get(node, ()) if node is not None else ()
        return len(shape) == 3 or (len(shape) == 4 and shape[2:] != (1, 1))

    def _large_shapes(self, size: tuple[int, ...]) -> dict[fx.Node, tuple[int, ...]]:
        """Return shapes for images so large that no map has a single place before the pooling."""
        factor = -(-_MAP_SIZE // min(size[1:]))
        if factor > 1:
            try:
                return self._shapes((size[0], factor * size[1], factor * size[2]))
            except ValueError:
                pass  # built for one size
        return self._shapes(size)

    # -- stages as modules ------------------------------------------------------------------
    @functools.cached_property
    def _parts(self) -> list[tuple[fx.Graph, fx.Graph | None]]:
        """The graph of each stage, and the one for training if it can be cut at the same places."""
        traced = self.traced
        nodes = [traced.input, *self._ends]
        outermost: dict[fx.Node, str] = {}
        for path in sorted(traced.module_outputs, key=len):
            outermost.setdefault(traced.module_outputs[path], path)
        keys = [outermost.get(node, node.meta.get("key", "")) for node in nodes]
        # In training, only modules that contain several stages are traced; others run their code.
        paths = [key.split(".")[:-1] for key in keys]
        opened = {".".join(path[:k]) for path in paths for k in range(len(path) + 1)}
        graphs = [traced.part(*pair) for pair in itertools.pairwise(nodes)]
        try:
            training = trace(traced.root, opened)
        except TracingError:
            return [(graph, None) for graph in graphs]
        ends = [training.input, *(training.names.get(key) for key in keys[1:])]
        if self._ends[-1] is traced.output:
            ends[-1] = training.output
        return [
            (graph, training.part(*pair) if all(end in training.cuts for end in pair) else None)
            for graph, pair in zip(graphs, itertools.pairwise(ends), strict=True)
        ]

    @property
    def root(self) -> nn.Module:
        """The module, with constants that its graph reads."""
        return self.traced.root

    def stages(self, root: nn.Module | None = None) -> Stages:
        """Make the stages as modules of the layers of `root`: this module or a copy of it."""
        root = self.traced.root if root is None else root
        modules = [StageModule(root, *graphs).eval() for graphs in self._parts]
        return Stages(map(Stage, self.names, modules))

    def head_layers(self) -> set[str]:
        """Return the dotted names of the head's layers and parameters."""
        if not self._has_head:
            return set()
        nodes = self.traced.nodes[self.traced.cuts[self._embedding] + 1 :]
        return {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}

    # -- layers by name ---------------------------------------------------------------------
    @property
    def embedding_key(self) -> str:
        """Name of what enters the head, or of what the network returns if it has none."""
        return self._embedding.meta["key"]

    @property
    def last_map_key(self) -> str:
        """Name of the last value before the head that still has places to pool over."""
        for i in range(self.traced.position[self._embedding], 0, -1):
            if self._is_map(i):
                return self.traced.crossing[i].meta["key"]
        return self.embedding_key

    def resolve(self, layer: str) -> str:
        """Return the name of the operation that gives the value of a stage, module or operation."""
        if layer in self.names:
            return self.stage_keys[self.names.index(layer)]
        if layer not in self.traced.names:
            raise unknown_layer(layer, self.network_name, self.names, list(self.traced.names))
        return self.traced.names[layer].meta.get("key", "input")

    def shape(self, key: str, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a layer's value for two images of `input_size`."""
        shape = self._shapes(input_size).get(self._node(key), ())
        return checked_shape(shape, key, self.network_name)

    def is_channels_last(self, key: str, input_size: tuple[int, ...]) -> bool:
        """Whether a 4-D value is N×H×W×C: the axes that grow with the image are H and W."""
        shape = self.shape(key, input_size)
        if len(shape) != 4:
            return False
        if (shape[1] == shape[2]) != (shape[2] == shape[3]):
            return shape[1] == shape[2]
        channels, height, width = input_size
        try:
            other = self.shape(key, (channels, 2 * height, 2 * width))
        except ValueError:
            return False
        return other[1] != shape[1] and other[3] == shape[3]

    def tokens(self, key: str) -> tuple[int | None, int]:
        """Find the class token in a layer's sequence, if any, and the number of prefix tokens.

        ``x[:, 0]`` between the layer and the head takes a class token, ``x[:, k:]`` leaves out
        the k first ones.
        """
        node = self._node(key)
        following = {node}
        for other in self.traced.nodes[: self.traced.position[self._embedding] + 1]:
            if not following.intersection(other.all_input_nodes):
                continue
            following.add(other)
            index = other.args[1] if other.target is operator.getitem else None
            if isinstance(index, tuple) and len(index) >= 2 and index[0] == slice(None):
                if isinstance(index[1], int):
                    n_prefix = getattr(self.traced.root, "num_prefix_tokens", index[1] + 1)
                    return index[1], int(n_prefix)
                if isinstance(index[1], slice) and isinstance(index[1].start, int):
                    return None, index[1].start
        return None, 0

    def extractor(self, keys: list[str], poolings: list[nn.Module]) -> fx.GraphModule:
        """Make the network up to the deepest of the layers; it returns their pooled values."""
        return self.traced.extractor([self._node(key) for key in keys], poolings)

    def _node(self, key: str) -> fx.Node:
        return self.traced.input if key == "input" else self.traced.by_key[key]

    def _shapes(self, input_size: tuple[int, ...]) -> dict[fx.Node, tuple[int, ...]]:
        try:
            return self.traced.shapes(input_size)
        except Exception as error:
            raise not_accepted(self.network_name, input_size, error) from error


def _common_module(names: list[str]) -> str:
    """Find the innermost module that holds all these parameters, or that of the first."""
    paths = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join([parts[0] for parts in same] or paths[0]) or names[0]


def _unique(labels: list[str]) -> list[str]:
    """Make names of stages: short ones where they are words, each one once."""
    names: list[str] = []
    for k, label in enumerate(labels):
        name = "stem" if k == 0 and len(labels) > 1 else label
        short = name.rpartition(".")[2]
        if not short[:1].isdigit() and len(short) > 3 and short not in names:
            name = short
        is_taken = name in names or name in labels[k + 1 :]
        names.append(f"{name}#{k}" if is_taken else name)
    return names
