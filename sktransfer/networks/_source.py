"""A source: which network, with which weights, and how to build it again in any process."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from sktransfer._threads import own_random_state
from sktransfer.networks import _weights
from sktransfer.networks._preprocessing import Preprocessing

RANDOM_SEED = 0


class Source(ABC):
    """A network that can be built again.

    Attributes
    ----------
    name : str
        As the user gave it.
    preprocessing : Preprocessing
        What the weights were trained with.
    digest : str
        Changes with the weights and the architecture.
    is_user_file : bool
        Whether the weights come from a file that the user named.
    is_foreign : bool
        Whether the network's code is the user's own.
    """

    name: str
    preprocessing: Preprocessing
    digest: str
    is_user_file: bool = False
    is_foreign: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for sources that give the same network."""
        return (type(self).__name__, self.name, self.digest)

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the architecture in eval mode; its tensors may lie on the meta device."""

    @abstractmethod
    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        """Fill `module`, which :meth:`build` returned, with the weights."""


class GivenSource(Source):
    """A network whose weights are in memory.

    Parameters
    ----------
    name : str
    preprocessing : Preprocessing
        What the network's architecture came with.
    module : nn.Module
        In eval mode and frozen.
    digest : str
        Of the weights.
    """

    def __init__(
        self, name: str, preprocessing: Preprocessing, module: nn.Module, digest: str
    ) -> None:
        self.name, self.preprocessing = name, preprocessing
        self.module, self.digest = module, digest

    def build(self) -> nn.Module:
        return self.module

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        """Do nothing: the module has its weights."""


class NamedSource(Source):
    """An architecture with a name, and its published, a local file's or random weights.

    A subclass makes the architecture in `make` and finds published weights in `weights_file`.
    """

    key_report: dict[str, list[str]]

    def __init__(self, name: str, weights: object) -> None:
        self.name = name
        self.is_random = weights is None
        self.path = _weights.weights_path(weights)
        self.is_user_file = self.path is not None

    @abstractmethod
    def make(self) -> nn.Module:
        """Build the architecture with initial values."""

    def weights_file(self) -> Path:
        """Find the weights on this machine."""
        assert self.path is not None
        return self.path

    def digest_weights(self) -> str:
        if self.is_random:
            versions = f"torch-{torch.__version__}:torchvision-{torchvision.__version__}"
            return f"random:{RANDOM_SEED}:{self.name}:{versions}"
        return f"sha256:{_weights.file_digest(self.weights_file())}"

    def build(self) -> nn.Module:
        return skeleton(self.make)

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if self.is_random:
            with own_random_state(RANDOM_SEED):
                state = self.make().state_dict()
            module.load_state_dict(state, assign=True)
        else:
            path = self.weights_file()
            if not path.is_file():
                raise FileNotFoundError(
                    f"The weights file {str(path)!r} of {self.name} is gone: put it back."
                )
            if (got := self.digest_weights()) != self.digest:
                raise ValueError(
                    f"The weights file {str(path)!r} of {self.name} has changed since this was "
                    f"fitted ({got[:19]}… now, {self.digest[:19]}… then): put the old file back, "
                    "or fit again."
                )
            state = _weights.read_state_dict(path)
            what = f"{self.name}, {path}"
            self.key_report = _weights.fit_state_dict(module, state, head_layers, what)
        freeze(module)


class _EmptyOnMeta(TorchFunctionMode):
    """Create layers without memory and initial values, as the weights are loaded later.

    ``with torch.device("meta")`` would also discard what an architecture computes: position
    indices of timm's networks, widths of torchvision's RegNets.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a module without its values: ResNet-50 takes 0.1 s instead of 0.8, VGG-16 0.04 of 5.

    Where building needs values, the module is built with them.
    """
    with contextlib.suppress(Exception):
        with own_random_state(), _EmptyOnMeta():
            module = make()
        loaded = module.state_dict().keys()
        if not any(b.is_meta and name not in loaded for name, b in module.named_buffers()):
            return freeze(module)
    with own_random_state(RANDOM_SEED):
        return freeze(make())


def freeze(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    bare = name.removeprefix("timm:")
    close = get_close_matches(bare.lower(), known, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(prefix + c) for c in close)}?" if close else ""
