"""Rows: equal ones merged, weights, images that cannot be read, several image columns."""

import os
import pathlib
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from skorch.callbacks import Callback
from small_models import assert_same_model, quick, small

from sktransfer import FineTuningClassifier, FineTuningRegressor, PretrainedFeatureExtractor


# -- merged rows -----------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*did not improve")
@pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])
def test_weight_two_is_the_row_twice(stripes, cls):
    X, y = stripes
    y = y if cls is FineTuningClassifier else X.mean(axis=(1, 2, 3))
    weight = np.arange(len(X)) // 3 % 3
    twice = np.repeat(np.arange(len(X)), weight)[::-1]
    kwargs = {"batch_size": 8, "early_stopping": True, "lr": 0.01, "validation_fraction": 0.2}
    if cls is FineTuningClassifier:
        kwargs["class_weight"] = "balanced"
    weighted = small(cls, **kwargs).fit(X, y, sample_weight=weight)
    repeated = small(cls, **kwargs).fit(X[twice], y[twice])
    assert_same_model(weighted, repeated, rtol=1e-6)


def test_order_of_rows_does_not_matter(stripes):
    X, y = stripes
    order = np.random.default_rng(0).permutation(len(X))
    assert_same_model(small().fit(X, y), small().fit(X[order], y[order]), rtol=0, atol=0)


# -- images that cannot be read --------------------------------------------------------------
@pytest.mark.parametrize("unfreeze", [0, 1])
@pytest.mark.parametrize("head_init", ["linear_probe", "random"])
def test_bad_images(picture_files, tmp_path, unfreeze, head_init):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    X = [*picture_files[:6], str(tmp_path / "missing.png"), str(tmp_path / "broken.png")]
    y = ["a", "b", "b", "b", "a", "b", "a", "a"]
    model = small(unfreeze=unfreeze, head_init=head_init)
    message = r"2 of 8 rows[\s\S]*row 6[\s\S]*missing.png[\s\S]*on_error=.skip."
    with pytest.raises(ValueError, match=message) as caught:
        model.fit(X, y)
    assert [bad.row for bad in caught.value.bad_images] == [6, 7]
    with pytest.warns(UserWarning, match=r"2 of 8 rows are left out of training") as caught:
        model.set_params(on_error="skip").fit(X, y)
    assert sys.version_info < (3, 12) or caught[0].filename == __file__
    assert [bad.row for bad in model.bad_images_] == [6, 7]
    assert "missing.png" in model.bad_images_[0].where
    assert model.bad_images_[0].reason
    with pytest.warns(UserWarning, match=r"2 of 8 rows are left out of prediction"):
        proba = model.predict_proba(X)
    # Of them only what is known without an image is predicted.
    np.testing.assert_allclose(proba[6:], [[2 / 6, 4 / 6]] * 2, atol=1e-3)
    np.testing.assert_allclose(model.class_priors_, [2 / 6, 4 / 6], atol=1e-3)
    with pytest.warns(UserWarning, match=r"left out of prediction"):
        assert np.isnan(model.transform(X)).all(axis=1).tolist() == [False] * 6 + [True] * 2
    alone = small(unfreeze=unfreeze, head_init=head_init).fit(X[:6], y[:6])
    assert_same_model(model, alone, rtol=0)


def test_priors_of_weighted_labels(coded):
    X, k = coded
    weight = np.where(k == 1, 3.0, 1.0)
    model = quick(on_error="skip").fit(X, k, weight)
    np.testing.assert_allclose(model.class_priors_, [0.2, 0.6, 0.2], atol=1e-3)
    Y = np.stack([k == 1, np.zeros(48)], axis=1).astype(int)
    model = quick(on_error="skip").fit(X, Y, weight)
    np.testing.assert_allclose(model.class_priors_, [0.6, 0.0], atol=0.01)
    with pytest.warns(UserWarning, match="left out of prediction"):
        proba = model.predict_proba([X[0], b"no image"])
    np.testing.assert_allclose(proba[1], model.class_priors_)


def test_numbers_of_bad_images_are_the_mean(numbers):
    X, y = numbers
    model = quick(FineTuningRegressor, on_error="skip").fit(X, y)
    with pytest.warns(UserWarning, match="left out of prediction"):
        predicted = model.predict([X[0], b"no image"])
    assert predicted[1] == pytest.approx(y.mean())


def test_no_row_is_left(stripes):
    X, y = stripes
    model = small(on_error="skip")
    with (
        pytest.warns(UserWarning, match="2 of 2 rows are left out of training"),
        pytest.raises(ValueError, match=r"No row is left .*: 2 of 2 could not be read"),
    ):
        model.fit([b"no", b"image"], ["a", "b"])
    with (
        pytest.warns(UserWarning, match="2 of 2 rows are left out of validation"),
        pytest.raises(ValueError, match=r"No row is left .*: 2 of 2 could not be read"),
    ):
        model.fit(X, y, X_val=[b"no", b"image"], y_val=y[:2])


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_missing_file_without_weight_is_not_read(picture_files, tmp_path, on_error):
    paths, y = [*picture_files, str(tmp_path / "none.png")], np.arange(len(picture_files) + 1) % 2
    weight = np.ones(len(y))
    weight[-1] = 0
    model = small(max_epochs=1, on_error=on_error).fit(paths, y, sample_weight=weight)
    assert model.bad_images_ == []
    assert_same_model(model, small(max_epochs=1).fit(paths[:-1], y[:-1]), rtol=0, atol=0)


