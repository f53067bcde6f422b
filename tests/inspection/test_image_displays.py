"""Displays of images: what they draw, from any container, and what they leave in the store."""

import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC, OneClassSVM

from sktransfer import PretrainedFeatureExtractor, embedding_store, inspection
from sktransfer.inspection import (
    EmbeddingDisplay,
    LeaksDisplay,
    NeighborsDisplay,
    SaliencyDisplay,
    TopLossesDisplay,
)


@pytest.fixture(params=["paths", "arrays", "frame", "series"])
def X(request, pictures, picture_files):
    """The twelve pictures in a container."""
    return {
        "paths": picture_files,
        "arrays": pictures,
        "frame": pd.DataFrame({"image": picture_files}, index=range(30, 42)),
        "series": pd.Series(picture_files, index=range(30, 42)),
    }[request.param]


@pytest.fixture
def y():
    return np.array(["left", "right"] * 6)


@pytest.fixture
def own_axes():
    return Figure().subplots()


def titles(display):
    return [text.get_text() for text in display.texts_]


# -- every display ---------------------------------------------------------------------------
def test_all_are_public():
    assert set(inspection.__all__) <= set(dir(inspection))
    for name in inspection.__all__:
        assert getattr(inspection, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'SomeDisplay'"):
        _ = inspection.SomeDisplay


def test_own_axes_are_used(pictures, y, own_axes):
    display = EmbeddingDisplay(pictures, np.random.default_rng(0).normal(size=(12, 2)), y)
    assert display.plot(ax=own_axes) is display
    assert display.ax_ is own_axes
    assert display.figure_ is own_axes.figure
    for other in (
        LeaksDisplay(pictures, None, [1], [0], [0.9], ["copy"]),
        NeighborsDisplay(pictures, pictures[:2], [[0, 1], [1, 0]], [[0, 1], [0, 1]]),
        SaliencyDisplay(pictures[:2], np.ones((2, 4, 4)), ["a", "b"]),
        TopLossesDisplay(pictures, [3], y[:1], y[1:2], [0.7]),
    ):
        assert other.plot(ax=Figure().subplots()) is other
    assert plt.get_fignums() == []


def test_a_missing_matplotlib_is_named(pictures, monkeypatch):
    display = LeaksDisplay(pictures, None, [1], [0], [0.9], ["copy"])
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"LeaksDisplay draws with .*sktransfer\[plot\]"):
        display.plot()


# -- leaks, neighbours -----------------------------------------------------------------------
def test_leaks(X):
    table = pd.DataFrame(
        {
            "test_row": [4, 2],
            "train_row": [4, 3],
            "similarity": [1, np.nan],
            "kind": ["exact", "group"],
        }
    )
    display = LeaksDisplay.from_leaks(table, X, X)
    assert titles(display)[:2] == ["exact 1.00\ntest row 4", "\ntrain row 4"]
    assert titles(display)[2] == "group\ntest row 2"
    first, second = (np.asarray(image.get_array()) for image in display.images_[:2])
    assert (first == second).all()
    assert len(LeaksDisplay.from_leaks(table, X, n_pairs=1).images_) == 2


def test_leaks_of_every_kind_are_drawn(pictures):
    kinds = ["exact"] * 6 + ["copy", "flip", "copy", "crop"]
    table = {"kind": kinds, "test_row": range(10), "train_row": [11] * 10, "similarity": [1] * 10}
    assert LeaksDisplay.from_leaks(table, pictures, n_pairs=5).test_row.tolist() == [0, 1, 6, 7, 9]


def test_no_leaks(pictures):
    table = {"test_row": [], "train_row": [], "similarity": [], "kind": []}
    display = LeaksDisplay.from_leaks(table, pictures)
    assert display.images_ == []
    assert display.ax_.get_title() == "No similar images"


def test_neighbors(X, y, pictures):
    extractor = PretrainedFeatureExtractor(n_jobs=1)
    display = NeighborsDisplay.from_estimator(extractor, X, pictures[:2], y_train=y, n_neighbors=3)
    assert display.neighbors[:, 0].tolist() == [0, 1]
    np.testing.assert_allclose(display.distances[:, 0], 0, atol=1e-4)
    assert len(display.images_) == 2 * 4
    assert titles(display)[:2] == ["image 0", "left\nrow 0, 0.00"]
    assert not hasattr(extractor, "backbone_")


def test_neighbors_need_columns(pictures, y):
    model = make_pipeline(PretrainedFeatureExtractor(), LogisticRegression()).fit(pictures, y)
    with pytest.raises(TypeError, match=r"has no transform.*pipeline\[:-1\]"):
        NeighborsDisplay.from_estimator(model, pictures, pictures)
    display = NeighborsDisplay.from_estimator(model[:-1], pictures, pictures[:1], n_neighbors=50)
    assert np.shape(display.neighbors) == (1, 12)


