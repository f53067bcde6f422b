"""transfer_report on texts: against random weights, tf-idf and the majority."""

import numpy as np
import pytest
from sklearn import config_context
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tiny_transformers import make_text_folder

from sktransfer import FineTuningClassifier, PretrainedTextExtractor
from sktransfer.transferability import rank_backbones, transfer_report

GOOD, BAD = (
    ["fine", "great", "superb", "lovely", "bright"],
    ["poor", "awful", "dull", "weak", "grim"],
)
OTHERS = [f"word{k}" for k in range(60)]


@pytest.fixture
def vectors(tmp_path):
    """Word vectors in which good words are near each other, and so are bad ones."""
    rng = np.random.default_rng(0)
    rows = {word: rng.normal(size=6) for word in [*GOOD, *BAD, *OTHERS]}
    for sign, words in ((3, GOOD), (-3, BAD)):
        for word in words:
            rows[word][0] += sign
    lines = [f"{word} {' '.join(f'{x:.4f}' for x in row)}" for word, row in rows.items()]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    return f"vectors:{tmp_path / 'vectors.txt'}"


def make_texts(n):
    """Each text has one telling word, so that tf-idf has to see each of these words."""
    rng = np.random.default_rng(1)
    y = np.arange(n) % 2
    texts = [" ".join([*rng.choice(OTHERS, 6), rng.choice([BAD, GOOD][label])]) for label in y]
    return np.array(texts, dtype=object), y


def test_word_vectors_that_fit_help(vectors):
    X, y = make_texts(100)
    model = make_pipeline(PretrainedTextExtractor(vectors), LogisticRegression(C=10))
    report = transfer_report(model, X, y, train_sizes=[8, 40], cv=5, random_state=0)
    assert report.verdict_ == "helps"
    assert list(report.start_) == ["random", "tf-idf", "dummy"]
    assert report.start_["tf-idf"].value > 0


def test_tf_idf_where_all_output_is_pandas(vectors):
    X, y = make_texts(20)
    model = make_pipeline(PretrainedTextExtractor(vectors), LogisticRegression())
    with config_context(transform_output="pandas"):
        report = transfer_report(model, X, y, train_sizes=[1.0], against="pixels", cv=2)
    assert np.isfinite(report.scores_["tf-idf"]).all()


def test_fine_tuning_on_texts(tmp_path):
    pytest.importorskip("transformers")
    X = np.array(["a good film", "a bad film"] * 12, dtype=object)
    model = FineTuningClassifier(f"hf:{make_text_folder(tmp_path)}", max_epochs=1, unfreeze=0)
    report = transfer_report(
        model, X, [1, 0] * 12, train_sizes=[16], against=["pixels"], cv=3, random_state=0
    )
    assert list(report.start_) == ["tf-idf"]


def test_several_labels_per_text(tmp_path):
    pytest.importorskip("transformers")
    X = np.array(["a good film", "a bad film"] * 12, dtype=object)
    labels = np.stack([np.arange(24) % 2, np.arange(24) % 3 == 0], axis=1).astype(int)
    model = FineTuningClassifier(f"hf:{make_text_folder(tmp_path)}", max_epochs=1, unfreeze=0)
    report = transfer_report(
        model, X, labels, train_sizes=[1.0], against=["pixels"], cv=2, random_state=0
    )
    assert np.isfinite(report.scores_["tf-idf"]).all()


def test_ranking(vectors, tmp_path):
    X, y = make_texts(80)
    (tmp_path / "other").mkdir()
    lines = [f"{word} {len(word)} 1" for word in [*GOOD, *BAD]]
    (tmp_path / "other" / "length.txt").write_text("\n".join(lines))
    other = PretrainedTextExtractor(f"vectors:{tmp_path / 'other' / 'length.txt'}", pooling="max")
    ranking = rank_backbones(X, y, [other, vectors], random_state=0)
    table = ranking.table_
    assert table["backbone"].tolist() == [vectors, other.backbone]
    assert table["score"][0] > 0.75
    assert table["gain"][0] > 0.15
    best = ranking.best_.fit(X)
    assert best.transform(X).shape == (80, 6)
    with pytest.raises(ValueError, match="Some of the backbones take images and others texts"):
        rank_backbones(X, y, [vectors, "builtin"])
    with pytest.raises(ValueError, match="pooling='sif' depends on the texts of fit"):
        rank_backbones(X, y, [other.set_params(pooling="sif")])


def test_ranking_of_layers(tmp_path):
    pytest.importorskip("transformers")
    X = np.array(["a good film", "a bad film", "not dull", "very dull"] * 6, dtype=object)
    name = f"hf:{make_text_folder(tmp_path)}"
    ranking = rank_backbones(X, [1, 0, 1, 0] * 6, [name], layers="stages", cv=3, random_state=0)
    layers = {"embeddings", "block0", "block1", "block2", "embedding"}
    assert set(ranking.table_["layer"]) == layers
    numbered = PretrainedTextExtractor(name, layer=[0, -1])
    ranking = rank_backbones(X, [1, 0, 1, 0] * 6, [numbered], cv=3, random_state=0)
    assert ranking.table_["layer"].tolist() == ["embeddings + last_states"]
