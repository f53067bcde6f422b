"""Trace a network with torch.fx: names of operations, places to cut, shapes, and parts."""

from __future__ import annotations

import copy
import operator
import random
import re
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx, nn

from sktransfer._progress import did_you_mean
from sktransfer._threads import process_lock

# Modules of these packages are one operation each; their containers are traced through.
_LEAF_PACKAGES = ("torch.nn.", "torchvision.ops.", "torch.ao.nn.")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# While torch.fx traces, it replaces methods of nn.Module for all threads.
_lock = process_lock()


class TracingError(RuntimeError):
    """The module's ``forward`` cannot be traced."""


class _Tracer(fx.Tracer):
    """Records the module of each operation, and the value that each module returns.

    `opened`: names of the only modules to trace through; None: all except torch's layers.
    """

    def __init__(self, opened: set[str] | None):
        modules, functions = _timm_notrace()
        super().__init__(autowrap_functions=functions)
        self._opened, self._notrace = opened, modules
        self._paths = [""]
        self._thread = threading.get_ident()
        self.outputs: dict[str, fx.Node] = {}
        self.has_own_code = False

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        # One input; further arguments of forward keep their defaults.
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._opened is not None:
            return module_qualified_name not in self._opened
        if is_patched(m):
            return True
        if isinstance(m, _CONTAINERS):
            return False
        return (
            m.__module__.startswith(_LEAF_PACKAGES)
            or isinstance(m, self._notrace)
            or type(m).__name__ in ("DropPath", "StochasticDepth")
            # timm's linear layers may be heads, and its batch norms with an activation can be
            # folded; a user's own cannot.
            or (
                isinstance(m, (nn.BatchNorm2d, nn.Linear))
                and m.forward.__module__.startswith(("torch.", "timm."))
            )
        )

    # torch.fx also calls this for modules that run in other threads.
    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        n_nodes, depth = len(self.graph.nodes), len(self.module_stack)
        self._paths.append(path)
        try:
            out = super().call_module(m, forward, args, kwargs)
        except Exception:  # a module that cannot be traced becomes one operation
            for node in reversed(list(self.graph.nodes)[n_nodes:]):
                self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            out = self.create_proxy("call_module", path, args, kwargs)
            self.has_own_code = True
        finally:
            self._paths.pop()
        if isinstance(out, fx.Proxy):
            self.outputs.setdefault(path, out.node)
        return out

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind, target, *args, **kwargs):
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["path"] = str(target) if kind == "call_module" else self._paths[-1]
        return node


def _timm_notrace() -> tuple[tuple[type, ...], tuple]:
    """Return the modules and functions that timm registers as not traceable."""
    if "timm" not in sys.modules:
        return (), ()
    from timm.layers import get_notrace_functions, get_notrace_modules

    return tuple(get_notrace_modules()), tuple(get_notrace_functions())


def trace(module: nn.Module, opened: set[str] | None = None) -> Traced:
    """Trace a copy of `module` in eval mode.

    With `opened`, trace it in train mode, and only through these modules; all others are one
    operation and run their own code. Raises TracingError if ``forward`` branches on values or does
    not return one tensor, or if the module has hooks.
    """
    training = opened is not None
    if is_patched(module):
        raise TracingError("hooks or a forward set on the instance")
    tracer = _Tracer(opened)
    states = random.getstate(), torch.get_rng_state()
    try:
        with _lock:
            copied = copy_with_parameters(module).train(training)
            graph = tracer.trace(copied)
            known = vars(module)
            constants = {  # tensors that forward makes
                name: vars(copied).pop(name)
                for name in list(vars(copied))
                if name.startswith("_tensor_constant") and name not in known
            }
    except Exception as error:
        raise TracingError(f"{type(error).__name__}: {error}") from error
    drawn = random.getstate() != states[0] or not torch.equal(torch.get_rng_state(), states[1])
    if training and (constants or drawn):  # each step would use the same numbers
        raise TracingError("forward makes tensors or draws random numbers in training")
    output = graph.output_node().args[0]
    if training and isinstance(output, tuple):  # the others are for auxiliary losses
        output = output[0]
        graph.output_node().args = (output,)
        for node in reversed(graph.nodes):
            if not node.users and node.op not in ("output", "placeholder"):
                graph.erase_node(node)
    if not isinstance(output, fx.Node):
        raise TracingError("forward returns something other than one tensor")
    root = object.__new__(type(module))  # copy.copy is refused by parametrized modules
    root.__dict__.update(known, **constants)
    return Traced(root, graph, output, tracer)


