"""A network as a graph of named operations: tracing, places to cut, shapes.

Tracing writes down what ``module(x)`` does in eval mode, operation by operation, with
:mod:`torch.fx`. Layers of ``torch.nn`` and ``torchvision.ops`` stay whole, and they are the
module's own objects: freezing or training one in the graph does so in the module.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx, nn

from sktransfer._threads import ProcessLock
from sktransfer.networks._copies import (
    are_same,
    contents,
    is_patched,
    shallow_copy,
    structural_copy,
)
from sktransfer.networks._tracer import Tracer
from sktransfer.networks._training_only import (
    Call,
    Read,
    follow_mode,
    followers,
    main_output,
    noting_reads,
    outermost,
    signatures,
)

# torch.fx traces by replacing nn.Module's own methods for a while, for all threads.
_trace_lock = ProcessLock()


class TracingError(RuntimeError):
    """The module's ``forward`` cannot be written down as a graph."""


def trace(module: nn.Module) -> Traced:
    """Write down what `module` does in eval mode.

    A copy runs, so that what `forward` keeps on the module never reaches the user's.

    Raises
    ------
    TracingError
        If ``forward`` does what no graph can hold: branches on pixel values, several inputs,
        values kept for later, hooks of more than a layer.
    """
    tracer = Tracer()
    for path, part in module.named_modules():
        if is_patched(part) and not tracer.is_leaf_module(part, path):
            # They would run while this is written down, and hold what is no tensor.
            raise TracingError(f"{path or 'the module'} has hooks or a forward of its own")
    try:
        with _trace_lock:
            copied = structural_copy(module).eval()
            before = contents(copied)
            with noting_reads(tracer.note_read):
                graph = tracer.trace(copied)
        output = graph.output_node()
        if not isinstance(output.args[0], fx.Node):
            raise TracingError("forward returns something other than one tensor")
    except TracingError:
        raise
    except Exception as error:
        raise TracingError(f"{type(error).__name__}: {error}") from error
    constants = {
        name: vars(copied).pop(name)
        for name in list(vars(copied))
        if name.startswith("_tensor_constant") and name not in vars(module)
    }
    if not are_same(before, contents(copied)):
        raise TracingError("forward alters the module")
    traced = Traced(module, graph, tracer.module_outputs, constants, tracer.reads)
    if any(traced.is_patched_before_norm(node) for node in traced.nodes):
        # The norm would be folded into the layer, and what was added to either would be lost.
        raise TracingError("a batch norm, or what feeds one, has hooks or a forward of its own")
    return traced


