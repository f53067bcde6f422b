"""Views of pictures: what the linear probe of the start is fitted on."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from test_fine_tuning import small

from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    PretrainedFeatureExtractor,
    load_backbone,
)
from sktransfer.fine_tuning import _base as _fine_tuning_base
from sktransfer.fine_tuning import _probe as linear_probe
from sktransfer.fine_tuning._views import corners
from sktransfer.images._images import Images

pytestmark = pytest.mark.usefixtures("one_thread")


# -- corners ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_corners_are_parts_enlarged(pictures, dtype):
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(dtype)  # 40 × 48
    height, width = 34, 41  # 85 %
    boxes = [(0, 0), (6, 7), (0, 7), (6, 0)]  # (top, left)
    views = corners(x, 4)
    assert len(views) == 4
    for view, (top, left) in zip(views, boxes, strict=True):
        assert view.shape == x.shape
        assert view.dtype == dtype
        for got, picture in zip(view, pictures, strict=True):
            part = Image.fromarray(picture[top : top + height, left : left + width])
            expected = np.asarray(part.resize((48, 40), Image.Resampling.BILINEAR))
            got = got.permute(1, 2, 0).numpy().astype(float)
            np.testing.assert_allclose(got, expected, atol=1.01)
    assert len(corners(x, 2)) == 2


def test_a_picture_of_one_pixel_has_corners():
    x = torch.full((1, 3, 1, 1), 7, dtype=torch.uint8)
    assert all(torch.equal(view, x) for view in corners(x, 4))


# -- the probe -------------------------------------------------------------------------------
def rows_of_views(n_classes=3, n=24, n_views=4, n_features=5):
    rng = np.random.default_rng(0)
    codes = np.arange(n) % n_classes
    rows = rng.normal(size=(n, n_views, n_features)) + codes[:, None, None]
    return rows, codes, rng.uniform(0.5, 2, n)


def spread(rows, target, weight):
    n_views = rows.shape[1]
    return rows.reshape(-1, rows.shape[2]), target.repeat(n_views, 0), weight.repeat(n_views)


@pytest.mark.parametrize("n_features", [5, 300])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_all_views_are_fitted_on(n_classes, n_features, monkeypatch):
    monkeypatch.setattr(linear_probe, "_C_FEW_ROWS", 0.05)
    monkeypatch.setattr(linear_probe, "_MAX_ITER", 5000)
    rows, codes, weight = rows_of_views(n_classes, n_features=n_features)
    rng = np.random.RandomState(0)
    coef, intercept = linear_probe.fit_probe(rows, codes, weight, "multiclass", n_classes, rng)

    X, y, w = spread(rows, codes, weight)
    scaler = StandardScaler().fit(X, sample_weight=w)
    # A row's views share its weight.
    model = LogisticRegression(C=0.05, tol=1e-8, max_iter=5000)
    model.fit(scaler.transform(X), y, sample_weight=w / rows.shape[1] / weight.mean())
    scores = X @ coef.T + intercept
    proba = np.exp(scores - scores.max(1, keepdims=True))
    np.testing.assert_allclose(
        proba / proba.sum(1, keepdims=True), model.predict_proba(scaler.transform(X)), atol=2e-3
    )


def test_ridge_takes_all_views(monkeypatch):
    monkeypatch.setattr(linear_probe, "_ALPHAS", (3.0,))
    rows, _, weight = rows_of_views()
    target = np.random.default_rng(1).normal(size=(len(rows), 2))
    coef, intercept = linear_probe.fit_probe(rows, target, weight, "regression", 2, None)

    X, y, w = spread(rows, target, weight)
    scaler = StandardScaler().fit(X, sample_weight=w)
    model = Ridge(alpha=3.0 * weight.mean())
    model.fit(scaler.transform(X), y, sample_weight=w / rows.shape[1])
    np.testing.assert_allclose(
        X @ coef.T + intercept, model.predict(scaler.transform(X)), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
def test_equal_views_are_one(kind):
    rows, codes, weight = rows_of_views()
    target = codes if kind == "multiclass" else np.eye(3)[codes]
    alone, thrice = (
        linear_probe.fit_probe(
            rows[:, :1].repeat(k, 1), target, weight, kind, 3, np.random.RandomState(0)
        )
        for k in (1, 3)
    )
    for one, other in zip(alone, thrice, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
def test_whole_pictures_choose_the_strength(kind, monkeypatch):
    """Views of noise change what is fitted, not how strongly it is regularised."""
    rows, codes, weight = rows_of_views(n=60)
    rows[:, 1:] = np.random.default_rng(1).normal(0, 50, rows[:, 1:].shape)
    target = codes if kind == "multiclass" else np.eye(3)[codes]
    chosen = []
    solve, ridge = linear_probe._solve, linear_probe.Ridge

    def note_solve(z, codes, weight, strength, start=None):
        if len(z) in (60, 240):  # the last fit, not one for the held-out part
            chosen.append(strength)
        return solve(z, codes, weight, strength, start)

    monkeypatch.setattr(linear_probe, "_solve", note_solve)
    monkeypatch.setattr(
        linear_probe, "Ridge", lambda alpha: chosen.append(alpha) or ridge(alpha=alpha)
    )
    # Scaled alike, so that the whole pictures are the same numbers in both.
    monkeypatch.setattr(linear_probe, "_moments", lambda rows, weight: (np.zeros(5), np.ones(5)))
    for part in (rows[:, :1], rows, rows[:, ::-1]):
        linear_probe.fit_probe(part, target, weight, kind, 3, np.random.RandomState(0))
    if kind == "regression":  # with one view RidgeCV itself is the model
        views_first, noise_first = chosen
        cv = linear_probe.RidgeCV([a * weight.mean() for a in linear_probe._ALPHAS])
        assert views_first == cv.fit(rows[:, 0], target, sample_weight=weight).alpha_
        assert noise_first != views_first
        return
    alone, views_first, noise_first = np.array_split(chosen, 3)
    np.testing.assert_array_equal(views_first, alone)
    assert (noise_first != alone).any()


# -- the estimators --------------------------------------------------------------------------
def start_of(X, y, cls=FineTuningClassifier, **parameters):
    """What the head starts as, whatever is trained afterwards."""
    settings = {"unfreeze": 1, "lr": 1e-12, "weight_averaging": None, "max_epochs": 1}
    model = small(cls, **settings | parameters).fit(X, y)
    head = model.net_.module_.head.linear
    return head.weight.detach().numpy().copy()


def test_when_auto_takes_corners(stripes, monkeypatch):
    X, y = stripes

    def n_views(val=None, **changed):
        rows = {} if val is None else {"X_val": X[val:], "y_val": y[val:]}
        seen = []
        fit_probe = linear_probe.fit_probe
        monkeypatch.setattr(
            "sktransfer.fine_tuning._base.fit_probe",
            lambda rows, *rest: seen.append(rows.shape[1]) or fit_probe(rows, *rest),
        )
        small(**{"unfreeze": 1, "max_epochs": 1} | changed).fit(X, y, **rows)
        return seen

    assert n_views() == n_views(unfreeze="all") == [3]
    assert n_views(probe_views=5) == n_views(unfreeze=0, probe_views=5) == [5]
    assert n_views(unfreeze=0) == n_views(max_epochs=0) == n_views(val=30) == [1]
    assert n_views(early_stopping=True) == [1]
    assert n_views(backbone="builtin", weights=None, preprocessing="auto") == [1]
    assert n_views(head_init="random") == []
    monkeypatch.setattr(_fine_tuning_base, "_N_ROWS_TO_SPLIT", len(X))
    assert n_views(early_stopping=False) == [1]


def test_partial_fit_starts_from_the_pictures_alone(stripes):
    X, y = stripes
    one, other = (small(unfreeze=1, lr=1e-12, probe_views=n).partial_fit(X, y) for n in ("auto", 1))
    np.testing.assert_array_equal(one.predict_proba(X), other.predict_proba(X))


@pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])
def test_columns_of_images_stand_side_by_side(stripes, cls):
    """With the columns swapped the halves of the head are swapped."""
    X, y = stripes
    y = y if cls is FineTuningClassifier else np.unique(y, return_inverse=True)[1] * 1.0
    pairs = [[a, b] for a, b in zip(X, X[::-1], strict=True)]
    table = np.empty((len(X), 2), dtype=object)
    for i, pair in enumerate(pairs):
        table[i, 0], table[i, 1] = pair
    swapped = table[:, ::-1]
    for n_views in (1, 3):
        settings = {"probe_views": n_views, "head_init": "linear_probe", "cls": cls}
        one, other = start_of(table, y, **settings), start_of(swapped, y, **settings)
        width = one.shape[1] // 2
        np.testing.assert_allclose(
            one, np.hstack([other[:, width:], other[:, :width]]), rtol=1e-3, atol=1e-4
        )


def test_the_start_is_the_probe_of_all_views(stripes, monkeypatch):
    """Against the embeddings of corners that the extractor makes."""
    X, y = stripes
    monkeypatch.setattr(linear_probe, "_C", (0.05,))
    monkeypatch.setattr(linear_probe, "_MAX_ITER", 5000)
    same_size = {"preprocessing": {"size": 20, "crop": 20}}
    extractor = PretrainedFeatureExtractor(small().backbone, **same_size)
    x = torch.from_numpy(X).permute(0, 3, 1, 2)
    views = [x, *corners(x, 4)]
    rows = [extractor.fit_transform(list(v.permute(0, 2, 3, 1).numpy())) for v in views]
    flat = np.concatenate(rows).astype(float)
    scaler = StandardScaler().fit(flat)
    model = LogisticRegression(C=0.05, tol=1e-8, max_iter=5000)
    model.fit(scaler.transform(flat), np.tile(y, 5), sample_weight=np.full(len(flat), 1 / 5))
    got = start_of(X, y, probe_views=5, **same_size)
    np.testing.assert_allclose(got, model.coef_ / scaler.scale_, rtol=0.02, atol=5e-3)


def test_corners_of_what_a_function_prepared(stripes):
    """It gives normalised numbers rather than pixels; the corners are of those."""
    X, y = stripes
    size = {"size": 20, "crop": 20}
    usual = load_backbone(small().backbone, preprocessing=size).preprocessing

    def prepare(picture):
        pixels = (usual.resize_crop(picture) / 255 - np.array(usual.mean)) / np.array(usual.std)
        return pixels.transpose(2, 0, 1).astype(np.float32)

    expected = start_of(X, y, probe_views=3, preprocessing=size)
    got = start_of(X, y, probe_views=3, preprocessing=prepare)
    np.testing.assert_allclose(got, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())


def test_corners_come_from_the_store(stripes, decoded):
    X, y = stripes
    fit = {"unfreeze": 1, "max_epochs": 1}
    small(**fit).fit(X, y)
    n_decoded = len(decoded)
    small(**fit, lr=1e-3).fit(X[5:], y[5:])
    assert len(decoded) == n_decoded


def test_a_picture_that_vanishes_before_its_corners_are_seen(picture_files, monkeypatch):
    y = ["a", "b"] * 6
    picture = Images.picture
    seen = set()

    def vanish(self, i, min_size=None):
        if (path := self._cell(i)) == picture_files[3]:
            if path in seen and os.path.exists(path):
                os.remove(path)
            seen.add(path)
        return picture(self, i, min_size)

    monkeypatch.setattr(Images, "picture", vanish)
    model = small(unfreeze=1, on_error="skip")
    with pytest.warns(UserWarning, match="1 of 12 rows are left out"):
        model.fit(picture_files, y)
    assert np.isfinite(model.net_.module_.head.linear.weight.detach().numpy()).all()


@pytest.mark.parametrize("probe_views", [0, 6, "many", 2.5])
def test_impossible_numbers_of_views(stripes, probe_views):
    with pytest.raises(ValueError, match="The 'probe_views' parameter"):
        small(probe_views=probe_views).fit(*stripes)
