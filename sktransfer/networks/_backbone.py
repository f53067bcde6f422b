"""A pre-trained network by name, as a function from images to feature columns."""

from __future__ import annotations

import copy
import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from sktransfer._progress import did_you_mean
from sktransfer._threads import own_settings
from sktransfer.networks._blocks import LAST_STATES, BlockPlan, EmbeddingModel
from sktransfer.networks._graph import Stages
from sktransfer.networks._inference import (
    POOLINGS,
    TEXT_POOLINGS,
    Network,
    Pooling,
    get_network,
    is_in_memory,
    layout_of,
    pooled_width,
    resolve_pooling,
)
from sktransfer.networks._own import ModuleSource, own_source
from sktransfer.networks._preprocessing import AnyPreprocessing, resolve_preprocessing
from sktransfer.networks._published import named_source, text_source
from sktransfer.networks._sources import GivenSource, Source
from sktransfer.networks._text import SavedTextSource, TextSource
from sktransfer.networks._word_vectors import Lookup, WordVectors

# Part of every fingerprint, to be changed when the computation of embeddings changes.
_FORMAT = "sktransfer-embedding-2"
_EMBEDDING = "embedding"


@own_settings()
def load_backbone(
    backbone: str | nn.Module | Callable[[], nn.Module] | Source = "builtin",
    *,
    weights: str | PathLike | None = "DEFAULT",
    layer: int | str | Sequence[int | str | None] | None = None,
    pooling: str = "auto",
    preprocessing: str | dict | Callable = "auto",
) -> Backbone:
    """Load a pre-trained network by name.

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="builtin"
        Name of a torchvision classification builder (``"resnet50"``), ``"timm:NAME"`` (extra
        ``timm``), ``"hf:NAME_OR_FOLDER"`` (a network of transformers for images, extra ``hf``),
        ``"builtin"`` (its weights ship in the package), a module, or a callable without arguments
        that returns one. A module is copied; its ``forward`` takes one batch of images and
        returns one tensor.
    weights : str, path-like or None, default="DEFAULT"
        Name of published weights (``"IMAGENET1K_V2"``); path of a local ``.pt``, ``.pth`` or
        ``.safetensors`` file with a state dict, whose head may have any width; or None for
        random weights, the same ones every time.
    layer : int, str, list of them or None, default=None
        None: what enters the classification head. Or the name of a stage, a sub-module or an
        operation (``"layer3"``, ``"layer3.0.conv1"``, ``"layer3.0.add"``), or a list of them,
        whose pooled outputs are joined in that order; None in a list is the embedding. Or
        ``"all"``: every stage between the stem and the head, the last one as the embedding. For a
        network of transformers also the number of its hidden states: 0 before the first block, -1
        the last ones.
    pooling : {"auto", "avg", "max", "avgmax", "gem", "cls", "flatten"}, default="auto"
        How a feature map becomes a row. ``"auto"``: as in the network itself for the embedding;
        for an inner layer, the mean over the map, or the class token if the network classifies
        from one. With ``layer=None`` any other kind is applied to the last map.
        ``"gem"`` is the generalised mean with p = 3.
    preprocessing : "auto", dict or callable, default="auto"
        ``"auto"``: what the weights were trained with; for a module 256 pixels, cropped to
        224, with ImageNet's mean and standard deviation. A dict overrides parts of it:
        ``size``, ``crop``, ``mean``, ``std``, ``interpolation``, ``fast_decode``, ``resize_on``.
        A callable takes a uint8 array (height, width, 3) and returns a float array or tensor
        (channels, height, width), ready for the network.

    Returns
    -------
    backbone : Backbone
        The network, cut at `layer`.

    Raises
    ------
    ValueError
        If a name, a layer or the combination is unknown; the message lists what is known.
    OSError
        If the weights are not on this machine and cannot be downloaded.

    See Also
    --------
    list_backbones : Names that are accepted.
    PretrainedFeatureExtractor : Use a backbone as a transformer.

    Examples
    --------
    >>> from sktransfer import load_backbone
    >>> backbone = load_backbone("builtin")
    >>> backbone.n_features
    1408
    >>> backbone.stages.names
    ['stem', 'stage1', 'stage2', 'stage3', 'stage4', 'pool', 'head']
    >>> load_backbone("builtin", layer=["stage2", "stage4"]).feature_groups
    [('stage2', 96), ('stage4', 704)]
    """
    source = resolve_source(backbone, weights)
    known = TEXT_POOLINGS if source.is_text else POOLINGS
    if not isinstance(pooling, str) or pooling not in known:
        hint = did_you_mean(str(pooling), known)
        of_texts = " for texts" if source.is_text else ""
        raise ValueError(
            f"pooling={pooling!r} is not accepted{of_texts}: one of {list(known)}.{hint}"
        )
    how = resolve_preprocessing(preprocessing, source.preprocessing)
    loaded = Backbone(source, _named_layers(layer, source), pooling, how)
    if source.is_user_file:
        _ = loaded.network.module  # raises if the file does not fit
    return loaded


