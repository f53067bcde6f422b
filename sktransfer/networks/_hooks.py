"""Networks that cannot be traced: hooks record the values of layers in a forward pass."""

from __future__ import annotations

import copy
import functools
import threading

import torch
from torch import nn

from sktransfer._progress import warn
from sktransfer._threads import process_lock
from sktransfer.networks._graph import (
    Stage,
    Stages,
    checked_shape,
    copy_with_parameters,
    not_accepted,
    unknown_layer,
)

# Hooks are registered on the shared module, so that two threads would mix their values.
_lock = process_lock()


class _StopForward(BaseException):
    """Ends a forward pass when all values are recorded.

    It derives from BaseException because the network may catch every Exception.
    """


class HookedPlan:
    """The stages of a network that cannot be traced: ``"body"`` and ``"head"``.

    The head is the last linear layer, if the network returns its output. A key is ``"name"`` for
    the output of a sub-module, ``">name"`` for its input, and ``""`` for the network's output.
    """

    def __init__(self, module: nn.Module, input_size: tuple[int, ...], name: str):
        self.root, self.network_name = module, name
        self._layers = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
        self._runs: dict[tuple[int, ...], _RecordedPass] = {}
        self._head = self._run(input_size).head
        if self._run(input_size).is_random:
            warn(
                f"{name} draws random numbers in eval mode, so that its rows are random. A dropout "
                "has to be a module or get training=self.training."
            )
        self.names = ["body", "head"] if self._head else ["body"]
        self.stage_keys = [self.embedding_key, ""][: len(self.names)]

    def stages(self, root: nn.Module | None = None) -> Stages:
        """Make the stages as modules of the layers of `root`: this module or a copy of it."""
        root = self.root if root is None else root
        if not self._head:
            return Stages([Stage("body", root)])
        head = root.get_submodule(self._head)
        return Stages([Stage("body", _Body(root, self._head)), Stage("head", head)])

    def head_layers(self) -> set[str]:
        """Return the dotted name of the head, if there is one."""
        return {self._head} if self._head else set()

    # -- layers by name ---------------------------------------------------------------------
    @property
    def embedding_key(self) -> str:
        """The input of the head, or the network's output."""
        return f">{self._head}" if self._head else ""

    @property
    def last_map_key(self) -> str:
        return self.embedding_key

    def resolve(self, layer: str) -> str:
        """Return the key of a stage or sub-module."""
        if layer in self.names:
            return self.stage_keys[self.names.index(layer)]
        if layer not in self._layers:
            raise unknown_layer(layer, self.network_name, self.names, self._layers)
        return layer

    def shape(self, key: str, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a layer's value for two images of `input_size`."""
        shapes = self._run(input_size).shapes
        if key not in shapes:
            raise ValueError(
                f"layer={key!r} of {self.network_name} does not run when an image is embedded, or "
                "does not return one tensor."
            )
        return checked_shape(shapes[key], key or "output", self.network_name)

    def is_channels_last(self, key: str, input_size: tuple[int, ...]) -> bool:
        """Whether the shape of a 4-D value suggests N×H×W×C."""
        shape = self.shape(key, input_size)
        return len(shape) == 4 and shape[1] == shape[2] != shape[3]

    def tokens(self, key: str) -> tuple[int | None, int]:
        """Return (None, 0): neither a class token nor prefix tokens are known."""
        return None, 0

    def extractor(self, keys: list[str], poolings: list[nn.Module]) -> HookedExtractor:
        """Make the network up to the last of the layers; it returns their pooled values."""
        return HookedExtractor(self.root, keys, poolings)

    def _run(self, input_size: tuple[int, ...]) -> _RecordedPass:
        if input_size not in self._runs:
            try:
                run = _RecordedPass(self.root, input_size)
            except Exception as error:
                raise not_accepted(self.network_name, input_size, error) from error
            if not isinstance(run.output, torch.Tensor):
                raise TypeError(
                    f"{self.network_name} returns {type(run.output).__name__}: its forward has to "
                    "return one tensor. Wrap it in a module that returns the one that is meant."
                )
            self._runs[input_size] = run
        return self._runs[input_size]


class _RecordedPass:
    """A forward pass of two black images, with the shapes of values by key."""

    def __init__(self, module: nn.Module, input_size: tuple[int, ...]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._last: tuple[str, object] = "", None
        copied = copy_with_parameters(module).eval()
        for name, part in copied.named_modules():
            part.register_forward_hook(functools.partial(self._note, name))
        state = torch.get_rng_state()
        with torch.no_grad():
            self.output = copied(torch.zeros((2, *input_size)))
        self.is_random = not torch.equal(torch.get_rng_state(), state)
        name, value = self._last
        # The last linear layer, if the network returns its output.
        self.head = name if value is self.output else ""

    def _note(self, name: str, layer: nn.Module, args: tuple, value: object) -> None:
        if isinstance(value, torch.Tensor):
            self.shapes.setdefault(name, tuple(value.shape))
        if isinstance(layer, nn.Linear) and args:
            self.shapes.setdefault(f">{name}", tuple(args[0].shape))
            self._last = name, value


class HookedExtractor(nn.Module):
    """Runs a network until the values of `keys` are computed; each is pooled immediately."""

    def __init__(self, module: nn.Module, keys: list[str], poolings: list[nn.Module]):
        super().__init__()
        self.module, self.keys = module, list(keys)
        self.poolings = nn.ModuleList(poolings)

    def copy_to(self, device: torch.device, dtype: torch.dtype) -> HookedExtractor:
        """Copy it to another device or type, in eval mode."""
        copied = copy.deepcopy(self.module).to(device=device, dtype=dtype)
        return HookedExtractor(copied.eval(), self.keys, list(self.poolings))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        values: dict[int, torch.Tensor] = {}
        thread = threading.get_ident()

        def keep(k: int, value: object) -> None:
            # The first call counts. A process that is forked meanwhile inherits the hooks.
            if k in values or not isinstance(value, torch.Tensor):
                return
            if threading.get_ident() != thread:
                return
            values[k] = self.poolings[k](value)
            if len(values) == len(self.keys):
                raise _StopForward

        with _lock:
            hooks = []
            for k, key in enumerate(self.keys):
                layer = self.module.get_submodule(key.removeprefix(">"))
                hooks.append(
                    layer.register_forward_pre_hook(
                        lambda _, args, k=k: keep(k, args[0] if args else None)
                    )
                    if key.startswith(">")
                    else layer.register_forward_hook(lambda _, args, out, k=k: keep(k, out))
                )
            try:
                self.module(x)
            except _StopForward:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
        if missing := [key for k, key in enumerate(self.keys) if k not in values]:
            raise ValueError(
                f"layer {missing[0].removeprefix('>')!r} did not run for these images, though it "
                "did for others: give as `layer` one that always runs."
            )
        return [values[k] for k in range(len(self.keys))]


class _Body(nn.Module):
    """Everything before the head, as a stage."""

    def __init__(self, module: nn.Module, head: str):
        super().__init__()
        self.extractor = HookedExtractor(module, [f">{head}"], [nn.Identity()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extractor(x)[0]
