"""PretrainedFeatureExtractor: what it returns, and how it stands in scikit-learn."""

import copy
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from PIL import Image
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.ensemble import RandomForestClassifier, StackingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor, embedding_store
from sktransfer.images._images import Images


@pytest.fixture(scope="module")
def labels():
    return np.arange(12) % 2


def naive_rows(pictures):
    """Resize with PIL, normalise, run the stages before the head one picture at a time."""
    from sktransfer import load_backbone

    backbone = load_backbone("builtin")
    p = backbone.preprocessing
    rows = []
    for picture in pictures:
        resized = p.resize_crop(np.ascontiguousarray(picture))
        x = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None] / 255.0
        x = (x - torch.tensor(p.mean)[:, None, None]) / torch.tensor(p.std)[:, None, None]
        with torch.no_grad():
            for stage in backbone.stages[:-1]:
                x = stage.module.eval()(x)
        rows.append(x.flatten().numpy())
    return np.stack(rows)


def test_equals_naive_reference(pictures):
    rows = PretrainedFeatureExtractor().fit_transform(pictures)
    assert rows.dtype == np.float32
    expected = naive_rows(pictures)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_fit_decodes_nothing_and_knows_the_width():
    extractor = PretrainedFeatureExtractor().fit(["does-not-exist.jpg"])
    assert extractor.n_features_out_ == len(extractor.get_feature_names_out())
    assert extractor.n_features_in_ == 1


@pytest.mark.parametrize("batch_size", [1, 5, 64, "auto"])
@pytest.mark.parametrize("n_jobs", [None, 1, 3])
@pytest.mark.parametrize("memory", [None, False])
def test_rows_depend_on_their_picture_alone(pictures, batch_size, n_jobs, memory):
    expected = PretrainedFeatureExtractor(memory=False, batch_size=1).fit_transform(pictures)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 2))
    extractor = PretrainedFeatureExtractor(batch_size=batch_size, n_jobs=n_jobs, memory=memory)
    rows = extractor.fit_transform(pictures[order])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(rows, expected[order], rtol=1e-4, atol=1e-5 * scale)
    again = extractor.transform(pictures[order][::-1])[::-1]
    np.testing.assert_allclose(again, rows, rtol=1e-4, atol=1e-5 * scale)


def test_precision_computes_differently_and_returns_float32(pictures):
    full = PretrainedFeatureExtractor().fit_transform(pictures)
    half = PretrainedFeatureExtractor(precision="bfloat16").fit_transform(pictures)
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.1 * np.abs(full).max()


