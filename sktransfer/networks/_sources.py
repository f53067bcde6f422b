"""Sources: networks with their weights, which any process can build again."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from sktransfer._progress import shown
from sktransfer._threads import own_random_state
from sktransfer.networks import _weights
from sktransfer.networks._preprocessing import AnyPreprocessing

RANDOM_SEED = 0
# The seed of random weights, weights=None.
random_seed: ContextVar[int] = ContextVar("random_seed", default=RANDOM_SEED)
_SUFFIXES = (".pt", ".pth", ".pth.tar", ".bin", ".ckpt", ".safetensors")


class Source(ABC):
    """A network that can be built again."""

    name: str
    preprocessing: AnyPreprocessing  # that the weights were trained with
    digest: str  # changes with the weights and the architecture
    is_user_file: bool = False  # the weights come from a file that the user named
    is_user_code: bool = False  # the network's class is the user's
    is_text: bool = False  # its inputs are texts

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the architecture in eval mode; its tensors may lie on the meta device."""

    def load(self, module: nn.Module, head_layers: set[str]) -> None:  # noqa: B027
        """Load the weights into `module`, unless :meth:`build` did so."""

    def check_weights(self) -> None:  # noqa: B027
        """Raise OSError if the weights are not on this machine; they are not read."""


class GivenSource(Source):
    """A network whose weights are in memory: `module`, in eval mode and frozen."""

    def __init__(
        self, name: str, preprocessing: AnyPreprocessing, module: nn.Module, digest: str
    ) -> None:
        self.name, self.preprocessing = name, preprocessing
        self.module, self.digest = module, digest

    def build(self) -> nn.Module:
        return self.module


class BuiltSource(Source):
    """A network that is built with its weights from files of the digest :meth:`digest_files`."""

    @abstractmethod
    def digest_files(self) -> str:
        """Return the present digest of the files."""

    def check_weights(self) -> None:
        if self.digest_files() != self.digest:
            raise FileNotFoundError(
                f"The files of {self.name} have changed since this was fitted: put the old ones "
                "back, or fit again."
            )


class NamedSource(Source):
    """A named architecture with its published weights, those of a local file, or random ones.

    A subclass makes the architecture in `make` and finds published weights in `weights_file`.
    """

    def __init__(self, name: str, weights: object) -> None:
        self.name = name
        self.is_random = weights is None
        self.seed = random_seed.get()
        self.path = weights_path(weights)
        self.is_user_file = self.path is not None
        self.is_published = not (self.is_random or self.is_user_file)

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
            return f"random:{self.seed}:{self.name}:{versions}"
        return f"sha256:{_weights.file_digest(self.weights_file())}"

    def build(self) -> nn.Module:
        return skeleton(self.make)

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        if self.is_random:
            with own_random_state(self.seed):
                state = self.make().state_dict()
            module.load_state_dict(state, assign=True)
        else:
            self.check_weights()
            path = self.weights_file()
            if (got := self.digest_weights()) != self.digest:
                raise ValueError(
                    f"The weights file {str(path)!r} of {self.name} has changed since this was "
                    f"fitted ({got[:19]}… now, {self.digest[:19]}… then): put the old file back, "
                    "or fit again."
                )
            state = _weights.read_state_dict(path, module.state_dict().keys())
            what = f"{self.name}, {path}"
            _weights.fit_state_dict(module, state, head_layers, what)
        freeze(module)

    def check_weights(self) -> None:
        path = None if self.is_random else self.weights_file()
        if path is not None and not path.is_file():
            raise FileNotFoundError(
                f"The weights file {path.name!r} of {self.name} is not in {str(path.parent)!r}: "
                "put it back."
            )


def is_path(weights: object) -> bool:
    """Whether `weights` is a path rather than the name of published weights."""
    if isinstance(weights, str):
        return bool(Path(weights).suffix) or any(sign in weights for sign in ("/", os.sep, "~"))
    return isinstance(weights, os.PathLike)


def weights_path(weights: object) -> Path | None:
    """Return the file, if `weights` is a path."""
    if not isinstance(weights, (str, os.PathLike)) or not is_path(weights):
        return None
    path = Path(os.path.abspath(os.path.expanduser(weights)))
    if not path.name.lower().endswith(_SUFFIXES):
        raise ValueError(
            f"weights={shown(weights)}: a weights file ends in one of {', '.join(_SUFFIXES)}."
        )
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"weights={shown(weights)} {what}; looked for {path.name!r} in {str(path.parent)!r}."
        )
    return path


class _EmptyOnMeta(TorchFunctionMode):
    """Create layers without memory and initial values, whose weights are loaded later.

    ``with torch.device("meta")`` would also discard what an architecture computes: position
    indices of timm's networks, widths of torchvision's RegNets.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a module without values: VGG-16 takes 0.04 s instead of 5.

    If building needs values, the module is built with them.
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
