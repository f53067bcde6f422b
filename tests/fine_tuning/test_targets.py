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


# -- missing labels --------------------------------------------------------------------------
def without(values, dtype):
    """A Series of these labels, that of row 3 gone."""
    return pd.Series(values).astype(dtype).mask(np.arange(len(values)) == 3)


MISSING = {
    "string": lambda k: without(k.astype(str), "string"),
    "string[pyarrow]": lambda k: without(k.astype(str), "string[pyarrow]"),
    "Int64": lambda k: without(k, "Int64"),
    "boolean": lambda k: without(k == 1, "boolean"),
    "bool[pyarrow]": lambda k: without(k == 1, "bool[pyarrow]"),
    "category": lambda k: without(k.astype(str), "category"),
    "datetime64": lambda k: without(k, "datetime64[s]"),
    "time zones": lambda k: without(k, "datetime64[s, UTC]"),
    "floats": lambda k: np.where(np.arange(len(k)) == 3, NAN, k),
    "list of str and NaN": lambda k: ["a", "b", "c", NAN] + ["a"] * (len(k) - 4),
    "list of str and None": lambda k: ["a", "b", "c", None] + ["a"] * (len(k) - 4),
    "dates": lambda k: [datetime.date(2020, 1, 1 + i) for i in k[:3]] + [None] * (len(k) - 3),
    "indicators": lambda k: pd.DataFrame({"a": k == 1, "b": without(k == 2, "boolean")}),
    "indicators of floats": lambda k: np.stack([k == 1, without(k, float)], axis=1),
}  # fmt: skip


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


@pytest.mark.parametrize("make", [iter, set, lambda k: dict.fromkeys(k), str], ids=str)
def test_targets_without_rows(coded, make):
    X, k = coded
    for cls in (FineTuningClassifier, FineTuningRegressor):
        with pytest.raises(ValueError, match=r"y should be a 1d array, got \w+, which has no rows"):
            quick(cls).fit(X, make(k.tolist()))
    with pytest.raises(ValueError, match="classes should be a 1d array, got"):
        quick().partial_fit(X, k, classes=make([0, 1, 2]))


# -- types -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("Int64", "i"), ("int64[pyarrow]", "i"), ("boolean", "b"), ("bool[pyarrow]", "b")],
)
def test_nullable_labels_without_any_missing(coded, dtype, kind):
    X, k = coded
    y = pd.Series(k if kind == "i" else k == 1).astype(dtype)
    model = quick().fit(X, y)
    assert model.classes_.dtype.kind == model.predict(X).dtype.kind == kind
    assert_same_model(model, quick().fit(X, np.asarray(y)), rtol=0, atol=0)
    assert model.score(X, y) > 0.6


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "bool[pyarrow]", "mixed"])
def test_nullable_indicators(coded, dtype):
    X, k = coded
    Y = pd.DataFrame({"a": k == 0, "b": k != 1})
    Y = Y.astype({"a": int}) if dtype == "mixed" else Y.astype(dtype)
    model = quick().fit(X, Y)
    expected = quick().fit(X, np.stack([k == 0, k != 1], axis=1))
    assert_same_model(model, expected, rtol=0, atol=0)
    assert model.score(X, Y) == expected.score(X, Y.to_numpy(int)) > 0.6


class Size(enum.Enum):
    SMALL = 1
    LARGE = 2