# -- the network runs once ------------------------------------------------------------------
@pytest.fixture
def count_embedded(monkeypatch):
    """How many images went through a network."""
    from sktransfer.embedding import _batches as _inference

    counts = {"images": 0}
    forward = _inference._BatchLimit.forward

    def counting(self, network, batch, device=None):
        counts["images"] += len(batch)
        return forward(self, network, batch, device)

    monkeypatch.setattr(_inference._BatchLimit, "forward", counting)
    return counts


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
def test_a_file_replaced_meanwhile_leaves_no_wrong_row(
    picture_files, tmp_path, monkeypatch, is_on_disk
):
    path, other = (Path(picture_files[i]) for i in (2, 7))
    old, new = path.read_bytes(), other.read_bytes()
    extractor = PretrainedFeatureExtractor(memory=tmp_path / "store" if is_on_disk else None)
    expected = clone(extractor).set_params(memory=False).fit_transform(picture_files)
    read = Images.picture

    def replace_and_read(self, i, min_size=None):
        if i == 2:
            path.write_bytes(new)
        return read(self, i, min_size)

    with monkeypatch.context() as context:
        context.setattr(Images, "picture", replace_and_read)
        extractor.fit_transform(picture_files[:4])
    path.write_bytes(old)
    for X in (picture_files, [*picture_files[:2], old]):
        rows = extractor.transform(X)
        np.testing.assert_allclose(rows, expected[: len(X)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_file_that_changes_meanwhile_leaves_its_twin_alone(
    picture_files, tmp_path, monkeypatch, is_deleted
):
    path, twin = Path(picture_files[2]), tmp_path / "twin"
    twin.write_bytes(path.read_bytes())
    X = [*picture_files[:4], str(twin), str(twin)]
    done = []
    extractor = PretrainedFeatureExtractor(memory=False, on_error="nan")
    expected = extractor.fit_transform(X)
    read = Images.picture

    def change_and_read(self, i, min_size=None):
        if i == 2:
            path.unlink() if is_deleted else path.write_bytes(Path(X[0]).read_bytes())
        done.append(i)
        return read(self, i, min_size)

    monkeypatch.setattr(Images, "picture", change_and_read)
    rows = extractor.transform(X)
    assert [bad.row for bad in extractor.bad_images_] == ([2] if is_deleted else [])
    assert not np.allclose(rows[2], expected[2], rtol=1e-3, atol=1e-3)
    assert sorted(done) == [0, 1, 2, 3, 4, 5]
    kept = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(rows[kept], expected[kept], rtol=1e-4, atol=1e-4)


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
def test_layers_that_are_computed_together_are_claimed_together(
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


def test_no_rows_are_no_rows(pictures):
    frame = pd.DataFrame({"front": list(pictures[:2]), "back": list(pictures[2:4])})
    extractor = PretrainedFeatureExtractor().fit(frame)
    extractor.bad_images_ = ["of the call before"]
    assert extractor.transform(frame[:0]).shape == (0, extractor.n_features_out_)
    assert extractor.bad_images_ == []
    with pytest.raises(ValueError, match="feature names"):
        extractor.transform(frame[:0].rename(columns=str.upper))
    with pytest.raises(ValueError, match="minimum of 1"):
        extractor.transform([])
    assert list(extractor.set_output(transform="pandas").transform(frame[:0]).columns) == list(
        extractor.get_feature_names_out()
    )


def test_out_of_memory_halves_the_batch_and_goes_on(pictures, monkeypatch):
    from sktransfer.embedding import _batches as _inference

    expected = PretrainedFeatureExtractor(memory=False).fit_transform(pictures)
    extractor = PretrainedFeatureExtractor(memory=False, batch_size=12, n_jobs=1).fit(pictures)
    network = extractor.backbone_.inference_module(torch.device("cpu"), "float32")

    def small_memory(batch):
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")
        return network(batch)

    monkeypatch.setattr(type(extractor.backbone_), "inference_module", lambda *args: small_memory)
    with pytest.warns(UserWarning, match="going on with batches of"):
        rows = extractor.transform(pictures)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)
    assert _inference._is_out_of_memory(RuntimeError("[enforce fail] can't allocate memory"))


# -- bad images ------------------------------------------------------------------------------
@pytest.fixture
def with_bad_rows(picture_files, tmp_path):
    truncated = tmp_path / "truncated.png"
    with open(picture_files[0], "rb") as whole:
        truncated.write_bytes(whole.read()[:60])
    return [*picture_files[:2], str(tmp_path / "missing.png"), picture_files[2], str(truncated)]


def test_raise_reports_all_bad_rows_and_keeps_the_good(with_bad_rows, count_embedded):
    extractor = PretrainedFeatureExtractor()
    with pytest.raises(ValueError, match=r"2 of 5 images could not be read") as caught:
        extractor.fit_transform(with_bad_rows)
    message = str(caught.value)
    assert "row 2" in message
    assert "missing.png" in message
    assert "row 4" in message
    assert "truncated.png" in message
    assert 'on_error="nan"' in message
    assert [bad.row for bad in extractor.bad_images_] == [2, 4]
    assert count_embedded["images"] == 3
    good = [with_bad_rows[i] for i in (0, 1, 3)]
    extractor.transform(good)
    assert count_embedded["images"] == 3
    assert extractor.bad_images_ == []


def test_many_bad_rows_are_counted(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(30)]
    with pytest.raises(ValueError, match=r"30 of 30 images[\s\S]*and 20 more"):
        PretrainedFeatureExtractor().fit_transform(paths)


@pytest.mark.parametrize(("on_error", "value"), [("nan", np.nan), ("zero", 0.0)])
def test_bad_rows_become_a_value(with_bad_rows, on_error, value):
    extractor = PretrainedFeatureExtractor(on_error=on_error)
    rows = extractor.fit_transform(with_bad_rows)
    np.testing.assert_array_equal(rows[[2, 4]], value)
    assert np.isfinite(rows[[0, 1, 3]]).all()
    assert [bad.row for bad in extractor.bad_images_] == [2, 4]


def test_nan_rows_are_imputed_in_a_pipeline(with_bad_rows):
    pipe = make_pipeline(PretrainedFeatureExtractor(on_error="nan"), SimpleImputer())
    assert np.isfinite(pipe.fit_transform(with_bad_rows)).all()


def test_bad_rows_of_several_columns_name_the_column(picture_files):
    frame = pd.DataFrame({"front": picture_files[:3], "back": [picture_files[3], None, ""]})
    with pytest.raises(ValueError, match=r"row 1, column 'back'[\s\S]*row 2, column 'back'"):
        PretrainedFeatureExtractor().fit_transform(frame)


def test_float_range_assumption_is_one_warning(pictures):
    with pytest.warns(UserWarning, match="outside 0…1") as caught:
        rows = PretrainedFeatureExtractor().fit_transform(pictures.astype(float))
    assert len(caught) == 1
    np.testing.assert_array_equal(rows, PretrainedFeatureExtractor().fit_transform(pictures))


# -- scikit-learn ----------------------------------------------------------------------------
def test_flat_rows_without_image_shape_are_an_error(pictures):
    with pytest.raises(ValueError, match="image_shape"):
        PretrainedFeatureExtractor().fit(pictures.reshape(12, -1))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"backbone": 3}, "The 'backbone' parameter of PretrainedFeatureExtractor must be"),
        ({"pooling": "mean"}, "The 'pooling' parameter"),
        ({"batch_size": 0}, "The 'batch_size' parameter"),
        ({"on_error": "ignore"}, "The 'on_error' parameter"),
        ({"precision": "int8"}, "The 'precision' parameter"),
    ],
)
def test_parameter_errors_are_in_scikit_learns_words(pictures, parameters, message):
    with pytest.raises(ValueError, match=message):
        PretrainedFeatureExtractor(**parameters).fit(pictures)


