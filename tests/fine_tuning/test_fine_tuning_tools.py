"""scikit-learn's own tools around the fine-tuning estimators, written as a user would."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier, VotingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.inspection import permutation_importance
from sklearn.model_selection import (
    HalvingGridSearchCV,
    ShuffleSplit,
    cross_val_predict,
    cross_validate,
    learning_curve,
)
from sklearn.pipeline import make_pipeline
from test_fine_tuning import small

from sktransfer import FineTuningClassifier, FineTuningRegressor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def table(stripes, tmp_path):
    """Products: paths of a telling and of a silent picture, and two numbers; and their kinds."""
    X, y = stripes
    paths = [str(tmp_path / f"{i}.png") for i in range(len(X))]
    for path, picture in zip(paths, X, strict=True):
        Image.fromarray(picture).save(path)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"front": paths, "back": rng.permutation(paths)})
    frame["price"] = rng.normal(size=len(y)) + (y == "down")
    frame["weight"] = rng.normal(size=len(y))
    return frame, y


def only(*columns):
    return ColumnTransformer([("only", "passthrough", list(columns))])


def test_halving_search_over_epochs(stripes):
    search = HalvingGridSearchCV(
        small(), {"lr": [1e-4, 1e-2], "unfreeze": [0, 1]}, cv=2, factor=2, random_state=0,
        resource="max_epochs", min_resources=1, max_resources=4, error_score="raise",
    ).fit(*stripes)  # fmt: skip
    assert search.n_resources_ == [1, 2, 4]
    assert search.best_estimator_.n_iter_ == 4
    assert search.n_features_in_ == 1


def test_halving_search_over_rows(stripes):
    search = HalvingGridSearchCV(
        small(unfreeze=0), {"lr": [1e-4, 1e-2]}, cv=2, factor=2, min_resources=24, random_state=0,
        error_score="raise",
    ).fit(*stripes)  # fmt: skip
    assert search.n_resources_ == [24, 48]


@pytest.mark.parametrize("voting", ["soft", "hard"])
def test_voting_beside_a_forest_on_the_table(table, voting):
    frame, y = table
    photo = make_pipeline(only("front"), small(unfreeze=1))
    numbers = make_pipeline(only("price", "weight"), RandomForestClassifier(20, random_state=0))
    vote = VotingClassifier([("photo", photo), ("numbers", numbers)], voting=voting)
    vote.fit(frame, y)
    assert set(vote.predict(frame)) <= set(y)
    if voting == "soft":
        alone = [p.fit(frame, y).predict_proba(frame) for p in (photo, numbers)]
        np.testing.assert_allclose(vote.predict_proba(frame), np.mean(alone, axis=0), atol=1e-6)


def test_learning_curve(table):
    frame, y = table
    sizes, train, test = learning_curve(
        small(unfreeze=0), frame["front"], y, train_sizes=[0.5, 1.0], cv=3, error_score="raise"
    )
    assert list(sizes) == [16, 32]
    assert train.shape == test.shape == (2, 3)
    assert np.isfinite(test).all()


def test_permutation_importance_of_image_columns(table):
    frame, y = table
    both = frame[["front", "back"]]
    model = small(unfreeze=0, max_epochs=4).fit(both, y)
    found = permutation_importance(model, both, y, n_repeats=3, random_state=0)
    assert found.importances_mean[0] > 0.2
    assert found.importances_mean[0] > found.importances_mean[1]
    pipe = make_pipeline(only("front"), small(unfreeze=0)).fit(frame, y)
    found = permutation_importance(pipe, frame, y, n_repeats=2, random_state=0)
    assert found.importances_mean[0] > 0
    np.testing.assert_array_equal(found.importances_mean[1:], 0)


@pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])
def test_cross_val_predict(table, cls):
    frame, y = table
    if cls is FineTuningClassifier:
        proba = cross_val_predict(small(), frame["front"], y, cv=3, method="predict_proba")
        assert (np.sort(np.unique(y))[proba.argmax(axis=1)] == y).mean() > 0.5
        scores = cross_val_predict(small(), frame["front"], y, cv=3, method="decision_function")
        np.testing.assert_array_equal(scores.argmax(axis=1), proba.argmax(axis=1))
    else:
        target = frame[["price", "weight"]]
        assert cross_val_predict(small(cls), frame["front"], target, cv=3).shape == (48, 2)


def test_a_hundred_folds_of_a_large_network_are_a_few_megabytes(stripes, tmp_path):
    X, y = stripes
    path = tmp_path / "resnet50.pt"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)
    assert path.stat().st_size > 90e6
    model = FineTuningClassifier(
        "resnet50", weights=path, unfreeze=0, max_epochs=1, random_state=0,
        preprocessing={"size": 32, "crop": 32},
    )  # fmt: skip
    folds = cross_validate(
        model, X, y, cv=ShuffleSplit(100, train_size=12, random_state=0), return_estimator=True
    )["estimator"]
    assert len(folds) == 100
    pickled = pickle.dumps(folds)
    heads = 100 * 4 * 3 * 2048
    assert len(pickled) < heads + 2e6 < 5e6
    again = pickle.loads(pickled)
    for i in (0, 99):
        np.testing.assert_array_equal(again[i].predict_proba(X), folds[i].predict_proba(X))
    assert not np.array_equal(again[0].predict_proba(X), again[99].predict_proba(X))