def load_text_backbone(
    backbone: str | TextSource | SavedTextSource | WordVectors,
    *,
    weights: str | None = "DEFAULT",
    layer: int | str | Sequence[int | str] | None = None,
    pooling: str = "auto",
    max_length: int | str = "auto",
) -> Backbone:
    """Load a network for texts; the parameters are those of `PretrainedTextExtractor`."""
    source = text_source(backbone, weights) if isinstance(backbone, str) else backbone
    kind = "avg" if pooling == "mean" else pooling
    return Backbone(source, _named_layers(layer, source), kind, source.tokens(max_length))


def _named_layers(layer, source: Source):  # type: ignore[no-untyped-def]
    """Replace numbers of hidden states of a network of transformers by the layers' names."""
    is_list = isinstance(layer, Iterable) and not isinstance(layer, str)
    asked = list(layer) if is_list else [layer]
    if any(isinstance(k, Integral) for k in asked):
        plan = get_network(source, source.preprocessing.input_size).plan
        if isinstance(plan, BlockPlan):
            asked = [_hidden_states(k, plan.names) if isinstance(k, Integral) else k for k in asked]
    return asked if is_list else asked[0]


def _hidden_states(layer: Integral, stages: list[str]) -> str:
    """Return the name of the `layer`-th hidden states of a transformer."""
    n_states, k = len(stages) - 1, operator.index(layer)
    if k == -1:
        return LAST_STATES
    if not -n_states <= k < n_states:
        known = f"0 (before the first block) to {n_states - 1} or -1 (the last ones) are accepted."
        raise ValueError(
            f"layer={layer} is not in the network, which has {n_states} hidden states: {known}"
            if n_states
            else f"layer={layer} asks for hidden states within a network that is not divided into "
            "blocks: None or -1 (the last ones) is accepted."
        )
    return LAST_STATES if k % n_states == n_states - 1 else stages[k % n_states]


def resolve_source(backbone: object, weights: object) -> Source:
    """Return the source of the network that `backbone` and `weights` describe."""
    if isinstance(backbone, Source):
        return backbone
    if isinstance(backbone, str):
        return named_source(backbone, weights)
    if isinstance(backbone, nn.Module) or callable(backbone):
        return own_source(backbone, weights)
    raise TypeError(
        f"backbone={backbone!r} is a {type(backbone).__name__}: a name (see list_backbones()), a "
        "torch.nn.Module or a callable that returns one is accepted."
    )


