"""FineTuningRegressor: targets of any size and number."""

import functools

import numpy as np
import pytest
from sklearn.metrics import r2_score
from small_models import quick, small

from sktransfer import FineTuningRegressor

quick = functools.partial(quick, FineTuningRegressor)
small = functools.partial(small, FineTuningRegressor)


def test_numbers_are_learnt(numbers):
    X, y = numbers
    model = small(lr=0.01).fit(X, y)
    assert model.predict(X).shape == (48,)
    assert model.predict(X).dtype == np.float64
    assert r2_score(y, model.predict(X)) == pytest.approx(model.score(X, y))
    assert model.score(X, y) > 0.5


@pytest.mark.parametrize("scale", [1e-15, 1e12, 1e200, 1e300])
def test_the_scale_of_targets_does_not_matter(coded, scale):
    X, k = coded
    model, scaled = (small().fit(X, (k + 1.0) * s) for s in (1, scale))
    np.testing.assert_allclose(scaled.predict(X) / scale, model.predict(X), rtol=1e-4)


def test_several_targets(numbers):
    X, y = numbers
    Y = np.stack([y, 1000 + X.std(axis=(1, 2, 3))], axis=1)
    model = small(unfreeze=1).fit(X, Y)
    assert model.predict(X).shape == Y.shape
    np.testing.assert_allclose(model.predict(X).mean(axis=0), Y.mean(axis=0), rtol=0.1)
    single = small(unfreeze=1).fit(X, Y[:, [0, 0]]).predict(X)
    np.testing.assert_allclose(single[:, 0], single[:, 1], rtol=1e-4)


def test_a_constant_target(stripes):
    np.testing.assert_allclose(quick().fit(stripes[0], np.full(48, 3.0)).predict(stripes[0]), 3.0)


def test_numbers_that_are_too_far_from_the_others(coded):
    X, k = coded
    message = r"The target 2e\+30 is too far from the others: .* to targets of mean \[1.\]"
    with pytest.raises(ValueError, match=message):
        quick().fit(X, k, X_val=X, y_val=np.where(k == 2, 2e30, k))
    with pytest.raises(ValueError, match="scale the targets to a smaller range"):
        quick().fit(X, np.where(k == 1, 1, -1) * 1.7e308)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([np.nan] + [1.0] * 47, "Input y contains NaN"),
        ([np.inf] + [1.0] * 47, "Input y contains infinity"),
        (["a"] * 48, "y holds 'a' in row 0, .* FineTuningClassifier takes"),
        ([1.0, 2.0], "inconsistent numbers of samples"),
        (None, "requires y to be passed"),
    ],
    ids=["NaN", "infinity", "strings", "length", "None"],
)
def test_bad_targets_are_refused_before_a_network_is_loaded(stripes, y, message):
    X, right = stripes[0], np.arange(48.0)
    with pytest.raises(ValueError, match=message):
        quick(backbone="no such network").fit(X, y)
    message = message.replace("y ", "y_val ") if y is not None else "X_val is given without y_val"
    with pytest.raises(ValueError, match=message):
        quick(backbone="no such network").fit(X, right, X_val=X, y_val=y)


def test_validation_targets_of_another_number(numbers):
    X, y = numbers
    with pytest.raises(ValueError, match=r"y_val has 2 target\(s\), but .* was fitted on 1"):
        quick().fit(X, y, X_val=X, y_val=np.stack([y, y], 1))
