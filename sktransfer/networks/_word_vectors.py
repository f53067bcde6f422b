"""Tables of word vectors and of static tokens: a text is the vectors of its words."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from math import log
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from sktransfer.networks._blocks import END, LAST_STATES, EmbeddingModel, read_recipe
from sktransfer.networks._huggingface import files_digest
from sktransfer.networks._inference import Pooling, get_network
from sktransfer.networks._sources import (
    BuiltSource,
    freeze,
    random_seed,
)
from sktransfer.networks._tables import read_table, table_files
from sktransfer.networks._tokens import Tokens
from sktransfer.networks._weights import state_digest

_WORD = re.compile(r"\w+(?:['’]\w+)?")
_MAX_WORDS = 10_000  # of a text
_SIF = 1e-3  # a in a / (a + p(w)), as in the paper


class WordTable(EmbeddingModel):
    """Vectors of words; its inputs are texts as (n, n_words, width + 1), the last one 1.

    `recipe` says how texts become rows of the table, so that the module alone is enough for that.
    """

    table: torch.Tensor

    def __init__(self, table: torch.Tensor, recipe: dict, extra: Mapping[str, torch.Tensor]):
        super().__init__(recipe)
        self.pooling = Pooling("avg_unit" if recipe.get("normalize") else "avg", "texts")
        self.register_buffer("table", table)
        self.names_of_extra = list(extra)
        for name, tensor in extra.items():
            self.register_buffer(name, tensor)

    def values(self, x: torch.Tensor, keys: list[str]) -> dict[str, torch.Tensor]:
        return {LAST_STATES: x, END: self.pooling(x)}

    def example(self, n: int) -> torch.Tensor:
        return torch.ones(n, 1, self.table.shape[1] + 1)

    def __deepcopy__(self, memo: dict) -> WordTable:
        return self  # nothing trains it

    def to(self, *args, **kwargs) -> WordTable:
        return self  # its forward pass does not read the table


class WordVectors(BuiltSource):
    """A table of word vectors, or of static tokens, from a file or from memory."""

    is_text = True

    def __init__(self, name: str, weights: object) -> None:
        if weights not in ("DEFAULT", None):
            raise ValueError(
                f"weights={weights!r} is not accepted for {name!r}: 'DEFAULT' means those of its "
                "file, None random ones."
            )
        self.name, self.is_random, self.seed = name, weights is None, random_seed.get()
        self.digest = self.digest_files()
        self.preprocessing = self.tokens("auto")

    @classmethod
    def of(cls, name: str, state: Mapping[str, torch.Tensor]) -> WordVectors:
        """Make one of a saved table's state."""
        recipe = read_recipe(state["recipe"])
        extra = {k: v for k, v in state.items() if k not in ("table", "recipe")}
        made = cls.__new__(cls)
        made.name, made.is_random, made.seed = name, False, 0
        made.module = freeze(WordTable(state["table"], recipe, extra))  # type: ignore[assignment]
        made.digest = f"own-{state_digest(made.module)}"
        made.preprocessing = made.tokens("auto")
        return made

    def digest_files(self) -> str:
        if "module" in vars(self):  # of a saved file: no other file is needed
            return self.digest
        digest = files_digest(table_files(self.name))
        return f"random:{self.seed}:{digest}" if self.is_random else digest

    def build(self) -> nn.Module:
        if "module" in vars(self):
            return self.module
        table, recipe, extra = read_table(self.name)
        if self.is_random:
            rng = np.random.default_rng(self.seed)
            scale = float(np.abs(table).mean()) or 1.0
            table = rng.normal(scale=scale, size=table.shape).astype(np.float32)
        return freeze(WordTable(torch.from_numpy(table), recipe, extra))

    module: WordTable

    def tokens(self, max_length: int | str) -> WordTokens:
        """Return the preprocessing of texts, cut after so many words."""
        return WordTokens(self, _MAX_WORDS if max_length == "auto" else int(max_length))

    def lookup(self) -> Lookup:
        """Return what finds words in the table."""
        module = get_network(self, (1,)).module
        assert isinstance(module, WordTable)
        return lookup_of(module)


