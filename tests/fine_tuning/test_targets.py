"""What y, y_val and classes may be, and what class and sample weights make of them."""

import datetime
import enum
import pickle
import re

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.ensemble import BaggingClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.utils.class_weight import compute_sample_weight
from test_fine_tuning import assert_same_model, small

from sktransfer import FineTuningClassifier, FineTuningRegressor, save
from sktransfer.fine_tuning._targets import codes_of, sorted_classes

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")


@pytest.fixture
def coded(stripes):
    """Pictures and 0, 1, 2."""
    X, y = stripes
    return X, np.unique(y, return_inverse=True)[1]


def quick(cls=FineTuningClassifier, **parameters):
    return small(cls, **{"unfreeze": 0, "max_epochs": 1, **parameters})


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
def test_a_missing_label_is_told_with_its_row(coded, make):
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
def test_what_has_no_rows_is_told(coded, make):
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
def test_labels_without_an_order_are_told(coded, labels, kinds):
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


def test_numbers_and_strings_are_told_apart_among_many_classes():
    labels = np.arange(40)
    with pytest.raises(ValueError, match="holds the label 0 in row 0"):
        codes_of(labels, sorted_classes(labels.astype(str)))


def test_times_in_another_unit_are_the_same():
    days = np.array(["2020-01-02", "2020-01-01"], dtype="datetime64[D]")
    classes = sorted_classes(days)
    np.testing.assert_array_equal(codes_of(days.astype("datetime64[ns]"), classes), [1, 0])
    with pytest.raises(ValueError, match="in row 1"):
        codes_of(days + np.array([0, 1]) * np.timedelta64(1, "h"), classes)


# -- classes ---------------------------------------------------------------------------------
def test_a_warm_start_goes_on_with_the_same_kind(coded):
    X, k = coded
    Y = np.eye(3, dtype=int)[k]
    for first, second in ((k, Y), (Y, k)):
        model = quick(warm_start=True).fit(X, first)
        with pytest.raises(ValueError, match=r"warm_start.*Previously got multi\w+ targets"):
            model.fit(X, second)
        model.fit(X, first)


def test_classes_of_several_labels_are_their_columns(coded):
    X, k = coded
    Y = np.eye(3, dtype=int)[k]
    with pytest.raises(ValueError, match="several labels per row: there the classes are the num"):
        quick().partial_fit(X, Y, classes=[0, 1])
    model = quick().partial_fit(X, Y, classes=[0, 1, 2]).partial_fit(X, Y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="not the same as in the first call"):
        model.partial_fit(X, Y, classes=[0, 1])


