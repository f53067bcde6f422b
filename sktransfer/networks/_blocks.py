"""Models of the package transformers as stages: what comes before the blocks, blocks, the end."""

from __future__ import annotations

import copy
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from sktransfer._threads import own_random_state
from sktransfer.networks._graph import (
    Stage,
    Stages,
    checked_shape,
    not_accepted,
    unknown_layer,
)
from sktransfer.networks._sources import freeze

START, END, LAST_STATES = "embeddings", "pool", "last_states"
_Call = tuple[tuple, dict]


class _Pass(threading.local):
    """State of a model's switches in this thread: they note calls, or return `given`."""

    given: torch.Tensor | None = None
    hidden: torch.Tensor
    calls: list[_Call]
    shared: tuple | None  # what the first block returns beside the hidden states, for the others


_pass = _Pass()


class _AllCalled(Exception):
    """Ends a pass when every switch has noted its call."""


class _Switch(nn.Module):
    """A placeholder for a block: it returns what it gets, and notes the other arguments.

    Models make a block's masks and positions from their inputs. A pass without the blocks finds
    these, without hooks, so that several threads can run one model.
    """

    def __init__(self, block: nn.Module, k: int, n_blocks: int, others: tuple | None) -> None:
        super().__init__()
        self._block, self._k, self._n_blocks = (block,), k, n_blocks
        self._others = others  # what it returns beside the hidden states, in a tuple

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # ModernBERT asks its blocks for their kind of attention
            return getattr(super().__getattribute__("_block")[0], name)

    def forward(self, hidden: torch.Tensor, *args, **kwargs):
        is_last = self._k == self._n_blocks - 1
        if _pass.given is None:
            if self._k == 0:
                _pass.hidden, _pass.calls, _pass.shared = hidden, [], self._others
                if any(other is not None for other in self._others or ()):
                    # T5's first block makes the others' bias of positions.
                    _pass.shared = self._block[0](hidden, *args, **kwargs)[1:]
            _pass.calls.append((args, kwargs))
            if is_last:
                raise _AllCalled
        elif is_last:
            hidden = _pass.given
        return hidden if self._others is None else (hidden, *(_pass.shared or ()))


