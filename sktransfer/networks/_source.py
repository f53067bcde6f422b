"""What a source of networks is, and how one is built without moving anybody's random state."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from sktransfer._threads import own_random_state
from sktransfer.networks import _weights
from sktransfer.networks._preprocessing import Preprocessing

RANDOM_SEED = 0
_build_lock = threading.RLock()


class Source(ABC):
    """A network that can be built again: what it is, and with which weights.

    Attributes
    ----------
    name : str
        As the user said it.
    preprocessing : Preprocessing
        What the weights were trained with.
    digest : str
        Tells its weights and architecture from any others.
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
    def key(self) -> tuple:
        """Equal for sources that give the same network."""
        return (type(self).__name__, self.name, self.digest)

    @abstractmethod
    def build(self) -> nn.Module:
        """The architecture in eval mode; its tensors may hold no values yet."""

    @abstractmethod
    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        """Fill `module`, which :meth:`build` made, with the weights."""


class GivenSource(Source):
    """A network whose weights are at hand.

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
        self.name, self.digest, self.module = name, digest, module
        self.preprocessing = preprocessing

    def build(self) -> nn.Module:
        return self.module

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        return


class _EmptyOnMeta(TorchFunctionMode):
    """New layers get no memory and no initial values, as weights come from a file."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def building(*, seed: int | None = None) -> Iterator[None]:
    """Build without moving the user's random state; `seed`: with initial values, from it."""
    with _build_lock, own_random_state(seed), contextlib.ExitStack() as stack:
        if seed is None:
            stack.enter_context(_EmptyOnMeta())
        yield


def skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a module whose layers may stand on the meta device, without values."""
    try:
        with building(), warnings.catch_warnings():
            # What concerns initial values, which nobody will see.
            warnings.simplefilter("ignore")
            module = make()
        persistent = module.state_dict().keys()
        if not any(b.is_meta and n not in persistent for n, b in module.named_buffers()):
            return finish(module)
    except Exception:  # it computes while it is built
        pass
    with building(seed=RANDOM_SEED):
        return finish(make())


def finish(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def fill_randomly(module: nn.Module, fresh: nn.Module) -> None:
    module.load_state_dict(fresh.state_dict(), assign=True)
    finish(module)


def file_source(weights: Any) -> Path | None:
    """The path, if `weights` is one rather than the name of published weights."""
    if isinstance(weights, os.PathLike):
        return _weights.check_weights_path(weights)
    if isinstance(weights, str) and (
        "/" in weights or os.sep in weights or Path(weights).suffix or weights.startswith("~")
    ):
        return _weights.check_weights_path(weights)
    return None


class FromFile:
    """Weights from a local file, and the proof that it is still the same file."""

    name: str
    path: Path
    file_digest: str
    key_report: _weights.KeyReport

    def _check_unchanged(self) -> None:
        if not self.path.is_file():
            raise FileNotFoundError(
                f"The weights file {str(self.path)!r} of {self.name} is gone: put it back."
            )
        got = _weights.file_digest(self.path)
        if got != self.file_digest:
            raise ValueError(
                f"The weights file {str(self.path)!r} of {self.name} has changed since this was "
                f"fitted (SHA-256 {got[:12]}… now, {self.file_digest[:12]}… then): put the old "
                "file back, or fit again."
            )

    def _load_file(self, module: nn.Module, head_layers: set[str]) -> None:
        self._check_unchanged()
        self.key_report = _weights.fit_state_dict(
            module,
            _weights.read_state_dict(self.path),
            head_layers=head_layers,
            source=str(self.path),
            name=self.name,
        )
        finish(module)


def random_digest(name: str) -> str:
    versions = f"torch-{torch.__version__}:torchvision-{torchvision.__version__}"
    return f"random:{RANDOM_SEED}:{name}:{versions}"


def did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    bare = name.removeprefix("timm:")
    close = get_close_matches(bare.lower(), known, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(prefix + c) for c in close)}?" if close else ""