def copy_with_parameters(module: nn.Module) -> nn.Module:
    """Copy a module; the copy shares its parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def is_patched(part: nn.Module) -> bool:
    """Whether a module has hooks, or a ``forward`` set on the instance."""
    return bool(part._forward_hooks or part._forward_pre_hooks) or "forward" in vars(part)


class Traced:
    """A module's graph, the names of its operations, and the places where it can be cut.

    Attributes
    ----------
    root : nn.Module
        Holds the traced module's own layers, and constants that ``forward`` makes.
    nodes : list of fx.Node
        In the order in which they run, without the output.
    names : dict of str to fx.Node
        ``"layer3"`` (a module: what it returns in its first call), ``"layer3.0.add"`` (an
        operation, named as torchvision's feature extraction names it).
    crossing : dict of int to fx.Node
        Position -> the value that later operations need, if they need only one.
    cuts : dict of fx.Node to int
        The inverse of `crossing`: a value -> the last position where only this value crosses.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, output: fx.Node, tracer: _Tracer):
        self.root, self.graph, self.output = root, graph, output
        # Where shapes are found. Hooks and untraceable code may read values, which a skeleton does
        # not have; `forward` may make tensors on the CPU.
        needs_values = tracer.has_own_code or any(is_patched(m) for m in root.modules())
        is_skeleton = any(p.is_meta for p in root.parameters())
        self._devices = ["meta"] if is_skeleton else ["meta", "cpu"][needs_values:]
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.input = self.nodes[0]
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.names: dict[str, fx.Node] = {}
        for node in self.nodes[1:]:
            if node.op != "get_attr":
                self._name(node)
        self.by_key = {node.meta["key"]: node for node in self.names.values()}
        self.module_outputs = {
            path: node for path, node in tracer.outputs.items() if path and node in self.position
        }
        self.names.update(self.module_outputs)
        self.crossing = self._find_crossing()
        self.cuts = {node: i for i, node in self.crossing.items()}
        self._shapes: dict[tuple[int, ...], dict[fx.Node, tuple[int, ...]]] = {}

    def _name(self, node: fx.Node) -> None:
        base = node.meta.get("path", "")
        if node.op != "call_module":
            operation = re.sub(r"_\d+$", "", node.name)
            base = f"{base}.{operation}" if base else operation
        name, repeat = base, 0
        while name in self.names:
            repeat += 1
            name = f"{base}_{repeat}"
        self.names[name] = node
        node.meta["key"] = name

    def _find_crossing(self) -> dict[int, fx.Node]:
        last_use = {
            node: max((self.position.get(user, len(self.nodes)) for user in node.users), default=-1)
            for node in self.nodes
        }
        found: dict[int, fx.Node] = {}
        live: list[fx.Node] = []
        for i, node in enumerate(self.nodes):
            if node.op != "get_attr":  # parameters are read wherever they are needed
                live.append(node)
            live = [value for value in live if last_use[value] > i]
            if len(live) == 1:
                found[i] = live[0]
        return found

    def layer(self, node: fx.Node) -> nn.Module | None:
        """Return the module that `node` calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def parameters(self, node: fx.Node) -> dict[str, nn.Parameter]:
        """Return the parameters that an operation reads, by name."""
        target = str(node.target)
        if node.op == "call_module":
            return {f"{target}.{k}": p for k, p in self.modules[target].named_parameters()}
        if node.op == "get_attr":
            value = operator.attrgetter(target)(self.root)
            return {target: value} if isinstance(value, nn.Parameter) else {}
        return {}

    # -- parts ------------------------------------------------------------------------------
    def part(self, source: fx.Node, result: fx.Node) -> fx.Graph:
        """Return the graph of the operations after one cut (`source`) up to another (`result`)."""
        graph = fx.Graph()
        # A copy, because the first operation may work in place.
        values = {source: graph.call_method("clone", (graph.placeholder("x"),))}

        def copied(node: fx.Node) -> fx.Node:
            if node not in values:
                values[node] = graph.node_copy(node, copied)
            return values[node]

        for node in self.nodes[self.cuts[source] + 1 : self.cuts[result] + 1]:
            if node.op != "get_attr":
                copied(node)
        graph.output(values[result])
        return graph

    def extractor(self, nodes: Sequence[fx.Node], poolings: Sequence[nn.Module]) -> fx.GraphModule:
        """Make the network up to the deepest of `nodes`; it returns a list: each of them, pooled.

        A value is pooled at once: a later operation may work in place.
        """
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        pooled: dict[int, fx.Node] = {}
        for node in self.nodes[: max(self.position[node] for node in nodes) + 1]:
            values[node] = graph.node_copy(node, values.__getitem__)
            for k, asked in enumerate(nodes):
                if asked is node:
                    pooled[k] = graph.call_module(f"_pooling_{k}", (values[node],))
        graph.output([pooled[k] for k in range(len(nodes))])
        layers = targets(self.root, graph, {f"_pooling_{k}": p for k, p in enumerate(poolings)})
        return graph_module(layers, graph)

    # -- running ----------------------------------------------------------------------------
    def agrees_with_module(self, input_size: tuple[int, ...]) -> bool:
        """Whether the graph computes what the module does, for two random images."""
        x = torch.rand((2, *input_size), generator=torch.Generator().manual_seed(0))
        module = copy_with_parameters(self.root).eval()
        with torch.no_grad():
            expected = module(x.clone())
            if not isinstance(expected, torch.Tensor):
                return False
            got = fx.GraphModule(module, self.graph)(x.clone())
        scale = float(expected.nan_to_num(0, 0, 0).abs().max())
        return torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)

    def shapes(self, input_size: tuple[int, ...]) -> dict[fx.Node, tuple[int, ...]]:
        """Return the shape of every tensor in the graph for 2 black images."""
        if input_size not in self._shapes:
            for device in self._devices:
                try:
                    self._shapes[input_size] = self._shapes_on(device, input_size)
                    break
                except Exception:
                    if device == self._devices[-1]:
                        raise
        return self._shapes[input_size]

    def _shapes_on(
        self, device: str, input_size: tuple[int, ...]
    ) -> dict[fx.Node, tuple[int, ...]]:
        copied = _meta_copy(self.root) if device == "meta" else copy_with_parameters(self.root)
        x = torch.zeros((2, *input_size), device=device)
        run = _ShapeRun(copied.eval(), self.graph, device)
        with torch.no_grad():
            try:
                run.run(x)
            except Exception:
                copied(x)  # its own error is clearer
                raise
        return run.shapes


class _ShapeRun(fx.Interpreter):
    """Runs a graph and keeps the shapes of its values."""

    def __init__(self, module: nn.Module, graph: fx.Graph, device: str):
        super().__init__(module, graph=graph)
        self._device = torch.device(device)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n] = tuple(result.shape)
        return result

    def get_attr(self, target, args, kwargs):
        value = super().get_attr(target, args, kwargs)
        is_constant = isinstance(value, torch.Tensor) and value.device != self._device
        return value.to(self._device) if is_constant else value


def _meta_copy(module: nn.Module) -> nn.Module:
    """Copy a module to the meta device, where tensors have shapes but no values."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()
    }
    memo.update({id(b): b.to("meta") for b in module.buffers()})
    return copy.deepcopy(module, memo)