class EmbeddingModel(nn.Module, ABC):
    """A network from one tensor of images or texts to one row each, that `recipe` can build."""

    recipe: torch.Tensor  # JSON, as bytes: what builds the network again, beside its weights
    n_prefix = 0  # tokens before those of the image, the first of which is the class token …
    class_token: int | None = None  # … if this is 0
    size: tuple[int, ...]  # of an input, for the stages

    def __init__(self, recipe: dict) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.path = ""  # from where the blocks were taken
        self.ends_with_tokens = False  # instead of rows: a pooling of one's own follows
        self._set_recipe(recipe)

    def _set_recipe(self, recipe: dict) -> None:
        content = torch.frombuffer(bytearray(json.dumps(recipe).encode()), dtype=torch.uint8)
        self.register_buffer("recipe", content)

    @abstractmethod
    def example(self, n: int) -> torch.Tensor:
        """Make inputs."""

    @abstractmethod
    def values(self, x: torch.Tensor, keys: list[str]) -> dict[str, torch.Tensor]:
        """Return the values of some parts, each computed once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = LAST_STATES if self.ends_with_tokens else END
        return self.values(x, [key])[key]


class SplitModel(EmbeddingModel):
    """A model of transformers, in parts.

    A subclass says how inputs are given to the model, what goes from part to part, and what the
    row is. `method` is the one of the model's that is called.
    """

    kind: str  # of its inputs, for messages

    def __init__(self, model: nn.Module, recipe: dict) -> None:
        super().__init__(recipe)
        self.rest, self.method = model, recipe["method"]
        self.after = nn.Sequential()  # what follows the pooling
        self.runs_alone = False  # as a row depends on the padding

    def ready(self, state: Mapping[str, torch.Tensor] | None = None) -> Self:
        """Freeze and split the network, with the weights of `state` if it is given.

        `state` is the `state_dict` of this network when it was split. ValueError if these are the
        weights of another.
        """
        if state is not None:
            self._load_weights(state)
        freeze(self)
        x = self.example(2)
        with torch.no_grad():
            try:
                expected = self(x)
            except Exception as error:
                raise ValueError(
                    f"{type(self.rest).__name__} of transformers does not turn {self.kind} alone "
                    f"into embeddings ({type(error).__name__}: {error!s:.300})."
                ) from error
            if _are_close(self(self.alone(x)), expected[-1:], 1e-3):
                self._split(x, expected)
            elif _are_close(self(x), expected, 1e-3):
                self.runs_alone = True
            else:
                raise ValueError(
                    f"{type(self.rest).__name__} of transformers draws random numbers in each "
                    "pass, so that its rows are no embeddings."
                )
        return self

    def _load_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        path = read_recipe(self.recipe).get("blocks", "")  # from where the blocks were taken
        whole = f"rest.{path}." if path else "blocks."
        state = {
            f"{whole}{key.removeprefix('blocks.')}" if key.startswith("blocks.") else key: value
            for key, value in state.items()
        }
        kinds = {key: (tensor.dtype, tensor.shape) for key, tensor in self.state_dict().items()}
        given = {key: (tensor.dtype, tensor.shape) for key, tensor in state.items()}
        if {**given, "recipe": None} != {**kinds, "recipe": None}:
            raise ValueError("its weights do not fit its network")
        self.recipe = state["recipe"]
        self.load_state_dict(state, assign=True)

    @abstractmethod
    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last of some inputs, without padding."""

    @abstractmethod
    def inputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model's arguments."""

    @abstractmethod
    def pack(self, hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what goes from part to part."""

    @abstractmethod
    def unpack(self, value: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the hidden states and arguments, with any content, of which masks are made."""

    @abstractmethod
    def row(self, output, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the embeddings (n, width)."""

    def few(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return as few of the arguments as the model needs beside its last hidden states."""
        return inputs

    def _split(self, x: torch.Tensor, expected: torch.Tensor) -> None:
        """Take the blocks out of the model, if that can be done: the outer ones, if they nest."""
        lists = [
            (-path.count("."), len(part), path)
            for path, part in self.rest.named_modules()
            if isinstance(part, nn.ModuleList)
        ]
        for *_, path in sorted(lists, reverse=True):
            blocks = self.rest.get_submodule(path)
            assert isinstance(blocks, nn.ModuleList)
            outputs = self._outputs(blocks, x)
            if len(outputs) < len(blocks):  # these do not run
                continue
            switches = [
                _Switch(block, k, len(blocks), outputs[k]) for k, block in enumerate(blocks)
            ]
            self.rest.set_submodule(path, nn.ModuleList(switches))
            self.blocks, self.path = blocks, path
            if self._agrees(x, expected):
                self._set_recipe({**read_recipe(self.recipe), "blocks": path})
                return
            self.rest.set_submodule(path, blocks)
            self.blocks, self.path = nn.ModuleList(), ""

    def joined(self) -> SplitModel:
        """Copy the network with its blocks in their place again."""
        whole = copy.deepcopy(self)
        if self.path:
            whole.rest.set_submodule(self.path, whole.blocks)
            whole.blocks, whole.path = nn.ModuleList(), ""
        return whole

    def _outputs(self, blocks: nn.ModuleList, x: torch.Tensor) -> dict[int, tuple | None]:
        found: dict[int, tuple | None] = {}

        def note(k: int, out: object) -> None:
            found[k] = out[1:] if isinstance(out, tuple) else None

        hooks = [
            block.register_forward_hook(lambda _, args, out, k=k: note(k, out))
            for k, block in enumerate(blocks)
        ]
        self(x)
        for hook in hooks:
            hook.remove()
        return found

    def _agrees(self, x: torch.Tensor, expected: torch.Tensor) -> bool:
        try:
            value = self.start(x)
            for k in range(len(self.blocks)):
                value = self.block(k, value)  # with the arguments that a stage alone finds
            got = self.end(value)
        except Exception:
            return False
        return _are_close(got, expected)

    # -- the parts --------------------------------------------------------------------------
    def _whole(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model with its blocks in it."""
        if self.runs_alone and len(x) > 1:
            found = [self._whole(self.alone(one)) for one in x.split(1)]
            states = [values[LAST_STATES][0] for values in found]
            rows = torch.cat([values[END] for values in found])
            return {END: rows, LAST_STATES: pad_sequence(states, batch_first=True)}
        inputs = self.inputs(x)
        output = getattr(self.rest, self.method)(**inputs)
        return self._ends(output, inputs)

    def _ends(self, output, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states = output  # get_image_features and its like, before transformers 5
        if not isinstance(output, torch.Tensor):
            states = self.pack(output.last_hidden_state, inputs)
        return {END: self.after(self.row(output, inputs)), LAST_STATES: states}

    def front(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[_Call]]:
        """Return the hidden states before the blocks, and each block's other arguments."""
        try:
            getattr(self.rest, self.method)(**inputs)
        except _AllCalled:
            return _pass.hidden, _pass.calls
        raise AssertionError("the blocks run")

    def run_block(self, k: int, hidden: torch.Tensor, call: _Call) -> torch.Tensor:
        args, kwargs = call
        out = self.blocks[k](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def finish(self, hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor]):
        """Return the model's output for the last block's hidden states."""
        _pass.given = hidden
        try:
            return getattr(self.rest, self.method)(**inputs)
        finally:
            _pass.given = None

    def start(self, x: torch.Tensor) -> torch.Tensor:
        inputs = self.inputs(x)
        return self.pack(self.front(inputs)[0], inputs)

    def block(self, k: int, value: torch.Tensor) -> torch.Tensor:
        hidden, inputs = self.unpack(value)
        _, calls = self.front(inputs)  # with gradients: biases of positions are trained, too
        return self.pack(self.run_block(k, hidden, calls[k]), inputs)

    def end(self, value: torch.Tensor) -> torch.Tensor:
        hidden, inputs = self.unpack(value)
        ends = self._ends(self.finish(hidden, inputs), inputs)
        return ends[LAST_STATES if self.ends_with_tokens else END]

    def values(self, x: torch.Tensor, keys: list[str]) -> dict[str, torch.Tensor]:
        if not self.path:
            return self._whole(x)
        found: dict[str, torch.Tensor] = {}
        inputs = self.inputs(x)
        hidden, calls = self.front(inputs)
        found[START] = self.pack(hidden, inputs)
        is_whole = END in keys or LAST_STATES in keys
        last = len(self.blocks) if is_whole else max(self.number(key) for key in keys) + 1
        for k in range(last):
            hidden = self.run_block(k, hidden, calls[k])
            if (name := f"block{k}") in keys:
                found[name] = self.pack(hidden, inputs)
        if is_whole:
            found |= self._ends(self.finish(hidden, self.few(inputs)), inputs)
        return found

    @staticmethod
    def number(key: str) -> int:
        return int(key.removeprefix("block")) if key.startswith("block") else -1


def _are_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    atol = tolerance * float(expected.abs().nan_to_num().max())
    return torch.allclose(got, expected, rtol=10 * tolerance, atol=atol, equal_nan=True)


def read_recipe(content: torch.Tensor) -> dict:
    """Return the recipe that a network's buffer holds."""
    return json.loads(content.cpu().numpy().tobytes())


class BlockPlan:
    """The stages of an :class:`EmbeddingModel`: ``"embeddings"``, ``"block0"`` …, ``"pool"``.

    The last one holds what follows the blocks; of a model that cannot be split it is all.
    """

    def __init__(self, module: EmbeddingModel, input_size: tuple[int, ...], name: str) -> None:
        self.root, self.network_name = module, name
        blocks = [f"block{k}" for k in range(len(module.blocks))]
        self.names = [START, *blocks, END] if module.path else ["body"]
        self.stage_keys = [START, *blocks, END] if module.path else [END]
        self._shapes: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}

    embedding_key, last_map_key = END, LAST_STATES

    def stages(self, root: nn.Module | None = None) -> Stages:
        """Make the stages as modules of the layers of `root`: this module or a copy of it."""
        root = self.root if root is None else root
        if not isinstance(root, SplitModel) or not root.path:
            return Stages([Stage("body", root)])
        before, after = _around(root.rest, root.path)
        parts = [
            _Part(root, START, before),
            *(_Part(root, f"block{k}", [block]) for k, block in enumerate(root.blocks)),
            _Part(root, END, [*after, root.after]),
        ]
        return Stages(map(Stage, self.names, parts))

    def head_layers(self) -> set[str]:
        return set()

    def resolve(self, layer: str) -> str:
        """Return the key of a stage."""
        if layer in self.names:
            return self.stage_keys[self.names.index(layer)]
        if layer == LAST_STATES:
            return layer
        raise unknown_layer(layer, self.network_name, self.names, [])

    def shape(self, key: str, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a value for two inputs."""
        if input_size not in self._shapes:
            x = torch.zeros((2, *input_size)) if len(input_size) == 3 else self.root.example(2)
            keys = [*self.stage_keys, LAST_STATES]
            try:
                with torch.no_grad():
                    values = self.root.values(x, keys)
            except Exception as error:
                raise not_accepted(self.network_name, tuple(x.shape[1:]), error) from error
            self._shapes[input_size] = {k: tuple(value.shape) for k, value in values.items()}
        return checked_shape(self._shapes[input_size][key], key, self.network_name)

    def is_channels_last(self, key: str, input_size: tuple[int, ...]) -> bool:
        return False

    def tokens(self, key: str) -> tuple[int | None, int]:
        """Return the position of the class token, if there is one, and the number of prefixes."""
        return self.root.class_token, self.root.n_prefix

    def extractor(self, keys: list[str], poolings: list[nn.Module]) -> BlockExtractor:
        """Make what returns the pooled values of some stages."""
        return BlockExtractor(self.root, keys, poolings)


class BlockExtractor(nn.Module):
    """Returns the values of the parts `keys`, each pooled."""

    def __init__(self, module: EmbeddingModel, keys: list[str], poolings: list[nn.Module]) -> None:
        super().__init__()
        self.module, self.keys = module, list(keys)
        self.poolings = nn.ModuleList(poolings)

    def copy_to(self, device: torch.device, dtype: torch.dtype) -> BlockExtractor:
        """Copy it to another device or type, in eval mode."""
        copied = copy.deepcopy(self.module).to(device=device, dtype=dtype)
        return BlockExtractor(copied.eval(), self.keys, list(self.poolings))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        values = self.module.values(x, self.keys)
        return [pooling(values[key]) for key, pooling in zip(self.keys, self.poolings, strict=True)]


class _Part(nn.Module):
    """A stage; its parameters are those of its own layers of the model."""

    def __init__(self, model: SplitModel, name: str, layers: list[nn.Module]) -> None:
        super().__init__()
        self._model, self._name = (model,), name
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model = self._model[0]
        if self._name in (START, END):
            return model.start(x) if self._name == START else model.end(x)
        return model.block(model.number(self._name), x)


def _around(model: nn.Module, path: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return a model's layers that are defined before and after those at `path`."""
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    for name in path.split("."):
        children = dict(model.named_children())
        names = list(children)
        at = names.index(name)
        before += [children[k] for k in names[:at]]
        after = [*(children[k] for k in names[at + 1 :]), *after]
        model = children[name]
    return before, after


def random_ids(n: int, length: int, n_words: int) -> torch.Tensor:
    """Make token ids (n, length) for examples; the last row is shorter."""
    with own_random_state():
        ids = torch.randint(0, n_words, (n, length))
    ids[-1, length // 2 :] = -1
    return ids
