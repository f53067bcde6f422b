"""What y, y_val and classes may be."""

import datetime
import enum
import pickle
import re

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from small_models import assert_same_model, quick
from tiny_networks import tiny_network

from sktransfer import FineTuningClassifier, FineTuningRegressor, load, save

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
    message = "contains NaN or None: the label of row 3 is (<NA>|nan|NaT|None)[^.]*. Every row nee"
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
    ],
    ids=["list", "array", "Enum"],
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


# -- regression ------------------------------------------------------------------------------
@pytest.mark.parametrize(("value", "what"), [(NAN, "NaN or None"), (-np.inf, "infinity")])
@pytest.mark.parametrize("make", [np.asarray, list, pd.Series, torch.tensor, pl.Series])
def test_a_target_that_is_no_number_is_an_error_that_names_its_row(numbers, make, value, what):
    X, y = numbers
    bad = make(np.where(np.arange(48) == 3, value, y))
    message = f"contains {what}: the number of row 3 is {value}. Every row needs a number"
    with pytest.raises(ValueError, match=f"^Input y {message}"):
        quick(FineTuningRegressor).fit(X, bad)
    with pytest.raises(ValueError, match=f"^Input y_val {message}"):
        quick(FineTuningRegressor).fit(X, y, X_val=X, y_val=bad)
    with pytest.raises(ValueError, match=f"^Input y {message}"):
        quick(FineTuningRegressor).partial_fit(X, y).partial_fit(X, bad)


@pytest.mark.parametrize("value", [None, pd.NA, NAN, np.inf])
def test_a_missing_number_among_several_targets(numbers, value):
    X, y = numbers
    Y = pd.DataFrame({"a": y, "b": y}, dtype=object)
    Y.iloc[4, 1] = value
    with pytest.raises(ValueError, match=r"number of row 4 is .* in column 1\. Every row needs"):
        quick(FineTuningRegressor).fit(X, Y)


TEXT = {
    "array": np.array(["cat", "dog"]),
    "list": ["cat", "dog"],
    "category": pd.Series(["cat", "dog"], dtype="category"),
    "string": pd.Series(["cat", "dog"], dtype="string"),
    "mixed": [1.0, "dog"],
    "bytes": np.array([b"cat", b"dog"]),
}


@pytest.mark.parametrize("y", TEXT.values(), ids=TEXT)
def test_text_is_for_the_classifier(stripes, y):
    message = r"y holds b?'(cat|dog)' in row \d, and .* FineTuningClassifier takes lab.*to_numeric"
    with pytest.raises(ValueError, match=message):
        quick(FineTuningRegressor).fit(stripes[0][:2], y)


@pytest.mark.parametrize("make", [np.asarray, list, lambda y: y.astype(object)])
def test_numbers_with_fractions_are_for_the_regressor(stripes, make):
    y = np.where(np.arange(48) == 7, 2.5, np.arange(48.0))
    with pytest.raises(ValueError, match=r"continuous.* y holds 2\.5: FineTuningRegressor pred"):
        quick().fit(stripes[0], make(y))
    with pytest.raises(ValueError, match="FineTuningRegressor takes several numbers per row"):
        quick().fit(stripes[0], np.stack([y, y], 1))


# -- several labels per row ------------------------------------------------------------------
TAGS = {
    "ragged": [["a", "b"], ["c"], []],
    "equally many": [["a", "b"], ["c", "b"], ["a", "c"]],
    "tuples": [("a", "b"), ("c",), ()],
    "sets": [{"a", "b"}, {"c"}, {"a"}],
    "numbers": [[1, 2], [3], []],
    "arrays": [np.array(["a", "b"]), np.array(["c"]), np.array([])],
    "Series": pd.Series([["a", "b"], ["c"], []]),
    "Series of frozensets": pd.Series([frozenset("ab"), frozenset("c"), frozenset()]),
    "polars": pl.Series([["a", "b"], ["c"], []]),
}


@pytest.mark.parametrize("y", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("name", ["y", "y_val"])
def test_lists_of_tags_need_a_binarizer(coded, y, name):
    X, k = coded
    message = rf"^{name} holds .* as rows. .*MultiLabelBinarizer\(\).fit_transform\({name}\) makes"
    given = (X[:3], y) if name == "y" else (X, np.eye(3, dtype=int)[k], None, X[:3], y)
    with pytest.raises(ValueError, match=message):
        quick().fit(*given)


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_columns_of_labels_keep_their_names(coded, frame, tmp_path):
    X, k = coded
    Y = frame({"red": (k == 0) * 1, "amber": (k == 1) * 1, "green": (k != 2) * 1})
    model = quick().fit(X, Y, X_val=X, y_val=Y)
    assert list(model.classes_) == ["red", "amber", "green"]
    same = quick().fit(X, Y.to_numpy(), X_val=X, y_val=Y.to_numpy())
    assert same.classes_.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(model.predict_proba(X), same.predict_proba(X))
    assert model.score(X, Y) == same.score(X, Y) == model.score(X, Y.to_numpy())
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", backbone=tiny_network)
    assert list(loaded.classes_) == ["red", "amber", "green"]
    other = Y[["green", "red", "amber"]]
    for call in (model.partial_fit, model.score, lambda X, Z: quick().fit(X, Y, None, X, Z)):
        with pytest.raises(ValueError, match=r"columns \['green', 'red', .* in the same order"):
            call(X, other)
    model = quick().partial_fit(X, Y, classes=["amber", "green", "red"])
    assert list(model.partial_fit(X, Y.to_numpy()).classes_) == ["red", "amber", "green"]
    with pytest.raises(ValueError, match="the numbers or names of its columns"):
        quick().partial_fit(X, Y, classes=[0, 1, 2])
