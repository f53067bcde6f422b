"""Networks of texts: from tokens to one row."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from sktransfer._progress import warn
from sktransfer._threads import own_random_state
from sktransfer.networks._blocks import SplitModel, random_ids, read_recipe
from sktransfer.networks._huggingface import (
    FolderSource,
    import_transformers,
    make_skeleton,
    projected_class,
    quiet,
    weights_files,
)
from sktransfer.networks._inference import Pooling, get_network
from sktransfer.networks._sources import GivenSource
from sktransfer.networks._tokens import PADDING, Tokens
from sktransfer.networks._weights import read_state_dict, state_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOCABULARIES = ["tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"]
_VOCABULARIES += ["sentencepiece.bpe.model"]
_FILES = [*_VOCABULARIES, "tokenizer_config.json", "merges.txt", "special_tokens_map.json"]
_FILES += ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
_LAYER_FILES = ["config.json", "model.safetensors", "pytorch_model.bin"]  # of one for sentences
_MAX_LENGTH = 512  # where no file says what the network takes
# sentence-transformers' names of poolings
_POOLINGS = {"mean": "avg", "cls": "cls", "max": "max", "lasttoken": "last"}
# Beginnings of weights that embed no texts.
_NOT_OF_TEXTS = ("decoder.", "vision_", "visual_", "logit_")
_LARGE = 10**6  # transformers' tokenizers give a huge number where there is no limit


class TextModel(SplitModel):
    """A model from token numbers (n, length), -1 for padding, to rows.

    What goes from part to part is (n, length, width + 1): the hidden states and, last, the mask.
    """

    kind = "texts"

    def __init__(self, model: nn.Module, recipe: dict) -> None:
        super().__init__(model, recipe)
        self.after = nn.Sequential(*map(_layer_after, recipe.get("after", [])))
        self.pooling, self.padding = Pooling(recipe["pooling"], "texts"), recipe["padding"]
        self.is_own_row = self.method != "forward" or projected_class(model.config) != ""  # type: ignore[arg-type]
        config = getattr(model.config, "text_config", model.config)
        self.n_words: int = config.vocab_size  # type: ignore[union-attr, assignment]
        # CLIP's row is that of the token that ends a text: the one of the largest number where
        # an old configuration says 2.
        end = getattr(config, "eos_token_id", None)
        self.closing = end if isinstance(end, int) and end != 2 else self.n_words - 1
        self.other = next(k for k in range(9) if k not in (self.padding, self.closing))
        self.is_filled = recipe.get("filling") is not None

    def example(self, n: int) -> torch.Tensor:
        ids = random_ids(n, 6, self.n_words)
        return self._closed(ids.where(ids != PADDING, self.other) if self.is_filled else ids)

    def _closed(self, ids: torch.Tensor) -> torch.Tensor:
        """End texts by the token at which CLIP's row is."""
        if not self.is_own_row:
            return ids
        ids = ids.where(ids != self.closing, self.other)
        last = (ids != PADDING).sum(-1, keepdim=True).clamp(min=1) - 1
        return ids.scatter(1, last, self.closing)

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        return x[-1:, : max(1, int((x[-1] != PADDING).sum()))]

    def inputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        is_token = x != PADDING
        ids = torch.where(is_token, x, self.padding)
        return {"input_ids": ids, "attention_mask": is_token.long()}

    def pack(self, hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return torch.cat([hidden, mask], dim=-1)

    def unpack(self, value: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        is_token = value[..., -1] > 0.5
        ids = torch.where(is_token, self.other, PADDING)
        return value[..., :-1], self.inputs(self._closed(ids))

    def row(self, output, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not self.is_own_row:
            return self.pooling(self.pack(output.last_hidden_state, inputs))
        if isinstance(output, torch.Tensor):
            return output.float()
        return output.get("text_embeds", output.get("pooler_output")).float()


class Normalize(nn.Module):
    """Scales rows to length 1."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows, dim=1)


def _layer_after(settings: Mapping | None) -> nn.Module:
    """Make a layer that follows the pooling: a dense one, or without settings `Normalize`."""
    if settings is None:
        return Normalize()
    widths = settings["in_features"], settings["out_features"]
    activation = str(settings["activation_function"]).rpartition(".")[2]
    layers = nn.Linear(*widths, bias=settings["bias"]), getattr(nn, activation)()
    return nn.Sequential(OrderedDict(zip(("linear", "activation"), layers, strict=True)))


class TextSource(FolderSource):
    """A network of transformers for texts, with its tokenizer."""

    is_text = True

    @property
    def files(self) -> list[str]:  # type: ignore[override]
        return [*_FILES, *(f"{part}/{file}" for part in self._layers() for file in _LAYER_FILES)]

    def __init__(self, name: str, weights: object) -> None:
        super().__init__(name, weights)
        if not hasattr(getattr(self.config, "text_config", self.config), "vocab_size"):
            raise ValueError(
                f"backbone={name!r} is a {self.config.model_type} network, which takes no texts."
            )
        self.digest = self.digest_files()
        self.preprocessing = self.tokens("auto")

    # -- texts to tokens --------------------------------------------------------------------
    def tokens(self, max_length: int | str) -> Tokens:
        """Return the preprocessing of texts, cut after so many tokens."""
        return Tokens(self, _checked_length(max_length, self.limits(), self.name))

    def encoder(self, max_length: int) -> Callable[[str], Sequence[int]]:
        network = get_network(self, self.preprocessing.input_size)
        return _encoder(read_recipe(network.module.recipe), max_length)  # type: ignore[arg-type]

    def tokenizing(self) -> dict:
        """Return what turns texts into numbers."""
        filling = None
        if self.config.model_type.startswith("siglip"):  # was trained with texts filled up
            filling = self._read("tokenizer_config.json").get("pad_token")
            filling = filling["content"] if isinstance(filling, dict) else filling
        of_sentences = self._read("config_sentence_transformers.json")
        prompts, default = of_sentences.get("prompts"), of_sentences.get("default_prompt_name")
        return {
            "tokenizer": self._tokenizer_json(),
            "filling": filling,
            "prompt": (prompts or {}).get(default, ""),
        }

    def _tokenizer_json(self) -> str:
        """Return the tokenizer in the format of the package tokenizers."""
        transformers = import_transformers()
        try:
            if not any((self.folder / file).is_file() for file in _VOCABULARIES):
                raise FileNotFoundError(f"none of {', '.join(_VOCABULARIES)}")
            with quiet():
                made = transformers.AutoTokenizer.from_pretrained(
                    str(self.folder), local_files_only=True, trust_remote_code=False
                )
            return made.backend_tokenizer.to_str()
        except Exception as error:
            raise ValueError(
                f"backbone={self.name!r}: {str(self.folder)!r} holds no tokenizer that can be read "
                f"({type(error).__name__}: {error!s:.300}): a file tokenizer.json is needed."
            ) from error

    def limits(self) -> list[int]:
        """Return the usual and the largest number of tokens of a text."""
        config = getattr(self.config, "text_config", self.config)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and config.model_type in _SHIFTED:
            positions -= (config.pad_token_id or 0) + 1  # the first ones are of no token
        most = int(positions or _LARGE)
        usual = [
            self._read("tokenizer_config.json").get("model_max_length"),
            self._read("sentence_bert_config.json").get("max_seq_length"),
        ]
        most = most if most > 0 else _LARGE
        known = [int(n) for n in [most, *usual] if n is not None and 0 < n < _LARGE]
        return [min(known, default=_MAX_LENGTH), most]

    def _read(self, name: str):
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def _layers(self) -> dict[str, str]:
        """Return the folders and kinds of the layers for sentences, behind the network."""
        modules = self._read("modules.json")
        kinds = [str(part["type"]).rpartition(".")[2] for part in modules]
        return {
            part.get("path", f"1_{kind}"): kind
            for part, kind in zip(modules, kinds, strict=True)
            if kind != "Transformer"
        }

    def _for_sentences(self) -> tuple[str, list[dict | None]]:
        """Return the pooling that the folder's configuration says, else the mean, and what follows.

        The latter are the settings of dense layers, and None for one that scales to length 1.
        """
        settings: dict = {}
        after: list[dict | None] = []
        odd = []
        for path, kind in self._layers().items():
            read = self._read(f"{path}/config.json")
            if kind == "Pooling":
                settings = read
            elif kind == "Normalize" or "in_features" in read:
                after.append(None if kind == "Normalize" else read | {"path": path})
            else:
                odd.append(kind)
        # One name, or before sentence-transformers 6 a flag for each: pooling_mode_cls_token.
        flags = [k for k, v in settings.items() if v is True and k.startswith("pooling_mode_")]
        modes = [settings["pooling_mode"]] if "pooling_mode" in settings else flags
        modes = [re.sub("^pooling_mode_|_tokens?$", "", str(mode)) for mode in modes]
        if after and after[0] is None:  # which makes these equal
            modes = ["mean" if mode == "mean_sqrt_len" else mode for mode in modes]
        pooling = _POOLINGS.get("+".join(modes) or "mean")
        if odd or pooling is None:
            warn(
                f"{self.name} has {odd or modes} for sentences, which is not applied: its rows are "
                "the mean of its tokens."
            )
            return "avg", []
        return pooling, after

    # -- the network ------------------------------------------------------------------------
    def build(self) -> nn.Module:
        model = self.make(unused=_NOT_OF_TEXTS)
        config = getattr(self.config, "text_config", self.config)
        pooling, after = self._for_sentences()
        recipe = {
            "config": self.config.to_dict(),
            **self.tokenizing(),
            "limits": self.limits(),
            "pooling": pooling,
            "after": after,
            "padding": max(0, getattr(config, "pad_token_id", None) or 0),
            "method": "get_text_features" if hasattr(model, "get_text_features") else "forward",
        }
        with own_random_state(self.seed):
            made = TextModel(_text_part(model), recipe)
        for settings, layer in zip(after, made.after, strict=True):
            if settings is not None and not self.is_random:
                files = weights_files(self.folder / settings["path"], self.name)
                layer.load_state_dict(read_state_dict(files[0]))
        return made.ready()


class SavedTextSource(GivenSource):
    """A network for texts from a saved file."""

    is_text = True

    def __init__(self, name: str, module: TextModel, recipe: dict) -> None:
        self.name, self._recipe = name, recipe
        super().__init__(name, self.tokens("auto"), module, f"own-{state_digest(module)}")

    def tokens(self, max_length: int | str) -> Tokens:
        return Tokens(self, _checked_length(max_length, self._recipe["limits"], self.name))

    def encoder(self, max_length: int) -> Callable[[str], Sequence[int]]:
        return _encoder(self._recipe, max_length)


def saved_text_source(name: str, state: Mapping[str, torch.Tensor]) -> SavedTextSource:
    """Return the network for texts whose state is in memory; no file is read."""
    recipe = read_recipe(state["recipe"])
    made = TextModel(_text_part(make_skeleton(recipe["config"])), recipe).ready(state)
    return SavedTextSource(name, made, recipe)


def _text_part(model: PreTrainedModel) -> PreTrainedModel:
    """Return what of a model embeds texts."""
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        model = model.get_encoder()
    if getattr(model, "vision_model", None) is not None:
        model.vision_model = None  # type: ignore[assignment]
    if hasattr(model, "pooler"):  # some models call it whether they have one or not
        model.pooler = nn.Identity()
    model.config.use_cache = False
    return model


def _encoder(settings: Mapping, max_length: int) -> Callable[[str], Sequence[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(settings["tokenizer"])
    tokenizer.no_padding()
    if (filling := settings["filling"]) is not None:  # seen by the network as other tokens are
        number = tokenizer.token_to_id(filling)
        tokenizer.enable_padding(length=max_length, pad_id=number, pad_token=filling)
    tokenizer.enable_truncation(max_length)
    return lambda text: tokenizer.encode(settings["prompt"] + text).ids


def _checked_length(asked: int | str, limits: Sequence[int], name: str) -> int:
    usual, most = limits
    if asked == "auto":
        return usual
    if int(asked) > most:
        raise ValueError(f"max_length={asked} is more than the {most} tokens that {name} takes.")
    return int(asked)


# Their positions begin behind the number of the padding.
_SHIFTED = ["roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text", "xmod"]
_SHIFTED += ["ibert", "roberta-prelayernorm", "xlm-roberta-xl", "luke", "markuplm", "esm"]