# -- images that vanish while training -------------------------------------------------------
class Remove(Callback):
    """Removes a file after the second epoch, and notes how many rows have a weight."""

    n_weighted = []  # noqa: RUF012 - the training has a copy of the callback

    def __init__(self, path):
        self.path = path

    def on_batch_end(self, net, batch=None, training=False, **kwargs):
        self.n_weighted.append(int((batch[0]["weight"] > 0).sum()))

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 2:
            os.remove(self.path)


@pytest.fixture
def keeps_nothing(monkeypatch):
    """No image is kept in memory: each is read again in each epoch."""
    monkeypatch.setattr("sktransfer.fine_tuning._inputs.MAX_KEPT_BYTES", 0)


@pytest.mark.usefixtures("keeps_nothing")
def test_images_that_are_read_in_each_epoch_train_the_same_model(stripes):
    X, y = stripes
    for unfreeze in (1, "gradual", "all"):
        read = small(unfreeze=unfreeze, lr=1e-2, memory=False).fit(X, y)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sktransfer.fine_tuning._inputs.MAX_KEPT_BYTES", 2**30)
            kept = small(unfreeze=unfreeze, lr=1e-2, memory=False).fit(X, y)
        assert_same_model(kept, read, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("keeps_nothing")
@pytest.mark.parametrize("parameters", [{}, {"augment": "light"}, {"unfreeze": "gradual"}], ids=str)
def test_an_image_that_vanishes(picture_files, parameters):
    X, y = picture_files, ["a", "b"] * 6
    data = pathlib.Path(X[3]).read_bytes()
    settings = {"memory": False, "max_epochs": 4, "callbacks": [Remove(X[3])]}
    model = small(**settings | parameters)
    with pytest.raises(ValueError, match=r"row 3.*picture_03[\s\S]*could be read at the start"):
        model.fit(X, y)
    pathlib.Path(X[3]).write_bytes(data)
    Remove.n_weighted.clear()
    with pytest.warns(UserWarning, match=r"1 of 12 rows are left out of the rest of training"):
        model.set_params(on_error="skip").fit(X, y)
    assert [bad.row for bad in model.bad_images_] == [3]
    assert Remove.n_weighted == [12, 12, 11, 11]
    assert np.isfinite(model.predict_proba(X[:3])).all()


# -- reading ---------------------------------------------------------------------------------
def test_images_are_decoded_once_for_all_epochs(stripes):
    X, y = stripes
    n_seen = []

    def prepare(image):
        n_seen.append(1)
        return np.moveaxis(image, -1, 0).astype(np.float32) / 255

    settings = {"preprocessing": prepare, "augment": "light", "head_init": "random"}
    counts = []
    for max_epochs in (1, 4):
        n_seen.clear()
        small(max_epochs=max_epochs, **settings).fit(X, y)
        counts.append(len(n_seen))
    assert counts[0] == counts[1]


class Buffer:
    """A container with a state: each image is written into the same array."""

    def __init__(self, X):
        self.X, self.array = X, np.empty_like(X[0])

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        self.array[:] = self.X[i]
        return self.array


def test_a_container_with_a_state(stripes):
    X, y = stripes
    settings = {"unfreeze": 1, "memory": False, "n_jobs": 4, "lr": 0.01}
    model = small(**settings).fit(Buffer(X), y)
    assert_same_model(model, small(**settings).fit(X, y), rtol=1e-6)
    np.testing.assert_allclose(model.predict_proba(Buffer(X)), model.predict_proba(X), rtol=1e-6)


def test_several_image_columns(stripes):
    X, y = stripes
    frame = pd.DataFrame({"front": list(X), "back": list(X[::-1])})
    for unfreeze in (0, 1):
        model = small(unfreeze=unfreeze).fit(frame, y)
        assert model.n_features_in_ == 2
        assert model.n_features_out_ == 2 * model.backbone_.n_features
        assert model.transform(frame).shape == (48, model.n_features_out_)
        assert model.get_feature_names_out()[-1].startswith("back_")
        assert model.score(frame, y) > 0.6


# -- the tuned columns -----------------------------------------------------------------------
def test_transform_of_a_frozen_network_is_the_extractors(stripes):
    X, y = stripes
    rows = PretrainedFeatureExtractor().fit_transform(X)
    model = FineTuningClassifier(unfreeze=0, max_epochs=1).fit(X, y)
    np.testing.assert_array_equal(model.transform(X), rows)


def test_predictions_share_one_pass(stripes, first_inputs):
    X, y = stripes
    model = small(unfreeze=1).fit(X, y)
    proba = model.predict_proba(X)
    n_batches = len(first_inputs)
    np.testing.assert_array_equal(model.predict_proba(X), proba)
    assert model.transform(X[:3]).shape == (3, 6)
    assert len(first_inputs) == n_batches
    model.predict(X[:, ::-1])
    assert len(first_inputs) > n_batches


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_a_network_that_gives_nan_is_an_error(stripes, method):
    X, y = stripes
    even = np.full_like(X[:3], 7)

    def prepare(image):
        scale = np.nan if np.ptp(image) == 0 else 1 / 255
        return np.moveaxis(image * np.float32(scale), -1, 0)

    model = small(preprocessing=prepare).fit(X, y)
    for on_error in ("raise", "skip"):
        model.set_params(on_error=on_error)
        with pytest.raises(ValueError, match=r"NaN or infinity for 3 of 8 rows, .* row 5"):
            getattr(model, method)([*X[:5], *even])
    with pytest.raises(ValueError, match=r"NaN or infinity for 3 of 51 rows.* row 48[.]"):
        clone(model).fit([*X, *even], [*y, *y[:3]])