def test_unreadable_images_are_grey_squares(pictures):
    X = [None, pictures[0]]
    display = LeaksDisplay(X, None, [0], [1], [1.0], ["copy"]).plot()
    assert (np.asarray(display.images_[0].get_array()) == 200).all()


# -- top losses ------------------------------------------------------------------------------
def test_top_losses_are_the_confident_mistakes(X):
    y_true = np.array(["a", "b"] * 6)
    score = np.full((12, 2), 0.5)
    score[0], score[1], score[2], score[3] = (0.1, 0.9), (0.3, 0.7), (0.9, 0.1), (0.8, 0.2)
    score[4:, 0] = np.where(y_true[4:] == "a", 0.6, 0.4)
    score[4:, 1] = 1 - score[4:, 0]
    display = TopLossesDisplay.from_predictions(X, y_true, score)
    assert list(display.rows) == [0, 3]
    assert titles(display) == ["row 0, 0.9\nis a\npredicted b", "row 3, 0.8\nis b\npredicted a"]
    binary = TopLossesDisplay.from_predictions(X, y_true, score[:, 1], classes=["a", "b"])
    assert list(binary.rows) == [0, 3]
    logits = np.log(score[:, 1] / score[:, 0])
    assert list(TopLossesDisplay.from_predictions(X, y_true, logits, classes=["a", "b"]).rows) == [
        0,
        3,
    ]


@pytest.mark.parametrize("classifier", [LogisticRegression(), LinearSVC()])
def test_top_losses_of_an_estimator(pictures, y, classifier):
    model = make_pipeline(PretrainedFeatureExtractor(), classifier).fit(pictures, y)
    wrong = y.copy()
    wrong[[2, 7]] = wrong[[7, 2]]
    display = TopLossesDisplay.from_estimator(model, pictures, wrong)
    assert sorted(display.rows) == [2, 7]
    assert TopLossesDisplay.from_estimator(model, pictures, y).ax_.get_title() == "No mistakes"


def test_top_losses_of_a_regression(pictures):
    y = np.arange(12.0)
    model = make_pipeline(PretrainedFeatureExtractor(), Ridge()).fit(pictures, y)
    y[5] += 100
    display = TopLossesDisplay.from_estimator(model, pictures, y, n_images=3)
    assert len(display.rows) == 3
    assert display.rows[0] == 5
    assert display.loss[0] == pytest.approx(100, rel=0.1)


def test_top_losses_of_a_single_column(pictures, y):
    """LinearRegression returns one if y had one."""
    numbers = np.arange(12.0)[:, None]
    display = TopLossesDisplay.from_predictions(pictures, numbers, numbers * 2, n_images=2)
    assert list(display.rows) == [11, 10]
    ages = np.full(12, 200, dtype=np.uint8)
    display = TopLossesDisplay.from_predictions(pictures, ages, ages - np.uint8(50))
    assert set(display.loss) == {50}
    of_right = (y == "right")[:, None] * 0.8 + 0.1
    of_right[4] = 0.7
    display = TopLossesDisplay.from_predictions(pictures, y, of_right, classes=["left", "right"])
    assert list(display.rows) == [4]


def test_top_losses_check_the_columns(pictures, y):
    with pytest.raises(ValueError, match=r"y_score has 3 columns for 2 classes"):
        TopLossesDisplay.from_predictions(pictures, y, np.ones((12, 3)))
    with pytest.raises(ValueError, match="one column, which is of two classes"):
        TopLossesDisplay.from_predictions(pictures, y, np.ones(12), classes=[1, 2, 3])
    with pytest.raises(ValueError, match="y_score holds labels: give what predict_proba returns"):
        TopLossesDisplay.from_predictions(pictures, y, y)
    with pytest.raises(ValueError, match=r"1d array, got an array of shape \(12, 2\)"):
        TopLossesDisplay.from_predictions(pictures, np.ones((12, 2)), np.ones((12, 2)))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        TopLossesDisplay.from_predictions(pictures[:5], y, np.ones((12, 2)))
    with pytest.raises(ValueError, match="y_true holds labels, and y_score has one column"):
        TopLossesDisplay.from_predictions(pictures, y, np.ones(12))


def test_long_names_are_cut(pictures):
    names = np.array(["a very long name of a class"] * 12)
    display = NeighborsDisplay(pictures, pictures[:1], [[3]], [[0.5]], y_train=names[:, None])
    assert titles(display.plot())[1] == "a very long name …\nrow 3, 0.50"


# -- saliency --------------------------------------------------------------------------------
class Corner:
    """Scores images by the brightness of their upper left quarter; counts what it sees."""

    classes_ = np.array(["dark", "bright"])

    def __init__(self):
        self.batches = []

    def predict_proba(self, X):
        self.batches.append(len(X))
        p = np.array([np.mean(np.asarray(x)[:10, :10]) / 255 for x in X])
        return np.column_stack([1 - p, p])