@pytest.mark.filterwarnings("ignore:.*maximum iterations:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:.*[Nn]o early stopping:UserWarning")
@pytest.mark.filterwarnings("ignore:.*did not improve:UserWarning")
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"unfreeze": 1, "probe_views": 2},
        {"head_init": "random", "lr": 0.1, "max_epochs": 10},
        {"early_stopping": True, "validation_fraction": 0.3},
        {"class_weight": "balanced"},
        {"class_weight": {"down": 3}},
        {"mixup": 0.2, "label_smoothing": 0.1, "head": (4,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [["across"], ["across", "plain"]], ids=" ".join)
def test_classes_without_weight(stripes, parameters, kept):
    X, y = stripes
    weight = np.isin(y, kept).astype(float)
    model = quick(**parameters).fit(X, y, sample_weight=weight)
    assert list(model.classes_) == ["across", "down", "plain"]
    proba = model.predict_proba(X)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    assert set(model.predict(X)) <= set(kept)
    with_them = MLPClassifier(max_iter=2).fit(X.reshape(48, -1) / 255, y, sample_weight=weight)
    assert list(with_them.classes_) == list(model.classes_)


def test_one_class_is_refused_before_anything_is_loaded(stripes):
    X, y = stripes
    with pytest.raises(ValueError, match="at least two classes, but y holds one class only"):
        quick(backbone="no such network").fit(X[::3], y[::3])
    with pytest.raises(ValueError, match="but `classes` holds one class only: 'across'"):
        quick(backbone="no such network").partial_fit(X[::3], y[::3], classes=["across"])


def test_bagging_that_draws_one_class(stripes):
    X, y = stripes
    flat = X[:, ::2, ::2, 0].reshape(48, -1) / 255
    two = y != "plain"
    bag = BaggingClassifier(quick(image_shape=(10, 10)), 8, max_samples=4, random_state=0)
    bag.fit(flat[two], y[two])
    drawn = [set(y[two][rows]) for rows in bag.estimators_samples_]
    assert min(map(len, drawn)) == 1
    np.testing.assert_allclose(bag.predict_proba(flat).sum(axis=1), 1)


# -- class weights ---------------------------------------------------------------------------
def test_balanced_labels_weigh_as_in_scikit_learn(coded):
    X, k = coded
    Y = np.stack([k == 0, (k == 0) | (np.arange(48) < 9), k == 5], axis=1).astype(int)
    settings = {"max_epochs": 3, "lr": 0.01}
    balanced = quick(class_weight="balanced", **settings).fit(X, Y)
    given = quick(**settings).fit(X, Y, sample_weight=compute_sample_weight("balanced", Y))
    assert_same_model(balanced, given, rtol=1e-6)
    swapped = quick(class_weight="balanced", **settings | {"max_epochs": 0}).fit(X, Y[:, ::-1])
    start = quick(class_weight="balanced", **settings | {"max_epochs": 0}).fit(X, Y)
    np.testing.assert_allclose(start.predict_proba(X), swapped.predict_proba(X)[:, ::-1])
    weight = np.arange(48) // 3 % 3
    twice = np.repeat(np.arange(48), weight)
    weighted = quick(class_weight="balanced", **settings).fit(X, Y, sample_weight=weight)
    repeated = quick(class_weight="balanced", **settings).fit(X[twice], Y[twice])
    assert_same_model(weighted, repeated, rtol=1e-6)


@pytest.mark.parametrize("factor", [np.inf, NAN, -1])
def test_a_weight_that_no_class_can_have(stripes, factor):
    with pytest.raises(ValueError, match="none may be negative, NaN or infinite"):
        quick(backbone="no such network", class_weight={"down": factor}).fit(*stripes)


def test_classes_that_weigh_nothing(stripes):
    """A class may weigh nothing, as long as others are there."""
    X, y = stripes
    across = y == "across"
    model = quick(class_weight={"across": 0})
    model.fit(X, y, X_val=X[:30], y_val=y[:30])
    heavy = model.history_[-1]["valid_score"]
    assert heavy == pytest.approx(model.score(X[:30], y[:30], ~across[:30]))
    message = r"leaves nothing to train on or to validate on.* the classes \['across'\]"
    with pytest.raises(ValueError, match=message):
        model.fit(X, y, X_val=X[across], y_val=y[across])
    model.partial_fit(X, y)
    with pytest.raises(ValueError, match=message):
        model.partial_fit(X[across], y[across])
    model.partial_fit(X[~across], y[~across])


# -- probabilities ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["two", "three", "indicators"])
def test_logarithms_of_probabilities(coded, kind):
    X, k = coded
    y = {"two": k == 1, "three": k, "indicators": np.eye(3, dtype=int)[k]}[kind]
    model = quick(lr=0.01).fit(X, y)
    proba, log_proba = model.predict_proba(X), model.predict_log_proba(X)
    assert log_proba.dtype == np.float64
    np.testing.assert_allclose(log_proba, np.log(proba), rtol=1e-9)
    model._tuned.head.linear.weight.data *= 1e5  # probabilities below what a float can be
    log_proba, scores = model.predict_log_proba(X), model._scores(X)
    assert np.isfinite(log_proba).all()
    assert log_proba.min() < -1e4
    proba = model.predict_proba(X)
    if kind == "indicators":
        np.testing.assert_array_equal(proba, expit(scores))
        np.testing.assert_allclose(np.exp(log_proba), proba, atol=1e-12)
    else:
        np.testing.assert_allclose(proba.sum(axis=1), 1)
        gap = scores - scores.max(axis=1, keepdims=True)
        np.testing.assert_allclose(log_proba, gap, atol=np.log(3))


# -- numbers ---------------------------------------------------------------------------------
def test_large_numbers_are_learnt_as_small_ones(coded):
    X, k = coded
    small_ones = quick(FineTuningRegressor, lr=0.01).fit(X, k).predict(X)
    for scale in (1e200, 1e300):
        large = quick(FineTuningRegressor, lr=0.01).fit(X, k * scale).predict(X)
        np.testing.assert_allclose(large / scale, small_ones, rtol=1e-5, atol=1e-5)


def test_numbers_that_are_too_far_from_the_others_are_told(coded):
    X, k = coded
    message = r"The target 2e\+30 cannot be trained on beside targets of mean \[1.\]"
    with pytest.raises(ValueError, match=message):
        quick(FineTuningRegressor).fit(X, k, X_val=X, y_val=np.where(k == 2, 2e30, k))
    model = quick(FineTuningRegressor).partial_fit(X, k)
    with pytest.raises(ValueError, match=message):
        model.partial_fit(X, np.where(k == 2, 2e30, k))
    with pytest.raises(ValueError, match="bring the targets to a smaller range"):
        quick(FineTuningRegressor).fit(X, np.where(k == 1, 1, -1) * 1.7e308)


# -- validation pictures ---------------------------------------------------------------------
def test_errors_of_validation_pictures_name_them(stripes):
    X, y = stripes
    frame = pd.DataFrame({"a": list(X), "b": list(X)})
    flat = X[:, ::2, ::2, 0].reshape(48, -1) / 255
    one, pixels = quick(), quick(image_shape=(10, 10))
    for model, train, valid, message in (
        (one, frame[["a"]], frame[["a", "b"]], "^X_val: The feature names should match"),
        (one, X, [[a, a] for a in X], r"^X_val: X has 2 image column\(s\)"),
        (one, X, [], "^X_val: Found array with 0 sample"),
        (one, X, (a for a in X), "^X_val: X is of type generator"),
        (pixels, flat, flat[:, :64], "^X_val: X has 64 features"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model.fit(train, y, X_val=valid, y_val=y)