OBJECTS = {
    "int": lambda k: k.astype(object),
    "bool": lambda k: (k == 1).astype(object),
    "whole float": lambda k: k.astype(float).astype(object),
    "date": lambda k: np.array([datetime.date(2020, 1, 1 + i) for i in k]),
    "list of dates": lambda k: [datetime.date(2020, 1, 1 + i) for i in k.tolist()],
    "period": lambda k: pd.Series(pd.PeriodIndex.from_ordinals(k, freq="M")),
    "interval": lambda k: pd.cut(pd.Series(k), [-1, 0, 1, 2]),
    "time zone": lambda k: pd.Series(k).astype("datetime64[s, UTC]"),
    "tuple": lambda k: pd.Series([("a", i) for i in k.tolist()]),
}


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_objects_come_back_as_they_went_in(coded, make, tmp_path):
    X, k = coded
    y = make(k)
    given = list(y)
    classes = sorted(set(given))
    codes = np.array([classes.index(label) for label in given])
    model = quick().fit(X, y, X_val=X, y_val=y)
    assert_same_model(model, quick().fit(X, codes, X_val=X, y_val=codes), rtol=0, atol=0)
    assert list(model.classes_) == classes
    predicted = model.predict(X)
    assert {type(label) for label in predicted} == {type(label) for label in given}
    assert model.score(X, y) == np.mean([a == b for a, b in zip(predicted, given, strict=True)])
    assert model.score(X, y) > 0.6
    factors = quick(class_weight={label: 1 + i for i, label in enumerate(classes)}).fit(X, y)
    same = quick(class_weight={i: 1 + i for i in range(len(classes))}).fit(X, codes)
    assert_same_model(factors, same, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(model))
    assert list(again.predict(X)) == list(predicted)
    with pytest.raises(TypeError, match=r"classes_ is array[\s\S]* cannot hold"):
        save(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("labels", "kinds"),
    [
        (["a", 1, "a"], "['int', 'str']"),
        (np.array(["a", 1, "a"], dtype=object), "['int', 'str']"),
        ([Size.SMALL, Size.LARGE, Size.SMALL], "['Size']"),
        (pd.Series([[1], [1, 2], [1]]), "['list']"),
    ],
    ids=["list", "array", "Enum", "lists"],
)
def test_labels_without_an_order(coded, labels, kinds):
    X, k = coded
    y = pd.Series(list(labels))[k]
    y = y.tolist() if isinstance(labels, list) else y
    with pytest.raises(TypeError, match=re.escape(f"y holds labels of the types {kinds}, which")):
        quick().fit(X, y)


@pytest.mark.parametrize(
    ("scale", "message"), [(0.5, "Unknown label type: continuous"), (np.inf, "infinity")]
)
def test_numbers_as_objects_are_no_labels(coded, scale, message):
    X, k = coded
    with pytest.raises(ValueError, match=message):
        quick().fit(X, ((k + 1) * scale).astype(object))


def test_numbers_are_not_their_strings(coded):
    X, k = coded
    model = quick().partial_fit(X, k.astype(str))
    with pytest.raises(ValueError, match="y holds the label 0 in row 0, which is not one of the"):
        model.partial_fit(X, k)


def test_times_in_another_unit_are_the_same(coded):
    X, k = coded
    days = np.datetime64("2020-01-01") + k
    model = quick().fit(X, days, X_val=X, y_val=days.astype("datetime64[ns]"))
    assert_same_model(model, quick().fit(X, k, X_val=X, y_val=k), rtol=0, atol=0)
    with pytest.raises(ValueError, match="y_val holds the label '2020-01-01T01' in row 0"):
        quick().fit(X, days, X_val=X, y_val=days + np.timedelta64(1, "h"))


@pytest.mark.parametrize("labels", [["a", "b", "c"], [10, 20, 30], [1.0, 2.0, 3.0], [-1, 0, 1]])
def test_labels_come_back_as_they_went_in(coded, labels):
    X, k = coded
    y = np.array(labels)[k]
    model = quick().fit(X, y)
    assert model.predict(X).dtype == y.dtype
    assert set(model.predict(X)) <= set(labels)
    proba = model.predict_proba(X)
    assert proba.dtype == np.float64
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-12)


def test_booleans_and_categories(stripes):
    X, y = stripes
    assert quick().fit(X, y == "down").predict(X).dtype == bool
    categories = pd.Series(y, dtype="category")
    assert quick().fit(X, categories).score(X, categories) > 0.6


# -- refused ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["a"] * 48, "needs at least two classes, but y holds one class only: 'a'"),
        ([NAN] + [1.0] * 47, "contains NaN"),
        (np.linspace(0, 1, 48), "Unknown label type: continuous"),
        (["a", "b"], "inconsistent numbers of samples"),
        (None, "requires y to be passed"),
    ],
    ids=["one class", "NaN", "continuous", "length", "None"],
)
def test_bad_labels_are_refused_before_a_network_is_loaded(stripes, y, message):
    with pytest.raises(ValueError, match=message):
        quick(backbone="no such network").fit(stripes[0], y)


def test_classes_given_of_one_class(stripes):
    X, y = stripes
    with pytest.raises(ValueError, match="but `classes` holds one class only: 'across'"):
        quick(backbone="no such network").partial_fit(X[::3], y[::3], classes=["across"])


@pytest.mark.parametrize("change", [lambda y: 2 * y, lambda y: 2 * y - 1], ids=["0, 2", "-1, 1"])
def test_indicators_are_0_and_1(coded, change):
    X, k = coded
    indicators = np.stack([k == 1, k != 2], axis=1).astype(int)
    with pytest.raises(ValueError, match=r"y has shape \(48, 2\).*indicator matrix of 0 and 1"):
        quick().fit(X, change(indicators))
