"""save and load: the same predictions, small files, and nothing in a file is run."""

import datetime
import errno
import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    PretrainedFeatureExtractor,
    load,
    save,
)

pytestmark = pytest.mark.usefixtures("one_thread")


LABELS = np.array(["a", "b", "c"] * 4)
ESTIMATORS = {
    "head": FineTuningClassifier(unfreeze=0, max_epochs=1),
    "stage": FineTuningClassifier(unfreeze=1, max_epochs=1, head=(4,), optimizer="sgd"),
    "two columns": FineTuningClassifier(unfreeze=1, max_epochs=1, class_weight={"a": 2.0}),
    "labels": FineTuningClassifier(unfreeze={1: 0}, max_epochs=1),
    "numbers": FineTuningRegressor(unfreeze=0, max_epochs=1, preprocessing={"size": (48, 48)}),
    "extractor": PretrainedFeatureExtractor(layer=["stage1", None]),
}


def fitted(name, pictures, **parameters):
    X, y = pictures, LABELS
    if name == "two columns":
        import pandas as pd

        X = pd.DataFrame({"front": list(pictures), "back": list(pictures[::-1])})
    if name == "labels":
        y = np.stack([LABELS == "a", LABELS != "b"], axis=1).astype(int)
    if name == "numbers":
        y = np.arange(24.0).reshape(12, 2)
    model = clone(ESTIMATORS[name]).set_params(memory=False, **parameters)
    return model.fit(X, y), X


def shrunk(image):
    return np.moveaxis(image[:32, :32] / 255, 2, 0)


def outputs(model, X):
    return model.predict(X) if hasattr(model, "predict") else model.transform(X)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("standalone", [False, True])
def test_round_trip(name, standalone, pictures, tmp_path):
    model, X = fitted(name, pictures)
    save(model, tmp_path / "model.safetensors", standalone=standalone)
    loaded = load(tmp_path / "model.safetensors")
    assert type(loaded) is type(model)
    if name == "labels":
        np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X), rtol=1e-5)
    elif name in ("numbers", "extractor"):
        np.testing.assert_allclose(outputs(loaded, X), outputs(model, X), rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(outputs(loaded, X), outputs(model, X))
        np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X), rtol=1e-4)
    ours, theirs = model.get_params(), loaded.get_params()
    same = {key for key in ours if ours[key] == theirs[key]}
    assert set(ours) - same <= {"memory"}
    assert list(loaded.get_feature_names_out()) == list(model.get_feature_names_out())
    again = pickle.loads(pickle.dumps(loaded))
    if name == "numbers":
        np.testing.assert_allclose(outputs(again, X), outputs(model, X), rtol=1e-4)
    if name == "stage":
        loaded.partial_fit(X, LABELS)
        assert loaded.n_iter_ == 2


def test_file_is_as_small_as_what_was_trained(pictures, tmp_path):
    model, _ = fitted("head", pictures)
    save(model, tmp_path / "head")
    assert (tmp_path / "head").stat().st_size < 3 * 1408 * 4 + 10_000
    save(model, tmp_path / "whole", standalone=True)
    assert (tmp_path / "whole").stat().st_size > 5_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head", "whole"]


def test_a_standalone_file_is_saved_standalone_again(pictures, tmp_path):
    model, X = fitted("stage", pictures)
    save(model, tmp_path / "first", standalone=True)
    save(load(tmp_path / "first"), tmp_path / "second")
    again = load(tmp_path / "second")
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    again.set_params(memory=False).fit(X, model.predict(X))


@pytest.mark.parametrize(
    "changed", [{"head": (8,)}, {"layer": "stage2"}, {"weights": None}], ids=str
)
def test_what_could_not_be_loaded_is_not_saved(changed, pictures, tmp_path):
    model, _ = fitted("head", pictures)
    with pytest.raises(ValueError, match=r"it is not saved[\s\S]*changed after fit"):
        save(model.set_params(**changed), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["head", "extractor"])
@pytest.mark.parametrize("changed", [{"layer": "stage1.0.bn2"}, {"pooling": "max"}], ids=str)
def test_what_would_embed_differently_is_not_saved(name, changed, pictures, tmp_path):
    model, _ = fitted(name, pictures, layer="stage1")  # 48 columns, as the changed ones have
    with pytest.raises(ValueError, match=r"it is not saved[\s\S]*changed after fit"):
        save(model.set_params(**changed), tmp_path / "model", standalone=True)
    assert not list(tmp_path.iterdir())


