"""The start is a linear probe, against scikit-learn's own models on the extractor's embeddings."""

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler
from small_models import Record, small
from tiny_networks import tiny_network

from sktransfer import FineTuningClassifier, FineTuningRegressor, PretrainedFeatureExtractor

SAME_SIZE = {"preprocessing": {"size": 20, "crop": 20}}  # as the images are
STRENGTHS = (0.001, 0.01, 0.1, 1.0)


def start_of(X, y, cls=FineTuningClassifier, **parameters):
    """Weights and intercepts of the head before the first step."""
    record = Record()
    settings = {"unfreeze": 1, "max_epochs": 1, "callbacks": [record]}
    small(cls, **settings | parameters).fit(X, y)
    return record.start["head.linear.weight"], record.start["head.linear.bias"]


def embed(X, backbone=tiny_network):
    extractor = PretrainedFeatureExtractor(backbone, **SAME_SIZE)
    return extractor.fit_transform(X).astype(float)


def corner(X, k):
    """The first two corners: 85 % of each side from the top left, then from the bottom right."""
    height, width = X.shape[1:3]
    h, w = round(0.85 * height), round(0.85 * width)
    rows, columns = [(slice(h), slice(w)), (slice(height - h, None), slice(width - w, None))][k]
    parts = [Image.fromarray(x[rows, columns]) for x in X]
    size = (width, height)
    return np.stack([np.asarray(p.resize(size, Image.Resampling.BILINEAR)) for p in parts])


# -- epoch 0 is the probe --------------------------------------------------------------------
@pytest.mark.parametrize("head", ["linear", (5,)])
@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_epoch_zero_is_a_logistic_regression(stripes, head, unfreeze):
    X, y = stripes
    start = small(max_epochs=0, unfreeze=unfreeze, head=head, **SAME_SIZE).fit(X, y)
    assert start.best_epoch_ == start.n_iter_ == 0
    rows = embed(X)
    np.testing.assert_allclose(start.transform(X), rows, rtol=1e-4, atol=1e-4)
    # The gradient of the loss on standardised embeddings is that of the penalty: C of a grid.
    coef = start.net_.module_.head.linear.weight.detach().numpy() * rows.std(axis=0)
    z = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    error = start.predict_proba(X) - (y[:, None] == start.classes_)
    gradient = error.T @ z
    strength = -np.median(coef / gradient)
    assert np.abs(np.log10(np.array(STRENGTHS) / strength)).min() < 0.05
    np.testing.assert_allclose(coef, -strength * gradient, atol=0.02 * abs(coef).max())


@pytest.mark.parametrize("backbone", [tiny_network, "builtin"], ids=str)
def test_few_rows_take_a_fixed_strength(stripes, backbone):
    """Also where there are more columns than rows."""
    X, y = stripes[0][:20], stripes[1][:20]
    weight = np.linspace(0.5, 2, 20)
    start = small(max_epochs=0, backbone=backbone, **SAME_SIZE).fit(X, y, weight)
    rows = embed(X, backbone)
    scaler = StandardScaler().fit(rows, sample_weight=weight)
    positive = scaler.scale_[scaler.scale_ > 1e-12]
    z = (rows - scaler.mean_) / np.maximum(scaler.scale_, 0.01 * np.median(positive))
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)
    model.fit(z, y, sample_weight=weight / weight.mean())
    np.testing.assert_allclose(start.predict_proba(X), model.predict_proba(z), atol=2e-3)


def test_numbers_start_as_a_ridge_regression(numbers):
    X, y = numbers
    weight = np.linspace(0.5, 2, len(X))
    start = small(FineTuningRegressor, max_epochs=0, **SAME_SIZE).fit(X, y, weight)
    scaler = StandardScaler().fit(embed(X), sample_weight=weight)
    z = scaler.transform(embed(X))
    mean = np.average(y, weights=weight)
    scale = np.sqrt(np.average((y - mean) ** 2, weights=weight))
    alphas = 10.0 ** np.arange(-1, 6) * weight.mean()
    model = RidgeCV(alphas).fit(z, (y - mean) / scale, sample_weight=weight)
    np.testing.assert_allclose(start.predict(X), model.predict(z) * scale + mean, rtol=1e-3)


def test_indicators_start_as_a_regression_of_each(coded):
    X, k = coded[0][:24], coded[1][:24]
    Y = np.stack([k == 1, k != 2, np.zeros(24)], axis=1).astype(int)
    proba = small(max_epochs=0, **SAME_SIZE).fit(X, Y).predict_proba(X)
    z = StandardScaler().fit_transform(embed(X))
    for j in range(2):
        model = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(z, Y[:, j])
        np.testing.assert_allclose(proba[:, j], model.predict_proba(z)[:, 1], atol=2e-3)
    np.testing.assert_allclose(proba[:, 2], 1 / 26)  # never seen in 24 rows: 25 to 1 against it


