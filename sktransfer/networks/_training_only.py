"""What a ``forward`` does in training alone, which a graph written down in eval mode does not hold.

While a module is traced, every look at ``self.training`` is noted. A part that looks is run whole
where stages are trained: its own code then does what it does in the mode that the stage is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

_PLAIN = (
    fx.Node, bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format
)  # fmt: skip


@dataclass(eq=False)
class Call:
    """One run of a module that the graph looks into: the operations from `start` before `stop`."""

    path: str
    args: Any
    kwargs: Any
    start: int
    depth: int
    stop: int = -1
    out: fx.Node | None = None

    def end(self, tracer: fx.Tracer, out: fx.Node) -> None:
        """Note what came of it."""
        self.stop, self.out = len(tracer.graph.nodes), out

        def written(value: Any) -> Any:
            is_known = isinstance(value, (fx.Proxy, torch.Tensor))
            return tracer.create_arg(value) if is_known else value

        # Not before the end: some have no node until they are asked for it.
        self.args, self.kwargs = fx.node.map_aggregate((self.args, self.kwargs), written)

    @property
    def inputs(self) -> list[Any]:
        """All that it was given."""
        found: list[Any] = []
        fx.node.map_aggregate((self.args, self.kwargs), found.append)
        return found

    @property
    def is_plain(self) -> bool:
        """Whether a graph can hold the call itself."""
        return self.out is not None and all(isinstance(v, _PLAIN) for v in self.inputs)


class Read(NamedTuple):
    """Where ``self.training`` was looked at: before which operation, in which calls."""

    position: int
    calls: tuple[Call, ...]  # the outermost first

    @property
    def path(self) -> str:
        """The module whose code looked."""
        return self.calls[-1].path if self.calls else ""


class _NotedMode:
    """Stands for ``nn.Module.training``. With a setter it goes before what instances hold."""

    def __init__(self, note: Callable[[], None]):
        self._note = note

    def __get__(self, module: nn.Module | None, kind: type) -> bool:
        if module is None or "training" not in vars(module):
            raise AttributeError("training")
        self._note()
        return vars(module)["training"]

    def __set__(self, module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    def __delete__(self, module: nn.Module) -> None:  # as TorchScript's modules do
        del vars(module)["training"]


@contextmanager
def noting_reads(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` whenever any module's ``training`` is looked at."""
    outer = vars(nn.Module).get("training")  # of a network that is traced while another is
    nn.Module.training = _NotedMode(note)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training
        if outer is not None:
            nn.Module.training = outer


def outermost(calls: list[Call]) -> list[Call]:
    """Those that lie in no other."""
    found: list[Call] = []
    for call in sorted(calls, key=lambda c: (c.start, -c.stop, c.depth)):
        if not found or call.start >= found[-1].stop:
            found.append(call)
    return found


def main_output(value: Any) -> Any:
    """The first of several values: what comes beside it in training is for a loss of its own."""
    while isinstance(value, (tuple, list)):
        value = value[0]
    return value


def takes_mode(node: fx.Node) -> bool:
    """Whether an operation is a functional dropout, which is told the mode it is in."""
    return node.op == "call_function" and "dropout" in getattr(node.target, "__name__", "")


def follow_mode(node: fx.Node) -> None:
    """Let a functional dropout in a stage's graph be in the mode that the stage is in.

    Those of torch.nn.functional have it by name, torch's own are called (input, p, train).
    """
    with node.graph.inserting_before(node):
        mode = node.graph.get_attr("training")
    name = next((name for name in ("training", "train") if name in node.kwargs), None)
    if name is not None:
        node.update_kwarg(name, mode)
    else:
        node.update_arg(2, mode)


def followers(nodes: list[fx.Node], reads: list[Read]) -> set[fx.Node]:
    """The functional dropouts that follow the mode of their stage."""
    asking = [nodes[read.position] for read in reads if read.position < len(nodes)]
    return {node for node in asking if takes_mode(node)}


def signatures(
    nodes: list[fx.Node], constants: dict[str, Any], following: set[fx.Node]
) -> list[tuple[str, ...]]:
    """What tells operations apart, without their numbers and the mode that is followed.

    `constants` holds, among others, the tensors that ``forward`` made, which are numbered, too.
    """
    place = {node: f"%{i}" for i, node in enumerate(nodes)}

    def told(value: Any) -> Any:
        return place.get(value) if isinstance(value, fx.Node) else value

    def untold(value: Any) -> Any:
        return None if isinstance(value, bool) else told(value)

    def target(node: fx.Node) -> str:
        name = str(node.target)
        if not name.startswith("_tensor_constant"):
            return name
        value = constants[name]
        return f"{tuple(value.shape)} {'' if value.is_meta else value.sum()}"

    return [
        (
            node.op,
            target(node),
            *(
                str(fx.node.map_aggregate(part, untold if node in following else told))
                for part in (node.args, node.kwargs)
            ),
        )
        for node in nodes
    ]