def test_column_count_is_checked(picture_files):
    one = PretrainedFeatureExtractor().fit(picture_files)
    with pytest.raises(ValueError, match="2 image column"):
        one.transform(np.array([picture_files[:2]], dtype=object))


def test_feature_names(picture_files):
    frame = pd.DataFrame({"front": picture_files[:2], "back": picture_files[2:4]})
    extractor = PretrainedFeatureExtractor(layer=["stage1", "stage2"]).fit(frame)
    names = extractor.get_feature_names_out()
    assert len(names) == extractor.n_features_out_ == len(set(names))
    assert names[0] == "front_builtin_stage1_000"
    assert names[-1].startswith("back_builtin_stage2_")
    assert PretrainedFeatureExtractor().fit(picture_files).get_feature_names_out()[7] == (
        "builtin_0007"
    )


@pytest.mark.parametrize("container", ["pandas", "polars"])
def test_set_output(picture_files, container):
    frame_of = pd.DataFrame if container == "pandas" else pl.DataFrame
    frame = frame_of({"photo": picture_files})
    extractor = PretrainedFeatureExtractor().set_output(transform=container)
    out = extractor.fit_transform(frame)
    assert isinstance(out, frame_of)
    assert out.columns[7] == "photo_builtin_0007"
    np.testing.assert_array_equal(
        out.to_numpy(), PretrainedFeatureExtractor().fit_transform(picture_files)
    )


