"""What y, y_val and classes may be."""

import datetime
import enum
import pickle
import re

import numpy as np
import pandas as pd
import pytest
from small_models import assert_same_model, quick

from sktransfer import FineTuningClassifier, FineTuningRegressor, save

NAN = float("nan")


def without(values, dtype):
    """A Series of these labels, that of row 3 gone."""
    return pd.Series(values).astype(dtype).mask(np.arange(len(values)) == 3)


MISSING = {
    "string": lambda k: without(k.astype(str), "string"),
    "Int64": lambda k: without(k, "Int64"),
    "bool[pyarrow]": lambda k: without(k == 1, "bool[pyarrow]"),
    "category": lambda k: without(k.astype(str), "category"),
    "time zones": lambda k: without(k, "datetime64[s, UTC]"),
    "floats": lambda k: np.where(np.arange(len(k)) == 3, NAN, k),
    "list of str and NaN": lambda k: ["a", "b", "c", NAN] + ["a"] * (len(k) - 4),
    "dates": lambda k: [datetime.date(2020, 1, 1 + i) for i in k[:3]] + [None] * (len(k) - 3),
    "indicators": lambda k: pd.DataFrame({"a": k == 1, "b": without(k == 2, "boolean")}),
}


@pytest.mark.parametrize("make", MISSING.values(), ids=MISSING)
def test_a_missing_label_is_an_error_that_names_its_row(coded, make):
    X, k = coded
    y = make(k)
    message = "contains NaN or None: the label of row 3 is (<NA>|nan|NaT|None). Every row needs"
    with pytest.raises(ValueError, match=f"^Input y {message}"):
        quick().fit(X, y)
    with pytest.raises(ValueError, match=f"^Input y_val {message}"):
        quick().fit(X, k, X_val=X, y_val=y)
    if np.ndim(y) == 1:
        with pytest.raises(ValueError, match=f"^Input classes {message}"):
            quick().partial_fit(X, k, classes=y)


@pytest.mark.parametrize("make", [iter, set, dict.fromkeys, str], ids=lambda f: f.__name__)
def test_targets_without_rows(coded, make):
    X, k = coded
    for cls in (FineTuningClassifier, FineTuningRegressor):
        with pytest.raises(ValueError, match=r"y should be a 1d array, got \w+, which has no rows"):
            quick(cls).fit(X, make(k.tolist()))
    with pytest.raises(ValueError, match="classes should be a 1d array, got"):
        quick().partial_fit(X, k, classes=make([0, 1, 2]))


# -- types -----------------------------------------------------------------------------------
TYPES = {
    "str": lambda k: k.astype(str),
    "negative": lambda k: k - 1,
    "float": lambda k: k + 1.0,
    "bool": lambda k: k == 1,
    "category": lambda k: pd.Series(k.astype(str), dtype="category"),
    "Int64": lambda k: pd.Series(k).astype("Int64"),
    "bool[pyarrow]": lambda k: pd.Series(k == 1).astype("bool[pyarrow]"),
    "datetime64": lambda k: np.datetime64("2020-01-01") + k,
}


@pytest.mark.parametrize("make", TYPES.values(), ids=TYPES)
def test_labels_come_back_as_they_went_in(coded, make):
    X, k = coded
    y = make(k)
    model = quick().fit(X, y)
    classes, codes = np.unique(np.asarray(y), return_inverse=True)
    np.testing.assert_array_equal(model.classes_, classes)
    assert model.predict(X).dtype == model.classes_.dtype
    assert model.classes_.dtype.kind in (classes.dtype.kind, np.asarray(y[:1]).dtype.kind)
    assert_same_model(model, quick().fit(X, codes), rtol=0, atol=0)


