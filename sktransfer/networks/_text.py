"""Networks of texts: from tokens to one row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from sktransfer._progress import warn
from sktransfer.networks._blocks import SplitModel, random_ids, read_recipe
from sktransfer.networks._huggingface import (
    FolderSource,
    import_transformers,
    make_skeleton,
    quiet,
    read_config,
)
from sktransfer.networks._inference import Pooling
from sktransfer.networks._sources import GivenSource, random_seed
from sktransfer.networks._tokens import PADDING, Tokens
from sktransfer.networks._weights import state_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"]
_TOKENIZER_FILES += ["merges.txt", "tokenizer.model", "special_tokens_map.json"]
_SENTENCE_FILES = ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"]
_MAX_LENGTH = 512  # where no file says what the network takes
# sentence-transformers' names of poolings
_POOLINGS = {"mean": "avg", "cls": "cls", "max": "max", "lasttoken": "last"}
_LARGE = 10**6  # transformers' tokenizers give a huge number where there is no limit


class TextModel(SplitModel):
    """A model from token numbers (n, length), -1 for padding, to rows.

    What goes from part to part is (n, length, width + 1): the hidden states and, last, the mask.
    """

    def __init__(self, model: nn.Module, recipe: dict) -> None:
        super().__init__(model, recipe)
        self.pooling, self.padding = Pooling(recipe["pooling"], "texts"), recipe["padding"]
        config = getattr(model.config, "text_config", model.config)
        self.n_words: int = config.vocab_size  # type: ignore[union-attr, assignment]
        # CLIP's row is that of the token that ends a text: the one of the largest number where
        # an old configuration says 2.
        end = getattr(config, "eos_token_id", None)
        self.closing = end if isinstance(end, int) and end != 2 else self.n_words - 1

    def example(self, n: int) -> torch.Tensor:
        return random_ids(n, 6, self.n_words)

    def inputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        is_token = x != PADDING
        ids = torch.where(is_token, x, self.padding)
        return {"input_ids": ids, "attention_mask": is_token.long()}

    def pack(self, hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return torch.cat([hidden, mask], dim=-1)

    def unpack(self, value: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        is_token = value[..., -1] > 0.5
        other = next(k for k in range(self.n_words) if k not in (self.padding, self.closing))
        ids = torch.where(is_token, other, PADDING)
        if self.method != "forward":
            last = is_token.sum(-1, keepdim=True).clamp(min=1) - 1
            ids = ids.scatter(1, last, self.closing)
        return value[..., :-1], self.inputs(ids)

    def row(self, output, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.method == "forward":
            return self.pooling(self.pack(output.last_hidden_state, inputs))
        features = output if isinstance(output, torch.Tensor) else output.pooler_output
        return features.float()

    def tokens(self, output) -> torch.Tensor:
        return output.last_hidden_state


class TextSource(FolderSource):
    """A network of transformers for texts, with its tokenizer."""

    is_text = True
    files = (*_TOKENIZER_FILES, *_SENTENCE_FILES)

    def __init__(self, name: str, weights: object) -> None:
        self.name, self.is_random, self.seed = name, weights is None, random_seed.get()
        if weights not in ("DEFAULT", None):
            raise ValueError(
                f"weights={weights!r} is not accepted for {name!r}: 'DEFAULT' means those of its "
                "folder, None random ones."
            )
        self.config = read_config(name)
        self.digest = self.digest_files()
        self.preprocessing = self.tokens("auto")

    # -- texts to tokens --------------------------------------------------------------------
    def tokens(self, max_length: int | str) -> Tokens:
        """Return the preprocessing of texts, cut after so many tokens."""
        return Tokens(self, _checked_length(max_length, self.limits(), self.name))

    def encoder(self, max_length: int) -> Callable[[str], Sequence[int]]:
        return _encoder(self.tokenizer_json(), max_length, self._filling())

    def _filling(self) -> str | None:
        """Return the token that fills up all texts; None unless the network was trained so."""
        if not self.config.model_type.startswith("siglip"):
            return None
        token = self._read("tokenizer_config.json").get("pad_token")
        return token["content"] if isinstance(token, dict) else token

    def tokenizer_json(self) -> str:
        """Return the tokenizer in the format of the package tokenizers."""
        path = self.folder / "tokenizer.json"
        if path.is_file():
            return path.read_text("utf-8")
        transformers = import_transformers()
        try:
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
        known = [int(n) for n in [most, *usual] if n is not None and 0 < n < _LARGE]
        return [min(known, default=_MAX_LENGTH), most]

    def _read(self, name: str):
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def _pooling(self) -> str:
        """Return the pooling that the folder's configuration for sentences says, else the mean."""
        modules: list = self._read("modules.json") or []
        kinds = [str(part["type"]).rpartition(".")[2] for part in modules]
        odd = [k for k in kinds if k not in ("Transformer", "Pooling", "Normalize")]
        settings = self._read("1_Pooling/config.json")
        # One name, or before sentence-transformers 6 a flag for each: pooling_mode_cls_token.
        flags = [k for k, v in settings.items() if v is True and k.startswith("pooling_mode_")]
        modes = [settings["pooling_mode"]] if "pooling_mode" in settings else flags
        modes = [re.sub("^pooling_mode_|_tokens?$", "", str(mode)) for mode in modes]
        if "Normalize" in kinds:  # which makes these equal
            modes = ["mean" if mode == "mean_sqrt_len" else mode for mode in modes]
        kind = _POOLINGS.get("+".join(modes) or "mean")
        if odd or kind is None:
            warn(
                f"{self.name} has {odd or modes} for sentences, which is not applied: its rows are "
                "the mean of its tokens."
            )
            return "avg"
        return f"{kind}_unit" if "Normalize" in kinds else kind

    # -- the network ------------------------------------------------------------------------
    def build(self) -> nn.Module:
        model = self.make()
        config = getattr(self.config, "text_config", self.config)
        recipe = {
            "config": self.config.to_dict(),
            "tokenizer": self.tokenizer_json(),
            "filling": self._filling(),
            "limits": self.limits(),
            "pooling": self._pooling(),
            "padding": max(0, config.pad_token_id or 0),
            "method": "get_text_features" if hasattr(model, "get_text_features") else "forward",
        }
        return TextModel(_text_part(model), recipe).ready()