def targets(
    root: nn.Module, graph: fx.Graph, others: dict[str, nn.Module] | None = None
) -> dict[str, object]:
    """Return all modules and tensors that a graph names, those of `root` and `others`."""
    others = others or {}
    names = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    return {**{k: operator.attrgetter(k)(root) for k in names - others.keys()}, **others}


class Stage(NamedTuple):
    """One part of a network."""

    name: str
    module: nn.Module


class Stages(list[Stage]):
    """The parts of a network in the order in which they run."""

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Send `x` through all stages, one after another."""
        for stage in self:
            x = stage.module(x)
        return x


def graph_module(root: nn.Module | dict[str, object], graph: fx.Graph) -> fx.GraphModule:
    """Make the module of a graph, without torch's reference from the graph to the module.

    This circle would keep the weights in a device's memory until a garbage collection.
    """
    made = fx.GraphModule(root, graph)  # type: ignore[arg-type]
    made.graph.owning_module = None
    return made


class StageModule(nn.Module):
    """One stage: a graph for training and one for evaluation, both over the network's own layers.

    Its parameters and submodules have the names that they have in the network.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, training_graph: fx.Graph | None = None):
        super().__init__()
        graphs = [graph] if training_graph is None else [graph, training_graph]
        parts = {name: part for graph in graphs for name, part in targets(root, graph).items()}
        for name in sorted(parts, key=lambda name: name.count(".")):
            self._add(name, parts[name])
        # Only their code is used; modules in a tuple are not registered as submodules.
        self._runs = tuple(graph_module(targets(root, graph), graph) for graph in graphs)

    def _add(self, name: str, part: object) -> None:
        *parents, last = name.split(".")
        owner: nn.Module = self
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        if hasattr(owner, last):
            return
        if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
            owner.register_buffer(last, part)
        else:
            setattr(owner, last, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = self._runs[-1 if self.training else 0]
        return type(run).forward(self, x)


# -- errors ---------------------------------------------------------------------------------
def unknown_layer(layer: str, network: str, stages: list[str], names: list[str]) -> ValueError:
    """Make the error for a layer that a network does not have."""
    hint = did_you_mean(layer, dict.fromkeys([*stages, *names]))
    examples = ", ".join(map(repr, [name for name in names if name not in stages][:3]))
    more = (
        "; the dotted name of any sub-module or operation is accepted too "
        f"({examples}, …: {len(names)} in all)"
    )
    return ValueError(
        f"layer={layer!r} is not in {network}.{hint} Its stages are {stages}{more * bool(names)}."
    )


def checked_shape(shape: tuple[int, ...], key: str, network: str) -> tuple[int, ...]:
    """Return the shape of a layer's value for two images; raise unless its first axis is theirs."""
    if shape and shape[0] != 2:
        raise ValueError(
            f"{key.removeprefix('>')!r} of {network} gives values of shape {shape} for two "
            "images: the first axis has to be that of the images, one row for each. Give "
            "another layer, or a network that keeps the batch."
        )
    return shape


def not_accepted(network: str, input_size: tuple[int, ...], error: Exception) -> ValueError:
    """Make the error for an input size that a network cannot take."""
    reason: BaseException = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    text = str(reason).strip().split("\n")[0]
    shape = "×".join(map(str, input_size))
    return ValueError(
        f"{network} does not accept images of {shape} (channels × height × "
        f"width): {text}. preprocessing={{'size': …, 'crop': …}} sets another size."
    )
