"""Each image goes through the network once, and no row is a stale one."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor, embedding_store
from sktransfer.images._images import Images, as_images


def test_each_image_is_embedded_once(pictures, labels, count_embedded):
    pipe = make_pipeline(PretrainedFeatureExtractor(), LogisticRegression())
    search = GridSearchCV(pipe, {"logisticregression__C": [0.01, 0.1, 1]}, cv=3)
    search.fit(pictures, labels)
    assert count_embedded["images"] == len(pictures)


def test_duplicates_in_one_call_are_embedded_once(pictures, count_embedded):
    rows = PretrainedFeatureExtractor(memory=False).fit_transform(pictures[[0, 1, 0, 0, 1]])
    assert count_embedded["images"] == 2
    np.testing.assert_array_equal(rows[0], rows[3])


def test_cache_layers_serves_a_grid_over_layer_with_one_pass(pictures, labels, count_embedded):
    layers = ["stage1", "stage2", "stage3", "stage4"]
    pipe = make_pipeline(
        PretrainedFeatureExtractor(cache_layers=layers), StandardScaler(), LogisticRegression()
    )
    search = GridSearchCV(pipe, {"pretrainedfeatureextractor__layer": layers}, cv=2)
    search.fit(pictures, labels)
    assert count_embedded["images"] == len(pictures)
    alone = PretrainedFeatureExtractor(layer="stage2", memory=False).fit_transform(pictures)
    kept = PretrainedFeatureExtractor(layer="stage2", cache_layers=layers).fit_transform(pictures)
    np.testing.assert_allclose(kept, alone, rtol=1e-4, atol=1e-5)


def test_disk_store_outlives_the_object(pictures, count_embedded, tmp_path):
    first = PretrainedFeatureExtractor(memory=tmp_path).fit_transform(pictures)
    second = PretrainedFeatureExtractor(memory=joblib.Memory(tmp_path)).fit_transform(pictures)
    assert count_embedded["images"] == len(pictures)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "stage2"},
        {"pooling": "max"},
        {"weights": None},
        {"preprocessing": {"size": 48, "crop": 48}},
        {"precision": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_row_is_never_a_stale_row(pictures, change):
    PretrainedFeatureExtractor().fit_transform(pictures)
    stored = PretrainedFeatureExtractor(**change).fit_transform(pictures)
    alone = PretrainedFeatureExtractor(memory=False, **change).fit_transform(pictures)
    np.testing.assert_allclose(stored, alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())


def test_own_module_with_changed_parameters_is_another_network(pictures):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    extractor = PretrainedFeatureExtractor(module, preprocessing={"size": 32, "crop": 32})
    before = extractor.fit_transform(pictures)
    with torch.no_grad():
        module[0].weight.mul_(2)
    after = extractor.fit_transform(pictures)
    assert np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_a_file_replaced_meanwhile_leaves_no_wrong_row(picture_files, tmp_path, is_on_disk):
    path, other = (Path(picture_files[i]) for i in (2, 7))
    old, new = path.read_bytes(), other.read_bytes()

    class Replacing(Images):
        """Replaces a file between the moment that it is known by its stat and its reading."""

        def read(self, i):
            if i == 2:
                path.write_bytes(new)
            return super().read(i)

    extractor = PretrainedFeatureExtractor(memory=tmp_path / "store" if is_on_disk else None)
    extractor.fit(picture_files)
    expected = clone(extractor).set_params(memory=False).fit_transform(picture_files)
    images = as_images(picture_files[:4])
    images.__class__ = Replacing
    columns = np.empty((4, expected.shape[1]), dtype=np.float32)
    assert extractor._compute(images, columns) == []
    np.testing.assert_allclose(columns, expected[[0, 1, 7, 3]], rtol=1e-4, atol=1e-4)
    path.write_bytes(old)
    for X in (picture_files, [*picture_files[:2], old]):
        rows = extractor.transform(X)
        np.testing.assert_allclose(rows, expected[: len(X)], rtol=1e-4, atol=1e-4)


def test_preprocessing_is_copied_as_it_is_at_fit(pictures):
    class Darken:
        def __init__(self, gain):
            self.gain = gain

        def __call__(self, image):
            return (image[:32, :32] / 255 * self.gain).transpose(2, 0, 1)

    preprocessing = Darken(1.0)
    extractor = PretrainedFeatureExtractor(preprocessing=preprocessing).fit(pictures)
    preprocessing.gain = 0.2
    changed = extractor.transform(pictures)
    for gain, same in ((1.0, True), (0.2, False)):
        stored, alone = (
            PretrainedFeatureExtractor(preprocessing=Darken(gain), memory=m).fit_transform(pictures)
            for m in (None, False)
        )
        np.testing.assert_allclose(stored, alone, rtol=1e-4, atol=1e-5)
        assert np.allclose(changed, alone, rtol=1e-4, atol=1e-5) == same


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_layers_that_are_computed_together_are_locked_together(
    pictures, tmp_path, is_on_disk, count_embedded
):
    """Two threads ask for one layer each while both layers are computed by whoever comes first."""
    memory = tmp_path if is_on_disk else embedding_store(max_bytes="1G")
    layers = ["stage2", "stage3"]
    start = threading.Barrier(2)

    def ask(layer):
        extractor = PretrainedFeatureExtractor(
            layer=layer, cache_layers=layers, memory=memory, batch_size=2
        ).fit(pictures)
        start.wait()
        return extractor.transform(pictures)

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(ask, layers))
    assert count_embedded["images"] == len(pictures)
    for layer, rows in zip(layers, got, strict=True):
        alone = PretrainedFeatureExtractor(layer=layer, memory=False).fit_transform(pictures)
        np.testing.assert_allclose(rows, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_halves_the_batch(pictures, monkeypatch, error):
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(pictures)
    extractor = PretrainedFeatureExtractor(memory=False, batch_size=12, n_jobs=1).fit(pictures)
    network = extractor.backbone_.inference_module(torch.device("cpu"), "float32")

    def small_memory(batch):
        if len(batch) > 4:
            raise error
        return network(batch)

    monkeypatch.setattr(type(extractor.backbone_), "inference_module", lambda *args: small_memory)
    with pytest.warns(UserWarning, match="continuing with batches of"):
        rows = extractor.transform(pictures)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)
