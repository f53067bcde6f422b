"""transfer_report: true cases of positive, negative and no transfer, and what is compared."""

import numpy as np
import pandas as pd
import pytest
from made_cases import FLAT, SMALL, STRIPES, Filters, extractor, stripes
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    StratifiedKFold,
    TunedThresholdClassifierCV,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import FineTuningClassifier, FineTuningRegressor
from sktransfer.transferability import TransferReport, transfer_report

pytestmark = pytest.mark.usefixtures("one_thread")


def model(weight, **parameters):
    """A pipeline with a network of these filters."""
    return make_pipeline(
        extractor(Filters(weight), **parameters), StandardScaler(), LogisticRegression()
    )


@pytest.fixture(scope="module")
def faint():
    return stripes(0)


@pytest.fixture(scope="module")
def positive(faint):
    return transfer_report(model(STRIPES), *faint, train_sizes=[8, 24, 72], random_state=0)


class Seen(ClassifierMixin, BaseEstimator):
    """Notes how many rows of which groups it is fitted on."""

    log = []  # noqa: RUF012

    def __init__(self, weights="DEFAULT", backbone=None):
        self.weights, self.backbone = weights, backbone

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        Seen.log.append((self.weights, np.array(X), np.array(y)))
        return self

    def predict(self, X):
        return np.full(len(X), self.classes_[0])


# -- verdicts --------------------------------------------------------------------------------
def test_positive_transfer_is_found(positive):
    assert positive.verdict_ == "helps"
    assert positive.p_value_ == positive.gain_["random"].p_value < 0.01
    assert positive.start_["random"].value > 0.15
    assert positive.asymptote_["random"].value > 0.15
    assert positive.verdicts_ == dict.fromkeys(["random", "pixels", "dummy"], "helps")


def test_negative_transfer_is_found():
    report = transfer_report(
        model(FLAT), *stripes(0, contrast=40), train_sizes=[16, 64], cv=5, random_state=0
    )
    assert report.verdict_ == "hurts"
    assert report.gain_["random"].value < -0.2
    assert report.advice_[0].startswith("Try lower layers")


def test_of_labels_that_no_image_shows_few_verdicts_are_given(faint):
    X, rng = faint[0][:40], np.random.default_rng(0)
    verdicts = [
        transfer_report(
            model(STRIPES),
            X,
            rng.permutation(np.arange(40) % 2),
            train_sizes=[1.0],
            cv=5,
            against=["random"],
            random_state=seed,
        ).verdict_
        for seed in range(20)
    ]
    assert verdicts.count("no evidence") >= 18


# -- figures ---------------------------------------------------------------------------------
def test_figures_equal_a_plain_computation(faint, positive):
    X, y = faint
    folds = [*StratifiedKFold(10, shuffle=True, random_state=0).split(X, y)]
    own, random = (
        cross_val_score(model(STRIPES, weights=weights), X, y, cv=folds)
        for weights in ("DEFAULT", None)
    )
    assert positive.scores_["pre-trained"][:, -1] == pytest.approx(own)
    # Other folds have other random weights.
    assert positive.scores_["random"][0, -1] == pytest.approx(random[0])
    assert positive.scores_["random"][1:, -1].tolist() != random[1:].tolist()
    differences = positive.scores_["pre-trained"] - positive.scores_["random"]
    slopes = [np.polyfit(np.log2([8, 24, 72]), d, 1)[0] for d in differences]
    means = differences.mean(axis=1)
    for estimate, values in [
        (positive.start_, differences[:, 0]),
        (positive.slope_, slopes),
        (positive.asymptote_, differences[:, -1]),
        (positive.gain_, means),
    ]:
        error = np.sqrt((1 / 10 + 8 / 72) * np.var(values, ddof=1))
        assert estimate["random"].value == pytest.approx(np.mean(values))
        assert estimate["random"].error == pytest.approx(error)
    assert positive.p_value_ == pytest.approx(2 * stats.t.sf(means.mean() / error, 9))