def test_a_standalone_file_holds_the_fitted_preprocessing(pictures, tmp_path):
    model, X = fitted("extractor", pictures, preprocessing={"size": 32})
    path = tmp_path / "model"
    save(model.set_params(preprocessing="auto"), path, standalone=True)
    np.testing.assert_allclose(load(path).transform(X), model.transform(X), rtol=1e-4, atol=1e-5)
    model, _ = fitted("extractor", pictures, preprocessing=shrunk)
    with pytest.raises(ValueError, match=r"it is not saved[\s\S]*changed after fit"):
        save(model.set_params(preprocessing="auto"), path, standalone=True)


def test_other_estimators_are_refused(tmp_path):
    for other in (LogisticRegression(), make_pipeline(LogisticRegression()), "model", None):
        with pytest.raises(TypeError, match=r"save writes .* and pipelines and searches that hold"):
            save(other, tmp_path / "model")
    for unfitted in (FineTuningClassifier(), make_pipeline(PretrainedFeatureExtractor())):
        with pytest.raises(ValueError, match="not fitted"):
            save(unfitted, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dtype", ["U3", "O", "bool", "int8", "float32", "datetime64[ns]", "datetime64[D]", "m8[h]"]
)
def test_labels_come_back_of_their_type(dtype, pictures, tmp_path):
    labels = np.arange(12) % 2
    y = (labels + 20_000).astype(dtype) if dtype[0] in "dm" else labels.astype(dtype)
    y = np.array([f"{x}" for x in labels], dtype=object) if dtype == "O" else y
    model = FineTuningClassifier(unfreeze=0, max_epochs=0, layer="stage1", memory=False)
    save(model.fit(pictures, y), tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.classes_.dtype == y.dtype
    np.testing.assert_array_equal(loaded.classes_, model.classes_)


def test_labels_that_are_other_objects_are_refused(pictures, tmp_path):
    dates = np.array([datetime.date(2020, 1, day % 2 + 1) for day in range(12)], dtype=object)
    model = FineTuningClassifier(unfreeze=0, max_epochs=0, layer="stage1", memory=False)
    with pytest.raises(TypeError, match=r"classes_ is .* use pickle"):
        save(model.fit(pictures, dates), tmp_path / "model")
    assert not list(tmp_path.iterdir())


# -- files ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small():
    X = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return PretrainedFeatureExtractor(layer="stage1", memory=False).fit(X)


def test_threads_may_save_to_one_path(small, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: save(small, tmp_path / "model"), range(16)))
    assert load(tmp_path / "model").n_features_out_ == small.n_features_out_
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_file_alone(small, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(small, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_a_full_disk(small, tmp_path):
    resource = pytest.importorskip("resource")  # a limit on the size of files acts like one
    path = tmp_path / "model"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*model'") as caught:
            save(small, path, standalone=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_only_files_are_replaced(small, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"Invalid argument: '.*pipe'"):
        save(small, tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_files_have_the_permissions_that_open_gives(small, tmp_path):
    (tmp_path / "opened").write_bytes(b"")
    path = tmp_path / "model"
    save(small, path)
    assert path.stat().st_mode == (tmp_path / "opened").stat().st_mode
    path.chmod(0o640)
    save(small, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_symbolic_links_are_followed(small, tmp_path):
    (tmp_path / "inner").mkdir()
    link, path = tmp_path / "link", tmp_path / "inner" / "model"
    link.symlink_to(Path("inner") / "model")
    for _ in range(2):  # at first it leads to nothing
        save(small, link)
        assert link.is_symlink()
        assert load(path).n_features_out_ == small.n_features_out_


def test_errors_name_paths_that_cannot_be_opened(small, tmp_path, monkeypatch):
    missing = tmp_path / "missing" / "model"
    (tmp_path / "file").touch()
    for error, path in (
        (FileNotFoundError, missing),
        (NotADirectoryError, tmp_path / "file" / "model"),
        (IsADirectoryError, tmp_path),
    ):
        for call in (lambda path: save(small, path), load):
            with pytest.raises(error) as caught:
                call(path)
            assert caught.value.filename == str(path)
    refusal = PermissionError(errno.EACCES, "Permission denied", "elsewhere")
    monkeypatch.setattr("tempfile.mkdtemp", Mock(side_effect=refusal))
    with pytest.raises(PermissionError, match=r"Permission denied: '.*model'"):
        save(small, tmp_path / "model")
    for nothing in (None, 3):
        with pytest.raises(TypeError):
            load(nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("standalone", [False, True])
def test_layers_kept_for_the_store_survive(tmp_path, standalone):
    X = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    extractor = PretrainedFeatureExtractor(layer="stage2", cache_layers=["stage3"]).fit(X)
    save(extractor, tmp_path / "extractor.sktransfer", standalone=standalone)
    again = load(tmp_path / "extractor.sktransfer")
    np.testing.assert_array_equal(again.transform(X), extractor.transform(X))