class WordTokens(Tokens):
    """The preprocessing of texts for a table: each is the vectors of its words."""

    def __init__(self, source: WordVectors, max_length: int) -> None:
        super().__init__(source, max_length)  # type: ignore[arg-type]
        self._source = source

    @property
    def input_size(self) -> tuple[int, ...]:
        return (1,)

    def prepare(self, text: str) -> np.ndarray:
        """Return the vectors of a text's known words, and a column of ones: float32."""
        lookup = self._source.lookup()
        vectors = lookup.vectors(lookup.words(text)[: self.max_length])
        return np.concatenate([vectors, np.ones((len(vectors), 1), np.float32)], axis=1)

    def join(
        self, texts: Sequence[torch.Tensor], device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Pad texts with zeros: float32 (n, longest, width + 1)."""
        longest = max(1, *map(len, texts))
        joined = torch.zeros(len(texts), longest, texts[0].shape[1])
        for row, text in zip(joined, texts, strict=True):
            row[: len(text)] = text
        return joined.to(device)


# -- words to vectors ------------------------------------------------------------------------
class Lookup(ABC):
    """Splits texts into words of a table, and finds their vectors."""

    def __init__(self, module: WordTable) -> None:
        self.table = module.table.numpy()
        self.recipe = read_recipe(module.recipe)
        self.extra = {name: getattr(module, name).numpy() for name in module.names_of_extra}

    @abstractmethod
    def words(self, text: str) -> list:
        """Return the words of a text that have a vector."""

    @abstractmethod
    def vectors(self, words: list) -> np.ndarray:
        """Return the vectors of words, float32 (n, width)."""


class WordLookup(Lookup):
    """Words of letters and digits, in lower case where the table has no other."""

    def __init__(self, module: WordTable) -> None:
        super().__init__(module)
        self._places = {word: i for i, word in enumerate(self.recipe["words"])}
        self._subwords = self.recipe["subwords"]  # [shortest, longest, number of buckets] or None

    def words(self, text: str) -> list[str]:
        found: list[str] = []
        for word in _WORD.findall(text.lower() if self.recipe["is_lower"] else text):
            if word in self._places or self._subwords:
                found.append(word)
            elif (low := word.lower()) in self._places:
                found.append(low)
            else:  # of "don't" the table may have "don"
                found += [part for part in re.split("['’]", word) if part in self._places]
        return found

    def vectors(self, words: list[str]) -> np.ndarray:
        places = np.array([self._places.get(word, 0) for word in words], dtype=np.intp)
        vectors = self.table[places].astype(np.float32)
        for k, word in enumerate(words):
            if word not in self._places:
                vectors[k] = self._of_ngrams(word)
        return vectors

    def _of_ngrams(self, word: str) -> np.ndarray:
        """Return the mean of the vectors of a word's n-grams, as fastText makes it."""
        from gensim.models.fasttext import ft_ngram_hashes

        places = ft_ngram_hashes(word, *self._subwords)
        vectors = self.extra["ngrams"][places]
        return vectors.mean(axis=0) if len(places) else np.zeros(self.table.shape[1])


class TokenLookup(Lookup):
    """Tokens of a tokenizer."""

    def __init__(self, module: WordTable) -> None:
        from tokenizers import Tokenizer

        super().__init__(module)
        self._tokenizer = Tokenizer.from_str(self.recipe["tokenizer"])
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def words(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i != self.recipe["unknown"]]

    def vectors(self, words: list[int]) -> np.ndarray:
        ids = np.array(words, dtype=np.intp)
        rows = self.extra["mapping"][ids] if "mapping" in self.extra else ids
        vectors = self.table[rows].astype(np.float32)
        return vectors * self.extra["weights"][ids, None] if "weights" in self.extra else vectors


_lookups: WeakKeyDictionary[WordTable, Lookup] = WeakKeyDictionary()


def lookup_of(module: WordTable) -> Lookup:
    """Return the one lookup of a table."""
    if (found := _lookups.get(module)) is None:
        kind = TokenLookup if "tokenizer" in read_recipe(module.recipe) else WordLookup
        found = _lookups[module] = kind(module)
    return found


# -- weights that depend on the texts of fit -------------------------------------------------
def fit_word_weights(kind: str, lookup: Lookup, texts: Collection[str]) -> dict:
    """Return what :func:`weighted_row` needs, from the texts of `fit`.

    ``"sif"``, smooth inverse frequency: a word weighs a / (a + p(w)), with p(w) its share of all
    words and a = 0.001, and `component` is the first principal direction u of the rows [1]_.
    ``"tfidf"``: a word weighs ln((1 + n) / (1 + df)) + 1 for n texts of which df hold it.

    References
    ----------
    .. [1] S. Arora, Y. Liang and T. Ma. "A simple but tough-to-beat baseline for sentence
       embeddings." ICLR 2017. https://openreview.net/forum?id=SyK00v5xx
    """
    counts: Counter = Counter()
    for text in texts:
        words = lookup.words(text)
        counts.update(words if kind == "sif" else set(words))
    n_words, n_texts = sum(counts.values()), len(texts)
    weights: dict = {"component": np.zeros(lookup.table.shape[1], dtype=np.float32)}
    if kind == "sif":
        weights["words"] = {str(w): _SIF / (_SIF + n / n_words) for w, n in counts.items()}
        weights["others"] = 1.0
        if texts:
            rows = np.stack([weighted_row(kind, weights, lookup, text) for text in texts])
            weights["component"] = np.linalg.svd(rows, full_matrices=False)[2][0]
    else:
        weights["words"] = {str(w): log((1 + n_texts) / (1 + n)) + 1 for w, n in counts.items()}
        weights["others"] = log(1 + n_texts) + 1
    return weights


def weighted_row(kind: str, weights: Mapping, lookup: Lookup, text: str) -> np.ndarray:
    """Return the row of a text: the mean of x = weight · vector, without its part x - u uᵀ x.

    As in its paper, ``"sif"`` divides by the number of words; ``"tfidf"`` by their weights.
    """
    words = lookup.words(text)
    if not words:
        return np.zeros(lookup.table.shape[1], dtype=np.float32)
    of_words = np.array([weights["words"].get(str(word), weights["others"]) for word in words])
    row = of_words @ lookup.vectors(words) / (len(words) if kind == "sif" else of_words.sum())
    return (row - weights["component"] * (weights["component"] @ row)).astype(np.float32)