class SavedTextSource(GivenSource):
    """A network for texts from a saved file."""

    is_text = True

    def __init__(self, name: str, module: TextModel, recipe: dict) -> None:
        self.name, self._recipe = name, recipe
        super().__init__(name, self.tokens("auto"), module, f"own-{state_digest(module)}")

    def tokens(self, max_length: int | str) -> Tokens:
        return Tokens(self, _checked_length(max_length, self._recipe["limits"], self.name))

    def encoder(self, max_length: int) -> Callable[[str], Sequence[int]]:
        return _encoder(self._recipe["tokenizer"], max_length, self._recipe.get("filling"))


def saved_text_source(name: str, state: Mapping[str, torch.Tensor]) -> SavedTextSource:
    """Return the network for texts whose state is in memory; no file is read."""
    recipe = read_recipe(state["recipe"])
    made = TextModel(_text_part(make_skeleton(recipe["config"])), recipe).ready(state)
    return SavedTextSource(name, made, recipe)


def _text_part(model: PreTrainedModel) -> PreTrainedModel:
    """Return what of a model embeds texts."""
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    for name in ("pooler", "vision_model"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    model.config.use_cache = False
    return model


def _encoder(
    tokenizer_json: str, max_length: int, filling: str | None
) -> Callable[[str], Sequence[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    if filling is not None:  # which the network sees as it does the other tokens
        number = tokenizer.token_to_id(filling)
        tokenizer.enable_padding(length=max_length, pad_id=number, pad_token=filling)
    tokenizer.enable_truncation(max_length)
    return lambda text: tokenizer.encode(text).ids


def _checked_length(asked: int | str, limits: Sequence[int], name: str) -> int:
    usual, most = limits
    if asked == "auto":
        return usual
    if int(asked) > most:
        raise ValueError(f"max_length={asked} is more than the {most} tokens that {name} takes.")
    return int(asked)


# Their positions begin behind the number of the padding.
_SHIFTED = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text", "xmod")
