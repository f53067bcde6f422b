"""Displays of transfer: their artists show the given data."""

import subprocess
import sys

import numpy as np
import pytest
from made_cases import SMALL, STRIPES, Filters, extractor, stripes
from matplotlib import pyplot as plt
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sktransfer import FineTuningClassifier
from sktransfer.inspection import BackboneRankingDisplay, FineTuningDisplay, TransferCurveDisplay
from sktransfer.transferability import rank_backbones, transfer_report

SCORES = {
    "pre-trained": np.array([[0.7, 0.8, 0.9], [0.8, 0.8, 0.9]]),
    "random": np.array([[0.4, 0.6, 0.7], [0.4, 0.5, 0.8]]),
    "dummy": np.full((2, 3), 0.5),
}
EPOCHS = [
    {"epoch": 1, "train_loss": 0.9, "lr": 1e-3, "n_unfrozen": 1},
    {"epoch": 2, "train_loss": 0.7, "lr": 1e-4, "n_unfrozen": 3},
]
VALIDATION = [
    {"epoch": 0, "valid_loss": 1.0, "valid_score": 0.5},
    {"valid_loss": 0.8, "valid_score": 0.7},
    {"valid_loss": 0.9, "valid_score": 0.6},
]
HISTORY = [own | valid for own, valid in zip([{}, *EPOCHS], VALIDATION, strict=True)]


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


# -- TransferCurveDisplay --------------------------------------------------------------------
def test_curves_over_training_sizes():
    display = TransferCurveDisplay([10, 20, 40], SCORES, score_name="accuracy", title="Transfer")
    assert display.plot() is display
    for line, scores in zip(display.lines_, SCORES.values(), strict=True):
        assert_array_equal(line.get_xdata(), [10, 20, 40])
        assert_allclose(line.get_ydata(), scores.mean(axis=0))
    assert len(display.fills_) == 3
    assert_allclose(sorted(display.marks_["start"].get_ydata()), [0.4, 0.75])
    assert_allclose(sorted(display.marks_["asymptote"].get_ydata()), [0.75, 0.9])
    # Least squares of 0.75, 0.8, 0.9 and of 0.4, 0.55, 0.75 over 0, 1, 2.
    assert_allclose(np.diff(display.marks_["slope"].get_ydata()), 0.075)
    assert_allclose(np.diff(display.marks_["slope of baseline"].get_ydata()), 0.175)
    labels = ["start +0.350", "asymptote +0.150", "slope -0.100 per doubling"]
    assert texts(display.ax_.get_legend()) == [*SCORES, *labels]
    assert display.ax_.get_xlabel() == "training rows"
    assert display.ax_.get_ylabel() == "accuracy"
    assert display.ax_.get_title() == "Transfer"


def test_equal_sizes_have_no_slope():
    display = TransferCurveDisplay([40, 40, 40], SCORES).plot()
    assert set(display.marks_) == {"start", "asymptote"}


def test_curves_over_epochs():
    epochs = {"pre-trained": [[0.5, 0.8, np.nan], [0.7, 0.8, 0.9]], "random": [[0.2, 0.3, 0.3]] * 2}
    display = TransferCurveDisplay([10], {}, epochs=epochs).plot(over="epochs")
    assert_allclose(display.lines_[0].get_ydata(), [0.6, 0.8, 0.9])
    assert_array_equal(display.lines_[0].get_xdata(), [0, 1, 2])
    assert set(display.marks_) == {"start", "asymptote"}
    assert display.ax_.get_xlabel() == "epoch"


def test_curves_of_a_report():
    X, y = stripes(0, n=40)
    tuned = FineTuningClassifier(Filters(STRIPES), **SMALL, unfreeze=0, max_epochs=1)
    report = transfer_report(tuned, X, y, train_sizes=[8, 1.0], cv=2, random_state=0)
    _, ax = plt.subplots()
    display = report.plot(ax)
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    assert display.ax_.get_title() == f"Transfer: {report.verdict_} (p = {report.p_value_:.2g})"
    assert_allclose(display.lines_[0].get_ydata(), report.scores_["pre-trained"].mean(axis=0))
    assert len(report.plot(over="epochs").lines_) == 2
    assert len(TransferCurveDisplay.from_report(report).lines_) == 4


def test_wrong_axes_of_curves():
    display = TransferCurveDisplay([10, 20, 40], SCORES)
    with pytest.raises(ValueError, match="over='time': 'train_sizes' or 'epochs' is accepted"):
        display.plot(over="time")
    with pytest.raises(ValueError, match="There are no scores by epoch"):
        display.plot(over="epochs")


