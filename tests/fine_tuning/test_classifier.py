"""FineTuningClassifier: class weights, classes without rows, probabilities, several labels."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.ensemble import BaggingClassifier
from sklearn.utils.class_weight import compute_sample_weight
from small_models import assert_same_model, quick, small


# -- class weights ---------------------------------------------------------------------------
@pytest.mark.parametrize("class_weight", ["balanced", {"down": 5}], ids=str)
def test_class_weights_weigh_as_in_scikit_learn(stripes, class_weight):
    X, y = stripes
    rare = np.flatnonzero((y != "down") | (np.arange(len(y)) < 8))
    X, y = X[rare], y[rare]
    weighted = small(class_weight=class_weight, lr=0.01).fit(X, y)
    full = class_weight if class_weight == "balanced" else {"across": 1, "plain": 1, "down": 5}
    given = small(lr=0.01).fit(X, y, sample_weight=compute_sample_weight(full, y))
    assert_same_model(weighted, given, rtol=1e-5, atol=1e-6)
    plain = small(lr=0.01).fit(X, y)
    assert weighted.predict_proba(X)[:, 1].mean() > plain.predict_proba(X)[:, 1].mean()


def test_balanced_labels_weigh_as_in_scikit_learn(coded):
    X, k = coded
    Y = np.stack([k == 0, (k == 0) | (np.arange(48) < 9), k == 5], axis=1).astype(int)
    settings = {"max_epochs": 3, "lr": 0.01}
    balanced = quick(class_weight="balanced", **settings).fit(X, Y)
    given = quick(**settings).fit(X, Y, sample_weight=compute_sample_weight("balanced", Y))
    assert_same_model(balanced, given, rtol=1e-6)
    with pytest.raises(ValueError, match="with several labels per row: only 'balanced' and None"):
        quick(class_weight={0: 2}).fit(X, Y)


def test_class_weights_of_zero(stripes):
    X, y = stripes
    across = y == "across"
    with pytest.raises(ValueError, match=r"none may be .* and not all zero"):
        quick(class_weight=dict.fromkeys(y, 0)).fit(X, y)
    model = quick(class_weight={"across": 0})
    model.fit(X, y, X_val=X[:30], y_val=y[:30])
    kept = model.history_[model.best_epoch_]["valid_score"]
    assert kept == pytest.approx(model.score(X[:30], y[:30], ~across[:30]))
    message = r"leaves nothing to train on or to validate on.* the classes \['across'\]"
    with pytest.raises(ValueError, match=message):
        model.fit(X, y, X_val=X[across], y_val=y[across])


def test_class_weights_of_other_labels(stripes):
    with pytest.raises(ValueError, match=r"The classes, .*, are not in class_weight"):
        quick(class_weight={"up": 2}).fit(*stripes)


# -- classes without rows --------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*[Nn]o early stopping:UserWarning")
@pytest.mark.filterwarnings("ignore:.*did not improve:UserWarning")
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"unfreeze": 1, "head": (4,)},
        {"head_init": "random", "lr": 0.1, "max_epochs": 10},
        {"early_stopping": True, "validation_fraction": 0.3},
        {"class_weight": "balanced"},
        {"class_weight": {"down": 3}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [["across"], ["across", "plain"]], ids=" ".join)
def test_classes_without_weight(stripes, parameters, kept):
    X, y = stripes
    weight = np.isin(y, kept).astype(float)
    model = quick(**parameters).fit(X, y, sample_weight=weight)
    assert list(model.classes_) == ["across", "down", "plain"]
    np.testing.assert_allclose(model.predict_proba(X).sum(axis=1), 1)
    assert set(model.predict(X)) <= set(kept)


def test_bagging_that_draws_one_class(stripes):
    X, y = stripes
    flat = X[:, ::2, ::2, 0].reshape(48, -1) / 255
    two = y != "plain"
    bag = BaggingClassifier(quick(image_shape=(10, 10)), 8, max_samples=4, random_state=0)
    bag.fit(flat[two], y[two])
    drawn = [set(y[two][rows]) for rows in bag.estimators_samples_]
    assert min(map(len, drawn)) == 1
    np.testing.assert_allclose(bag.predict_proba(flat).sum(axis=1), 1)


# -- probabilities and scores ----------------------------------------------------------------
@pytest.mark.parametrize("kind", ["two", "three", "indicators"])
def test_logarithms_of_probabilities(coded, kind):
    X, k = coded
    y = {"two": k == 1, "three": k, "indicators": np.eye(3, dtype=int)[k]}[kind]
    model = quick(lr=0.01).fit(X, y)
    proba, log_proba = model.predict_proba(X), model.predict_log_proba(X)
    assert log_proba.dtype == np.float64
    np.testing.assert_allclose(log_proba, np.log(proba), rtol=1e-9)
    model.net_.module_.head.linear.weight.data *= 1e5  # probabilities below what a float can be
    log_proba, scores = model.predict_log_proba(X), model.decision_function(X)
    assert np.isfinite(log_proba).all()
    assert log_proba.min() < -1e4
    proba = model.predict_proba(X)
    np.testing.assert_allclose(np.exp(log_proba), proba, atol=1e-12)
    if kind == "indicators":
        np.testing.assert_array_equal(proba, expit(scores))
    elif kind == "two":
        np.testing.assert_allclose(proba[:, 1], expit(scores), atol=1e-12)
    else:
        gap = scores - scores.max(axis=1, keepdims=True)
        np.testing.assert_allclose(log_proba, gap, atol=np.log(3))


def test_scores_are_accuracies(stripes):
    X, y = stripes
    model = small(lr=0.01).fit(X, y)
    weight = np.linspace(0, 1, len(y))
    right = model.predict(X) == y
    assert model.score(X, y) == right.mean() > 0.6
    assert model.score(X, y, weight) == pytest.approx(np.average(right, weights=weight))


def test_several_labels_per_row(coded):
    X, k = coded
    Y = np.stack([k == 1, k != 2, np.zeros(len(k))], axis=1).astype(int)
    model = small(unfreeze=1, class_weight="balanced").fit(X, Y)
    assert list(model.classes_) == [0, 1, 2]
    predicted = model.predict(X)
    np.testing.assert_array_equal(predicted, model.predict_proba(X) > 0.5)
    assert (predicted[:, 2] == 0).all()
    assert model.score(X, Y) == (predicted == Y).all(axis=1).mean() > 0.5
    with pytest.raises(ValueError, match=r"y_val has shape \(48,\), but .* on multilabel targets"):
        small().fit(X, Y, X_val=X, y_val=k)