@pytest.mark.parametrize("selector", ["path", ["path"]])
def test_column_transformer(picture_files, selector):
    frame = pd.DataFrame({"path": picture_files, "size": np.arange(12.0)}).iloc[::-1]
    columns = ColumnTransformer(
        [("image", PretrainedFeatureExtractor(), selector), ("rest", "passthrough", ["size"])]
    ).set_output(transform="pandas")
    out = columns.fit_transform(frame)
    assert list(out.index) == list(frame.index)
    assert out.columns[0] == "image__path_builtin_0000"
    assert not out.isna().any().any()
    expected = PretrainedFeatureExtractor().fit_transform(list(frame["path"]))
    np.testing.assert_array_equal(out.iloc[:, :-1].to_numpy(), expected)


def test_feature_union(pictures):
    union = FeatureUnion(
        [
            ("low", PretrainedFeatureExtractor(layer="stage1")),
            ("high", PretrainedFeatureExtractor()),
        ]
    )
    low, high = (t.fit(pictures).n_features_out_ for _, t in union.transformer_list)
    assert union.fit_transform(pictures).shape == (12, low + high)


def test_grid_over_backbone_layer_and_pooling(pictures, labels):
    pipe = make_pipeline(PretrainedFeatureExtractor(), StandardScaler(), LogisticRegression())
    grid = [
        {"pretrainedfeatureextractor__layer": ["stage2", None, ["stage1", "stage4"]]},
        {"pretrainedfeatureextractor__pooling": ["avg", "max"]},
        {
            "pretrainedfeatureextractor__backbone": ["squeezenet1_1"],
            "pretrainedfeatureextractor__weights": [None],
            "pretrainedfeatureextractor__preprocessing": [{"size": 32, "crop": 32}],
        },
    ]
    search = GridSearchCV(pipe, grid, cv=2, error_score="raise").fit(pictures, labels)
    assert len(search.cv_results_["params"]) == 6


def test_search_in_two_processes(pictures, labels, tmp_path):
    pipe = make_pipeline(PretrainedFeatureExtractor(memory=tmp_path), LogisticRegression())
    scores = []
    for n_jobs in (1, 2):
        search = GridSearchCV(
            pipe, {"logisticregression__C": [0.1, 1]}, cv=2, n_jobs=n_jobs, error_score="raise"
        )
        scores.append(search.fit(pictures, labels).cv_results_["mean_test_score"])
    np.testing.assert_array_equal(scores[0], scores[1])


def test_halving_search(pictures, labels):
    pipe = make_pipeline(PretrainedFeatureExtractor(), LogisticRegression())
    many = np.concatenate([pictures] * 4)
    search = HalvingGridSearchCV(
        pipe, {"logisticregression__C": [0.01, 0.1, 1, 10]}, cv=2, random_state=0
    )
    assert search.fit(many, np.tile(labels, 4)).predict(pictures).shape == (12,)


def test_stacking_calibration_and_frozen(picture_files, labels):
    frame = pd.DataFrame({"path": picture_files, "size": np.arange(12.0)})
    images = make_pipeline(
        make_column_transformer((PretrainedFeatureExtractor(), ["path"])), LogisticRegression()
    )
    numbers = make_pipeline(
        make_column_transformer(("passthrough", ["size"])), RandomForestClassifier(5)
    )
    stack = StackingClassifier([("images", images), ("numbers", numbers)], cv=2)
    assert stack.fit(frame, labels).predict(frame).shape == (12,)
    calibrated = CalibratedClassifierCV(images, cv=2).fit(frame, labels)
    np.testing.assert_allclose(calibrated.predict_proba(frame).sum(axis=1), 1)
    frozen = FrozenEstimator(PretrainedFeatureExtractor().fit(picture_files))
    pipe = make_pipeline(frozen, LogisticRegression()).fit(picture_files, labels)
    assert pipe.predict(picture_files).shape == (12,)


def test_set_params_acts(pictures):
    extractor = PretrainedFeatureExtractor()
    before = extractor.fit_transform(pictures)
    after = extractor.set_params(layer="stage1").fit_transform(pictures)
    assert before.shape[1] != after.shape[1]