# -- FineTuningDisplay -----------------------------------------------------------------------
def test_a_history_with_a_validation_part():
    display = FineTuningDisplay(HISTORY, best_epoch=1, n_stages=4, score_name="accuracy")
    assert display.plot() is display
    values = {key: line.get_ydata().tolist() for key, line in display.lines_.items()}
    assert values == {
        "train_loss": [0.9, 0.7],
        "valid_loss": [1.0, 0.8, 0.9],
        "valid_score": [0.5, 0.7, 0.6],
        "lr": [1e-3, 1e-4],
        "n_frozen": [3, 1],
    }
    assert display.lines_["valid_score"].get_xdata().tolist() == [0, 1, 2]
    assert len(display.axes_) == 4
    assert [line.get_xdata() for line in display.kept_] == [[1, 1]] * 4
    assert "stopped after epoch 2, kept epoch 1" in display.axes_[0].get_title()
    assert display.axes_[2].get_yscale() == "log"
    assert display.axes_[-1].get_xlabel() == "epoch"


@pytest.mark.usefixtures("one_thread")
def test_a_history_of_an_estimator():
    X, y = stripes(0, n=20)
    tuned = FineTuningClassifier(Filters(STRIPES), **SMALL, max_epochs=2, random_state=0)
    pipeline = make_pipeline(FunctionTransformer(), tuned).fit(X, y)
    _, axes = plt.subplots(3)
    display = FineTuningDisplay.from_estimator(pipeline, axes=axes)
    losses = [row["train_loss"] for row in pipeline[-1].history_]
    assert display.axes_ == list(axes)
    assert_allclose(display.lines_["train_loss"].get_ydata(), losses)
    assert "valid_score" not in display.lines_
    with pytest.raises(ValueError, match="axes holds 2 axes, and 3 are needed"):
        display.plot(axes[:2])


@pytest.mark.usefixtures("one_thread")
def test_a_history_of_a_search():
    X, y = stripes(0, n=20)
    tuned = FineTuningClassifier(Filters(STRIPES), **SMALL, random_state=0)
    search = GridSearchCV(tuned, {"max_epochs": [1]}, cv=2).fit(X, y)
    display = FineTuningDisplay.from_estimator(search)
    assert display.lines_["lr"].get_xdata().tolist() == [1]
    ticks = display.axes_[-1].xaxis.get_majorticklocs()
    assert (ticks == np.round(ticks)).all()
    with pytest.raises(ValueError, match="with max_epochs=0 only the head is fitted"):
        FineTuningDisplay.from_estimator(tuned.set_params(max_epochs=0).fit(X, y))


def test_only_fine_tuning_has_a_history():
    with pytest.raises(TypeError, match="LogisticRegression keeps no history_"):
        FineTuningDisplay.from_estimator(LogisticRegression().fit([[0], [1]], [0, 1]))


# -- BackboneRankingDisplay ------------------------------------------------------------------
def test_scores_against_cost():
    display = BackboneRankingDisplay(
        ["large", "small", "broken"],
        [0.9, 0.8, np.nan],
        [20.0, 2.0, 1.0],
        score_error=[0.01, 0.02, np.nan],
        gain=[0.3, np.nan, np.nan],
        score_name="accuracy",
    ).plot()
    assert [bars[0].get_xydata().tolist() for bars in display.points_] == [[[20, 0.9]], [[2, 0.8]]]
    assert len(display.gains_) == 1
    assert_allclose(display.gains_[0].get_ydata(), [0.6, 0.9])
    legend = display.ax_.get_legend()
    assert texts(legend) == ["large", "small"]
    assert legend.get_title().get_text() == "hollow: random weights"
    assert display.ax_.get_xlabel() == "seconds per 1,000 rows"
    assert display.ax_.get_ylabel() == "accuracy"


@pytest.mark.usefixtures("one_thread")
def test_a_ranking():
    X, y = stripes(0, n=20)
    ranking = rank_backbones(X, y, [extractor(Filters(STRIPES))], layers=["conv", None], cv=2)
    _, ax = plt.subplots()
    display = ranking.plot(ax)
    assert display.ax_ is ax
    assert sorted(texts(ax.get_legend())) == ["Filters", "Filters, conv"]
    assert len(BackboneRankingDisplay.from_ranking(ranking).points_) == 2


# -- all -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "display",
    [
        TransferCurveDisplay([10, 20, 40], SCORES),
        FineTuningDisplay(HISTORY, best_epoch=1, n_stages=4),
        BackboneRankingDisplay(["a"], [0.5], [1.0]),
    ],
)
def test_without_matplotlib(display, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"not installed: pip install sktransfer\[plot\]"):
        display.plot()


def test_matplotlib_is_imported_when_used():
    code = (
        "import sys, sktransfer.inspection as i; i.TransferCurveDisplay([1], {});"
        "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