def test_tables_and_text(positive):
    table = positive.table_
    assert isinstance(table, pd.DataFrame)
    assert table["model"].unique().tolist() == ["pre-trained", "random", "pixels", "dummy"]
    assert table["train_size"].tolist() == [8, 24, 72] * 4
    text, html = repr(positive), positive._repr_html_()
    assert text.startswith("Transfer helps: accuracy +0.")
    for words in ("slope per doubling", "asymptote", "pixels", "no evidence"):
        assert (words in text) == (words in html) == (words != "no evidence")


def test_a_single_fold_or_size_gives_no_evidence(faint):
    X, y = faint
    half = [(np.arange(40), np.arange(40, 80))]
    report = transfer_report(model(STRIPES), X, y, train_sizes=[1.0], cv=half, random_state=0)
    assert report.verdict_ == "no evidence"
    assert np.isnan([report.p_value_, report.slope_["random"].value]).all()
    assert report.start_ == report.asymptote_
    assert report.advice_ == [
        "The difference was not tested: give at least two folds, and scores without NaN."
    ]
    assert "p = nan (training sizes: 1, folds: 1)" in repr(report)


@pytest.mark.parametrize(
    ("n_folds", "gain", "verdict"),
    [(2, 1 / 6, "no evidence"), (5, 1 / 6, "helps"), (5, -0.5, "hurts"), (5, 0, "no evidence")],
)
def test_folds_with_equal_differences_are_known_to_their_rounding(n_folds, gain, verdict):
    scores = np.full((n_folds, 1), 0.5)
    folds = [*KFold(n_folds).split(np.zeros(6 * n_folds))]
    report = TransferReport(
        {"pre-trained": scores + gain, "random": scores},
        np.array([6]),
        {},
        folds,
        score_name="accuracy",
        is_fine_tuned=False,
    )
    assert report.verdict_ == verdict
    assert report.gain_["random"].error > 0


# -- training parts --------------------------------------------------------------------------
def parts_of(**parameters):
    """The rows that each fit of the pre-trained model is given: (row number, label)."""
    Seen.log.clear()
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(["a", "b", "c"], [60, 24, 6]))
    transfer_report(Seen(backbone="none"), np.arange(90), y, against=["dummy"], **parameters)
    return [(X, y) for weights, X, y in Seen.log if weights == "DEFAULT"]


def test_parts_are_nested_and_stratified():
    parts = parts_of(train_sizes=[3, 0.5, 1.0], cv=3, random_state=0)
    assert [len(X) for X, _ in parts] == [3, 30, 60] * 3
    for small, half, whole in zip(*[iter(parts)] * 3, strict=True):
        assert set(small[0]) <= set(half[0]) <= set(whole[0])
        assert sorted(small[1]) == ["a", "b", "c"]
        assert np.unique(half[1], return_counts=True)[1] == pytest.approx([20, 8, 2], abs=1)


