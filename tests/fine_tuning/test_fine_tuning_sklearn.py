"""scikit-learn's battery, and its tools around the estimators as a user would write them."""

import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn import config_context
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier, StackingClassifier, VotingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks
from small_models import assert_same_model, quick, small
from tiny_networks import tiny_network

from sktransfer import FineTuningClassifier, FineTuningRegressor

# -- the battery: all pass, none is expected to fail -----------------------------------------
COMMON = {
    "backbone": tiny_network,
    "image_shape": (1, -1),
    "preprocessing": {"size": 16, "crop": 16},
    "max_epochs": 2,
}
ESTIMATORS = [
    FineTuningClassifier(**COMMON, unfreeze=0),
    FineTuningClassifier(**COMMON, unfreeze=1, augment="light", dropout=0.2, head=(4,)),
    FineTuningRegressor(**COMMON, batch_size=64),
]


# The battery's numbers are drawn from the whole real line: pixels outside 0…1 are expected.
@pytest.mark.filterwarnings("ignore:.*outside 0…:UserWarning")
@parametrize_with_checks(ESTIMATORS)
def test_sklearn_estimator(estimator, check):
    check(estimator)


def test_whole_battery_runs():
    """2-D input is declared, so that no more is skipped than scikit-learn itself skips."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checks = list(estimator_checks_generator(ESTIMATORS[0]))
    assert len(checks) >= 55
    assert not [w for w in caught if "Can't test estimator" in str(w.message)]


# -- searches --------------------------------------------------------------------------------
def test_grid_search(stripes):
    X, y = stripes
    grid = [
        {"unfreeze": [0, 1], "lr": [1e-3, 1e-2]},
        {"layer_decay": [0.5], "backbone": ["builtin"], "unfreeze": [0]},
    ]
    search = GridSearchCV(small(max_epochs=1), grid, cv=2, error_score="raise").fit(X, y)
    assert len(search.cv_results_["params"]) == 5
    assert search.predict(X).dtype == y.dtype


def test_halving_search_over_epochs(stripes):
    search = HalvingGridSearchCV(
        small(), {"lr": [1e-4, 1e-2]}, cv=2, factor=2, random_state=0, error_score="raise",
        resource="max_epochs", min_resources=1, max_resources=2,
    ).fit(*stripes)  # fmt: skip
    assert search.n_resources_ == [1, 2]
    assert search.best_estimator_.n_iter_ == 2


# -- in larger models ------------------------------------------------------------------------
def only(*columns):
    return ColumnTransformer([("only", "passthrough", list(columns))])


@pytest.mark.parametrize("voting", ["soft", "hard"])
def test_voting_beside_a_forest_on_a_table(stripes, tmp_path, voting):
    X, y = stripes
    paths = [str(tmp_path / f"{i}.png") for i in range(len(X))]
    for path, image in zip(paths, X, strict=True):
        Image.fromarray(image).save(path)
    price = np.random.default_rng(0).normal(size=len(y)) + (y == "down")
    frame = pd.DataFrame({"photo": paths, "price": price})
    photo = make_pipeline(only("photo"), small(unfreeze=1))
    forest = make_pipeline(only("price"), RandomForestClassifier(20, random_state=0))
    vote = VotingClassifier([("photo", photo), ("price", forest)], voting=voting).fit(frame, y)
    assert set(vote.predict(frame)) <= set(y)
    if voting == "soft":
        alone = [p.fit(frame, y).predict_proba(frame) for p in (photo, forest)]
        np.testing.assert_allclose(vote.predict_proba(frame), np.mean(alone, axis=0), atol=1e-6)


def test_calibration_stacking_and_cross_validation(stripes):
    X, y = stripes
    calibrated = CalibratedClassifierCV(quick(), cv=2).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(axis=1), 1)
    frame = pd.DataFrame({"photo": list(X)})
    stack = StackingClassifier([("tuned", quick())], cv=2).fit(frame[["photo"]], y)
    assert stack.predict(frame).shape == (48,)
    assert cross_val_score(quick(), X, y, cv=3).shape == (3,)


def test_a_tuned_network_before_a_classical_model(stripes):
    X, y = stripes
    pipe = make_pipeline(
        small(unfreeze=1).set_output(transform="pandas"), LogisticRegression(max_iter=10_000)
    )
    assert pipe.fit(X, y).score(X, y) > 0.6
    assert pipe[:-1].transform(X).columns[0].endswith("tuned_000")


def test_an_empty_part_of_a_table(stripes):
    X, y = stripes
    frame = pd.DataFrame({"photo": list(X)})
    model = quick().fit(frame, y).set_output(transform="pandas")
    assert model.transform(frame[:0]).shape == (0, model.n_features_out_)
    with pytest.raises(ValueError, match="minimum of 1"):
        model.predict(frame[:0])


def test_validation_rows_through_a_pipeline(stripes):
    X, y = stripes
    with config_context(enable_metadata_routing=True):
        model = small(early_stopping=False).set_fit_request(X_val=True, y_val=True)
        pipe = make_pipeline(FunctionTransformer(lambda X: X[:, ::-1]), model)
        pipe.set_params(transform_input=["X_val"])
        pipe.fit(X[:40], y[:40], X_val=X[40:], y_val=y[40:])
        assert "valid_score" in pipe[-1].history_[0]
        flipped = small(early_stopping=False)
        flipped.fit(X[:40, ::-1], y[:40], X_val=X[40:, ::-1], y_val=y[40:])
    assert_same_model(pipe[-1], flipped, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["predict_proba", "decision_function"])
def test_cross_val_predict(stripes, method):
    X, y = stripes
    scores = cross_val_predict(small(), X, y, cv=3, method=method)
    assert (np.unique(y)[scores.argmax(axis=1)] == y).mean() > 0.5
    Y = np.stack([X.mean(axis=(1, 2, 3)), X.std(axis=(1, 2, 3))], axis=1)
    assert cross_val_predict(quick(FineTuningRegressor), X, Y, cv=3).shape == (48, 2)
