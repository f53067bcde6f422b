"""The validation part that a splitter of scikit-learn, or groups, choose."""

import numpy as np
import pytest
import sklearn
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    GroupShuffleSplit,
    KFold,
    PredefinedSplit,
    StratifiedGroupKFold,
    StratifiedShuffleSplit,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch.callbacks import Callback
from small_models import assert_same_model, of_kind, quick, small

from sktransfer import FineTuningClassifier, FineTuningRegressor

# Whether an epoch improves on the probe does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:.* did not improve on the linear probe")


class Sets(Callback):
    """Notes the images of the training and the validation part, for all copies."""

    def on_epoch_begin(self, net, dataset_train=None, dataset_valid=None, **kwargs):
        Sets.parts = [
            part.take(np.arange(len(part)))[0][:, 0].permute(0, 2, 3, 1).numpy()
            for part in (dataset_train, dataset_valid)
        ]


@pytest.fixture
def of_groups(coded):
    """Images of the network's input size, targets, and twelve groups."""
    X, k = coded
    return np.ascontiguousarray(X[:, :16, :16]), k, np.arange(48) % 12


def parts_of(X, y, groups=None, cls=FineTuningClassifier, **parameters):
    """Numbers of the rows in the training part and in the validation part."""
    small(cls, augment="light", callbacks=[Sets()], **parameters).fit(X, y, groups=groups)
    images = [image.tobytes() for image in X]
    parts = [{image.tobytes() for image in part} for part in Sets.parts]
    return [np.flatnonzero([image in part for image in images]) for part in parts]


SPLITTERS = [
    GroupShuffleSplit(test_size=0.25, random_state=0),
    GroupKFold(4),
    StratifiedGroupKFold(4),
]


@pytest.mark.parametrize(
    ("early_stopping", "kind"),
    [
        *((splitter, "labels") for splitter in (*SPLITTERS, True)),
        *((SPLITTERS[0], "numbers"), (SPLITTERS[1], "indicators"), (True, "numbers")),
    ],
    ids=str,
)
def test_groups_stay_whole(of_groups, early_stopping, kind):
    X, k, groups = of_groups
    cls, X, y = of_kind((X, k), kind)
    train, valid = parts_of(
        X, y, groups, cls=cls, early_stopping=early_stopping, validation_fraction=0.25
    )
    assert set(groups[train]).isdisjoint(groups[valid])
    assert len(train) + len(valid) == 48
    assert len(set(groups[valid])) == 3


def test_the_splitter_sees_the_rows_of_X(of_groups):
    X, k, _ = of_groups
    fold = np.where(np.arange(48) % 5 == 2, 0, -1)
    train, valid = parts_of(X, k, early_stopping=PredefinedSplit(fold))
    np.testing.assert_array_equal(valid, np.flatnonzero(fold == 0))
    np.testing.assert_array_equal(train, np.flatnonzero(fold == -1))
    # A row that is equal to one on the validation side is there as well.
    twice = parts_of([*X, X[2]], [*k, k[2]], early_stopping=PredefinedSplit([*fold, -1]))
    np.testing.assert_array_equal(twice[1], [*valid, 48])
    half = parts_of(X, k, early_stopping=StratifiedShuffleSplit(train_size=12, test_size=12))
    assert [len(part) for part in half] == [12, 12]


def test_one_random_state_makes_a_run_repeatable(of_groups):
    X, k, groups = of_groups
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    splitter = GroupShuffleSplit(test_size=0.3, random_state=np.random.RandomState(3))
    for given in (GroupShuffleSplit(test_size=0.3), splitter):
        fits = [quick(early_stopping=given).fit(X, k, groups=groups) for _ in range(2)]
        assert fits[0].history_[0]["valid_loss"] == fits[1].history_[0]["valid_loss"]
        assert_same_model(*fits, rtol=0, atol=0)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_a_weight_of_two_is_the_row_twice(of_groups):
    X, k, groups = of_groups
    model = small(early_stopping=GroupShuffleSplit(test_size=0.25), lr=0.01)
    twice = [[*part, *part[:5]] for part in (X, k, groups)]
    repeated = small(**model.get_params()).fit(twice[0], twice[1], groups=twice[2])
    weighted = model.fit(X, k, np.where(np.arange(48) < 5, 2, 1), groups=groups)
    assert_same_model(weighted, repeated, atol=0)


