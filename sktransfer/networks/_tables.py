"""Files of word vectors and of static tokens."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

from sktransfer._progress import shown

Table = tuple[np.ndarray, dict, dict[str, torch.Tensor]]

_STATIC_FILES = ("model.safetensors", "tokenizer.json", "config.json")


def table_files(name: str) -> list[Path]:
    """Return the files of ``"vectors:PATH"`` or ``"static:FOLDER"``."""
    kind, _, place = name.partition(":")
    path = Path(place).expanduser().absolute()
    if kind == "static":
        files = [path / file for file in _STATIC_FILES]
        if missing := [file.name for file in files[:2] if not file.is_file()]:
            raise FileNotFoundError(
                f"backbone={name!r}: the folder {str(path)!r} holds no {' and no '.join(missing)}. "
                "A folder that save_pretrained of model2vec wrote is needed."
            )
        return [file for file in files if file.is_file()]
    if not path.is_file():
        raise FileNotFoundError(
            f"backbone={name!r}: there is no file {path.name!r} in {str(path.parent)!r}. The path "
            "of a table of word vectors is needed: text or binary of GloVe or word2vec, fastText's "
            ".bin, or .npy with a list of words beside it."
        )
    return [path, _words_file(path, name)] if path.suffix == ".npy" else [path]


def read_table(name: str) -> Table:
    """Return the vectors of a file, how texts become rows of them, and further tensors."""
    files = table_files(name)
    try:
        return _read_static(files) if name.startswith("static:") else _read_vectors(files)
    except (ValueError, KeyError, EOFError, NotImplementedError) as error:
        raise ValueError(
            f"backbone={name!r}: {str(files[0])!r} cannot be read as a table of vectors "
            f"({type(error).__name__}: {error!s:.200})."
        ) from error


def _read_static(files: list[Path]) -> Table:
    from safetensors.torch import load_file

    state = load_file(files[0])
    tokenizer = files[1].read_text("utf-8")
    settings = json.loads(files[2].read_text("utf-8")) if len(files) > 2 else {}
    model = json.loads(tokenizer)["model"]
    unknown = model.get("unk_id")
    if unknown is None and isinstance(model.get("vocab"), dict):
        unknown = model["vocab"].get(model.get("unk_token"))
    recipe = {
        "tokenizer": tokenizer,
        "unknown": unknown,
        "normalize": bool(settings.get("normalize", True)),
    }
    extra = {key: tensor for key, tensor in state.items() if key in ("mapping", "weights")}
    return state["embeddings"].numpy(), recipe, extra


def _read_vectors(files: list[Path]) -> Table:
    path, subwords, extra = files[0], None, {}
    if path.suffix == ".npy":
        table, words = np.load(path, mmap_mode="c"), _read_words(files[1])
        if table.ndim != 2 or len(table) != len(words):
            raise ValueError(f"it has the shape {table.shape}, for {len(words)} words")
    elif ".bin" not in path.suffixes:
        table, words = _read_text(path)
    else:
        vectors = _read_by_gensim(path)
        table, words = vectors.vectors, list(vectors.index_to_key)
        if hasattr(vectors, "vectors_ngrams"):
            subwords = [vectors.min_n, vectors.max_n, vectors.bucket]
            extra = {"ngrams": torch.from_numpy(vectors.vectors_ngrams)}
    is_lower = not any(word != word.lower() for word in words)
    recipe = {"words": words, "is_lower": is_lower, "subwords": subwords}
    return table.astype(np.float32, copy=False), recipe, extra


def _read_text(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read a word and its numbers from each line; word2vec's first line is their count."""
    words, rows = [], []
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt", encoding="utf-8", errors="replace") as file:
        first = file.readline().split()
        width = int(first[1]) if len(first) == 2 else len(first) - 1
        if len(first) != 2:
            file.seek(0)
        for line in file:
            word, *numbers = line.rstrip().rsplit(" ", width)  # a word may hold spaces
            rows.append(np.array(numbers, dtype=np.float32))
            words.append(word)
            if len(rows[-1]) != width:
                raise ValueError(f"line {len(words)} has {len(numbers)} numbers, not {width}")
    return np.stack(rows), words


def _read_by_gensim(path: Path):
    if importlib.util.find_spec("gensim") is None:
        raise ImportError(
            "Binary tables of word vectors need the package gensim, which is not installed: "
            "pip install sktransfer[text]"
        )
    from gensim.models import KeyedVectors
    from gensim.models.fasttext import load_facebook_vectors

    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        is_fasttext = file.read(4) == b"\xba\x16\x4f\x2f"  # its magic number, little-endian
    if is_fasttext:
        return load_facebook_vectors(str(path))
    return KeyedVectors.load_word2vec_format(str(path), binary=True)


_WORD_FILES = (".txt", ".json", ".vocab", "_words.txt", "_vocab.txt", ".parquet")


def _words_file(path: Path, name: str) -> Path:
    """Return the list of words beside a file .npy."""
    places = [path.with_name(path.stem + ending) for ending in _WORD_FILES]
    places.append(path.with_name("words.txt"))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"backbone={name!r}: beside the vectors {path.name!r} their words are needed, one a "
            f"line in the order of the rows: {shown([place.name for place in places])}."
        )
    return found


def _read_words(path: Path) -> list[str]:
    if path.suffix == ".json":
        words = json.loads(path.read_text("utf-8"))
        return sorted(words, key=words.__getitem__) if isinstance(words, dict) else list(words)
    if path.suffix == ".parquet":
        import pandas as pd

        return pd.read_parquet(path).iloc[:, 0].astype(str).tolist()
    with open(path, encoding="utf-8") as file:  # str.splitlines() would split at "\x85", too
        return [line.rstrip("\n") for line in file]