def test_parameters_are_never_written_to(pictures):
    layers, override = ["stage1", "stage2"], {"size": 32, "crop": 32}
    extractor = PretrainedFeatureExtractor(layer=layers, preprocessing=override)
    before = copy.deepcopy(extractor.get_params())
    extractor.fit_transform(pictures)
    assert extractor.get_params() == before
    assert extractor.layer is layers


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e)), lambda e: joblib_round_trip(e)],
    ids=["deepcopy", "pickle", "joblib"],
)
def test_copies_give_the_same_rows(pictures, again):
    extractor = PretrainedFeatureExtractor(memory=False).fit(pictures)
    np.testing.assert_array_equal(
        again(extractor).transform(pictures), extractor.transform(pictures)
    )


def joblib_round_trip(estimator):
    import io

    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


def test_pickle_holds_no_weights_and_loads_in_a_fresh_process(pictures, tmp_path):
    extractor = PretrainedFeatureExtractor(memory=False).fit(pictures)
    pickled = pickle.dumps(extractor)
    assert len(pickled) < 20_000
    (tmp_path / "extractor.pkl").write_bytes(pickled)
    np.save(tmp_path / "pictures.npy", pictures)
    code = (
        "import os, pickle, sys, numpy as np; folder = sys.argv[1]\n"
        "extractor = pickle.load(open(os.path.join(folder, 'extractor.pkl'), 'rb'))\n"
        "pictures = np.load(os.path.join(folder, 'pictures.npy'))\n"
        "np.save(os.path.join(folder, 'rows.npy'), extractor.transform(pictures))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "rows.npy"), extractor.transform(pictures), rtol=1e-4, atol=1e-5
    )


def test_frozen_means_bit_identical(pictures, labels):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.5),
    ).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    extractor = PretrainedFeatureExtractor(module, preprocessing={"size": 32, "crop": 32})
    first = extractor.fit_transform(pictures)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    again = clone(extractor, safe=False).set_params(memory=False).fit(pictures).transform(pictures)
    np.testing.assert_allclose(again, first, rtol=1e-5, atol=1e-6)


def test_html_representation_links_to_the_documentation():
    assert "sktransfer.readthedocs.io" in PretrainedFeatureExtractor()._repr_html_()


def test_verbose_shows_a_bar(pictures, capsys):
    PretrainedFeatureExtractor(verbose=1).fit_transform(pictures)
    assert "12/12" in capsys.readouterr().err


def test_scikit_learns_progress_bar(pictures):
    callback = pytest.importorskip("sklearn.callback")
    pytest.importorskip("rich")

    class Recorder:
        def __init__(self):
            self.events = []

        def setup(self, estimator, context):
            self.events.append("setup")

        def on_fit_task_begin(self, estimator, context):
            self.events.append("begin")

        def on_fit_task_end(self, estimator, context):
            self.events.append("end")

        def teardown(self, estimator, context):
            self.events.append("teardown")

    recorder = Recorder()
    extractor = PretrainedFeatureExtractor().set_callbacks(recorder)
    extractor.fit_transform(pictures)
    assert recorder.events.count("begin") == recorder.events.count("end") == 13
    extractor.set_callbacks(callback.ProgressBar()).fit_transform(pictures)


