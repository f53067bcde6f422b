"""Networks whose ``forward`` no graph can hold: layers caught by hooks while they run."""

from __future__ import annotations

import copy
import os
import threading
from typing import Any

import torch
from torch import nn

from sktransfer._graphs._copies import structural_copy
from sktransfer._graphs._stage_plan import checked_shape, not_accepted, unknown_layer

# Hooks hang on the module itself: two threads' passes must not fill each other's values.
_one_at_a_time = threading.RLock()

if hasattr(os, "register_at_fork"):
    # A fork waits for the pass under way: the child would inherit the hooks of a thread that it
    # does not have.
    os.register_at_fork(
        before=_one_at_a_time.acquire,
        after_in_parent=_one_at_a_time.release,
        after_in_child=_one_at_a_time.release,
    )


class _Reached(BaseException):
    """Ends a forward pass as soon as all that was asked for is there.

    Not an Exception: the network may catch those.
    """


class HookedPlan:
    """What :class:`StagePlan` is, for a network that runs but cannot be traced.

    An ``nn.Sequential`` has its children for stages. Of any other network the last linear
    layer, if the network returns what it gives, is the ``"head"`` and the rest the ``"body"``.
    Of a layer that runs several times the first call counts.
    """

    def __init__(self, module: nn.Module, input_size: tuple[int, int, int], name: str):
        self.module, self.network_name = module, name
        self.modules = dict(module.named_modules())
        self._values: dict[tuple[int, int, int], dict[str, tuple[int, ...]]] = {}
        self._head: str | None = None
        self._run(input_size)

    @property
    def names(self) -> list[str]:
        if self._is_chain:
            return [name for name, _ in self.module.named_children()]
        return ["body"] if self._head is None else ["body", "head"]

    @property
    def _is_chain(self) -> bool:
        return type(self.module) is nn.Sequential

    def pieces(self) -> list[tuple[str, nn.Module]]:
        """The stages as modules."""
        if self._is_chain:
            return list(self.module.named_children())
        if self._head is None:
            return [("body", self.module)]
        body = _Body(HookedExtractor(self.module, [self.embedding_key], [nn.Identity()]))
        return [("body", body), ("head", self.modules[self._head])]

    def head_layers(self) -> set[str]:
        """Dotted name of the head, if there is one."""
        return set() if self._head is None else {self._head}

    @property
    def embedding_key(self) -> str:
        """``">head"``: what enters the sub-module `head`; ``""``: what the network returns."""
        return "" if self._head is None else f">{self._head}"

    @property
    def last_map_key(self) -> str:
        return self.embedding_key

    def resolve(self, layer: str) -> str:
        """The sub-module that a name stands for."""
        if not self._is_chain and layer in self.names:
            return self.embedding_key if layer == "body" else ""
        if layer not in self.modules or layer == "":
            names = [name for name in self.modules if name]
            raise unknown_layer(layer, self.network_name, self.names, names)
        return layer

    def shape(self, key: str, input_size: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of a layer's value for two pictures of `input_size`."""
        shapes = self._run(input_size)
        if key not in shapes:
            raise ValueError(
                f"layer={key!r} of {self.network_name} does not run when a picture is embedded, or "
                "does not return one tensor."
            )
        return checked_shape(shapes[key], key or "output", self.network_name)

    def is_channels_last(self, key: str, input_size: tuple[int, int, int]) -> bool:
        """Whether a 4-D value is N×H×W×C, as far as its shape tells."""
        shape = self.shape(key, input_size)
        return len(shape) == 4 and shape[1] == shape[2] != shape[3]

    def tokens(self, key: str) -> tuple[int | None, int]:
        """Nothing is known of class tokens."""
        return None, 0

    def extractor(self, keys: list[str], poolings: list[nn.Module]) -> HookedExtractor:
        """The network up to the last of the layers, returning their pooled values."""
        return HookedExtractor(self.module, keys, poolings)

    def _run(self, input_size: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """Send two black pictures through, and note shapes and the last linear layer."""
        if input_size in self._values:
            return self._values[input_size]
        shapes: dict[str, tuple[int, ...]] = {}
        last: dict[str, Any] = {}

        def note(name: str) -> Any:
            def hook(layer: nn.Module, args: Any, value: Any) -> None:
                if isinstance(value, torch.Tensor):
                    shapes.setdefault(name, tuple(value.shape))
                if isinstance(layer, nn.Linear) and args:
                    shapes.setdefault(f">{name}", tuple(args[0].shape))
                    last.update(name=name, value=value)

            return hook

        try:
            module = structural_copy(self.module).eval()
            for name, part in module.named_modules():
                part.register_forward_hook(note(name))
            with torch.no_grad():
                device = next((p.device for p in module.parameters()), "cpu")
                out = module(torch.zeros((2, *input_size), device=device))
        except Exception as error:
            raise not_accepted(self.network_name, input_size, error) from error
        if not isinstance(out, torch.Tensor):
            raise TypeError(
                f"{self.network_name} returns {type(out).__name__}: its forward has to return one "
                "tensor. Wrap it in a module that returns the one that is meant."
            )
        if last.get("value") is out:
            self._head = last["name"]
        self._values[input_size] = shapes
        return shapes


class HookedExtractor(nn.Module):
    """Runs a network until the asked layers have given their values.

    Parameters
    ----------
    module : nn.Module
    keys : list of str
        ``"name"``: what the sub-module returns; ``">name"``: what it gets.
    poolings : list of nn.Module
        Applied to the values, one each, before the network goes on.
    """

    def __init__(self, module: nn.Module, keys: list[str], poolings: list[nn.Module]):
        super().__init__()
        self.module, self.keys = module, list(keys)
        self.poolings = nn.ModuleList(poolings)

    def copy_to(self, device: torch.device, dtype: torch.dtype) -> HookedExtractor:
        """An independent copy elsewhere or in another type, in eval mode."""
        copied = copy.deepcopy(self.module).to(device=device, dtype=dtype)
        return HookedExtractor(copied.eval(), self.keys, list(self.poolings))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        with _one_at_a_time:
            return self._forward(x)

    def _forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        values: dict[int, torch.Tensor] = {}
        modules = dict(self.module.named_modules())
        hooks = []

        def keep(k: int, value: Any) -> None:
            # The first call's, whatever else is asked for.
            if k in values or not isinstance(value, torch.Tensor):
                return
            values[k] = self.poolings[k](value)
            if len(values) == len(self.keys):
                raise _Reached

        for k, key in enumerate(self.keys):
            layer = modules[key.removeprefix(">")]
            if key.startswith(">"):
                hooks.append(
                    layer.register_forward_pre_hook(
                        lambda _, args, k=k: keep(k, args[0] if args else None)
                    )
                )
            else:
                hooks.append(layer.register_forward_hook(lambda _, args, out, k=k: keep(k, out)))
        try:
            self.module(x)
        except _Reached:
            pass
        finally:
            for handle in hooks:
                handle.remove()
        if missing := [key for k, key in enumerate(self.keys) if k not in values]:
            raise ValueError(
                f"layer {missing[0].removeprefix('>')!r} did not run for these pictures, though it "
                "did for others: give as `layer` one that always runs."
            )
        return [values[k] for k in range(len(self.keys))]


class _Body(nn.Module):
    """Everything before the head, as a stage."""

    def __init__(self, extractor: HookedExtractor):
        super().__init__()
        self.extractor = extractor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extractor(x)[0]