OBJECTS = {
    "whole float": lambda k: k.astype(float).astype(object),
    "date": lambda k: [datetime.date(2020, 1, 1 + i) for i in k.tolist()],
    "interval": lambda k: pd.cut(pd.Series(k), [-1, 0, 1, 2]),
    "time zone": lambda k: pd.Series(k).astype("datetime64[s, UTC]"),
    "tuple": lambda k: pd.Series([("a", i) for i in k.tolist()]),
}


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_objects_come_back_as_they_went_in(coded, make, tmp_path):
    X, k = coded
    y = make(k)
    classes = sorted(set(y))
    codes = np.array([classes.index(label) for label in y])
    model = quick().fit(X, y, X_val=X, y_val=y)
    assert_same_model(model, quick().fit(X, codes, X_val=X, y_val=codes), rtol=0, atol=0)
    assert list(model.classes_) == classes
    predicted = model.predict(X)
    assert {type(label) for label in predicted} == {type(label) for label in y}
    assert model.score(X, y) == np.mean([a == b for a, b in zip(predicted, y, strict=True)]) > 0.6
    factors = quick(class_weight={label: 1 + i for i, label in enumerate(classes)}).fit(X, y)
    same = quick(class_weight={i: 1 + i for i in range(3)}).fit(X, codes)
    assert_same_model(factors, same, rtol=0, atol=0)
    assert list(pickle.loads(pickle.dumps(model)).predict(X)) == list(predicted)
    with pytest.raises(TypeError, match=r"classes_ [\s\S]*cannot"):
        save(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", ["Int64", "bool[pyarrow]", "mixed"])
def test_nullable_indicators(coded, dtype):
    X, k = coded
    Y = pd.DataFrame({"a": k == 0, "b": k != 1})
    Y = Y.astype({"a": int}) if dtype == "mixed" else Y.astype(dtype)
    model = quick().fit(X, Y)
    expected = quick().fit(X, np.stack([k == 0, k != 1], axis=1))
    assert_same_model(model, expected, rtol=0, atol=0)
    assert model.score(X, Y) == expected.score(X, Y.to_numpy(int)) > 0.6


def test_numbers_are_not_their_strings(coded):
    X, k = coded
    model = quick().partial_fit(X, k.astype(str))
    with pytest.raises(ValueError, match="y holds the label 0 in row 0, which is not one of the"):
        model.partial_fit(X, k)


# -- refused ---------------------------------------------------------------------------------
Size = enum.Enum("Size", ["SMALL", "LARGE", "HUGE"])


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (lambda k: [("a", 1, "b")[i] for i in k], "['int', 'str']"),
        (lambda k: np.array(["a", 1, "b"], dtype=object)[k], "['int', 'str']"),
        (lambda k: [list(Size)[i] for i in k], "['Size']"),
        (lambda k: pd.Series([[i] for i in k]), "['list']"),
    ],
    ids=["list", "array", "Enum", "lists"],
)
def test_labels_without_an_order(coded, make, kinds):
    X, k = coded
    with pytest.raises(TypeError, match=re.escape(f"y holds labels of the types {kinds}, which")):
        quick().fit(X, make(k))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["a"] * 48, "needs at least two classes, but y holds one class only: 'a'"),
        ([NAN] + [1.0] * 47, "contains NaN"),
        (np.linspace(0, 1, 48), "Unknown label type: continuous"),
        (np.linspace(0, 1, 48).astype(object), "Unknown label type: continuous"),
        ([np.inf] + [1.0] * 47, "contains infinity"),
        (["a", "b"], "inconsistent numbers of samples"),
        (None, "requires y to be passed"),
        (np.tile([[0, 2], [2, 0]], (24, 1)), r"shape \(48, 2\).*indicator matrix of 0 and 1"),
        (np.tile([[1, -1], [-1, 1]], (24, 1)), r"shape \(48, 2\).*indicator matrix of 0 and 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_labels_are_refused_before_a_network_is_loaded(stripes, y, message):
    with pytest.raises(ValueError, match=message):
        quick(backbone="no such network").fit(stripes[0], y)


def test_classes_given_of_one_class(stripes):
    X, y = stripes
    with pytest.raises(ValueError, match="but `classes` holds one class only: 'across'"):
        quick(backbone="no such network").partial_fit(X[::3], y[::3], classes=["across"])
