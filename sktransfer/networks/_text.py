"""Networks of texts: from tokens to one row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from sktransfer._threads import own_random_state
from sktransfer.networks._blocks import SplitModel, random_ids
from sktransfer.networks._huggingface import (
    files_digest,
    hf_folder,
    import_transformers,
    load_model,
    quiet,
    read_config,
    weights_files,
)
from sktransfer.networks._inference import Pooling
from sktransfer.networks._sources import Source, freeze, random_seed
from sktransfer.networks._tokens import PADDING, Tokens

_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"]
_TOKENIZER_FILES += ["merges.txt", "tokenizer.model", "special_tokens_map.json"]
_SENTENCE_FILES = ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"]
_MAX_LENGTH = 512  # where no file says what the network takes
# sentence-transformers' names of poolings
_POOLINGS = {"mean_tokens": "avg", "cls_token": "cls", "max_tokens": "max", "lasttoken": "last"}
_LARGE = 10**6  # transformers' tokenizers give a huge number where there is no limit


class TextModel(SplitModel):
    """A model from token numbers (n, length), -1 for padding, to rows.

    What goes from part to part is (n, length, width + 1): the hidden states and, last, the mask.
    """

    def __init__(self, model: nn.Module, pooling: str, method: str, padding: int) -> None:
        super().__init__(model, method)
        self.pooling, self.padding = Pooling(pooling, "texts"), padding
        self.n_words: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]

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
        other = (self.padding + 1) % self.n_words
        return value[..., :-1], self.inputs(torch.where(is_token, other, PADDING))

    def row(self, output, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.method == "forward":
            return self.pooling(self.pack(output.last_hidden_state, inputs))
        features = output if isinstance(output, torch.Tensor) else output.pooler_output
        return features.float()

    def tokens(self, output) -> torch.Tensor:
        return output.last_hidden_state


class TextSource(Source):
    """A network of transformers for texts, with its tokenizer."""

    is_text = True

    def __init__(self, name: str, weights: object, max_length: int | str = "auto") -> None:
        self.name, self.is_random, self.seed = name, weights is None, random_seed.get()
        if weights not in ("DEFAULT", None):
            raise ValueError(
                f"weights={weights!r} is not accepted for {name!r}: 'DEFAULT' means those of its "
                "folder, None random ones."
            )
        self.config = read_config(name)
        self.digest = self._digest()
        self.preprocessing = Tokens(self, self._length(max_length))

    @property
    def folder(self) -> Path:
        # Where it is now: a pickle may come from another machine.
        return hf_folder(self.name)

    def _files(self) -> list[Path]:
        folder = self.folder
        names = ["config.json", *_TOKENIZER_FILES, *_SENTENCE_FILES]
        found = [folder / name for name in names if (folder / name).is_file()]
        return found if self.is_random else [*found, *weights_files(folder, self.name)]

    def _digest(self) -> str:
        of_seed = f"random:{self.seed}:{torch.__version__}:" if self.is_random else ""
        return of_seed + files_digest(self._files())

    def check_weights(self) -> None:
        if self._digest() != self.digest:
            raise FileNotFoundError(
                f"The files of {self.name} in {str(self.folder)!r} have changed since this was "
                "fitted: put the old ones back, or fit again."
            )

    # -- texts to tokens --------------------------------------------------------------------
    def encoder(self, max_length: int) -> Callable[[str], Sequence[int]]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer_json())
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        return lambda text: tokenizer.encode(text).ids

    def tokenizer_json(self) -> str:
        """Return the tokenizer in the format of the package tokenizers."""
        path = self.folder / "tokenizer.json"
        return path.read_text("utf-8") if path.is_file() else self._converted()

    def _converted(self) -> str:
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

    def _length(self, asked: int | str) -> int:
        limits = [self._read("tokenizer_config.json").get("model_max_length")]
        config = getattr(self.config, "text_config", self.config)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and config.model_type in _SHIFTED:
            positions -= (config.pad_token_id or 0) + 1  # the first ones are of no token
        limits.append(positions)
        known = [int(n) for n in limits if n is not None and 0 < n < _LARGE]
        most = min(known, default=_MAX_LENGTH)
        if asked == "auto":
            of_sentences = self._read("sentence_bert_config.json").get("max_seq_length")
            return min(most, of_sentences or most)
        if positions is not None and int(asked) > positions:
            raise ValueError(
                f"max_length={asked} is more than the {positions} tokens that {self.name} takes."
            )
        return int(asked)

    def _read(self, name: str):
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def _pooling(self) -> str:
        """Return the pooling that the folder's configuration for sentences says, else the mean."""
        modules: list = self._read("modules.json") or []
        kinds = [str(part["type"]).rpartition(".")[2] for part in modules]
        if odd := [k for k in kinds if k not in ("Transformer", "Pooling", "Normalize")]:
            raise ValueError(
                f"{self.name} has the further modules {odd} for sentences, which are not applied: "
                "choose a pooling, 'mean' for example."
            )
        settings = self._read("1_Pooling/config.json")
        modes = [k.removeprefix("pooling_mode_") for k, v in settings.items() if v is True]
        asked = [_POOLINGS.get(mode) for mode in modes if mode not in ("include_prompt",)]
        if settings.get("pooling_mode") is not None:
            asked = [_POOLINGS.get(str(settings["pooling_mode"]))]
        kind = asked[0] if len(asked) == 1 and asked[0] else "avg"
        return f"{kind}_unit" if "Normalize" in kinds else kind

    # -- the network ------------------------------------------------------------------------
    def build(self) -> nn.Module:
        transformers = import_transformers()
        if self.is_random:
            with own_random_state(self.seed), quiet():
                model = transformers.AutoModel.from_config(self.config)
                model = model.float()
        else:
            model = load_model(self.folder, self.name, self.config)
        method = "get_text_features" if hasattr(model, "get_text_features") else "forward"
        if self.config.is_encoder_decoder:
            model = model.get_encoder()
        for name in ("pooler", "vision_model"):
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        model.config.use_cache = False
        config = getattr(self.config, "text_config", self.config)
        padding = config.pad_token_id if config.pad_token_id is not None else 0
        made = TextModel(model, self._pooling(), method, max(0, padding))
        freeze(made)
        made.split()
        return made

    def load(self, module: nn.Module, head_layers: set[str]) -> None:
        """Do nothing: the network is built with its weights."""


# Their positions begin behind the number of the padding.
_SHIFTED = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text", "xmod")
