"""Writes down what a network does: which layers stay whole, and what is noted beside the graph."""

from __future__ import annotations

import sys
import threading
from typing import Any

from torch import fx, nn

from sktransfer.networks._training_only import Call, Read

# Modules of these packages are one operation each. Their containers are looked into.
_LEAF_PACKAGES = ("torch.nn.", "torchvision.ops.", "torch.ao.nn.")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _timm_leaves() -> tuple[tuple[type, ...], tuple[Any, ...]]:
    """Modules and functions that timm registers as not traceable."""
    if "timm" not in sys.modules:
        return (), ()
    try:
        from timm.layers import get_notrace_functions, get_notrace_modules
    except ImportError:
        return (), ()
    return tuple(get_notrace_modules()), tuple(get_notrace_functions())


class Tracer(fx.Tracer):
    """Remembers, beside the graph, which module each operation stands in and who asks for the mode.

    What other threads do with modules meanwhile goes through here, too, and is let alone.
    """

    def __init__(self) -> None:
        leaves, functions = _timm_leaves()
        super().__init__(autowrap_functions=functions)
        self._leaves = leaves
        self._thread = threading.get_ident()
        self._stack = [Call("", (), {}, 0, 0)]
        self.reads: list[Read] = []
        self.module_outputs: dict[str, fx.Node] = {}

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list]:
        # One input; further arguments of forward keep their defaults.
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _CONTAINERS):
            return False
        # Stochastic depth asks self.training: as a leaf it keeps following train()/eval().
        return (
            m.__module__.startswith(_LEAF_PACKAGES)
            or isinstance(m, self._leaves)
            or type(m).__name__ in ("DropPath", "StochasticDepth")
            # timm's batch norms with an activation: one layer, so that they can be folded. One
            # whose forward is the user's own cannot.
            or (
                isinstance(m, nn.BatchNorm2d)
                and m.forward.__module__.startswith(("torch.", "timm."))
            )
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        call = Call(path, args, kwargs, len(self.graph.nodes), len(self._stack))
        n_reads = len(self.reads)
        self._stack.append(call)
        try:
            out = super().call_module(m, forward, args, kwargs)
            if not isinstance(out, fx.Proxy) or self.is_leaf_module(m, path):
                return out
            if len(self.reads) > n_reads:
                call.end(self, out.node)
                if self._does_nothing(call):
                    del self.reads[n_reads:]
                    return self._as_leaf(call)
        finally:
            self._stack.pop()
        self.module_outputs[path] = out.node
        return out

    def note_read(self) -> None:
        """Note that ``forward`` looks at a module's ``training``."""
        if threading.get_ident() == self._thread:
            self.reads.append(Read(len(self.graph.nodes), tuple(self._stack[1:])))

    def _does_nothing(self, call: Call) -> bool:
        """Whether a module gave back a value that was there before."""
        own = list(self.graph.nodes)[call.start :]
        has_layers = any(node.op == "call_module" for node in own)
        return call.is_plain and call.out not in own and not has_layers

    def _as_leaf(self, call: Call) -> fx.Proxy:
        # Without an operation of its own it could not be told from what it was given.
        for node in reversed(list(self.graph.nodes)[call.start :]):
            if node.op != "get_attr":
                self.graph.erase_node(node)
        node = self.create_node("call_module", call.path, call.args, call.kwargs)
        node.meta["is_own_code"] = True
        return self.proxy(node)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["path"] = self._stack[-1].path
        return node