class Traced:
    """A module, its graph, and a name for every operation in it.

    Attributes
    ----------
    root : nn.Module
        The module that was traced. The graph calls its own layers.
    constants : dict of str to tensor
        What ``forward`` makes anew each time, under the names by which the graph reads it.
    nodes : list of fx.Node
        In the order in which they run, without the output.
    names : dict of str to fx.Node
        Every name a user may give: ``"layer3"`` (a sub-module: what it returns),
        ``"layer3.0.conv1"`` (a layer), ``"layer3.0.add"`` (an operation, named as
        torchvision's feature extraction names it).
    reads : list of Read
        Where ``forward`` asked whether it is in training.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        module_outputs: dict[str, fx.Node],
        constants: dict[str, Any],
        reads: list[Read],
    ):
        self.reads = reads
        self.constants = constants
        self.root = shallow_copy(root, constants) if constants else root
        self.graph = graph
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.input = self.nodes[0]
        output: Any = graph.output_node()
        self.output: fx.Node = output.args[0]
        self.names = self._name_nodes()
        self.names.update(
            {path: node for path, node in module_outputs.items() if path and node in self.order}
        )
        self.by_key = {node.meta["name"]: node for node in self.nodes if "name" in node.meta}
        self.modules = dict(root.named_modules())
        self._shapes: dict[tuple[int, ...], dict[fx.Node, tuple[int, ...]]] = {}

    def _name_nodes(self) -> dict[str, fx.Node]:
        names: dict[str, fx.Node] = {}
        for node in self.nodes[1:]:
            if node.op == "get_attr":
                continue
            base = node.meta.get("path", "")
            if node.op != "call_module":
                operation = re.sub(r"_\d+$", "", node.name)
                base = f"{base}.{operation}" if base else operation
            name, repeat = base, 0
            while name in names:
                repeat += 1
                name = f"{base}_{repeat}"
            names[name] = node
            node.meta["name"] = name
        return names

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The module that `node` calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def is_patched_before_norm(self, node: fx.Node) -> bool:
        """Whether `node` calls a patched layer that is a batch norm or is followed by one."""
        layer = self.layer(node)
        if layer is None or not is_patched(layer):
            return False
        near = [layer, *map(self.layer, node.users)]
        return any(isinstance(other, nn.modules.batchnorm._NormBase) for other in near)

    def cuts(self) -> dict[int, fx.Node]:
        """Where the graph can be cut: position -> the one value that crosses there.

        A cut at position ``i`` lies behind ``nodes[i]``. Parameters that an operation reads do
        not count: they are fetched on whichever side needs them.
        """
        last_use = {
            node: max((self.order.get(user, len(self.nodes)) for user in node.users), default=-1)
            for node in self.nodes
        }
        found: dict[int, fx.Node] = {}
        live: list[fx.Node] = []
        for i, node in enumerate(self.nodes):
            if node.op != "get_attr":
                live.append(node)
            live = [value for value in live if last_use[value] > i]
            if len(live) == 1:
                found[i] = live[0]
        return found

    def segment(self, lo: int, hi: int, source: fx.Node, result: fx.Node) -> fx.GraphModule:
        """The operations ``nodes[lo:hi + 1]`` as a module of one input (`source`).

        In train mode it does what the module does in train mode, also where that is more than
        the graph tells.
        """
        graph = fx.Graph()
        entering = graph.placeholder("x")
        whole = {call.start: call for call in self._whole_calls(lo, hi, source)}
        following = followers(self.nodes, self.reads)
        is_given_away = any(source in call.inputs for call in whole.values())
        if is_given_away or any(_writes_over(self, user, source) for user in source.users):
            # What is handed in may be kept by somebody, for the next epoch.
            entering = graph.call_method("clone", (entering,))
        values: dict[fx.Node, fx.Node] = {source: entering}

        def copied(node: fx.Node) -> fx.Node:
            if node not in values:
                assert node.op == "get_attr", f"{node} crosses the boundary at {source}"
                values[node] = graph.node_copy(node, copied)
            return values[node]

        stop = lo
        for i, node in enumerate(self.nodes[lo : hi + 1], lo):
            if (call := whole.get(i)) is not None:
                stop = call.stop
                args, kwargs = fx.node.map_arg((call.args, call.kwargs), copied)
                given = graph.call_module(call.path, args, kwargs)
                if call.out is not None:
                    values[call.out] = graph.call_function(main_output, (given,))
            elif i < stop:
                continue
            elif node.op == "get_attr":
                copied(node)
            elif node not in values:
                values[node] = graph.node_copy(node, copied)
                if node in following:
                    follow_mode(values[node])
        graph.output(values[result])
        _erase_unused_attributes(graph)
        return fx.GraphModule(self.root, graph)

    def _whole_calls(self, lo: int, hi: int, source: fx.Node) -> list[Call]:
        """Calls within ``nodes[lo:hi + 1]`` that a graph of these leaves to the modules themselves.

        Of those in which ``training`` was looked at the innermost that can be.
        """
        return outermost(
            [
                call
                for read in self.reads
                if (
                    call := next(
                        (c for c in reversed(read.calls) if self._is_within(c, lo, hi, source)),
                        None,
                    )
                )
            ]
        )

    def _is_within(self, call: Call, lo: int, hi: int, source: fx.Node) -> bool:
        """Whether a call takes and gives but what a graph of ``nodes[lo:hi + 1]`` has."""
        if not (call.is_plain and lo <= call.start < call.stop <= hi + 1):
            return False
        own = set(self.nodes[call.start : call.stop])
        hidden = [node for node in own - {call.out} if node.op != "get_attr"]
        given = [node for node in call.inputs if isinstance(node, fx.Node)]
        return (
            call.out in own
            and all(own.issuperset(node.users) for node in hidden)
            and all(
                node is source or node.op == "get_attr" or lo <= self.order[node] < call.start
                for node in given
            )
        )

    def unheard_reads(self, pieces: list[tuple[int, int, fx.Node]]) -> list[Read]:
        """Where ``training`` was looked at, and no graph of the pieces can follow."""
        return [
            read
            for read in self.reads
            if not any(self._is_within(call, *piece) for call in read.calls for piece in pieces)
            and not followers(self.nodes, [read])
        ]

    def changes_in_training(self, path: str, embedding: fx.Node) -> bool:
        """Whether a module's own ``forward``, in training, takes another way to the embedding."""
        copied = structural_copy(self.root).eval()
        copied.get_submodule(path).training = True
        try:
            tracer = Tracer()
            with _trace_lock, noting_reads(tracer.note_read):
                graph = tracer.trace(copied)
        except Exception:
            return True
        output = graph.output_node()
        result = main_output(output.args[0])
        while isinstance(result, fx.Node) and isinstance(result.target, type):  # a named tuple
            result = main_output(result.args)
        if not isinstance(result, fx.Node):
            return True
        heard = followers(self.nodes, self.reads)
        before = signatures(_way_to(embedding), vars(self.root), heard)
        heard = followers(list(graph.nodes), tracer.reads)
        after = signatures(_way_to(result), vars(copied), heard)
        return after[: len(before)] != before

    def extractor(self, nodes: list[fx.Node], poolings: list[nn.Module]) -> fx.GraphModule:
        """The network up to the deepest of `nodes`, returning a list: each of them, pooled.

        A value is pooled as soon as it is there: a later operation may write over it, and a
        large map need not be kept.
        """
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        needed = self._with_writers(_ancestors(nodes) | {self.input}, nodes)
        for node in self.nodes:
            if node in needed:
                values[node] = graph.node_copy(node, values.__getitem__)
        graph.output([])
        network = fx.GraphModule(self.root, graph)
        pooled = []
        for k, (node, pooling) in enumerate(zip(nodes, poolings, strict=True)):
            network.add_submodule(f"_sktransfer_pooling_{k}", pooling)
            at = [n for n in network.graph.nodes if n.name == values[node].name]
            with network.graph.inserting_after(at[0]):
                pooled.append(network.graph.call_module(f"_sktransfer_pooling_{k}", (at[0],)))
        output = network.graph.output_node()
        output.args = (pooled,)
        network.recompile()
        return network

    def _with_writers(self, needed: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
        """Add operations that write over a value, perhaps a view of a needed one, and no more."""
        end = max(self.order[node] for node in nodes)
        for node in self.nodes[:end]:
            if not node.users and any(
                _writes_over(self, node, value) for value in node.all_input_nodes
            ):
                needed |= _ancestors([node])
        return needed

    def agrees_with_module(self, input_size: tuple[int, int, int]) -> bool:
        """Whether the graph computes what the module does, for two random pictures."""
        shape = (2, *input_size)
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        module = structural_copy(self.root).eval()
        with torch.no_grad():
            expected = module(x.clone())
            got = fx.GraphModule(module, self.graph)(x.clone())
        finite = expected[expected.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        return bool(torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * scale, equal_nan=True))

    def shapes(self, input_size: tuple[int, int, int]) -> dict[fx.Node, tuple[int, ...]]:
        """Shape of every tensor in the graph for 2 pictures of `input_size`, without computing.

        The network runs on torch's meta device, which knows shapes and no values.
        """
        if input_size not in self._shapes:
            run = _ShapeRun(self)
            with torch.no_grad():
                run.run(torch.empty((2, *input_size), device="meta"))
            self._shapes[input_size] = run.shapes
        return self._shapes[input_size]


# What gives back a tensor of the shape it gets.
_SHAPE_KEEPING = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
)