@pytest.fixture
def corner_images():
    X = np.full((2, 40, 40, 3), 20, dtype=np.uint8)
    X[:, :10, :10] = 240
    return X


@pytest.mark.parametrize("as_container", [np.asarray, list], ids=["array", "list"])
def test_saliency_finds_the_part_that_counts(corner_images, as_container):
    model = Corner()
    X = as_container(corner_images)
    display = SaliencyDisplay.from_estimator(model, X, n_patches=4, batch_size=10)
    assert display.maps.shape == (2, 4, 4)
    assert np.unravel_index(display.maps[0].argmax(), (4, 4)) == (0, 0)
    np.testing.assert_allclose(display.maps[0][2:, 2:], 0, atol=1e-12)
    assert max(model.batches) == 10
    assert sum(model.batches) == 2 * (1 + 5**2)
    assert titles(display)[0].startswith("bright: 0.94")
    other = SaliencyDisplay.from_estimator(Corner(), X, n_patches=4, target="dark")
    np.testing.assert_allclose(other.maps, -display.maps)


def test_saliency_of_a_sure_prediction(corner_images):
    """A probability of 0.9999 hardly falls; its log-odds do."""
    model = Corner()
    proba = model.predict_proba
    model.predict_proba = lambda X: (p := proba(X) ** 6) / p.sum(axis=1, keepdims=True)
    display = SaliencyDisplay.from_estimator(model, corner_images[:1], n_patches=4)
    assert titles(display)[0] == "bright: 1.00"
    assert display.maps[0].max() > 1
    assert display.score_name == "log-odds"


def test_saliency_needs_predictions(pictures, y):
    with pytest.raises(TypeError, match="has no predict_proba nor decision_function nor predict"):
        SaliencyDisplay.from_estimator(PretrainedFeatureExtractor().fit(pictures), pictures[:1])
    model = make_pipeline(PretrainedFeatureExtractor(), LogisticRegression())
    with pytest.raises(NotFittedError, match="not fitted yet"):
        SaliencyDisplay.from_estimator(model, pictures[:1])
    with pytest.raises(ValueError, match=r"row 0.*holds None"):
        SaliencyDisplay.from_estimator(model.fit(pictures, y), [None])


def test_saliency_keeps_nothing_in_the_store(pictures, y, tmp_path):
    model = make_pipeline(PretrainedFeatureExtractor(memory=tmp_path), LogisticRegression())
    model.fit(pictures, y)
    SaliencyDisplay.from_estimator(model, pictures[:1], n_patches=2)
    assert len(embedding_store(tmp_path)) == 12
    assert len(embedding_store()) == 0
    model.predict(255 - pictures[:1])
    assert len(embedding_store(tmp_path)) == 13


@pytest.mark.parametrize("end", [LogisticRegression(), LinearSVC(), Ridge()])
def test_saliency_of_any_pipeline(X, y, end):
    target = np.arange(12.0) if isinstance(end, Ridge) else y
    model = make_pipeline(PretrainedFeatureExtractor(), end).fit(X, target)
    few = X.iloc[:2] if hasattr(X, "iloc") else X[:2]
    display = SaliencyDisplay.from_estimator(model, few, n_patches=2)
    assert np.isfinite(display.maps).all()
    assert np.abs(display.maps).max() > 0
    assert len(display.images_) == 4
    assert len(display.maps_) == 2


def test_saliency_of_a_table_with_other_columns(picture_files, y):
    X = pd.DataFrame({"size": np.arange(12.0), "image": picture_files})
    columns = make_column_transformer(
        (PretrainedFeatureExtractor(), "image"), ("passthrough", ["size"])
    )
    model = make_pipeline(columns, LogisticRegression(max_iter=1000)).fit(X, y)
    display = SaliencyDisplay.from_estimator(model, X[3:5], column="image", n_patches=2)
    assert display.maps.shape == (2, 2, 2)
    with pytest.raises(ValueError, match=r"columns \['size', 'image'\]; name one as column"):
        SaliencyDisplay.from_estimator(model, X[3:5])


def test_saliency_of_flat_rows():
    X, y = load_digits(n_class=3, return_X_y=True)
    X = X / 16
    extractor = make_pipeline(
        PretrainedFeatureExtractor(image_shape=(8, 8)), LogisticRegression(max_iter=500)
    ).fit(X[:60], y[:60])
    display = SaliencyDisplay.from_estimator(extractor, X[:1], n_patches=4)
    assert display.maps.shape == (1, 4, 4)