def test_parts_hold_whole_groups():
    groups = np.arange(90) // 6
    parts = parts_of(train_sizes=[20, 1.0], cv=GroupKFold(3), groups=groups, random_state=0)
    for X, _ in parts:
        assert (np.unique(X // 6, return_counts=True)[1] == 6).all()
    assert [len(X) for X, _ in parts] == [24, 60] * 3


def test_parts_that_groups_make_equal_have_no_slope(faint):
    report = transfer_report(
        model(STRIPES),
        *faint,
        train_sizes=[30, 40],
        cv=GroupKFold(2),
        groups=np.arange(80) // 40,
        against=["random"],
        random_state=0,
    )
    assert report.train_sizes_.tolist() == [40, 40]
    assert np.isnan(report.slope_["random"].value)


def test_one_random_state_repeats_the_report(faint, positive):
    again = transfer_report(
        model(STRIPES), *faint, train_sizes=[72, 8, 24], n_jobs=2, random_state=0
    )
    assert again.p_value_ == positive.p_value_
    assert again.slope_ == positive.slope_


# -- estimators ------------------------------------------------------------------------------
def test_columns_beside_the_images_are_kept(faint):
    X, y = faint
    frame = pd.DataFrame({"photo": list(X), "size": (y == "down") + 0.0}, index=range(7, 87))
    columns = make_column_transformer(
        (extractor(Filters(FLAT)), ["photo"]), ("passthrough", ["size"])
    )
    report = transfer_report(
        make_pipeline(columns, StandardScaler(), LogisticRegression()),
        frame,
        pd.Series(y, index=frame.index),
        train_sizes=[1.0],
        random_state=0,
    )
    means = {name: mean[0].value for name, mean in report.means_.items()}
    assert means["pre-trained"] == means["random"] == 1  # the size says it
    assert means["dummy"] == 0.5
    assert report.verdict_ == "no evidence"


def test_a_search_is_compared_as_a_whole(faint):
    search = GridSearchCV(model(STRIPES), {"logisticregression__C": [0.1, 1]}, cv=2)
    report = transfer_report(
        search, *faint, train_sizes=[1.0], cv=3, scoring="neg_log_loss", random_state=0
    )
    assert report.score_name == "neg_log_loss"
    assert report.gain_["pixels"].value > 0.1


@pytest.mark.parametrize("has_network", [False, True])
def test_baselines_of_a_search_have_its_scoring(faint, has_network):
    name = "pretrainedfeatureextractor__weights"
    grid = {name: ["DEFAULT", None]} if has_network else {"C": [0.1, 1]}
    inner = model(STRIPES) if has_network else LogisticRegression()
    search = GridSearchCV(inner, grid, scoring="neg_log_loss", cv=2)
    search = search if has_network else make_pipeline(extractor(Filters(STRIPES)), search)
    report = transfer_report(search, *faint, train_sizes=[1.0], cv=3, random_state=0)
    assert report.score_name == "neg_log_loss"
    assert all(scores.max() < 0 for scores in report.scores_.values())
    assert report.gain_["dummy"].value > 0


def test_a_scoring_that_score_does_not_use(faint):
    tuned = TunedThresholdClassifierCV(model(STRIPES), scoring="balanced_accuracy", cv=2)
    report = transfer_report(tuned, *faint, train_sizes=[1.0], against="dummy", cv=2)
    assert report.score_name == "accuracy"


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_search_does_not_give_baselines_their_weights_back(faint, is_nested):
    name = "pretrainedfeatureextractor"
    grid = {f"{name}__weights": ["DEFAULT", None], f"{name}__layer": [None, "pool"]}
    own = make_pipeline(extractor(Filters(STRIPES)), StandardScaler(), LogisticRegression())
    search = GridSearchCV(own, [grid, {f"{name}__weights": ["DEFAULT"]}], cv=2)
    search = make_pipeline("passthrough", search) if is_nested else search
    report = transfer_report(search, *faint, train_sizes=[1.0], cv=3, random_state=0)
    assert report.gain_["random"].value > 0.2
    assert report.gain_["pixels"].value > 0.2


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_a_search_over_fine_tuning(faint, n_outputs):
    X, y = faint
    targets = ((y == "down") * 5.0)[:, None].repeat(n_outputs, axis=1)
    tuned = FineTuningRegressor(Filters(STRIPES), **SMALL, unfreeze=0, max_epochs=0)
    search = GridSearchCV(tuned, {"unfreeze": [0, 1]}, cv=2)
    against = ["random", "pixels"]
    report = transfer_report(
        search, X, targets, train_sizes=[1.0], cv=3, against=against, random_state=0
    )
    assert report.gain_["pixels"].value > 0.1


def test_regression(faint):
    X, y = faint
    size = (y == "down") * 5 + np.random.default_rng(0).normal(size=80)
    pipeline = make_pipeline(extractor(Filters(STRIPES)), StandardScaler(), Ridge())
    report = transfer_report(pipeline, X, size, train_sizes=[20, 64], random_state=0)
    assert report.score_name == "R²"
    assert report.verdicts_["pixels"] == report.verdicts_["dummy"] == "helps"
    assert report.gain_["random"].value > 0.1
    assert report.scores_["dummy"].max() <= 0


def test_fine_tuning_is_followed_by_epoch(faint):
    X, y = faint
    tuned = FineTuningClassifier(Filters(STRIPES), **SMALL, unfreeze=0, max_epochs=2)
    report = transfer_report(tuned, X, y, train_sizes=[0.3, 1.0], cv=3, random_state=0)
    assert report.gain_["random"].value > 0.1
    assert {name: e.shape for name, e in report.epochs_.items()} == {
        "pre-trained": (3, 3),
        "random": (3, 3),
    }
    # Without interpolated weights the last epoch is the model that is scored.
    assert report.epochs_["pre-trained"][:, -1] == pytest.approx(
        report.scores_["pre-trained"][:, -1]
    )


def test_fine_tuning_of_numbers_is_followed_by_epoch(faint):
    X, y = faint
    size = (y == "down") * 5 + np.random.default_rng(0).normal(size=80)
    tuned = FineTuningRegressor(Filters(STRIPES), **SMALL, unfreeze=0, max_epochs=2)
    report = transfer_report(
        tuned, X, size, train_sizes=[1.0], cv=2, against=["random"], random_state=0
    )
    assert report.epochs_["pre-trained"][:, -1] == pytest.approx(
        report.scores_["pre-trained"][:, -1]
    )


def test_fine_tuning_that_stops_early_follows_its_own_part(faint):
    X, y = faint
    size = (y == "down") * 5.0
    tuned = FineTuningRegressor(
        Filters(STRIPES), **SMALL, unfreeze=0, max_epochs=3, early_stopping=True, n_iter_no_change=1
    )
    with pytest.warns(UserWarning, match="did not improve"):
        report = transfer_report(
            tuned, X, size, train_sizes=[1.0], cv=2, against=["random"], random_state=0
        )
    assert report.epochs_["random"].shape[0] == 2
    assert np.isfinite(report.epochs_["random"][:, :2]).all()


@pytest.mark.filterwarnings("ignore:.*are left out of")
def test_images_that_fine_tuning_skips_stop_no_baseline(faint):
    X, y = (part[:24] for part in faint)
    tuned = FineTuningClassifier(Filters(STRIPES), **SMALL, max_epochs=0, on_error="skip")
    report = transfer_report(tuned, [*X[:23], None], y, train_sizes=[1.0], cv=2, random_state=0)
    assert np.isfinite(report.scores_["pixels"]).all()


def test_several_labels_per_row(faint):
    X, y = faint
    labels = np.stack([y == "down", np.arange(80) % 4 == 0], axis=1).astype(int)
    tuned = FineTuningClassifier(Filters(STRIPES), **SMALL, unfreeze=0, max_epochs=1)
    report = transfer_report(tuned, X, labels, train_sizes=[1.0], cv=3, random_state=0)
    assert report.gain_["random"].value > 0
    assert set(report.scores_) == {"pre-trained", "random", "pixels", "dummy"}


def test_a_network_behind_another_step(faint):
    tuned = FineTuningClassifier(Filters(STRIPES), **SMALL, unfreeze=0, max_epochs=0)
    pipeline = make_pipeline("passthrough", tuned)
    report = transfer_report(pipeline, *faint, train_sizes=[1.0], cv=3, random_state=0)
    assert report.gain_["pixels"].value > 0.1
    assert report.epochs_ == {}


@pytest.mark.parametrize("labels", [[-1, 1], [True, False], np.array([3, 9], dtype=object)])
def test_labels_of_any_type(faint, positive, labels):
    X, y = faint
    coded = pd.Series(np.asarray(labels)[(y == "down").astype(int)], index=range(80, 160))
    report = transfer_report(model(STRIPES), X, coded, train_sizes=[72], random_state=0)
    assert report.asymptote_["random"] == pytest.approx(positive.asymptote_["random"])


def test_one_reading_of_pixels(faint):
    X, y = faint
    bright = X // 4 + (y == "down")[:, None, None, None].astype(np.uint8) * 100
    report = transfer_report(
        model(STRIPES), bright, y, train_sizes=[1.0], against="pixels", random_state=0
    )
    assert report.scores_["pixels"].min() == 1
    assert list(report.scores_) == ["pre-trained", "pixels"]


def test_pixels_and_the_search_for_copies_read_numbers_as_the_estimator_does(faint):
    X, y = faint
    wide = X.astype(float) * 1000 / 255
    tuned = FineTuningClassifier(
        Filters(STRIPES), **SMALL, unfreeze=0, max_epochs=0, value_range=(0, 1000)
    )
    own, same = (
        transfer_report(
            tuned.set_params(value_range=limits),
            images,
            y,
            train_sizes=[1.0],
            cv=2,
            against=["pixels"],
            random_state=0,
        )
        for images, limits in ((wide, (0, 1000)), (X, None))
    )
    assert own.scores_["pixels"].tolist() == same.scores_["pixels"].tolist()


@pytest.mark.parametrize("form", [list, lambda X: pd.DataFrame({"photo": list(X)})])
def test_copies_on_both_sides_are_warned_of(faint, form):
    X, y = faint
    twice = form(np.concatenate([X[:40], X[:40]]))
    columns = make_column_transformer((extractor(Filters(FLAT)), ["photo"]))
    first = extractor(Filters(FLAT)) if form is list else columns
    with pytest.warns(UserWarning, match="near-duplicate among the training images.*find_leaks"):
        transfer_report(
            make_pipeline(first, LogisticRegression()),
            twice,
            np.tile(y[:40], 2),
            train_sizes=[1.0],
            cv=2,
            against="dummy",
            random_state=0,
        )


# -- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": LogisticRegression()}, "has no pre-trained network in it"),
        ({"against": ["chance"]}, r"give one or more of \['random', 'pixels', 'dummy'\]"),
        ({"against": []}, "give one or more of"),
        ({"train_sizes": [73]}, "train_sizes holds 73: whole numbers of rows from 2 to 72"),
        ({"train_sizes": [1]}, "train_sizes holds 1: "),
        ({"train_sizes": [1.5]}, "shares above 0 and up to 1.0"),
        ({"train_sizes": ["all"]}, "train_sizes holds 'all': "),
        ({"train_sizes": []}, "train_sizes is empty"),
        ({"groups": [1]}, r"groups has shape \(1,\); it needs a label for each of 80 rows"),
        ({"y": np.linspace(0, 1, 80)}, "y holds numbers with fractional parts"),
        ({"scoring": "f9"}, "f9"),
        ({"y": ["a"] * 3}, "inconsistent numbers of samples"),
        ({"y": ["a"] * 80}, "y must have at least two classes"),
        ({"y": ["a", None] * 40}, "y holds missing labels in 40 of 80 rows: 1, 3"),
    ],
)
def test_errors(faint, change, message):
    X, y = faint
    arguments = {"estimator": model(FLAT), "y": y, **change}
    with pytest.raises(ValueError, match=message):
        transfer_report(arguments.pop("estimator"), X, arguments.pop("y"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "builtin"}, "estimator='builtin' is neither a classifier nor a regressor"),
        ({"estimator": extractor(Filters())}, "is neither a classifier nor a regressor"),
        ({"estimator": LogisticRegression}, "is neither a classifier nor a regressor"),
        ({"scoring": ["accuracy"]}, r"scoring=\['accuracy'\]: the name of one scorer"),
    ],
)
def test_wrong_types(faint, change, message):
    arguments = {"estimator": model(FLAT), **change}
    with pytest.raises(TypeError, match=message):
        transfer_report(arguments.pop("estimator"), *faint, **arguments)


def test_unreadable_images_are_named_by_their_row_in_x(faint):
    X, y = faint
    with pytest.raises(ValueError, match="1 of 72 images could not be read") as error:
        transfer_report(model(FLAT), [*X[:7], None, *X[8:]], y, train_sizes=[1.0], random_state=0)
    assert error.value.__notes__ == [
        "These are rows of one part of X; in X itself they are rows [7]."
    ]


def test_pixels_need_images():
    with pytest.raises(TypeError, match="against='pixels' needs images, and Seen does not"):
        transfer_report(Seen(backbone="none"), np.arange(20), np.arange(20) % 2)