def test_pixels_lose_to_features_on_disjoint_quarters():
    """Transfer helps: features tell photographs apart where pixels do not."""
    skimage_data = pytest.importorskip("skimage.data")
    names = ["brick", "camera", "cat", "coffee", "coins", "grass", "gravel", "rocket"]
    crops, y, quarter = [], [], []
    rng = np.random.default_rng(0)
    for label, name in enumerate(names):
        grey = np.asarray(Image.fromarray(getattr(skimage_data, name)()).convert("L"))
        height, width = grey.shape[0] // 2, grey.shape[1] // 2
        for q in range(4):
            for _ in range(4):
                top = (q // 2) * height + rng.integers(height - 80)
                left = (q % 2) * width + rng.integers(width - 80)
                crops.append(grey[top : top + 80, left : left + 80])
                y.append(label)
                quarter.append(q)
    X = np.stack(crops)
    folds = [
        (np.flatnonzero(np.array(quarter) != q), np.flatnonzero(np.array(quarter) == q))
        for q in range(4)
    ]
    scores = {}
    for name, parameters in {"trained": {}, "random": {"weights": None}}.items():
        model = make_pipeline(
            PretrainedFeatureExtractor(**parameters),
            StandardScaler(),
            LogisticRegression(C=0.01, max_iter=500),
        )
        scores[name] = cross_val_score(model, X, y, cv=folds).mean()
    assert scores["trained"] > scores["random"] + 0.05


def test_a_bad_picture_does_not_mark_its_row_in_other_columns(picture_files, tmp_path):
    missing = str(tmp_path / "missing.png")
    frame = pd.DataFrame(
        {"a": [missing, picture_files[0]], "b": [picture_files[1], picture_files[1]]}
    )
    extractor = PretrainedFeatureExtractor(on_error="nan")
    rows = extractor.fit_transform(frame)
    assert [bad.where for bad in extractor.bad_images_] == [f"row 0, column 'a' ({missing!r})"]
    width = rows.shape[1] // 2
    assert np.isfinite(rows[:, width:]).all()


def test_image_shape_leaves_other_forms_alone(pictures, picture_files):
    flat = PretrainedFeatureExtractor(image_shape=(40, 48, 3))
    expected = flat.fit_transform(pictures.reshape(12, -1))
    for X in [picture_files, [[path] for path in picture_files], pictures, list(pictures)]:
        np.testing.assert_array_equal(flat.fit_transform(X), expected)


def test_metadata_routing_passes_by(pictures, labels):
    with config_context(enable_metadata_routing=True):
        classifier = LogisticRegression().set_fit_request(sample_weight=True)
        pipe = make_pipeline(PretrainedFeatureExtractor(), classifier)
        pipe.fit(pictures, labels, sample_weight=np.ones(12))
        assert pipe.predict(pictures).shape == (12,)


def test_zero_leaves_good_rows_alone(pictures):
    X = [pictures[0] * 0 + 255, None, pictures[1]]
    rows = PretrainedFeatureExtractor(on_error="zero", memory=False).fit_transform(X)
    alone = PretrainedFeatureExtractor(memory=False).fit_transform([X[0], X[2]])
    np.testing.assert_allclose(rows[[0, 2]], alone, rtol=1e-5, atol=1e-6)
    assert not rows[1].any()


def test_set_params_after_fit_changes_nothing_fitted(pictures):
    extractor = PretrainedFeatureExtractor(layer="stage1", memory=False).fit(pictures)
    expected = extractor.transform(pictures)
    extractor.set_params(layer=["stage1", "stage2"])
    np.testing.assert_array_equal(extractor.transform(pictures), expected)
    assert len(extractor.get_feature_names_out()) == expected.shape[1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"device": "gpu"}, "device='gpu' is no torch device"),
        ({"device": "cuda:99"}, r"device='cuda:99', but torch finds \d+ devices of that kind"),
        ({"device": "meta"}, "device='meta', but torch finds 0 devices of that kind"),
        ({"n_jobs": 0}, "The 'n_jobs' parameter"),
        ({"memory": True}, "The 'memory' parameter"),
        ({"memory": "s3://bucket"}, "memory must be a local folder"),
    ],
)
def test_what_cannot_be_is_told_by_fit(pictures, parameters, message):
    with pytest.raises(ValueError, match=message):
        PretrainedFeatureExtractor(**parameters).fit(pictures)


def test_bad_images_are_progress_too(tmp_path):
    pytest.importorskip("sklearn.callback")
    paths = [str(tmp_path / f"{i}.png") for i in range(120)]
    PretrainedFeatureExtractor(on_error="zero", n_jobs=4, verbose=1).fit_transform(paths)