class Backbone:
    """A pre-trained network, cut at the chosen layers and pooled to one row per image.

    Made by :func:`load_backbone`. It holds no weights: each process loads a network once, on
    first use, and all backbones share it. A pickle holds the name of the weights and their
    digest, or the module itself if the user gave one.

    Attributes
    ----------
    name : str
        ``"resnet50"``, ``"timm:…"``, ``"builtin"``, or the class name of an own module.
    short_name : str
        The name in feature names.
    feature_groups : list of (str, int)
        Each layer with its number of columns, in order.
    n_features : int
        Total number of columns.
    preprocessing : Preprocessing or CallablePreprocessing
        Its ``resize_crop`` and ``min_size`` prepare the images.
    input_size : tuple of 3 ints
        Channels, height and width of the network's input.
    fingerprint : str
        Changes with anything that changes the embedding: weights, architecture, layer,
        pooling, preprocessing. Equal in every process.
    group_fingerprints : list of str
        The fingerprint of each layer alone, so that its rows serve other combinations.
    """

    # Whether the weights come from a file of `save`, so that their name cannot load them again.
    is_standalone = False

    def __init__(
        self,
        source: Source,
        layer: str | Sequence[str | None] | None,
        pooling: str,
        preprocessing: AnyPreprocessing,
    ):
        self._source = source
        self.name = source.name
        name = source.name.removeprefix("timm:")
        if source.name.startswith(("hf:", "vectors:", "static:")):  # of a path the last part
            name = Path(name).name.removesuffix(".txt")
        self.short_name = re.sub(r"\W+", "_", name).strip("_")
        self.layer, self.pooling, self.preprocessing = layer, pooling, preprocessing
        self.input_size: tuple[int, ...] = preprocessing.input_size
        # The size at which stages are found does not depend on the crop asked for.
        is_own = isinstance(source, ModuleSource)
        self._plan_size = self.input_size if is_own else source.preprocessing.input_size
        layers = self.layers_named(layer)
        if not layers:
            raise ValueError("layer=[] names no layer: give at least one, or None.")
        self._keys: list[str] = []
        self._poolings: list[tuple[str, str, int, int]] = []
        self.feature_groups: list[tuple[str, int]] = []
        self.group_fingerprints: list[str] = []
        for asked in layers:
            self._add_layer(asked)
        self.n_features = sum(width for _, width in self.feature_groups)
        self.fingerprint = (
            self.group_fingerprints[0] if len(layers) == 1 else _digest(self.group_fingerprints)
        )

    def _add_layer(self, asked: str | None) -> None:
        plan, label = self.network.plan, _EMBEDDING if asked is None else asked
        if asked is None:
            key = plan.embedding_key if self.pooling == "auto" else plan.last_map_key
        elif isinstance(asked, str):
            key = plan.resolve(asked)
        else:
            raise TypeError(f"layer {asked!r} is not a name: a string, None or a list is accepted.")
        shape = plan.shape(key, self.input_size)
        layout = layout_of(shape, plan.is_channels_last(key, self.input_size))
        if self.is_text and layout == "tokens":
            layout = "texts"
        if layout is None:
            raise ValueError(
                f"layer {label!r} of {self.name} gives values of shape {shape[1:]} per image, "
                "which is neither a vector, a map nor a sequence of tokens."
            )
        token, n_prefix = plan.tokens(key)
        kind = resolve_pooling(self.pooling, layout, f"layer {label!r} of {self.name}", token)
        pooling = (kind, layout, token or 0, n_prefix)
        self._keys.append(key)
        self._poolings.append(pooling)
        self.feature_groups.append((label, pooled_width(kind, layout, shape)))
        source = self._source
        parts = [_FORMAT, type(source).__name__, source.name, source.digest, *pooling, key]
        self.group_fingerprints.append(
            _digest([*parts, self.input_size, self.preprocessing.identity])
        )

    def layers_named(self, layer: str | Sequence[str | None] | None) -> list[str | None]:
        """List the layers that the parameter `layer` asks for."""
        stages = [name for name in self.stage_names[1:] if name not in ("pool", "head")]
        is_list = isinstance(layer, Iterable) and not isinstance(layer, str)
        asked: Iterable = layer if is_list else [layer]  # type: ignore[assignment]
        return [name for k in asked for name in ([*stages[:-1], None] if k == "all" else [k])]

    def __repr__(self) -> str:
        layer = "" if self.layer is None else f", layer={self.layer!r}"
        return f"<Backbone {self.name}{layer}: {self.input_size} -> {self.n_features}>"

    @property
    def is_text(self) -> bool:
        """Whether it takes texts, not images."""
        return self._source.is_text

    @property
    def network(self) -> Network:
        """The shared network; it is loaded again if it was evicted."""
        return get_network(self._source, self._plan_size)

    def lookup(self) -> Lookup | None:
        """Return the look-up of words if this is a table of word vectors, else None."""
        return self._source.lookup() if isinstance(self._source, WordVectors) else None

    @property
    def stages(self) -> Stages:
        """The network's stages with their weights, shared and frozen."""
        _ = self.network.module
        return self.network.plan.stages()

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages; no weights are loaded for them."""
        return self.network.plan.names

    @property
    def has_maps(self) -> bool:
        """Whether its stages return maps, as those of convolutional networks do."""
        plan = self.network.plan
        return len(plan.shape(plan.last_map_key, self.input_size)) == 4

    @property
    def stage_names_to_layer(self) -> list[str]:
        """Names of the stages up to the deepest of the layers asked for."""
        return self.stage_names[: max(self.layer_stages) + 1]

    @property
    def layer_stages(self) -> list[int]:
        """Position of the stage that returns each layer's value; ValueError if none does."""
        plan, names = self.network.plan, self.stage_names
        position = {key: i for i, key in reversed(list(enumerate(plan.stage_keys)))}
        has_head = plan.head_layers() and len(names) > 1
        position[plan.embedding_key] = len(names) - (2 if has_head else 1)
        if isinstance(plan, BlockPlan):
            position[plan.last_map_key] = len(names) - 1
        for (label, _), key in zip(self.feature_groups, self._keys, strict=True):
            if key not in position:
                raise ValueError(
                    f"{self!r}: {label!r} ends within a stage, where fine-tuning cannot put a "
                    f"head. Give as `layer` some of the stages {names}, 'all' or None; and "
                    "pooling='auto' if that was changed."
                )
        return [position[key] for key in self._keys]

    def column_names(self, prefix: str, n_layers: int | None = None) -> list[str]:
        """Name the columns of the first `n_layers` layers; ``prefix_layer_007`` if several."""
        groups, names = self.feature_groups[:n_layers], list[str]()
        for layer, width in groups:
            digits = max(3, len(str(width - 1)))
            stem = f"{prefix}_{layer}" if len(groups) > 1 else prefix
            names += [f"{stem}_{i:0{digits}d}" for i in range(width)]
        return names

    @property
    def weights_digest(self) -> str:
        """Changes with the weights; a module's code is not part of it."""
        digest = self._source.digest
        return digest.rpartition(":")[2] if isinstance(self._source, ModuleSource) else digest

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        if is_in_memory(self._source, self._plan_size):
            return
        try:
            self._source.check_weights()
        except OSError as error:
            raise FileNotFoundError(
                f"{error}\nA pickle holds no weights that a name or a file brings back: "
                "sktransfer.save(model, path, standalone=True) writes a file with all weights."
            ) from error

    @property
    def cut(self) -> tuple:
        """All that determines the embedding except the weights."""
        return self.name, self._keys, self._poolings, self.preprocessing.identity

    def make_poolings(self) -> list[Pooling]:
        """Make the pooling of each layer."""
        return [Pooling(*settings) for settings in self._poolings]

    def copy_network(self) -> tuple[nn.Module, Stages]:
        """Copy the network; return the copy and its stages, which call the copy's layers."""
        network = self.network
        _ = network.module  # the weights
        root = copy.deepcopy(network.plan.root)
        if isinstance(root, EmbeddingModel):
            root.ends_with_tokens = network.plan.last_map_key in self._keys
            root.size = self.input_size
        return root, network.plan.stages(root)

    def with_weights(self, module: nn.Module, digest: str) -> Backbone:
        """Return the same cut of `module`, a copy of the network with weights of this digest."""
        other = copy.copy(self)
        other._source = GivenSource(self.name, self._source.preprocessing, module, digest)
        other._source.is_user_code, other._source.is_text = self._source.is_user_code, self.is_text
        other.fingerprint = f"tuned-{digest}"
        other.group_fingerprints = [f"{other.fingerprint}-{key}" for key in self._keys]
        return other

    def inference_module(
        self, device: torch.device | str = "cpu", precision: str = "float32"
    ) -> nn.Module:
        """Return the network for inference: batch norms folded, channels last, frozen.

        Parameters
        ----------
        device : torch.device or str, default="cpu"
        precision : {"float32", "tf32", "bfloat16", "float16"}, default="float32"

        Returns
        -------
        module : nn.Module
            Takes uint8 pixels (N, channels, height, width) on `device`, already resized, or
            what the preprocessing callable gives as float32; returns a list of float32
            tensors (N, width), one per feature group. Made once and shared; safe to call from
            several threads.
        """
        return self.network.embedding_network(
            self._keys, self._poolings, self.preprocessing, torch.device(device), precision
        )


def with_cached_layers(layer: str | list | None, cache_layers: list | None) -> str | list | None:
    """Join the layers of the columns and those that are only stored."""
    asked = list(layer) if isinstance(layer, Iterable) and not isinstance(layer, str) else [layer]
    extra = [name for name in cache_layers or [] if name not in asked]
    return [*asked, *extra] if extra else layer


def _digest(parts: Iterable[object]) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()
