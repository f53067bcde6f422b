"""Transferability scores: published values, naive references, and what labels may be."""

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_diabetes, load_digits, load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import scale

from sktransfer.transferability import h_score, leep_score, logme_score, transrate_score

SCORES = [logme_score, h_score, transrate_score]
of_each_score = pytest.mark.parametrize("score", SCORES)


@pytest.fixture
def noisy():
    """120 rows of 9 columns, of which one separates three classes."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 40)
    X = rng.normal(size=(120, 9))
    X[:, 0] += 6 * y
    return X, y


# -- values ----------------------------------------------------------------------------------
# LogME as thuml/LogME computes it (it stops at changes of 1e-3), the H-score of google-research's
# pactran_metrics, its shrunk form of Ibrahim et al., TransRate of the authors' code.
@pytest.mark.parametrize(
    ("load", "logme", "h", "shrunk", "transrate"),
    [
        (load_iris, -0.1600602763, 1.1918988250, 1.1778424993, 0.5894054064),
        (load_wine, -0.5377070159, 1.7058208021, 1.6726003026, 2.6671221961),
        (load_digits, 0.2702775954, 5.9179093367, 5.8514329980, 50.2793122613),
    ],
)
def test_published_values(load, logme, h, shrunk, transrate):
    X, y = load(return_X_y=True)
    if load is load_wine:
        X = scale(X)
    assert logme_score(X, y) == pytest.approx(logme, abs=1e-6)
    assert h_score(X, y, shrinkage=False) == pytest.approx(h, abs=1e-9)
    assert h_score(X, y) == pytest.approx(shrunk, abs=1e-9)
    assert transrate_score(X, y) == pytest.approx(transrate, abs=1e-9)


def test_published_value_of_a_regression():
    X, y = load_diabetes(return_X_y=True)
    assert logme_score(X, scale(y)) == pytest.approx(-1.0990414715, abs=1e-6)


def test_published_values_of_leep_and_nce():
    X, y = load_digits(return_X_y=True)
    source = LogisticRegression(C=0.01, max_iter=3000).fit(X / 16, y // 2)
    p = source.predict_proba(X / 16)
    assert leep_score(p, y) == pytest.approx(-1.9016219806, abs=1e-5)
    assert leep_score(np.eye(5)[p.argmax(axis=1)], y) == pytest.approx(-1.1611331724, abs=1e-5)


# -- naive references, with more columns than rows, too ----------------------------------------
@pytest.mark.parametrize("shape", [(60, 12), (40, 40), (30, 75)])
def test_logme_is_the_largest_evidence(shape):
    rng = np.random.default_rng(1)
    X = rng.normal(size=shape)
    y = X[:, 0] + rng.normal(size=len(X))
    n = len(y)

    def evidence(log_alpha, log_beta):  # of y ~ N(0, X Xᵀ / alpha + I / beta)
        covariance = X @ X.T / np.exp(log_alpha) + np.eye(n) / np.exp(log_beta)
        _, logdet = np.linalg.slogdet(covariance)
        return -(n * np.log(2 * np.pi) + logdet + y @ np.linalg.solve(covariance, y)) / (2 * n)

    grid = [evidence(a, b) for a in np.linspace(-5, 9, 57) for b in np.linspace(-5, 9, 57)]
    assert max(grid) - 1e-4 <= logme_score(X, y) <= max(grid) + 2e-2


@pytest.mark.parametrize("n_columns", [9, 60, 200])
def test_shrunk_h_score_is_that_of_scikit_learns_covariance(n_columns):
    rng = np.random.default_rng(2)
    y = np.repeat(["a", "b", "c"], 20)
    X = rng.normal(size=(60, n_columns)) + (y == "b")[:, None] * 0.3
    estimate = LedoitWolf().fit(X)
    means = np.stack([X[y == label].mean(axis=0) for label in y])
    between = np.cov(means, rowvar=False)
    expected = np.trace(np.linalg.inv(estimate.covariance_) @ between) * (1 - estimate.shrinkage_)
    assert_allclose(h_score(X, y), expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:X has 80 columns")
@pytest.mark.parametrize("n_columns", [7, 80])
def test_transrate_is_the_difference_of_coding_rates(n_columns):
    rng = np.random.default_rng(3)
    y = np.repeat([0, 1], [20, 30])
    X = rng.normal(size=(50, n_columns)) + y[:, None]
    X -= X.mean(axis=0)

    def rate(Z):
        return np.linalg.slogdet(np.eye(n_columns) + Z.T @ Z / (len(Z) * 0.01))[1] / 2

    expected = rate(X) - (rate(X[y == 0]) + rate(X[y == 1])) / 2
    assert_allclose(transrate_score(X, y, eps=0.01), expected, rtol=1e-9)


def test_leep_translates_the_source_classes():
    rng = np.random.default_rng(4)
    p, y = rng.dirichlet(np.ones(4), size=30), rng.integers(0, 3, 30)
    joint = np.array([[p[y == c, z].sum() / 30 for z in range(4)] for c in range(3)])
    likelihoods = [
        sum(p[i, z] * joint[y[i], z] / joint[:, z].sum() for z in range(4)) for i in range(30)
    ]
    assert_allclose(leep_score(p, y), np.mean(np.log(likelihoods)))


def test_leep_leaves_out_a_source_class_that_is_never_predicted():
    p, y = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), ["ant", "ant", "bee"]
    assert leep_score(np.column_stack([p, np.zeros(3)]), y) == leep_score(p, y)


# -- properties --------------------------------------------------------------------------------
@of_each_score
def test_right_labels_score_higher_than_shuffled_ones(score, noisy):
    X, y = noisy
    shuffled = np.random.default_rng(0).permutation(y)
    assert score(X, y) > score(X, shuffled)


@of_each_score
@pytest.mark.parametrize(
    "relabel",
    [
        lambda y: np.array(["ant", "bee", "wasp"])[y],
        lambda y: np.array(["ant", "bee", "wasp"], dtype=object)[y],
        lambda y: np.array([-1, 1, 40])[y],
        lambda y: np.array([0.0, 1.0, 2.0])[y],
        lambda y: pd.Series(y, index=range(900, 1020)),
        lambda y: pd.Series(y).astype("category"),
        lambda y: pd.Series(np.array(["ant", "bee", "wasp"])[y]).astype("string"),
        lambda y: pd.Series(y).astype("Int64"),
        lambda y: np.array([b"ant", b"bee", b"wasp"])[y],
        lambda y: y[:, None],
        list,
    ],
    ids=[
        *["str", "object", "gaps", "floats", "series", "category"],
        *["string", "Int64", "bytes", "column", "list"],
    ],
)
def test_labels_of_any_type(score, relabel, noisy):
    X, y = noisy
    assert score(X, relabel(y)) == pytest.approx(score(X, y), rel=1e-12)


@of_each_score
def test_two_classes_named_minus_one_and_one_or_true_and_false(score, noisy):
    X, y = noisy
    expected = score(X, (y > 0).astype(int))
    assert score(X, np.where(y > 0, 1, -1)) == pytest.approx(expected, rel=1e-12)
    assert score(X, y > 0) == pytest.approx(expected, rel=1e-12)


@of_each_score
def test_a_rotation_and_columns_of_zeros_change_no_score(score, noisy):
    X, y = noisy
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))
    assert score(X @ rotation, y) == pytest.approx(score(X, y), rel=1e-9)
    if score is not h_score:  # its shrinkage depends on the number of columns
        padded = np.column_stack([X, np.zeros((120, 3))])
        assert score(padded, y) == pytest.approx(score(X, y), rel=1e-9)


@of_each_score
def test_float32_columns_and_frames(score, noisy):
    X, y = noisy
    expected = score(X.astype(np.float32).astype(np.float64), y)
    assert score(pd.DataFrame(X.astype(np.float32)), y) == pytest.approx(expected, rel=1e-12)


@of_each_score
@pytest.mark.parametrize("factor", [1e-8, 1e8, 1e200])
def test_scale_of_the_columns(score, factor, noisy):
    X, y = noisy
    if score is not transrate_score:  # whose distortion is absolute
        assert score(factor * X, y) == pytest.approx(score(X, y), rel=1e-9)


@of_each_score
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_columns_say_nothing(score, value, noisy):
    y = noisy[1]
    got = score(np.full((120, 4), value), y)
    if score is not logme_score:
        assert got == 0
    elif value:  # X is not centred: one column fits the classes' shares
        assert got == pytest.approx(logme_score(np.ones((120, 1)), y), rel=1e-6)
    else:
        assert got < logme_score(np.ones((120, 1)), y)


def test_several_outputs_are_averaged(noisy):
    X, _ = noisy
    y = np.random.default_rng(0).normal(size=(120, 2))
    expected = (logme_score(X, y[:, 0]) + logme_score(X, y[:, 1])) / 2
    assert logme_score(X, y) == pytest.approx(expected)


def test_whole_numbers_are_a_regression_where_it_is_said(noisy):
    X, y = noisy
    assert logme_score(X, y, task="regression") == pytest.approx(logme_score(X, y + 1e-12))
    assert logme_score(X, y) == logme_score(X, y, task="classification")


# -- what cannot be scored ---------------------------------------------------------------------
def test_warnings_where_a_score_saturates():
    rng = np.random.default_rng(5)
    X, y = rng.normal(size=(30, 50)), np.repeat([0, 1, 2], 10)
    with pytest.warns(UserWarning, match=r"50 columns and 30 rows.*is then 2 for any columns"):
        assert h_score(X, y, shrinkage=False) == pytest.approx(2)
    with pytest.warns(UserWarning, match="50 columns and 30 rows: TransRate then depends on"):
        transrate_score(X, y)
    assert h_score(X, y) < 1
    assert np.isfinite(logme_score(X, y))


@of_each_score
def test_missing_values_are_named_by_their_rows(score, noisy):
    X, y = noisy
    X[[3, 17], 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"X holds NaN or infinity in 2 of 120 rows: 3, 17\."):
        score(X, y)


@of_each_score
@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT, np.inf])
@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_missing_labels_are_named_by_their_rows(score, missing, dtype, noisy):
    X, y = noisy
    labels = y.tolist() if dtype is object or missing is np.inf else [*map(str, y)]
    labels[5], dtype = missing, "Float64" if missing is np.inf else dtype
    with pytest.raises(ValueError, match=r"y holds missing labels in 1 of 120 rows: 5\."):
        score(X, pd.Series(labels, dtype=dtype))


@pytest.mark.parametrize("score", [*SCORES, lambda X, y: leep_score(np.eye(3)[y.astype(int)], y)])
def test_labels_that_are_none(score, noisy):
    X, y = noisy
    if score is not logme_score:
        with pytest.raises(
            ValueError, match="fractional parts, and labels are needed: logme_score"
        ):
            score(X, y + 0.5)
    mixed = y.astype(object)
    mixed[mixed == 2] = "two"
    with pytest.raises(TypeError, match="y mixes labels of the types int, str: use one"):
        h_score(X, mixed)


@of_each_score
def test_a_single_class_has_no_score(score, noisy):
    with pytest.raises(ValueError, match="at least two classes; all labels are"):
        score(noisy[0], np.zeros(120, dtype=int))


@of_each_score
def test_lengths_must_agree(score, noisy):
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        score(noisy[0], noisy[1][:50])


def test_parameters_are_checked(noisy):
    with pytest.raises(ValueError, match="task='clustering' is not accepted"):
        logme_score(*noisy, task="clustering")
    with pytest.raises(ValueError, match="eps=0 must be positive"):
        transrate_score(*noisy, eps=0)
    with pytest.raises(ValueError, match="eps='small' must be positive"):
        transrate_score(*noisy, eps="small")
    with pytest.raises(ValueError, match=r"y holds NaN or infinity in 1 of 120 rows: 2\."):
        logme_score(noisy[0], [1.5, 2.5, np.nan] + [0.5] * 117, task="regression")
    with pytest.raises(ValueError, match="Row 1 of source_proba holds no probabilities"):
        leep_score([[0.5, 0.5], [2.0, -1.0]], [0, 1])
    with pytest.raises(ValueError, match="y should be a 1d array, got an array of shape"):
        h_score(noisy[0], np.zeros((120, 2)))
