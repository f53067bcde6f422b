"""value_range: the numbers that are black and white."""

import io
import pickle
import re

import joblib
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from image_forms import as_images, pixels
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    PretrainedFeatureExtractor,
    embedding_store,
    load,
    save,
)

N, H, W = 6, 24, 32
WINDOW = (500.0, 1500.0)


@pytest.fixture(scope="module")
def numbers():
    """Twelve bits."""
    return np.random.default_rng(0).integers(0, 4096, (N, H, W), dtype=np.uint16)


def windowed(numbers, low=WINDOW[0], high=WINDOW[1]):
    grey = np.rint((numbers.astype(float) - low) / (high - low) * 255).clip(0, 255)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


def files(numbers, format):
    out = []
    for image in numbers:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, format)
        out.append(stream.getvalue())
    return out


def nested(numbers):
    return pa.array(numbers.tolist(), type=pa.list_(pa.list_(pa.uint16())))


FORMS = {
    "uint16": lambda s: s,
    "list": list,
    "int16": lambda s: s.astype(np.int16),
    "int32": lambda s: list(s.astype(np.int32)),
    "uint32": lambda s: s.astype(np.uint32),
    "int64": lambda s: s.astype(np.int64),
    "float32": lambda s: s.astype(np.float32),
    "float64": lambda s: s.astype(np.float64),
    "big-endian": lambda s: s.astype(">u2"),
    "channels": lambda s: np.repeat(s[..., None], 3, axis=-1),
    "tensor": lambda s: torch.from_numpy(s.astype(np.int32)),
    "tensors": lambda s: list(torch.from_numpy(s.astype(np.float32))[:, None]),
    "lists": lambda s: s.tolist(),
    "objects": lambda s: s.astype(object),
    "polars": lambda s: pl.Series(s),
    "pyarrow": lambda s: pa.table({"image": nested(s)}),
    "PNG": lambda s: files(s, "PNG"),
    "TIFF": lambda s: files(s, "TIFF"),
    "float TIFF": lambda s: files(s.astype(np.float32), "TIFF"),
    "PIL": lambda s: [Image.fromarray(image) for image in s],
    "PIL, 32 bits": lambda s: [Image.fromarray(image.astype(np.int32)) for image in s],
    "PGM": lambda s: [b"P5 %d %d 4095\n" % (W, H) + image.astype(">u2").tobytes() for image in s],
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_read_in_the_same_way(form, numbers):
    images = as_images(FORMS[form](numbers), None, WINDOW)
    for i, image in enumerate(numbers):
        np.testing.assert_array_equal(pixels(images, i), windowed(image))
    assert images.take_warnings() is None  # nothing is assumed
    view = pickle.loads(pickle.dumps(images[2:4]))
    np.testing.assert_array_equal(pixels(view, 1), windowed(numbers[3]))


@pytest.mark.parametrize("dtype", [np.uint16, np.float64, object])
def test_flat_rows(dtype, numbers):
    extractor = PretrainedFeatureExtractor(image_shape=(H, W), value_range=WINDOW, memory=False)
    rows = extractor.fit_transform(numbers.reshape(N, -1).astype(dtype))
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(windowed(numbers))
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("value_range", "dtype"),
    [
        ((-1, 1), np.float32),
        ((-1000, 400), np.int16),
        ((0, 1e-3), np.float16),
        ((-3e38, 3e38), "f4"),
    ],
)
def test_any_range(value_range, dtype):
    low, high = value_range
    ramp = np.linspace(low * 1.5, high * 1.1 if high < 1e38 else high, 256).clip(-3.4e38)
    images = as_images([ramp.reshape(16, 16).astype(dtype)], None, value_range)
    expected = ((ramp / 2 - low / 2) / (high / 2 - low / 2) * 255).clip(0, 255)
    np.testing.assert_allclose(pixels(images, 0)[..., 0].ravel(), expected, atol=1)
    assert images.take_warnings() is None


def test_eight_bits_are_windowed_too():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    jpeg = io.BytesIO()
    Image.fromarray(np.full((16, 16), 100, np.uint8)).save(jpeg, "JPEG", quality=100)
    images = as_images([grey, *files([grey], "PNG"), jpeg.getvalue()], None, [50, 150])
    for i in range(2):
        np.testing.assert_array_equal(pixels(images, i), windowed(grey, 50, 150))
    np.testing.assert_allclose(pixels(images, 2), 127, atol=4)
    images = as_images([grey], None, (0, 255))
    np.testing.assert_array_equal(pixels(images, 0)[..., 0], grey)