@pytest.mark.parametrize("container", [list, pd.Series, lambda X: pd.DataFrame({"scan": X})])
def test_saliency_of_numbers_with_a_value_range(pictures, y, container):
    """They mean the same to the estimator as in any other container."""
    scans = pictures.astype(np.uint16) * 4
    extractor = PretrainedFeatureExtractor(value_range=(0, 1023))
    X = container(list(scans))
    model = make_pipeline(extractor, LogisticRegression()).fit(X, y)
    got = SaliencyDisplay.from_estimator(model, X[:2], n_patches=2)
    expected = [f"{p.max():.2f}" for p in model.predict_proba(X[:2])]
    assert [name.split(": ")[1] for name in got.names] == expected
    assert np.abs(got.maps).max() > 0


def test_saliency_of_an_outlier_detector(pictures):
    model = make_pipeline(PretrainedFeatureExtractor(), OneClassSVM()).fit(pictures)
    display = SaliencyDisplay.from_estimator(model, pictures[:1], n_patches=2)
    assert display.names == [f"{model.decision_function(pictures[:1])[0]:.4g}"]


def test_saliency_of_a_classifier_needs_scores(pictures):
    voting = VotingClassifier([("a", LogisticRegression())])
    model = make_pipeline(PretrainedFeatureExtractor(), voting).fit(pictures, [0, 1, 2] * 4)
    with pytest.raises(TypeError, match="has no predict_proba nor decision_function: give"):
        SaliencyDisplay.from_estimator(model, pictures[:1])


def test_saliency_of_an_unknown_class(corner_images):
    with pytest.raises(ValueError, match=r"target must be one of \[.*got 'grey'"):
        SaliencyDisplay.from_estimator(Corner(), corner_images, target="grey")


# -- embedding -------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["pca", "tsne", PCA(2)])
def test_embedding(X, y, method):
    display = EmbeddingDisplay.from_estimator(PretrainedFeatureExtractor(), X, y, method=method)
    assert np.shape(display.points) == (12, 2)
    assert [len(scatter.get_offsets()) for scatter in display.scatters_] == [6, 6]
    legend = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert legend == ["left", "right"]
    assert 1 <= len(display.thumbnails_) <= 12
    frames = {thumbnail.patch.get_edgecolor() for thumbnail in display.thumbnails_}
    assert frames == {tuple(scatter.get_facecolor()[0]) for scatter in display.scatters_}


def test_embedding_without_labels_or_with_numbers(pictures):
    features = np.random.default_rng(0).normal(size=(12, 5))
    assert len(EmbeddingDisplay.from_features(features, pictures).scatters_) == 1
    many = np.tile(features, (3, 1)) + np.arange(36)[:, None]
    display = EmbeddingDisplay.from_features(many, np.tile(pictures, (3, 1, 1, 1)), np.arange(36.0))
    assert len(display.scatters_) == 1
    assert len(display.figure_.axes) == 2


def test_embedding_with_labels_that_are_missing(pictures):
    display = EmbeddingDisplay(pictures, np.eye(12, 2), ["a", None, "b"] * 4).plot()
    assert [scatter.get_label() for scatter in display.scatters_] == ["None", "a", "b"]
    display = EmbeddingDisplay(pictures, np.eye(12, 2), [0, np.nan, 1] * 4).plot()
    assert [len(scatter.get_offsets()) for scatter in display.scatters_] == [4, 4, 4]
    numbers = np.r_[np.nan, np.arange(23.0)]
    display = EmbeddingDisplay(np.tile(pictures, (2, 1, 1, 1)), np.eye(24, 2), numbers).plot()
    display.figure_.canvas.draw()
    assert (display.scatters_[0].get_facecolor()[:, 3] == 1).all()


def test_embedding_with_an_unknown_method(pictures):
    with pytest.raises(ValueError, match=r'"tsne" or a transformer .* got .umap.'):
        EmbeddingDisplay.from_features(np.eye(12), pictures, method="umap")


def test_columns_are_checked(pictures):
    features = np.random.default_rng(0).normal(size=(12, 5))
    of_pictures = {"X_train": pictures, "X": pictures[:2]}
    with pytest.raises(ValueError, match=r"1 sample\(s\) .* a minimum of 2 is required"):
        EmbeddingDisplay.from_features(features[:1], pictures[:1])
    for n in (5, 13):
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            EmbeddingDisplay.from_features(features, np.resize(pictures, (n, 40, 40, 3)))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        NeighborsDisplay.from_features(features, features[:3], **of_pictures)
    features[3] = np.nan
    message = "holds NaN or infinity in 1 of 12 rows, of which the first is row 3: leave these rows"
    with pytest.raises(ValueError, match=f"features {message}"):
        EmbeddingDisplay.from_features(features, pictures)
    with pytest.raises(ValueError, match=f"features_train {message}"):
        NeighborsDisplay.from_features(features, features[:2], **of_pictures)