def test_two_classes(stripes):
    X, y = stripes
    two = small(max_epochs=0).fit(X[y != "plain"], y[y != "plain"])
    assert two.decision_function(X).shape == (len(X),)
    proba = two.predict_proba(X)
    np.testing.assert_allclose(1 / (1 + np.exp(-two.decision_function(X))), proba[:, 1])


# -- corners ---------------------------------------------------------------------------------
def test_the_start_is_the_probe_of_images_and_their_corners(stripes):
    X, y = stripes[0][:24], stripes[1][:24]
    rows = np.concatenate([embed(X), embed(corner(X, 0)), embed(corner(X, 1))])
    scaler = StandardScaler().fit(rows)
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)
    # The three views of an image share its weight.
    model.fit(scaler.transform(rows), np.tile(y, 3), sample_weight=np.full(72, 1 / 3))
    expected = model.coef_ / scaler.scale_
    for unfreeze in (1, "all"):
        coef, _ = start_of(X, y, unfreeze=unfreeze, **SAME_SIZE)
        np.testing.assert_allclose(coef, expected, rtol=0.02, atol=5e-3)
    alone, _ = start_of(X, y, unfreeze=0, **SAME_SIZE)
    assert np.abs(alone - expected).max() > 0.02


def test_corners_of_numbers(numbers):
    X, y = numbers
    views = [embed(X), embed(corner(X, 0)), embed(corner(X, 1))]
    rows = np.concatenate(views)
    scaler = StandardScaler().fit(rows)
    target = (y - y.mean()) / y.std()
    # The images alone choose the strength.
    alpha = RidgeCV(10.0 ** np.arange(-1, 6)).fit(scaler.transform(views[0]), target).alpha_
    model = Ridge(alpha).fit(scaler.transform(rows), np.tile(target, 3), np.full(3 * len(X), 1 / 3))
    coef, _ = start_of(X, y, FineTuningRegressor, **SAME_SIZE)
    np.testing.assert_allclose(coef[0], model.coef_ / scaler.scale_, rtol=0.05, atol=5e-3)


@pytest.mark.filterwarnings("ignore:.*did not improve")
@pytest.mark.filterwarnings("ignore:There is no early stopping")
@pytest.mark.parametrize(
    "settings",
    [{"unfreeze": 0}, {"early_stopping": True}, {"has_validation_part": True},
     {"backbone": "builtin", "weights": None}],
    ids=str,
)  # fmt: skip
def test_when_there_are_no_corners(stripes, first_inputs, settings):
    """More care is taken only where trained weights move and nothing chooses the epoch."""
    X, y = stripes[0][:24], stripes[1][:24]
    settings = {"unfreeze": 1, "max_epochs": 1, "memory": False} | settings
    rows = {"X_val": X, "y_val": y} if settings.pop("has_validation_part", False) else {}
    small(**settings).fit(X, y, **rows)
    n_passes = sum(len(batch) for batch in first_inputs)
    n_images = len(X) * (2 if rows else 1)
    # The embeddings and the boundary of the frozen stages.
    assert n_passes <= n_images * (1 if settings["unfreeze"] == 0 else 2)


def test_partial_fit_starts_from_the_images_alone(stripes):
    X, y = stripes
    model = small(unfreeze=1, lr=1e-12).partial_fit(X, y)
    probe = small(unfreeze=1, max_epochs=0).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), probe.predict_proba(X), atol=1e-5)


@pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])
def test_columns_of_images_are_side_by_side(coded, cls):
    """With the columns swapped the halves of the head are swapped."""
    X, k = coded
    table = np.empty((len(X), 2), dtype=object)
    for i, pair in enumerate(zip(X, X[::-1], strict=True)):
        table[i, 0], table[i, 1] = pair
    (one, _), (other, _) = (start_of(t, k, cls) for t in (table, table[:, ::-1]))
    width = one.shape[1] // 2
    swapped = np.hstack([other[:, width:], other[:, :width]])
    np.testing.assert_allclose(one, swapped, rtol=1e-3, atol=1e-4)


def test_corners_of_what_a_function_prepared(stripes):
    """It gives normalised numbers rather than pixels; the corners are of those."""
    X, y = stripes
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])

    def prepare(image):
        return ((image / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)

    expected, _ = start_of(X, y, **SAME_SIZE)
    got, _ = start_of(X, y, preprocessing=prepare)
    np.testing.assert_allclose(got, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())


def test_epoch_zero_is_the_probe_as_it_is(stripes):
    X, y = stripes
    with pytest.warns(UserWarning, match=r"linear probe \(epoch 0\) is kept"):
        model = small(lr=1e-12).fit(X, y, X_val=X, y_val=y)
    probe = small(unfreeze=0, max_epochs=0).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), probe.predict_proba(X), atol=1e-5)
    epochs = {row["epoch"]: row for row in model.history_}
    assert epochs[1]["valid_loss"] == pytest.approx(epochs[0]["valid_loss"], rel=1e-4)