def test_black_and_white_and_transparency_have_no_range(numbers):
    mask = numbers[0] > 2000
    alpha = np.where(mask, 65535, 0).astype(np.uint16)
    X = [mask, Image.fromarray(mask), *files([mask], "PNG"), np.stack([numbers[0], alpha], axis=-1)]
    images = as_images(X, None, WINDOW)
    for i in range(3):
        np.testing.assert_array_equal(pixels(images, i)[..., 0], mask * 255)
    expected = np.where(mask[..., None], windowed(numbers[0]), 255)
    np.testing.assert_array_equal(pixels(images, 3), expected)


@pytest.mark.parametrize("value_range", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1), (1,), (1, 2, 3)])
def test_two_numbers_in_order(value_range, numbers):
    message = r"value_range must be None or two finite numbers \(low, high\), low < high, .*; got "
    for cls in (PretrainedFeatureExtractor, FineTuningClassifier, FineTuningRegressor):
        model = cls(value_range=value_range)
        with pytest.raises(ValueError, match=message + re.escape(repr(value_range))):
            model.fit(numbers, np.arange(N))
    with pytest.raises(ValueError, match=r"'value_range' parameter of .* must be an instance of"):
        PretrainedFeatureExtractor(value_range="0-1").fit(numbers)


@pytest.mark.parametrize("form", ["uint16", "PNG"])
def test_two_ranges_share_no_stored_row(form, numbers):
    X, store = FORMS[form](numbers), embedding_store(None)
    ranges = [WINDOW, (0, 4095), (0, 65535)]
    expected = [
        PretrainedFeatureExtractor(value_range=r, memory=False).fit_transform(X) for r in ranges
    ]
    store.clear()
    for _ in range(2):
        for r, rows in zip(ranges, expected, strict=True):
            found = PretrainedFeatureExtractor(value_range=r).fit_transform(X)
            np.testing.assert_allclose(found, rows, rtol=1e-5, atol=1e-6)
    assert len(store) == 3 * N


def test_paths_keep_one_digest_and_a_row_for_each_range(numbers, tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(N)]
    for path, data in zip(paths, files(numbers, "PNG"), strict=True):
        (tmp_path / path).write_bytes(data)
    for r in (WINDOW, (0, 4095), WINDOW):
        extractor = PretrainedFeatureExtractor(value_range=r, memory=tmp_path / "store")
        found = extractor.fit_transform(paths)
        expected = PretrainedFeatureExtractor(memory=False).fit_transform(windowed(numbers, *r))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_grid_search_on_threads_over_ranges(numbers):
    y = np.arange(12) % 2
    X = np.concatenate([numbers, numbers])
    X[y == 1, :12] //= 4
    pipe = Pipeline([("embed", PretrainedFeatureExtractor()), ("classify", LogisticRegression())])
    search = GridSearchCV(pipe, {"embed__value_range": [(0, 4095), [0, 1e9]]}, cv=2, n_jobs=2)
    with joblib.parallel_config("threading"):
        search.fit(X, y)
    assert search.best_params_["embed__value_range"] == (0, 4095)
    assert search.cv_results_["mean_test_score"][1] < search.best_score_


@pytest.mark.filterwarnings("ignore:.*did not improve")
@pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])
@pytest.mark.parametrize("unfreeze", [0, 1])
def test_fine_tuning(cls, unfreeze, numbers, tmp_path):
    y, X = np.arange(N) % 2, files(numbers, "PNG")
    settings = {"unfreeze": unfreeze, "max_epochs": 1, "random_state": 0, "memory": False}
    settings["preprocessing"] = {"size": 32, "crop": 32}
    expected = cls(**settings).fit(windowed(numbers), y, X_val=windowed(numbers[:2]), y_val=y[:2])
    model = clone(cls(value_range=WINDOW, **settings)).fit(X, y, X_val=X[:2], y_val=y[:2])
    save(model, tmp_path / "model")
    for fitted in (model, pickle.loads(pickle.dumps(model)), load(tmp_path / "model")):
        assert fitted.value_range == WINDOW
        for method in ("predict", "transform"):
            rows = getattr(fitted, method)(X)
            right = getattr(expected, method)(windowed(numbers))
            np.testing.assert_allclose(rows, right, rtol=1e-4, atol=1e-4)
    model.partial_fit(X, y)
    expected.partial_fit(windowed(numbers), y)
    np.testing.assert_allclose(
        model.predict(X), expected.predict(windowed(numbers)), rtol=1e-3, atol=1e-3
    )