class _ShapeRun(fx.Interpreter):
    """Runs a graph on the meta device, with stand-ins for the layers' tensors."""

    def __init__(self, traced: Traced):
        super().__init__(traced.root, graph=traced.graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch._assert:
            condition, _ = self.fetch_args_kwargs_from_env(n)[0]
            if not bool(condition):
                # The message was written while tracing: it holds no number.
                raise ValueError(re.sub(r",? ?(but )?got Proxy\(.*?\)", "", str(n.args[1])))
            return None
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n] = tuple(result.shape)
        return result

    def call_module(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if is_patched(layer):  # a hook may want to see values
            return _run_on_zeros(layer, args, kwargs)
        if isinstance(layer, _SHAPE_KEEPING) and args:
            return args[0]
        return meta_copy(layer)(*args, **kwargs)

    def get_attr(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.detach().to("meta") if isinstance(value, torch.Tensor) else value


def _run_on_zeros(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))

    def moved(values: Any, where: torch.device | str) -> Any:
        return fx.node.map_aggregate(
            values,
            lambda v: torch.zeros_like(v, device=where) if isinstance(v, torch.Tensor) else v,
        )

    copied = structural_copy(layer).eval()
    return moved(copied(*moved(args, device), **moved(kwargs, device)), "meta")


def meta_copy(module: nn.Module) -> nn.Module:
    """A stand-in for `module` whose tensors have shapes and no values; shares all the rest."""
    copied = shallow_copy(module, {"training": False})
    copied._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    copied._buffers = {
        name: None if b is None else b.detach().to("meta") for name, b in module._buffers.items()
    }
    copied._modules = {
        name: None if m is None else meta_copy(m) for name, m in module._modules.items()
    }
    return copied


def _way_to(node: fx.Node) -> list[fx.Node]:
    """The operations that a value comes from, in the order in which they run."""
    needed = _ancestors([node])
    return [other for other in node.graph.nodes if other in needed]


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _writes_over(traced: Traced, user: fx.Node, value: fx.Node) -> bool:
    """Whether the operation `user` may change `value` in place."""
    if user.op == "call_module":
        layer = traced.layer(user)
        return user.meta.get("is_own_code", False) or any(
            getattr(part, "inplace", False) for part in (layer.modules() if layer else ())
        )
    if not user.args or user.args[0] is not value:
        return False
    if user.op == "call_method":
        name = str(user.target)
        return name.endswith("_") and not name.endswith("__")
    name = getattr(user.target, "__name__", "")
    return (
        user.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
        or bool(user.kwargs.get("inplace"))
        or user.target is operator.setitem
        or (name.endswith("_") and not name.endswith("__"))
    )


def _erase_unused_attributes(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def token_use(traced: Traced, node: fx.Node, embedding: fx.Node) -> tuple[int | None, int]:
    """Which token of the sequence `node` the network classifies from, and how many are prefix.

    ``x[:, 0]`` between the two tells of a class token, ``x[:, k:]`` of k tokens that are no
    place in the picture.
    """
    downstream = {node}
    between = _ancestors([embedding])
    for other in traced.nodes:
        if other not in between or not downstream.intersection(other.all_input_nodes):
            continue
        downstream.add(other)
        index = other.args[1] if other.target is operator.getitem else None
        if isinstance(index, tuple) and len(index) >= 2 and index[0] == slice(None):
            if isinstance(index[1], int):
                # The class token, and registers if timm says that there are any.
                n_prefix = getattr(traced.root, "num_prefix_tokens", index[1] + 1)
                return index[1], int(n_prefix)
            if isinstance(index[1], slice) and isinstance(index[1].start, int):
                return None, index[1].start
    return None, 0