def test_a_validation_part_that_is_given_comes_first(of_groups):
    X, k, _ = of_groups
    expected = small(early_stopping=True).fit(X[:36], k[:36], X_val=X[36:], y_val=k[36:])
    model = small(early_stopping=GroupKFold())  # groups are not needed
    assert_same_model(model.fit(X[:36], k[:36], X_val=X[36:], y_val=k[36:]), expected, atol=0)
    model.partial_fit(X, k)


# -- refused ---------------------------------------------------------------------------------
def test_a_splitter_without_splits(of_groups):
    X, k, _ = of_groups
    message = "early_stopping: PredefinedSplit yields no split of these 48 rows"
    with pytest.raises(ValueError, match=message):
        quick(early_stopping=PredefinedSplit(np.full(48, -1))).fit(X, k)


# StratifiedGroupKFold of scikit-learn 1.6 splits without groups.
@pytest.mark.parametrize("splitter", SPLITTERS[:2], ids=str)
def test_a_splitter_that_needs_groups(of_groups, splitter):
    X, k, _ = of_groups
    message = r"early_stopping: \w+ cannot split these 48 rows .*set_fit_request\(groups=True"

    with pytest.raises(ValueError, match=message):
        quick(backbone="no such network", early_stopping=splitter).fit(X, k)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.zeros(48), "GroupShuffleSplit.* cannot split these 48 rows"),
        (np.arange(47), "inconsistent numbers of samples"),
    ],
    ids=["one group", "length"],
)
def test_groups_that_cannot_be_split(of_groups, groups, message):
    X, k, _ = of_groups
    for splitter in (True, GroupShuffleSplit()):
        with pytest.raises(ValueError, match=message):
            quick(early_stopping=splitter).fit(X, k, groups=groups)


def test_a_class_of_splitters(coded):
    with pytest.raises(TypeError, match=r"early_stopping=<class .*ShuffleSplit'> is a class: give"):
        quick(early_stopping=GroupShuffleSplit).fit(*coded)


def test_splits_without_rows(coded):
    X, k = coded
    weight = (np.arange(48) < 40) * 1.0
    valid = PredefinedSplit(np.where(weight, -1, 0))
    with pytest.warns(UserWarning, match="no early stopping: the splitter's first part of 40 diff"):
        quick(early_stopping=valid).fit(X, k, weight)
    with pytest.raises(ValueError, match="leaves no row to train on"):
        quick(early_stopping=valid).fit(X, k, 1 - weight)
    for value in ("yes", 3, "split"):
        with pytest.raises(ValueError, match="The 'early_stopping' parameter of FineTuningClassif"):
            quick(early_stopping=value).fit(X, k)


# -- in scikit-learn -------------------------------------------------------------------------
@pytest.fixture
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


@pytest.mark.usefixtures("routing")
@pytest.mark.parametrize("is_piped", [False, True])
@pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])
def test_groups_stay_whole_within_a_cross_validation(of_groups, is_piped, cls):
    X, k, groups = of_groups
    splitter = GroupShuffleSplit(test_size=0.25)
    model = small(cls, early_stopping=splitter, callbacks=[Sets()], augment="light")
    model.set_fit_request(groups=True)
    if is_piped:
        model = make_pipeline(FunctionTransformer(), model)
    done = cross_validate(
        model, X, k * 1, cv=GroupKFold(3), params={"groups": groups}, return_indices=True
    )
    assert np.isfinite(done["test_score"]).all()
    # Eight groups of four rows are left in a fold: six to train on, two to validate on.
    assert [len(part) for part in Sets.parts] == [24, 8]


@pytest.mark.usefixtures("routing")
def test_groups_in_a_search(of_groups):
    X, k, groups = of_groups
    model = quick(early_stopping=GroupShuffleSplit(test_size=0.25)).set_fit_request(groups=True)
    search = GridSearchCV(model, {"lr": [0.001, 0.01]}, cv=GroupKFold(2), error_score="raise")
    assert search.fit(X, k, groups=groups).best_score_ > 0.3
    alone = GridSearchCV(quick(early_stopping=True), {"lr": [0.01]}, cv=KFold(2))
    with pytest.raises(sklearn.exceptions.UnsetMetadataPassedError, match="groups"):
        alone.fit(X, k, groups=groups)
